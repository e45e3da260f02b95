"""Real-world image folders: what is listed, and which folders are splits or classes."""

import io
import os
import resource
import time
from pathlib import Path

import pytest
from PIL import Image

from vitft.data import decoder
from vitft.data.sources import folders
from vitft.data.sources.folders import Listing
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import Source, class_indices, open_dataset
from vitft.data.splits import make_splits, manifest
from vitft.errors import DataError
from vitft.prediction.inputs import find_images


def draw(*files: Path) -> None:
    """Write a tiny image to each file."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), "red").save(file, "PNG")


def content(source: Source) -> dict[str, list[tuple[str, str]]]:
    """The image names and class names of each split."""
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
    open_dataset(str(tmp_path))
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
        open_dataset(str(tmp_path))


def test_links_that_multiply_end(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}").mkdir()
        draw(tmp_path / f"{number:02}" / "1.png")
        for link in ("a", "b") if number < 29 else ():
            (tmp_path / f"{number:02}" / link).symlink_to(tmp_path / f"{number + 1:02}")
    assert 30 < Listing(tmp_path / "00").tree.count < 5000


def test_of_many_links_to_one_folder_some_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MAX_VISITS", 3)
    draw(tmp_path / "pool" / "1.png")
    for name in "qrstu":
        (tmp_path / name).symlink_to(tmp_path / "pool")
    found = Listing(tmp_path)
    assert found.tree.count == 3  # pool, q and r
    assert found.remarks == [f"the link {name} is not followed: it was followed 3 times already" for name in "stu"]


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / Path(*"x" * 110) / "1.png")
    with pytest.raises(DataError, match="is over 100 folders deep"):
        open_dataset(str(tmp_path))


# -- recognizing images -------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an installation without HEIC and JPEG XL."""
    known = tuple(name for name in decoder.formats() if name not in ("HEIF", "JXL"))
    names = frozenset(name for name in decoder.suffixes() if name not in (".heic", ".heif", ".hif", ".jxl"))
    monkeypatch.setattr(folders, "formats", lambda: known)
    monkeypatch.setattr(folders, "suffixes", lambda: names)


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.mark.usefixtures("no_plugins")
def test_pictures_that_are_not_read_are_counted_with_the_remedy(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "1.png", tmp_path / "dog" / "1.png", tmp_path / "dog" / "a photo.heic")
    for number in range(3):
        write(tmp_path / "dog" / f"{number}.HEIC", HEIC)
    write(tmp_path / "cat" / "x.jxl", b"\xff\x0a" + bytes(40))
    source = open_dataset(str(tmp_path))
    assert content(source)["train"] == [("cat/1.png", "cat"), ("dog/1.png", "dog"), ("dog/a photo.heic", "dog")]
    assert source.warnings == (
        "1 file is JPEG XL, which cannot be read (first: cat/x.jxl): pip install 'vitft[heic]'",
        "3 files are HEIC, which cannot be read (first: dog/0.HEIC): pip install 'vitft[heic]'",
    )


@pytest.mark.usefixtures("no_plugins")
def test_a_class_of_which_no_picture_is_read_is_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "1.png", tmp_path / "dog" / "1.png")
    write(tmp_path / "fish" / "1.HEIC", HEIC)
    with pytest.raises(DataError, match=r"the folder fish has no readable image: 1 file is HEIC.*vitft\[heic\]"):
        open_dataset(str(tmp_path))


def test_what_pillow_can_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "suffixes", lambda: decoder.suffixes() | {".heic"})  # as with a plugin
    draw(tmp_path / "cat" / "1.png", tmp_path / "dog" / "1.heic")
    assert content(open_dataset(str(tmp_path)))["train"] == [("cat/1.png", "cat"), ("dog/1.heic", "dog")]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "DDS", "QOI"])
def test_every_format_is_known_without_its_name(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x", kind)
    assert Listing(tmp_path).tree.by_content == ["x"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL"])
def test_an_image_that_is_cut_short_is_still_one(tmp_path: Path, kind: str) -> None:
    """It is listed, not skipped, so that decoding reports the error."""
    stream = io.BytesIO()
    Image.new("RGB", (80, 80), "red").save(stream, kind)
    write(tmp_path / "x", stream.getvalue()[:20])
    assert Listing(tmp_path).tree.by_content == ["x"]


@pytest.mark.parametrize(
    "head", [b"", b"P", b"BM", b"II*\0", b"RIFF", b"GIF", b"\x0a\x05", b"# notes\n", b"\0" * 99, b"P1x"]
)
def test_what_merely_begins_like_an_image_is_none(tmp_path: Path, head: bytes) -> None:
    write(tmp_path / "x", head)
    assert Listing(tmp_path).tree.count == (head == b"II*\0")  # a TIFF that is cut short; decoding it says so


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert Listing(tmp_path).tree.others == [("pipe", "")]


def test_files_known_by_name_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "1.png")
    known = "avi csv gz html ipynb json jsonl md mat mov mp4 npy npz parquet pt pth py pyc safetensors tar tsv TXT XML"
    others, raw = f"{known} yaml yml zip", "arw CR2 cr3 dng nef nrw orf pef raf rw2 srw"
    for ending in f"{others} {raw}".split():
        write(tmp_path / f"1.{ending}", b"x")
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail(f"opened {a[0]}"))
    tree = Listing(tmp_path).tree
    assert tree.images == ["1.png"]
    assert {name for name, kind in tree.others if not kind} == {f"1.{ending}" for ending in others.split()}
    assert {name for name, kind in tree.others if kind == "camera raw"} == {f"1.{ending}" for ending in raw.split()}


def test_images_in_unsupported_formats_are_reported_apart_from_other_files(tmp_path: Path) -> None:
    for name in ("a", "a.bak", "a.eps", "a.pdf", "a.svg"):
        write(tmp_path / name, b"no image")
    assert Listing(tmp_path).tree.others == [
        ("a", ""),
        ("a.bak", ""),
        ("a.eps", "EPS"),
        ("a.pdf", ""),
        ("a.svg", "SVG"),
    ]


def test_of_many_kinds_of_other_files_the_most_frequent_are_told(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "1.png", tmp_path / "dog" / "1.png")
    for number in range(10):
        for kind in ("csv", "json", "md", "txt")[: number + 1]:
            write(tmp_path / f"{number}.{kind}", b"x")
    said = "34 files are not images: 10 .csv, 9 .json, 8 .md, 7 .txt"
    assert f"{said} (first: 0.csv)" in open_dataset(str(tmp_path)).decisions
    write(tmp_path / "x.html", b"x")
    assert f"{said.replace('34', '35')}, ... (first: 0.csv)" in open_dataset(str(tmp_path)).decisions


def test_predict_lists_the_files_of_a_folder_that_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "1.png", tmp_path / "no suffix")
    write(tmp_path / "a.NEF", b"II*\0")
    write(tmp_path / "notes.txt", b"x")
    assert [Path(name).name for name in find_images([tmp_path])] == ["1.png", "no suffix"]
    said = capsys.readouterr().err
    assert "1 file is camera raw, which cannot be read (first: a.NEF): convert to JPEG or PNG" in said
    assert "1 file is not an image: 1 .txt (first: notes.txt)" in said


@pytest.mark.slow
def test_20000_classes_and_200000_files_take_seconds(tmp_path: Path) -> None:
    for number in range(20_000):
        (tmp_path / "photos" / f"class {number:05}").mkdir(parents=True)
        for image in range(10):
            (tmp_path / "photos" / f"class {number:05}" / f"{image}.png").touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    source = open_dataset(str(tmp_path / "photos"))
    splits = make_splits(source, val_fraction=0.1, max_train_samples=None, max_eval_samples=None, seed=0)
    document = manifest(source, splits)
    took, memory = time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    counts = {role: one["count"] for role, one in document["splits"].items()}
    assert (len(source.labels), sum(counts.values())) == (20_000, 200_000)
    assert 20_000 <= counts["validation"] < 30_000  # one of each class, and where chance has it more
    assert took < 10
    assert memory < 1
