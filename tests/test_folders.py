"""Folders of images as people have them: what is listed, and which folder is a split, which a class."""

import os
import resource
import time
from pathlib import Path

import pytest
from PIL import Image

from vitft.data.folders import scan
from vitft.data.sources import Source, class_indices, open_source, sample_names
from vitft.data.splits import make_splits, manifest
from vitft.errors import DataError


def draw(*files: Path) -> None:
    """A tiny image in each of these files."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), "red").save(file, "PNG")


def content(source: Source) -> dict[str, list[tuple[str, str]]]:
    """Of every split the images' ids and class names."""
    found = {}
    for name, rows in source.splits.items():
        labels = class_indices(rows)
        ids = sample_names(rows, labels * 0 + range(len(rows)))
        found[str(name)] = [(one, source.labels[label]) for one, label in zip(ids, labels, strict=True)]
    return found


# -- listing --------------------------------------------------------------------------------------


def test_every_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(*(tmp_path / f"class {number}" / "deep" / "1.png" for number in range(20)))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    open_source(str(tmp_path))
    assert sorted(listed) == sorted({*listed})
    assert len(listed) == 41


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "cat" / "1.png", tmp_path / "dog" / "1.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"dog cannot be read: Permission denied"):
        open_source(str(tmp_path))


def test_links_that_multiply_end(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}").mkdir()
        draw(tmp_path / f"{number:02}" / "1.png")
        for link in ("a", "b") if number < 29 else ():
            (tmp_path / f"{number:02}" / link).symlink_to(tmp_path / f"{number + 1:02}")
    assert 30 < scan(tmp_path / "00").tree.count < 5000


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / Path(*"x" * 110) / "1.png")
    with pytest.raises(DataError, match="lies over 100 folders deep"):
        open_source(str(tmp_path))


@pytest.mark.slow
def test_20000_classes_and_200000_files_take_seconds(tmp_path: Path) -> None:
    for number in range(20_000):
        (tmp_path / "photos" / f"class {number:05}").mkdir(parents=True)
        for image in range(10):
            (tmp_path / "photos" / f"class {number:05}" / f"{image}.png").touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    source = open_source(str(tmp_path / "photos"))
    splits = make_splits(source, val_fraction=0.1, max_train_samples=None, max_eval_samples=None, seed=0)
    document = manifest(source, splits)
    took, memory = time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert (len(source.labels), document["splits"]["train"]["count"]) == (20_000, 180_000)
    assert took < 10
    assert memory < 1
