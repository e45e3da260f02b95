"""Data sets on this disk: folders of class folders, parquet files, tables of path and label.

Nothing is copied or cached: files stay files, and parquet is read into memory. (Parquet over 4 GB goes
through the arrow cache of `datasets`, which is mapped from disk, instead.)
"""

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vitft.data import pixels
from vitft.data.folders import Folder, scan
from vitft.data.layouts import read_folder
from vitft.data.room import check_room
from vitft.data.schema import Notes, Reading, find_columns, in_memory, role_of
from vitft.data.tables import TABLE_SUFFIXES, read_table
from vitft.errors import DataError

IN_MEMORY_BYTES = 4_000_000_000

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
        listing = scan(path.absolute())
        if files := find_parquet(listing.tree):
            return read_parquet(files, image_column, label_column)
        return read_folder(path, listing, reading, notes)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def find_parquet(tree: Folder) -> dict[str, list[Path]]:
    """Parquet files by split: of the folder, of folders named as splits, of data/ or an only sub-folder."""
    if files := _parquet_in(tree):
        return _by_split(files)
    if named := {inner.name: files for inner in tree.folders if role_of(inner.name) and (files := _parquet_in(inner))}:
        return named
    inner = [one for one in tree.folders if any(map(_parquet_in, (one, *one.folders)))]
    data = [one for one in inner if one.name == "data"] or inner
    if len(data) > 1:
        raise DataError(
            f"{tree.path} holds parquet files in {len(data)} folders: {', '.join(one.name for one in data)}; "
            "name one of them."
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
            schema = pq.read_schema(file)
            features = datasets.Features.from_arrow_schema(schema)
            absent = label_column is not None and label_column not in features and role_of(name) == "test"
            columns = find_columns(features, image_column, None if absent else label_column)
            wanted = [column for column in columns if column]
            check_room(file, wanted)
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


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Group by what the name says: train-00000-of-00002 and mnist_train are train; all are if none says."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[-_. ]", file.stem)
        found.setdefault(next(filter(role_of, words), words[0]), []).append(file)
    return found if any(map(role_of, found)) else {"train": files}


def _parquet_in(folder: Folder) -> list[Path]:
    return [Path(folder.path, one.name) for one in folder.others if one.name.endswith(".parquet")]
