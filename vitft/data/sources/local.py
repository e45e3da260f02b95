"""Datasets on this disk: folders of class folders, parquet files, tables of path and label, archives.

Nothing is copied or cached: files stay files, and parquet is read into memory. Parquet above 4 GB goes through the
arrow cache of `datasets` instead, which is memory-mapped from disk.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vitft.data.sources import arrays, features
from vitft.data.sources.archives import is_archive, read_archives
from vitft.data.sources.arrow_memory import check_memory
from vitft.data.sources.folders import Folder, Listing
from vitft.data.sources.layouts import read_folder
from vitft.data.sources.schema import COLUMNS, OF_TEXT, Notes, ReadOptions, Splits, role_of
from vitft.data.sources.tables.files import TABLE_SUFFIXES, read_table
from vitft.errors import DataError
from vitft.io.console import counted

IN_MEMORY_BYTES = 4_000_000_000


def read(path: Path, options: ReadOptions, notes: Notes) -> Splits:
    """Read any file or folder into splits with columns `image` and `label`, and add to `notes` how.

    Raises VitftError.
    """
    try:
        if path.is_file():
            if path.suffix.lower() == ".parquet":
                return read_parquet(by_split([path]), options, notes)
            if path.suffix.lower() in TABLE_SUFFIXES:
                return read_table(path, options, notes)
            if is_archive(path.name):
                return read_archives(by_split([path]), options, notes)
            raise DataError(f"{path} is not a dataset; give a folder, or a .csv, .jsonl, .parquet, .zip or .tar file.")
        if (batches := arrays.cifar_folder(path)) is not None:
            others = [name for name in COLUMNS if name != "label_column"]
            options.refuse(f"{path} has the original batches of CIFAR, not a table", *others, *OF_TEXT)
            return arrays.read_cifar(batches, options.label_column)
        if any((path / name).is_file() for name in _SAVED):
            return _read_saved(path, options, notes)
        listing = Listing(path.absolute())
        if files := find_files(listing.tree, lambda name: name.endswith(".parquet")):
            if listing.tree.count:
                notes.warn(
                    f"only the parquet files are read, not the {counted(listing.tree.count, 'image')} beside them"
                )
            return read_parquet(files, options, notes)
        if not listing.tree.count and (files := find_files(listing.tree, is_archive)):
            return read_archives(files, options, notes)
        return read_folder(path, listing, options, notes)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


_SAVED = ("dataset_dict.json", "dataset_info.json")  # written by save_to_disk


def _read_saved(path: Path, options: ReadOptions, notes: Notes) -> Splits:
    """Read what `Dataset.save_to_disk` wrote. Raises VitftError."""
    options.refuse(f"{path} was written by save_to_disk, not as text", *OF_TEXT)
    for state in path.rglob("state.json"):
        try:
            files = [str(file["filename"]) for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{state} is not what save_to_disk writes ({reason}); save the dataset again.") from error
        if outside := [file for file in files if Path(file).name != file]:
            raise DataError(f"{state} names {outside[0]}, outside of its folder; this dataset is not safe to open.")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets, pyarrow and json each raise their own
        raise DataError(f"{path} cannot be loaded by datasets: {' '.join(str(error).split())[:300]}") from error
    raw = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    return features.normalize_splits(raw, path, options, notes)


def find_files(tree: Folder, wanted: Callable[[str], bool]) -> dict[str, list[Path]]:
    """Files by split: in the folder itself, in folders named like splits, or in data/ or the only folder.

    Raises DataError for files in several other folders.
    """

    def within(folder: Folder) -> list[Path]:
        return [Path(folder.path, file.name) for file in folder.others if wanted(file.name)]

    if files := within(tree):
        return by_split(files)
    if by_folder := {inner.name: files for inner in tree.folders if role_of(inner.name) and (files := within(inner))}:
        return by_folder
    inner = [folder for folder in tree.folders if any(map(within, (folder, *folder.folders)))]
    data = [folder for folder in inner if folder.name == "data"] or inner
    if len(data) > 1:
        kind = "parquet files" if wanted(".parquet") else "archives"
        names = ", ".join(folder.name for folder in data)
        raise DataError(f"{tree.path} holds {kind} in {len(data)} folders: {names}; give one of them.")
    return find_files(data[0], wanted) if data else {}


def read_parquet(files: dict[str, list[Path]], options: ReadOptions, notes: Notes) -> Splits:
    """Read the image and label columns of parquet files, with the features that `datasets` wrote into them."""
    all_files = [file for of_split in files.values() for file in of_split]
    options.refuse(f"{all_files[0].name} is a parquet file, not text", *OF_TEXT)
    if sum(file.stat().st_size for file in all_files) > IN_MEMORY_BYTES:
        raw = {name: datasets.Dataset.from_parquet(list(map(str, of_split))) for name, of_split in files.items()}
        return features.normalize_splits(raw, all_files[0].parent, options, notes)
    splits = {name: _parquet_split(name, of_split, options, notes) for name, of_split in files.items()}
    first = features.features_of(pq.read_schema(all_files[0]))

    def read_all(names: list[str]) -> pa.Table:
        return pa.concat_tables([_read_columns(file, names) for file in all_files], promote_options="permissive")

    return features.divide(splits, first, read_all, all_files[0], options, notes)


def _read_columns(file: Path, names: list[str]) -> pa.Table:
    check_memory(file, names)
    return pq.read_table(file, columns=names, memory_map=True, partitioning=None)


def _parquet_split(name: str, files: list[Path], options: ReadOptions, notes: Notes) -> datasets.Dataset:
    parts = []
    for file in files:
        try:
            columns, read = features.features_of(pq.read_schema(file)), partial(_read_columns, file)
            parts.append((str(file), features.normalize(name, columns, read, options, notes)))
        except DataError as error:
            raise error if str(file.parent) in str(error) else DataError(f"{file}: {error}") from error
        except Exception as error:  # corrupt files fail in pyarrow, in datasets, or when text is decoded
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{file} is not a readable parquet file: {reason}") from error
    return features.concatenate(parts, name)


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Files by split, from their names: train-00000-of-00002 and mnist_train are train; all are if no name tells."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[\W\d_]+", file.stem.casefold())
        words += [word.removesuffix("set") for word in words]
        name = next(filter(role_of, words), "") or next(filter(None, words), "unnamed")
        splits.setdefault(name, []).append(file)
    return splits if any(map(role_of, splits)) else {"train": files}
