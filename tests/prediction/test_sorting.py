"""Images sorted into folders by class: nothing is overwritten, nothing leaves the folder, and twice is as once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import tiny_model
from vitft import TrainConfig
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.cli.app import app
from vitft.data.augment import Preprocess
from vitft.errors import DataError, UsageError
from vitft.prediction.predictor import Prediction
from vitft.prediction.sorting import Link, Sorter, folder_names

HOSTILE = ("../../up", "/etc", "..", ".", "", "CON", "com1.txt", "a/b", "a\\b", "a:b", "x\0y\n", "trailing. ", ".git",
           "unsure", "Unsure", "Cat", "cat", "é", "e\u0301", "\ud800", "x" * 300, "~", "-rf", "C:\\W")  # fmt: skip


def row(path: Path, label: str = "cat", *, unsure: bool = False) -> Prediction:
    return Prediction(str(path), ((label, 0.9),), unsure=unsure)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three files with one name and different contents, of which the last repeats the first, and one other file."""
    files = [tmp_path / "in" / name for name in ("a/1.png", "b/1.png", "c/1.png", "a/2.png")]
    for file, content in zip(files, (b"one", b"two", b"one", b"three"), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return files


@pytest.mark.parametrize("link", [None, "hard", "symbolic"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "in another order"])
def test_files_of_one_name_are_all_kept_and_twice_is_as_once(
    photos: list[Path], tmp_path: Path, link: Link | None, order: int
) -> None:
    out = tmp_path / "out"
    rows = [row(file) for file in photos]
    Sorter(out, ["cat"], link=link).write(rows)
    once = tree(out)
    assert sorted(once.values()) == [b"one", b"one", b"three", b"two"]
    assert {"cat/1.png", "cat/2.png"} < once.keys()
    Sorter(out, ["cat"], link=link).write(rows if order == 1 or link is None else rows[::-1])
    Sorter(out, ["cat"], link=link).write(rows + rows)
    assert tree(out) == once
    kinds = [(file.is_symlink(), file.stat().st_nlink) for file in (out / "cat").iterdir()]
    assert set(kinds) == {None: {(False, 1)}, "hard": {(False, 2)}, "symbolic": {(True, 1)}}[link]
    assert [file.read_bytes() for file in photos] == [b"one", b"two", b"one", b"three"]


def test_what_is_there_is_never_overwritten(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "cat").mkdir(parents=True)
    (out / "cat" / "1.png").write_bytes(b"mine")
    (out / "cat" / "2.png").symlink_to("nowhere")
    sorter = Sorter(out, ["cat"])
    first = sorter.place(row(photos[0]))
    assert first is not None
    first.write_bytes(b"edited")
    sorter.write([row(photos[3])])
    Sorter(out, ["cat"]).write([row(photos[0])])
    assert sorted(tree(out).values()) == [b"edited", b"mine", b"one", b"three"]
    assert (out / "cat" / "2.png").is_symlink()


def test_classes_become_folders_that_any_system_allows(photos: list[Path], tmp_path: Path) -> None:
    names = folder_names(HOSTILE)
    assert list(names) == list(dict.fromkeys(HOSTILE))
    assert len({name.casefold() for name in names.values()} | {"unsure"}) == len(names) + 1
    out = tmp_path / "deep" / "out"
    Sorter(out, HOSTILE).write([row(photos[0], label) for label in HOSTILE])
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    folders = [path.name for path in out.iterdir()]
    assert len(folders) == len(set(HOSTILE))
    for name in folders:
        assert (out / name / "1.png").is_file()
        assert not set(name) & set('<>:"/\\|?*\0\n')
        assert name.strip(". ") == name.rstrip(" ")
        assert name.split(".")[0].upper() not in ("CON", "COM1")


def test_unsure_images_have_a_folder_and_unreadable_ones_none(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Sorter(out, ["unsure", "cat"]).write(
        [row(photos[0]), row(photos[1], unsure=True), row(photos[2], "unsure"), Prediction("gone.png", error="gone")]
    )
    assert tree(out) == {"cat/1.png": b"one", "unsure/1.png": b"two", "unsure (2)/1.png": b"one"}


def test_a_name_that_becomes_too_long_is_cut(tmp_path: Path) -> None:
    name = "é" * 125 + ".jpeg"  # 255 bytes
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(folder)
    Sorter(tmp_path / "out", ["cat"]).write([row(tmp_path / folder / name) for folder in "ab"])
    assert sorted(tree(tmp_path / "out").values()) == [b"a", b"b"]
    assert all(file.suffix == ".jpeg" for file in (tmp_path / "out" / "cat").iterdir())


def test_an_image_in_the_folder_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_text("x")
    with pytest.raises(UsageError, match="is inside it"):
        Sorter(tmp_path, ["cat"]).write([row(tmp_path / "cat" / "1.png")])


def test_what_cannot_be_copied_is_a_line_and_leaves_nothing(
    tmp_path: Path, photos: list[Path], monkeypatch: Any
) -> None:
    def full(source: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitft.prediction.sorting.shutil.copy2", full)
    with pytest.raises(DataError, match=r"1\.png could not be copied: No space left on device"):
        Sorter(tmp_path / "out", ["cat"]).write([row(photos[0])])
    assert not list((tmp_path / "out" / "cat").iterdir())


def test_the_command_sorts(tmp_path: Path) -> None:
    model, drawn = tiny_model("vit"), np.random.default_rng(0)
    save_model(tmp_path / "best", model, Preprocess(32, 32), Card(TrainConfig(), ("a",), 0, 0.0, {}, {}))
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.fromarray(drawn.integers(0, 256, (9, 12, 3), np.uint8)).save(photos / f"{number}.png")
    (photos / "bad.png").write_bytes(b"no image")
    words = ["predict", str(photos), "--checkpoint", str(tmp_path / "best"), "--min-confidence", "1", "--sort-into"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "out"), "--link", "symbolic"])
    assert done.exit_code == 3, done.output
    assert sorted(tree(tmp_path / "out")) == ["unsure/0.png", "unsure/1.png", "unsure/2.png"]
    assert "out: 3 unsure" in done.stderr
    inside = CliRunner().invoke(app, [*words, str(photos / "sorted")])
    assert inside.exit_code == 2
    assert "where the images come from" in inside.stderr
    assert not (photos / "sorted").exists()
