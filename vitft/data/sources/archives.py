"""Image archives, read into memory: .zip and .tar of class folders, and WebDataset shards.

Nothing is unpacked to disk. Sizes are checked before reading, both the declared and the actual ones.
"""

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import psutil
import pyarrow as pa

from vitft.data.decoder import suffixes
from vitft.data.sources.features import LABEL_NAMES
from vitft.data.sources.folders import Folder, OtherFile, is_junk, relative
from vitft.data.sources.layouts import splits_of
from vitft.data.sources.schema import COLUMNS, IMAGE_TYPE, Notes, ReadOptions, Splits, image_structs, make_split
from vitft.data.streaming.tars import Header
from vitft.errors import DataError
from vitft.io.console import counted, size
from vitft.io.paths import is_text

T = TypeVar("T")

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LABELS = ("cls", "cls.txt", "label", "label.txt")  # WebDataset fields; json is the other one
_CHUNK_BYTES = 1 << 28  # of an arrow array
_MAX_MEMBERS = 5_000_000


def is_archive(name: str) -> bool:
    """Whether a file has an archive's suffix."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def read_archives(files: Mapping[str, list[Path]], options: ReadOptions, notes: Notes) -> Splits:
    """The splits of one archive of class folders, or of WebDataset shards, whose names give the split.

    Raises DataError for archives that do not fit in memory, and for members with unsafe paths.
    """
    all_files = [file for of_split in files.values() for file in of_split]
    options.refuse(f"{all_files[0].name} is an archive, not a table", *COLUMNS, "image_folder")
    members = {file: _members(file, options.encoding) for file in all_files}
    needed = sum(length for of_file in members.values() for name, length in of_file if _is_read(name))
    if needed > (limit := psutil.virtual_memory().total // 2):
        raise DataError(
            f"{all_files[0]}: its images need {size(needed)}, more than half of this machine's memory "
            f"({size(limit)}); unpack it, and give the folder."
        )
    filled = [of_file for of_file in members.values() if of_file]
    if filled and all(_is_shard([name for name, _ in of_file]) for of_file in filled):
        notes.decide(f"{len(all_files):,} WebDataset shards: labels are in the .cls or .json beside each image")
        return {name: _read_shards(of_split, options.encoding) for name, of_split in files.items()}
    if len(all_files) > 1:
        raise DataError(
            f"{all_files[0].parent} holds {len(all_files)} archives that are not WebDataset shards; "
            "unpack each into its own folder, or give one of them."
        )
    (file,) = all_files
    return _read_class_folders(file, [name for name, _ in members[file]], options.encoding, notes)


def _is_read(name: str) -> bool:
    if any(map(is_junk, name.split("/"))):
        return False
    _, field = _key(name)
    return _is_image(field) or field in _LABELS or field == "json"


def _members(file: Path, encoding: str | None) -> list[tuple[str, int]]:
    """Names and sizes of an archive's files. Raises DataError."""
    members: list[tuple[str, int]] = []
    for name, length, _ in _walk(file, encoding, lambda name: False):
        if not is_text(name):
            raise DataError(f"{file}: the name of its member {name!r} is not UTF-8; give its --encoding.")
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
            raise DataError(f"{file}: its member {name} points outside of the archive, which is not safe to open.")
        if len(members) >= _MAX_MEMBERS:
            raise DataError(f"{file} has over {_MAX_MEMBERS:,} members; unpack it, and give the folder.")
        members.append((name, length))
    return members


def _walk(file: Path, encoding: str | None, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    """Name, size and, if wanted, content of every regular file in an archive. Raises DataError.

    `encoding`: of names that the archive does not say to be UTF-8; by default CP437 in a zip, and UTF-8 in a tar.
    """
    try:
        yield from (_walk_zip if file.name.lower().endswith(".zip") else _walk_tar)(file, encoding, wanted)
    except LookupError as error:
        raise DataError(f"unknown encoding {encoding!r}; use for example cp437, cp1252 or gbk.") from error
    except Exception as error:  # zipfile, tarfile, zlib, lzma and struct each raise their own
        if isinstance(error, DataError) or getattr(error, "strerror", None):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} is not a readable archive: {reason}") from error


def _walk_zip(file: Path, encoding: str | None, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    with zipfile.ZipFile(file, metadata_encoding=encoding) as archive:
        for entry in archive.infolist():
            if entry.flag_bits & 1:
                raise DataError(f"{file} is encrypted; unpack it, and give the folder.")
            if not entry.is_dir():
                name = entry.filename.replace("\\", "/").removeprefix("./")
                yield name, entry.file_size, archive.read(entry) if wanted(name) else b""


def _walk_tar(file: Path, encoding: str | None, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int, bytes]]:
    left = psutil.virtual_memory().total  # a compressed archive's content is counted while reading
    with tarfile.open(file, "r:*", tarinfo=Header, encoding=encoding or "utf-8") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte for each
            left -= member.size
            if left < 0:
                raise DataError(f"{file} holds more than this machine's memory; unpack it, and give the folder.")
            if member.isreg():
                name = member.name.removeprefix("./")
                stream = tar.extractfile(member) if wanted(name) else None
                yield name, member.size, b"" if stream is None else stream.read()


# -- class folders ----------------------------------------------------------------------------------


def _read_class_folders(file: Path, files: list[str], encoding: str | None, notes: Notes) -> Splits:
    metadata = [name for name in files if name.lower().rpartition("/")[2] in ("metadata.csv", "metadata.jsonl")]
    if metadata:
        raise DataError(f"{file} has its labels in {metadata[0]}; unpack it, and give the folder.")
    tree = _tree(file, files)
    classes = splits_of(tree, notes)
    names = sorted({name for of_split in classes.values() for name in of_split})
    members = {
        relative(path, tree.path): (split, number)
        for split, of_split in classes.items()
        for number, name in enumerate(names)
        for path in of_split.get(name, ())
    }
    images: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in classes}
    for name, _, data in _walk(file, encoding, members.__contains__):
        if name in members:
            split, label = members[name]
            images[split][name] = label, data  # a repeated name replaces the earlier one, as in unpacking
    notes.decide(f"{file.name} is read into memory, {counted(sum(map(len, images.values())), 'image')}")
    return {split: _dataset([(name, *rows[name]) for name in sorted(rows)], names) for split, rows in images.items()}


def _tree(file: Path, names: list[str]) -> Folder:
    """The tree of folders in an archive."""
    root = Folder(str(file), file.name)
    folders = {"": root}

    def folder_at(path: str) -> Folder:
        if path not in folders:
            parent, _, name = path.rpartition("/")
            folders[path] = Folder(f"{file}{os.sep}{path}", name)
            folder_at(parent).folders.append(folders[path])
        return folders[path]

    for name in sorted(set(names)):
        parent, _, last = name.rpartition("/")
        if any(is_junk(part) for part in name.split("/")):
            continue
        if name.count("/") > 100:
            raise DataError(f"{file}: {name[:60]}... is over 100 folders deep.")
        if os.path.splitext(last)[1].lower() in suffixes():  # noqa: PTH122
            folder_at(parent).images.append(last)
        else:
            folder_at(parent).others.append(OtherFile(last, ""))
    return root


# -- WebDataset -------------------------------------------------------------------------------------


def _key(name: str) -> tuple[str, str]:
    """A member's sample key and field: a/b.seg.png is a/b and seg.png."""
    folder, _, last = name.rpartition("/")
    key, _, field = last.partition(".")
    return f"{folder}/{key}" if folder else key, field.lower()


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in suffixes()


def _is_shard(names: list[str]) -> bool:
    """Whether most images have a label with the same key."""
    fields: dict[str, set[str]] = {}
    for name in filter(_is_read, names):
        key, field = _key(name)
        fields.setdefault(key, set()).add(field)
    with_image = [of_key for of_key in fields.values() if any(map(_is_image, of_key))]
    return bool(with_image) and sum(bool({*_LABELS, "json"} & of_key) for of_key in with_image) > len(with_image) // 2


def _read_shards(files: list[Path], encoding: str | None) -> datasets.Dataset:
    rows: list[tuple[str, str | None, bytes]] = []
    for file in files:
        walked = _walk(file, encoding, _is_read)
        members = ((name, length, data, partial(bytes, data)) for name, length, data in walked)
        rows += label_members(str(file), members)
    return _dataset(rows, None)


def label_members(
    where: str, members: Iterable[tuple[str, int, T, Callable[[], bytes]]]
) -> list[tuple[str, str | None, T]]:  # fmt: skip
    """Name, label and content of the images of a WebDataset shard: those members beside which there is a label.

    A member is its name, its size, whatever stands for its content, and how to read that. Raises DataError.
    """
    images: dict[str, tuple[str, T]] = {}
    labels: dict[str, str | None] = {}
    for name, length, content, read in members:
        if not _is_read(name):
            continue
        key, field = _key(name)
        if _is_image(field):
            if key in images:
                raise DataError(f"{where}: {key} has two images, {images[key][0]} and {name}; keep one of them.")
            images[key] = (name, content)
        elif length < 1_000_000 and (field in _LABELS or (field == "json" and key not in labels)):
            labels[key] = _label(where, name, field, read())
    return [(name, labels.get(key), content) for key, (name, content) in images.items()]


def _label(file: str, name: str, field: str, data: bytes) -> str | None:
    try:
        text = data.decode().strip()
        label = json.loads(text) if field == "json" else text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {name} is not a label: {' '.join(str(error).split())[:200]}") from error
    if isinstance(label, dict):
        label = next((label[key] for key in LABEL_NAMES if key in label), None)
    if label is not None and not isinstance(label, str | int | bool):
        raise DataError(f"{file}: {name} holds {str(label)[:60]}; a class must be a name or a number.")
    if isinstance(label, str) and not is_text(label):
        raise DataError(f"{file}: {name} holds {label[:60]!r}, half of a surrogate pair; write the class as UTF-8.")
    return None if label is None else str(label)


def _dataset(rows: list[tuple[str, Any, bytes]], names: list[str] | None) -> datasets.Dataset:
    """A split from rows of name, label and content. With `names`, labels are indices into them."""
    chunks, start, length = [], 0, 0
    for end, (_, _, data) in enumerate(rows, 1):
        length += len(data)
        if length > _CHUNK_BYTES or end == len(rows):
            part = rows[start:end]
            chunks.append(image_structs(pa.array([row[2] for row in part], pa.binary()), [row[0] for row in part]))
            start, length = end, 0
    return make_split(pa.chunked_array(chunks, IMAGE_TYPE), [row[1] for row in rows], names)
