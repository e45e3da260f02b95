"""Archives of images, read into memory: .zip and .tar of class folders, and WebDataset shards.

Nothing is unpacked to disk. What an archive says that it holds is bounded before it is read, and so is what it
turns out to hold.
"""

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import datasets
import psutil
import pyarrow as pa

from vitft.data.decoder import suffixes
from vitft.data.sources.features import LABEL_NAMES
from vitft.data.sources.folders import Folder, Passed, is_junk, relative
from vitft.data.sources.layouts import splits_of
from vitft.data.sources.schema import IMAGE_TYPE, Notes, image_structs, make_split
from vitft.errors import DataError
from vitft.io.console import size

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LABELS = ("cls", "cls.txt", "label", "label.txt")  # of WebDataset, beside a json
_AT_A_TIME = 1 << 28  # bytes of an arrow array
_MOST = 5_000_000  # members


def is_archive(name: str) -> bool:
    """Whether a file is called as an archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def read_archives(files: Mapping[str, list[Path]], notes: Notes) -> dict[str, datasets.Dataset]:
    """The splits of archives: of one with class folders as these say, of WebDataset shards as their names do.

    Raises DataError for what would not fit in memory, and for members that lead out of the archive.
    """
    everything = [file for of_split in files.values() for file in of_split]
    members = {file: _members(file) for file in everything}
    needed = sum(length for of_file in members.values() for name, length in of_file if _is_read(name))
    if needed > (room := psutil.virtual_memory().total // 2):
        raise DataError(
            f"{everything[0]}: its images take {size(needed)}, and half of this machine's memory is {size(room)}; "
            "unpack it, and give the folder."
        )
    sharded = [file for file in everything if _is_shard([name for name, _ in members[file]])]
    if sharded and len(sharded) == len(everything):
        notes.decide(f"{len(everything):,} WebDataset shards: a label is the .cls or the .json beside its image")
        return {name: _shards(of_split) for name, of_split in files.items()}
    if len(everything) > 1:
        raise DataError(
            f"{everything[0].parent} holds {len(everything)} archives that are no WebDataset shards; "
            "unpack each into a folder of its own, or give one of them."
        )
    (file,) = everything
    return _folders(file, [name for name, _ in members[file]], notes)


def _is_read(name: str) -> bool:
    _, field = _key(name)
    return _is_image(field) or field in _LABELS or field == "json"


def _members(file: Path) -> list[tuple[str, int]]:
    """Names and sizes of an archive's files. Raises DataError."""
    found: list[tuple[str, int]] = []
    for name, length, _ in _walk(file, lambda name: False):
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
            raise DataError(f"{file}: its member {name} leads out of the archive; this is no data set to trust.")
        if len(found) >= _MOST:
            raise DataError(f"{file} has over {_MOST:,} members; unpack it, and give the folder.")
        found.append((name, length))
    return found


def _walk(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    """Of every regular file in an archive its name, its size and, if it is wanted, its content. Raises DataError."""
    try:
        yield from (_walk_zip if file.name.lower().endswith(".zip") else _walk_tar)(file, wanted)
    except DataError:
        raise
    except OSError as error:
        if error.strerror:
            raise
        raise DataError(f"{file} is no readable archive: {error}") from error
    except Exception as error:  # zipfile, tarfile, zlib, lzma and struct each have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} is no readable archive: {reason}") from error


def _walk_zip(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.flag_bits & 1:
                raise DataError(f"{file} is encrypted; unpack it, and give the folder.")
            if not entry.is_dir():
                name = entry.filename.replace("\\", "/").removeprefix("./")
                yield name, entry.file_size, archive.read(entry) if wanted(name) else b""


def _walk_tar(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    room = psutil.virtual_memory().total  # what a compressed archive holds is counted as it comes
    with tarfile.open(file, "r:*", tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte of each
            room -= member.size
            if room < 0:
                raise DataError(f"{file} holds more than this machine's memory; unpack it, and give the folder.")
            if member.isreg():
                name = member.name.removeprefix("./")
                stream = tar.extractfile(member) if wanted(name) else None
                yield name, member.size, b"" if stream is None else stream.read()


class _Member(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads at once, is of a bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Raises DataError for a header of over a megabyte."""
        found = super().frombuf(buf, encoding, errors)
        if not found.isreg() and found.size > 1 << 20:
            raise DataError(f"a member's header says that it has {size(found.size)}; this is no data set to trust.")
        return found


# -- class folders ----------------------------------------------------------------------------------


def _folders(file: Path, names: list[str], notes: Notes) -> dict[str, datasets.Dataset]:
    tables = [name for name in names if os.path.basename(name).lower() in ("metadata.csv", "metadata.jsonl")]  # noqa: PTH119
    if tables:
        raise DataError(f"{file} tells its labels in {tables[0]}; unpack it, and give the folder.")
    tree = _tree(file, names)
    classes = splits_of(tree, notes)
    places = {
        relative(path, tree.path): (split, label)
        for split, of_split in classes.items()
        for label, paths in of_split.items()
        for path in paths
    }
    found: dict[str, dict[str, tuple[str, bytes]]] = {name: {} for name in classes}
    for name, _, data in _walk(file, places.__contains__):
        if name in places:
            split, label = places[name]
            found[split][name] = label, data  # of two members of one name the later one, as when they are unpacked
    labels = sorted({label for of_split in classes.values() for label in of_split})
    notes.decide(f"{file.name} is read into memory, {sum(map(len, found.values())):,} images")
    return {split: _dataset([(name, *rows[name]) for name in sorted(rows)], labels) for split, rows in found.items()}


def _tree(file: Path, names: list[str]) -> Folder:
    """The folders that an archive's names make."""
    root = Folder(str(file), file.name)
    made = {"": root}

    def folder_at(path: str) -> Folder:
        if path not in made:
            above, _, name = path.rpartition("/")
            made[path] = Folder(f"{file}{os.sep}{path}", name)
            folder_at(above).folders.append(made[path])
        return made[path]

    for name in sorted(set(names)):
        above, _, own = name.rpartition("/")
        if any(is_junk(part) for part in name.split("/")):
            continue
        if name.count("/") > 100:
            raise DataError(f"{file}: {name[:60]}... lies over 100 folders deep.")
        if os.path.splitext(own)[1].lower() in suffixes():  # noqa: PTH122
            folder_at(above).images.append(own)
        else:
            folder_at(above).others.append(Passed(own, ""))
    for path in sorted(made, key=lambda one: -one.count("/") if one else 1):
        folder = made[path]
        folder.count = len(folder.images) + sum(inner.count for inner in folder.folders)
    return root


# -- WebDataset -------------------------------------------------------------------------------------


def _key(name: str) -> tuple[str, str]:
    """The key and the field of a member: a/b.seg.png is a/b and seg.png."""
    folder, _, own = name.rpartition("/")
    key, _, field = own.partition(".")
    return f"{folder}/{key}" if folder else key, field.lower()


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in suffixes()


def _is_shard(names: list[str]) -> bool:
    """Whether each image has a label of its own name."""
    fields: dict[str, set[str]] = {}
    for name in names:
        key, field = _key(name)
        fields.setdefault(key, set()).add(field)
    pictured = [of_key for of_key in fields.values() if any(map(_is_image, of_key))]
    return bool(pictured) and sum(bool({*_LABELS, "json"} & of_key) for of_key in pictured) > len(pictured) // 2


def _shards(files: list[Path]) -> datasets.Dataset:
    rows: list[tuple[str, str | None, bytes]] = []
    for file in files:
        images: dict[str, tuple[str, bytes]] = {}
        labels: dict[str, str | None] = {}
        for name, length, data in _walk(file, _is_read):
            key, field = _key(name)
            if _is_image(field):
                if key in images:
                    raise DataError(f"{file}: {key} has two images, {images[key][0]} and {name}; keep one of them.")
                images[key] = (name, data)
            elif length < 1_000_000 and (field in _LABELS or (field == "json" and key not in labels)):
                labels[key] = _label(file, name, field, data)
        rows += [(name, labels.get(key), data) for key, (name, data) in images.items()]
    return _dataset(rows, None)


def _label(file: Path, name: str, field: str, data: bytes) -> str | None:
    try:
        text = data.decode().strip()
        if field != "json":
            return text
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {name} is no label: {' '.join(str(error).split())[:200]}") from error
    found = next((told[key] for key in LABEL_NAMES if key in told), None) if isinstance(told, dict) else told
    if found is not None and not isinstance(found, str | int | bool):
        raise DataError(f"{file}: {name} tells no class but {str(found)[:60]}; a class must be a name or a number.")
    return None if found is None else str(found)


# -- arrow ------------------------------------------------------------------------------------------


def _dataset(rows: list[tuple[str, Any, bytes]], names: list[str] | None) -> datasets.Dataset:
    """Rows of name, label and content; the labels are names, or indices into `names`."""
    chunks, start, held = [], 0, 0
    for end, (_, _, data) in enumerate(rows, 1):
        held += len(data)
        if held > _AT_A_TIME or end == len(rows):
            part = rows[start:end]
            chunks.append(image_structs(pa.array([one[2] for one in part], pa.binary()), [one[0] for one in part]))
            start, held = end, 0
    index = None if names is None else {name: number for number, name in enumerate(names)}
    labels = [one[1] if index is None else index[one[1]] for one in rows]
    return make_split(pa.chunked_array(chunks, IMAGE_TYPE), labels, names)
