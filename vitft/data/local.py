"""Data sets on this disk: folders of class folders, parquet files, tables of path and label.

Nothing is copied or cached: files stay files, and parquet is read into memory. (Parquet over 4 GB goes
through the arrow cache of `datasets`, which is mapped from disk, instead.)
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from vitft.console import size
from vitft.data import pixels
from vitft.data.images import suffixes
from vitft.data.schema import Notes, Reading, find_columns, in_memory, role_of
from vitft.data.tables import TABLE_SUFFIXES, file_split, read_table
from vitft.errors import DataError

IN_MEMORY_BYTES = 4_000_000_000
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir"}

Splits = dict[str, datasets.Dataset]


def read(path: Path, reading: Reading, notes: Notes) -> Splits:
    """Read a file or folder, whatever it holds, into raw splits; what was decided goes to `notes`. Raises DataError."""
    image_column, label_column = reading.image_column, reading.label_column
    try:
        if path.is_file():
            if path.suffix.lower() == ".parquet":
                return read_parquet(_by_split([path]), image_column, label_column)
            if path.suffix.lower() in TABLE_SUFFIXES:
                return read_table(path, reading, notes)
            raise DataError(f"{path} is no data set; give a folder, or a .csv, .jsonl or .parquet file.")
        if (batches := pixels.cifar_folder(path)) is not None:
            return pixels.read_cifar(batches, label_column)
        if files := find_parquet(path):
            return read_parquet(files, image_column, label_column)
        return read_folder(path)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def read_folder(root: Path) -> Splits:
    """Read root/class/**/image, or root/split/class/**/image where folders are named as splits.

    A class is a folder directly under the root or split that holds at least one image, at any depth.
    """
    folders = _folders(root)
    roles = {folder.name: folder for folder in folders if role_of(folder.name)}
    classes = {split: found for split, folder in roles.items() if (found := _class_files(folder))}
    if not any(role_of(split) == "train" for split in classes):  # folders that are only called like splits
        classes = {"train": _class_files(root)}
    names = sorted({name for by_class in classes.values() for name in by_class})
    if not names:
        raise DataError(_nothing_in(root))
    return {
        split: file_split(root, [(f, names.index(c)) for c, fs in by_class.items() for f in fs], names)
        for split, by_class in classes.items()
        if by_class
    }


def find_parquet(root: Path) -> dict[str, list[Path]]:
    """Parquet files by split: of the folder, of folders named as splits, of data/ or an only sub-folder."""
    folders = _folders(root)
    inner = [folder for folder in folders if any(_parquet_in(folder)) or any(map(_parquet_in, _folders(folder)))]
    named = {folder.name: files for folder in folders if role_of(folder.name) and (files := _parquet_in(folder))}
    if files := _parquet_in(root):
        return _by_split(files)
    if named:
        return named
    data = [folder for folder in inner if folder.name == "data"] or inner
    if len(data) > 1:
        raise DataError(
            f"{root} holds parquet files in {len(data)} folders: {', '.join(f.name for f in data)}; name one of them."
        )
    return find_parquet(data[0]) if data else {}


def read_parquet(files: dict[str, list[Path]], image_column: str | None, label_column: str | None) -> Splits:
    """Read the image and label columns of parquet files, with the features that datasets wrote into them."""
    everything = [file for of_split in files.values() for file in of_split]
    if sum(file.stat().st_size for file in everything) > IN_MEMORY_BYTES:
        return {n: datasets.Dataset.from_parquet([str(f) for f in found]) for n, found in files.items()}
    return {n: _parquet_split(n, found, image_column, label_column) for n, found in files.items()}


def _parquet_split(
    name: str, files: list[Path], image_column: str | None, label_column: str | None
) -> datasets.Dataset:
    tables = []
    for file in files:
        try:
            _check_room(file)
            schema = pq.read_schema(file)
            features = datasets.Features.from_arrow_schema(schema)
            absent = label_column is not None and label_column not in features and role_of(name) == "test"
            columns = find_columns(features, image_column, None if absent else label_column)
            wanted = [column for column in columns if column]
            tables.append(pq.read_table(file, columns=wanted, memory_map=True, partitioning=None))
        except DataError:
            raise
        except Exception as error:  # torn files fail in pyarrow, in datasets, or where they read text
            reason = " ".join(str(error).split())
            raise DataError(f"{file} is no readable parquet file: {reason}") from error
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"the parquet files of split {name} differ in their columns: {error}") from error
    features = datasets.Features({column: features[column] for column in wanted})
    try:
        return in_memory(table.replace_schema_metadata(None), datasets.DatasetInfo(features=features), name)
    except (ValueError, TypeError, pa.ArrowException) as error:  # names with zero bytes are cut short
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{files[0]}: its columns are not what its features say: {reason}") from error


def _check_room(file: Path) -> None:
    """Raise DataError for a file of few bytes that says it has more rows, or larger ones, than memory holds."""
    said = pq.read_metadata(file)
    needed = _ROW_BYTES * said.num_rows + sum(said.row_group(i).total_byte_size for i in range(said.num_row_groups))
    if needed > (there := psutil.virtual_memory().total):
        raise DataError(
            f"{file}: its {said.num_rows:,} rows take {size(needed)}, and this machine has {size(there)} of memory."
        )


_ROW_BYTES = 60  # in memory, of a row of nulls


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Group by what the name says: train-00000-of-00002 and mnist_train are train; all are if none says."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[-_. ]", file.stem)
        found.setdefault(next(filter(role_of, words), words[0]), []).append(file)
    return found if any(map(role_of, found)) else {"train": files}


def _parquet_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.parquet") if f.is_file() and not _is_junk(f.name))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    found = {child.name: list(image_files(child)) for child in _folders(folder)}
    return {name: files for name, files in found.items() if files}


def image_files(folder: Path) -> Iterator[Path]:
    """Image files at any depth, in order of name; linked folders are followed, each only once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_junk(name))
        yield from (Path(parent, name) for name in sorted(files) if _is_image(name))


def passed_over(folder: Path) -> Iterator[Path]:
    """Files below a folder of images that `image_files` leaves out, in order of name."""
    read = set(image_files(folder))
    yield from (file for file in sorted(folder.rglob("*")) if file not in read and file.is_file())


def _is_image(name: str) -> bool:
    return not _is_junk(name) and os.path.splitext(name)[1].lower() in suffixes()  # noqa: PTH122  (hot loop)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if not _is_junk(child.name) and child.is_dir())


def _has_images(folder: Path) -> bool:
    return any(_is_image(child.name) and child.is_file() for child in folder.iterdir())


def _nothing_in(root: Path) -> str:
    if _has_images(root):
        return (
            f"{root} holds images but no class folders; put each class into a folder of its own, "
            "or give a CSV of path and label."
        )
    tables = sorted(child.name for child in root.iterdir() if child.suffix.lower() in TABLE_SUFFIXES)
    hint = f"; did you mean the file {root / tables[0]}?" if tables else "; expected root/class/image.jpg."
    return f"no class folders with images, parquet files or CIFAR batches in {root}{hint}"
