"""The comparison with peers, once in a tiny form: that it runs, and that its figures are of what it says.

torchvision and timm are not in the tests' environment, so vitft stands there alone.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent
PEERS = CLONE / "benchmarks" / "peers.py"
pytestmark = pytest.mark.skipif(not PEERS.is_file(), reason="not a clone: no benchmarks/ beside tests/")


PHOTOS = ("data", "--photos", "6", "--image-size", "32", "--rounds", "2", "--only", "vitft")
STEPS = ("train", "--model", "vit-micro", "--image-size", "28", "--images", "40", "--batch-size", "8", "--steps", "2",
         "--rounds", "1", "--only", "vitft --precision fp32")  # fmt: skip
IN_TURN = """
import json, runpy, sys
script, commands = sys.argv[1:]
for words in json.loads(commands):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
    print("next")
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a table that is to be replaced."""
    page = tmp_path_factory.mktemp("peers") / "page.md"
    page.write_text("before\n<!-- peers photos -->\nold\n<!-- end -->\nafter\n")
    return page


@pytest.fixture(scope="module")
def compared(page: Path) -> list[str]:
    """What the two comparisons say, in one process: it imports for seconds."""
    commands = [[*PHOTOS, "--into", str(page), "--name", "photos"], STEPS]
    words = [sys.executable, "-c", IN_TURN, str(PEERS), json.dumps(commands)]
    paths = os.pathsep.join([str(PEERS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return done.stdout.split("next\n")[:-1]


def test_the_input_paths_are_compared_on_photos_made_for_it(compared: list[str], page: Path) -> None:
    said, _ = compared
    assert re.search(r"^\| resize \| vitft \| [\d,]+ \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| 1.00 \| 1.00 \|$", said, re.M)
    assert "| random crop and flip | vitft |" in said
    assert "`python benchmarks/peers.py data --photos 6 --image-size 32 --rounds 2 --only vitft`" in said
    text = page.read_text()
    assert text.startswith("before\n<!-- peers photos -->\n`python")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text


def test_the_steps_are_compared_with_the_peak_of_their_precision(compared: list[str]) -> None:
    _, said = compared
    row = re.search(r"^\| vitft --precision fp32 \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| 1.00 \| (\d+) % \|$", said, re.M)
    assert row is not None, said
    assert 0 <= int(row[1]) <= 110
