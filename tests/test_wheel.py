"""The wheel carries all that it needs: recipes, the bundled checkpoint, types."""

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


def vitft(installed: Path, *words: str) -> str:
    # An editable install puts the clone on the path: take it off again.
    code = "import sys; sys.path = [p for p in sys.path if p != sys.argv[1]]; del sys.argv[1]; "
    code += "import vitft; assert sys.argv[1] in vitft.__file__, vitft.__file__; del sys.argv[1]; "
    code += "from vitft.cli import main; main()"
    command = [sys.executable, "-c", code, str(ROOT), str(installed), *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed.parent, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_lists_the_recipes(installed: Path) -> None:
    listed = vitft(installed, "recipes", "ls")
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert recipe.relative_to(ROOT / "recipes").with_suffix("").as_posix() in listed


def test_it_trains_on_the_digits(installed: Path) -> None:
    said = vitft(installed, "train", "--recipe", "digits", "--max-steps", "2", "--max-eval-samples", "40")
    assert "test accuracy" in said
    assert (installed.parent / "runs" / "digits-vit-micro-1" / "last" / "model.safetensors").is_file()


def test_it_makes_a_page(installed: Path) -> None:
    image = str(ROOT / "docs" / "boot.png")
    vitft(installed, "explain", "--image", image, "--html", "page.html")
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
