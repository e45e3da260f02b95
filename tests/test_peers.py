"""The comparison with peers, once in a tiny form: that it runs, and that its figures are of what it says.

torchvision and timm are not in the tests' environment, so vitft stands there alone.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent
PEERS = CLONE / "benchmarks" / "peers.py"
pytestmark = pytest.mark.skipif(not PEERS.is_file(), reason="not a clone: no benchmarks/ beside tests/")


def compared(*words: str) -> str:
    done = subprocess.run([sys.executable, str(PEERS), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_input_paths_are_compared_on_photos_made_for_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers photos -->\nold\n<!-- end -->\nafter\n")
    small = ["--photos", "6", "--image-size", "32", "--rounds", "2", "--only", "vitft"]
    said = compared("data", *small, "--into", str(page), "--name", "photos")
    assert re.search(r"^\| resize \| vitft \| [\d,]+ \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| 1.00 \| 1.00 \|$", said, re.M)
    assert "| random crop and flip | vitft |" in said
    assert "`python benchmarks/peers.py data --photos 6 --image-size 32 --rounds 2 --only vitft`" in said
    text = page.read_text()
    assert text.startswith("before\n<!-- peers photos -->\n`python")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text


def test_the_steps_are_compared_with_the_peak_of_their_precision() -> None:
    small = ["--model", "vit-micro", "--image-size", "28", "--images", "40", "--batch-size", "8", "--steps", "2"]
    said = compared("train", *small, "--rounds", "1", "--only", "vitft --precision fp32")
    row = re.search(r"^\| vitft --precision fp32 \| [\d,.]+ \([\d,.]+ to [\d,.]+\) \| 1.00 \| (\d+) % \|$", said, re.M)
    assert row is not None, said
    assert 0 <= int(row[1]) <= 110
