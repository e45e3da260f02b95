"""The wheel carries all that it needs: recipes, the bundled checkpoint, types."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, unpacked where nothing of the clone is."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


RECIPES = ("recipes", "ls")
TRAIN = ("train", "--recipe", "digits", "--max-steps", "2", "--max-eval-samples", "40")
PAGE = ("explain", "--image", str(ROOT / "docs" / "boot.png"), "--html", "page.html")
LEARN = ("learn", "--output", "course")
# An editable install puts the clone on the path: take it off again.
IN_TURN = """
import io, json, sys
from contextlib import redirect_stdout
clone, site, commands = sys.argv[1:]
sys.path = [p for p in sys.path if p != clone]
import vitft
assert site in vitft.__file__, vitft.__file__
from vitft.cli.app import app
said = []
for words in json.loads(commands):
    with redirect_stdout(io.StringIO()) as out:
        try:
            app(words)
        except SystemExit as end:
            assert not end.code, words
    said.append(out.getvalue())
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(installed: Path) -> dict[tuple[str, ...], str]:
    """What its commands say, in one process: it imports for seconds."""
    commands = (RECIPES, TRAIN, PAGE, LEARN)
    words = [sys.executable, "-c", IN_TURN, str(ROOT), str(installed), json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(words, cwd=installed.parent, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_it_lists_the_recipes(said: dict[tuple[str, ...], str]) -> None:
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert recipe.relative_to(ROOT / "recipes").with_suffix("").as_posix() in said[RECIPES]


def test_it_has_the_course_and_the_textbook(said: dict[tuple[str, ...], str], installed: Path) -> None:
    course = installed.parent / "course"
    assert len(list(course.glob("*.ipynb"))) == len(list((ROOT / "docs" / "course").glob("[0-9][0-9]-*.md")))
    assert "textbook.md" in said[LEARN]
    assert {file.name for file in (course / "textbook").iterdir()} == {
        file.name for file in (ROOT / "docs" / "textbook").iterdir()
    }
    assert str(installed / "vitft" / "scratch") in (course / "textbook.md").read_text(encoding="utf-8")


def test_it_trains_on_the_digits(said: dict[tuple[str, ...], str], installed: Path) -> None:
    assert "test accuracy" in said[TRAIN]
    assert (installed.parent / "runs" / "digits-vit-micro-1" / "last" / "model.safetensors").is_file()


@pytest.mark.usefixtures("said")
def test_it_makes_a_page(installed: Path) -> None:
    assert "Ankle boot" in (installed.parent / "page.html").read_text(encoding="utf-8")


def test_the_bundled_checkpoint_is_small(installed: Path) -> None:
    assets = installed / "vitft" / "assets" / "vit-micro"
    assert {f.name for f in assets.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert sum(f.stat().st_size for f in assets.iterdir()) <= 2_000_000
