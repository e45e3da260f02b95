"""Data sets on this disk: folders of class folders, parquet files, tables of path and label.

Nothing is copied or cached: files stay files, and parquet is read into memory. (Parquet over 4 GB goes
through the arrow cache of `datasets`, which is mapped from disk, instead.)
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vitft.data.sources import arrays
from vitft.data.sources.archives import is_archive, read_archives
from vitft.data.sources.arrow_memory import check_room
from vitft.data.sources.features import (
    columns_of,
    divided,
    features_of,
    joined,
    need_labels,
    plain,
    plain_splits,
    scalars,
    undivided,
)  # fmt: skip
from vitft.data.sources.folders import Folder, scan
from vitft.data.sources.layouts import read_folder
from vitft.data.sources.schema import Notes, Reading, role_of
from vitft.data.sources.tables import TABLE_SUFFIXES, read_table
from vitft.errors import DataError

IN_MEMORY_BYTES = 4_000_000_000

Splits = dict[str, datasets.Dataset]


def read(path: Path, reading: Reading, notes: Notes) -> Splits:
    """Read a file or folder, whatever it holds, into splits of columns `image` and `label`; `notes` say how.

    Raises VitftError.
    """
    try:
        if path.is_file():
            if path.suffix.lower() == ".parquet":
                return read_parquet(_by_split([path]), reading, notes)
            if path.suffix.lower() in TABLE_SUFFIXES:
                return read_table(path, reading, notes)
            if is_archive(path.name):
                return read_archives(_by_split([path]), notes)
            raise DataError(f"{path} is no data set; give a folder, or a .csv, .jsonl, .parquet, .zip or .tar file.")
        if (batches := arrays.cifar_folder(path)) is not None:
            return arrays.read_cifar(batches, reading.label_column)
        if any((path / name).is_file() for name in _SAVED):
            return _read_saved(path, reading, notes)
        listing = scan(path.absolute())
        if files := find_files(listing.tree, lambda name: name.endswith(".parquet")):
            if listing.tree.count:
                notes.warn(f"the parquet files are read, and {listing.tree.count:,} images beside them are not")
            return read_parquet(files, reading, notes)
        if not listing.tree.count and (files := find_files(listing.tree, is_archive)):
            return read_archives(files, notes)
        return read_folder(path, listing, reading, notes)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


_SAVED = ("dataset_dict.json", "dataset_info.json")  # what `Dataset.save_to_disk` writes


def _read_saved(path: Path, reading: Reading, notes: Notes) -> Splits:
    """A folder that `datasets` saved. Raises VitftError."""
    for state in path.rglob("state.json"):
        files = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        if outside := [file for file in files if Path(file).name != file]:
            raise DataError(f"{state} names the file {outside[0]}, outside of its folder; do not trust it.")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets, pyarrow and json have their own
        raise DataError(f"{path} is no readable data set of datasets: {' '.join(str(error).split())[:300]}") from error
    raw = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    return plain_splits(raw, path, reading, notes)


def find_files(tree: Folder, wanted: Callable[[str], bool]) -> dict[str, list[Path]]:
    """Files by split: of the folder, of folders named as splits, of data/ or an only sub-folder. Raises DataError."""

    def within(folder: Folder) -> list[Path]:
        return [Path(folder.path, one.name) for one in folder.others if wanted(one.name)]

    if files := within(tree):
        return _by_split(files)
    if named := {inner.name: files for inner in tree.folders if role_of(inner.name) and (files := within(inner))}:
        return named
    inner = [one for one in tree.folders if any(map(within, (one, *one.folders)))]
    data = [one for one in inner if one.name == "data"] or inner
    if len(data) > 1:
        kind = "parquet files" if wanted(".parquet") else "archives"
        raise DataError(
            f"{tree.path} holds {kind} in {len(data)} folders: {', '.join(one.name for one in data)}; name one of them."
        )
    return find_files(data[0], wanted) if data else {}


def read_parquet(files: dict[str, list[Path]], reading: Reading, notes: Notes) -> Splits:
    """Read the image and label columns of parquet files, with the features that datasets wrote into them."""
    everything = [file for of_split in files.values() for file in of_split]
    if sum(file.stat().st_size for file in everything) > IN_MEMORY_BYTES:
        raw = {name: datasets.Dataset.from_parquet([str(file) for file in found]) for name, found in files.items()}
        return plain_splits(raw, everything[0].parent, reading, notes)
    found = {name: _parquet_split(name, of_split, reading, notes) for name, of_split in files.items()}
    features = features_of(pq.read_schema(everything[0]))
    need_labels(found, features)
    if (only := undivided(found, reading)) is not None:
        names = scalars(features, columns_of(only, features, reading, Notes()))
        for file in everything:
            check_room(file, names)
        tables = [pq.read_table(file, columns=names, partitioning=None) for file in everything]
        table = pa.concat_tables(tables, promote_options="permissive")
        return divided(found[only], table, names, everything[0], reading, notes)
    return found


def _parquet_split(name: str, files: list[Path], reading: Reading, notes: Notes) -> datasets.Dataset:
    parts = []
    for file in files:
        try:
            image, label = columns_of(name, features_of(pq.read_schema(file)), reading, notes)
            wanted = list(dict.fromkeys(leaf.path[0] for leaf in (image, label) if leaf is not None))
            check_room(file, wanted)
            table = pq.read_table(file, columns=wanted, memory_map=True, partitioning=None)
            parts.append((str(file), plain(table, image, label)))
        except DataError as error:
            raise error if str(file.parent) in str(error) else DataError(f"{file}: {error}") from error
        except Exception as error:  # torn files fail in pyarrow, in datasets, or where they read text
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{file} is no readable parquet file: {reason}") from error
    return joined(parts, name)


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Group by what the name says: train-00000-of-00002 and mnist_train are train; all are if none says."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[\W\d_]+", file.stem.casefold())
        words += [word.removesuffix("set") for word in words]
        found.setdefault(next(filter(role_of, words), words[0]), []).append(file)
    return found if any(map(role_of, found)) else {"train": files}
