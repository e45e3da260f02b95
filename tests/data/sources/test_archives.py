"""Archives are read into memory after their sizes are checked, and never unpacked."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.corpus import photo, photos
from vitft.data.decoder import decode
from vitft.data.sources import archives
from vitft.data.sources.source import class_indices, open_dataset
from vitft.errors import DataError, UsageError

PETS = photos("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png") | {"notes.txt": b"x"}


def tar(path: Path, files: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, f"w:{path.suffix.removeprefix('.').removeprefix('tar')}") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def seen(dataset: Path) -> dict[str, list[tuple[str, str, int]]]:
    """For each split, the members with their classes and the red value of their pixels."""
    source = open_dataset(str(dataset))
    found = {}
    for name, rows in source.splits.items():
        labels = [source.labels[label] for label in class_indices(rows)]
        cells = [rows[row]["image"] for row in range(len(rows))]
        reds = [int(decode(one["bytes"])[0, 0, 0]) for one in cells]
        found[str(name)] = list(zip([one["path"] for one in cells], labels, reds, strict=True))
    return found


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar", "pets.tar.gz", "pets.tar.xz"])
@pytest.mark.parametrize("above", ["", "./", "pets/", "__MACOSX/../"])
def test_an_archive_of_class_folders_is_read_as_the_folder_would_be(tmp_path: Path, name: str, above: str) -> None:
    files = {above + member: content for member, content in reversed(PETS.items())}
    made = zipped(tmp_path / name, files) if name.endswith("zip") else tar(tmp_path / name, files)
    if ".." in above:
        with pytest.raises(DataError, match="points outside of the archive"):
            open_dataset(str(made))
        return
    inside = above.removeprefix("./")
    assert seen(made) == {
        "train": [(f"{inside}train/cat/0.png", "cat", 0), (f"{inside}train/dog/1.png", "dog", 1)],
        "test": [(f"{inside}test/cat/2.png", "cat", 2), (f"{inside}test/dog/3.png", "dog", 3)],
    }
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    shard = {"a/0.png": photo(), "a/0.cls": b"3\n", "a/1.png": photo(value=1), "a/1.cls": b"12"}
    tar(tmp_path / "train-000000.tar", shard)
    tar(tmp_path / "train-000001.tar", {"2.seg.png": photo(value=2), "2.json": b'{"label": 3, "caption": "x"}'})
    tar(tmp_path / "val-000000.tar", {"5.png": photo(value=5), "5.cls": b"12", "5.txt": b"a caption"})
    named = {f"{value}.png": photo(value=value) for value in (6, 7, 8)}
    tar(tmp_path / "test-000000.tar", named | {"6.cls.txt": b"12\n", "7.label": b"3", "8.label.txt": b"12"})
    assert seen(tmp_path) == {
        "train": [("a/0.png", "3", 0), ("a/1.png", "12", 1), ("2.seg.png", "3", 2)],
        "val": [("5.png", "12", 5)],
        "test": [("6.png", "12", 6), ("7.png", "3", 7), ("8.png", "12", 8)],
    }
    assert seen(tmp_path / "train-000000.tar")["train"][0] == ("a/0.png", "3", 0)


def test_images_keep_their_labels_where_they_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_CHUNK_BYTES", 2 * len(photo()))
    made = zipped(tmp_path / "x.zip", photos("a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png"))
    assert seen(made) == {"train": [(f"{'aaabb'[i]}/{i}.png", "aaabb"[i], i) for i in range(5)]}
    assert len(open_dataset(str(made)).splits["train"].data.column("image").chunks) > 1


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"0.png": photo(), "0.json": b"{"}, "0.json is not a label"),
        ({"0.png": photo(), "0.json": json.dumps({"label": [1, 2]}).encode()}, "holds \\[1, 2\\]; a class must be"),
        ({"0.png": photo(), "0.json": b'{"label": "\\ud800"}'}, "half of a surrogate pair; write the class as UTF-8"),
        ({"0.png": photo(), "0.jpg": photo(".jpg"), "0.cls": b"1"}, "0 has two images"),
        ({"0.png": photo(), "0.cls": b"1", "1.png": photo(), "2.png": photo(), "2.cls": b"1"}, "have no label"),
        (
            photos("0.png", "1.png", "2.png", "3.png") | {"0.cls": b"1", "1.cls": b"1"},
            "holds images but no class folders",
        ),
        ({"/etc/0.png": photo()}, "points outside of the archive"),
        ({"../0.png": photo()}, "points outside of the archive"),
        ({"0.png": photo()}, "holds images but no class folders"),
        ({"notes.txt": b"x"}, "no class folders"),
        ({"metadata.csv": b"file_name,label\n", "0.png": photo()}, "has its labels in metadata.csv; unpack it"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, files: dict[str, bytes], match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_dataset(str(tar(tmp_path / "x.tar", files)))


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    link = tarfile.TarInfo("cat/9.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    made = tar(tmp_path / "x.tar", photos("cat/0.png", "dog/1.png") | {"cat/9.png": link})
    assert seen(made) == {"train": [("cat/0.png", "cat", 0), ("dog/1.png", "dog", 1)]}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_broken_archive_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match=rf"{name} is not a readable archive"):
        open_dataset(str(tmp_path / name))
    made = zipped(tmp_path / "y.zip", PETS)
    made.write_bytes(made.read_bytes()[:200])
    with pytest.raises(DataError, match=r"y.zip is not a readable archive"):
        open_dataset(str(made))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "train.tar"])
@pytest.mark.parametrize("bytes_left", [None, 300, 0])
def test_a_damaged_header_is_not_the_end_of_an_archive(tmp_path: Path, name: str, bytes_left: int | None) -> None:
    """One bit is another, and perhaps the archive is cut off within the header, or before it."""
    files = photos(*(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(5)))
    if name == "train.tar":
        files = {
            f"{number}.{kind}": photo() if kind == "png" else b"3" for number in range(5) for kind in ("png", "cls")
        }
    raw = bytearray(tar(tmp_path / "whole.tar", files).read_bytes())
    with tarfile.open(tmp_path / "whole.tar") as archive:
        start = archive.getmembers()[6].offset
    raw[start + 3] ^= 1
    raw = raw if bytes_left is None else raw[: start + bytes_left]
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else bytes(raw))
    said = f"it is cut off at byte {start:,}" if bytes_left == 0 else f"the header at byte {start:,} is damaged"
    with pytest.raises(DataError, match=rf"{name} is not a readable archive: {said}"):
        open_dataset(str(tmp_path / name))


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    """As the last one that a process of several has written."""
    tar(tmp_path / "train-000000.tar", {"0.png": photo(), "0.cls": b"3", "1.png": photo(value=1), "1.cls": b"4"})
    tar(tmp_path / "train-000001.tar", {})
    expected = {"train": [("0.png", "3", 0), ("1.png", "4", 1)]}
    assert seen(tmp_path) == expected
    there = open_dataset(f"file://{tmp_path}").splits["train"]
    assert len(there) == 2
    with pytest.raises(DataError):
        open_dataset(str(tmp_path / "train-000001.tar"))


def test_what_macos_adds_to_a_shard_is_not_read(tmp_path: Path) -> None:
    shard = {"._0.png": b"x", "0.png": photo(), "0.cls": b"3", "._1.png": b"x", "1.png": photo(value=1), "1.cls": b"4"}
    made = tar(tmp_path / "train.tar", {"._0.cls": b"\0", **shard})
    assert seen(made) == {"train": [("0.png", "3", 0), ("1.png", "4", 1)]}
    assert len(open_dataset(f"file://{made}").splits["train"]) == 2


def test_names_in_an_archive_may_have_another_encoding(tmp_path: Path) -> None:
    files = photos("café/0.png", "thé/1.png")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in photos("caf+/0.png", "th+/1.png").items():
            archive.writestr(name, content)
    raw = (tmp_path / "x.zip").read_bytes().replace(b"caf+", b"caf\xe9").replace(b"th+", b"th\xe9")
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.tar: the name of its member 'caf.*' is not UTF-8; give its --encoding"):
        open_dataset(str(tmp_path / "x.tar"))
    for kind in ("tar", "zip"):
        assert open_dataset(str(tmp_path / f"x.{kind}"), encoding="latin-1").labels == ("café", "thé")
        with pytest.raises(DataError, match="unknown encoding 'klingon'; use for example"):
            open_dataset(str(tmp_path / f"x.{kind}"), encoding="klingon")


@pytest.mark.parametrize("option", [{"fold": 2}, {"label_column": "kind"}, {"image_folder": "/photos"}])
def test_options_of_a_table_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    shard = tar(tmp_path / "train.tar", {"0.png": photo(), "0.cls": b"3", "1.png": photo(value=1), "1.cls": b"4"})
    flag, said = f"--{next(iter(option)).replace('_', '-')}", "leave it out"
    for dataset in (str(shard), f"file://{shard}", str(zipped(tmp_path / "pets.zip", PETS))):
        with pytest.raises(UsageError, match=rf"{flag} .*: .*, not .*; {said}|{flag} .*, which are not text; {said}"):
            open_dataset(dataset, **option)


def test_what_an_archive_holds_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipped(tmp_path / "bomb.zip", {"cat/0.png": bytes(3_000_000), "dog/1.png": photo()})
    filled = tar(tmp_path / "bomb.tar.gz", {"notes.bin": bytes(7_000_000), "cat/0.png": photo()})
    assert bomb.stat().st_size + filled.stat().st_size < 30_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=5_000_000))
    with pytest.raises(
        DataError, match=r"its images need 3\.0 MB, more than half of this machine's memory \(2\.5 MB\)"
    ):
        open_dataset(str(bomb))
    with pytest.raises(DataError, match="holds more than this machine's memory"):
        open_dataset(str(filled))
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="over 3 members"):
        open_dataset(str(zipped(tmp_path / "many.zip", PETS)))


def test_a_header_of_a_member_is_bounded(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 32
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"header declares 4\.3 GB"):
        open_dataset(str(tmp_path / "x.tar"))


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    made = zipped(tmp_path / "x.zip", PETS)
    content = bytearray(made.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 8] |= 1
    made.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted; unpack it"):
        open_dataset(str(made))


def test_archives_of_classes_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        tar(tmp_path / f"{name}.tar", {"0.png": photo(), "1.png": photo()})
    with pytest.raises(DataError, match=r"2 archives that are not WebDataset shards; unpack each into its own folder"):
        open_dataset(str(tmp_path))
