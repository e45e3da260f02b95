"""Data sets given as a table: CSV, TSV or JSONL of image path and label."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vitft.data.schema import LABEL_NAMES, Notes, Reading, image_structs, in_memory, make_split
from vitft.errors import DataError, nearest

PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image_path", "image", "img")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")


def read_table(path: Path, reading: Reading, notes: Notes) -> dict[str, datasets.Dataset]:
    """Read a CSV, TSV or JSONL file of image path (relative to its own folder), label and perhaps split."""
    try:
        rows = list(_json_rows(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text in columns: {error}.") from error
    if not rows:
        raise DataError(f"{path} has no rows; give one line an image, with its path and label.")
    columns = {name: None for row in rows for name in row}
    path_column = _column(path, columns, reading.image_column, PATH_NAMES, "--image-column")
    rest = [name for name in columns if name not in (path_column, "split")]
    known = LABEL_NAMES if len(rest) != 1 else (*LABEL_NAMES, rest[0])
    label_column = _column(path, dict.fromkeys(rest), reading.label_column, known, "--label-column")
    splits: dict[str, list[tuple[Path, Any]]] = {}
    folders = _absolute((path.parent,))
    for number, row in enumerate(rows, 1):
        file = _named_file(folders, row.get(path_column), f"{path} row {number}", allow_outside=reading.allow_outside)
        splits.setdefault(str(row.get("split") or "train"), []).append((file, row.get(label_column)))
    return {name: file_split(Path(folders[0]), found) for name, found in splits.items()}


def file_split(root: Path, rows: list[tuple[Path, Any]], names: Iterable[str] | None = None) -> datasets.Dataset:
    """A raw split of files and their labels: values, or indices into `names`; `root` lies above all files."""
    paths = [str(file.absolute()) for file, _ in rows]
    labels = [label for _, label in rows]
    try:
        images = image_structs(None, paths)
        return make_split(images, labels, names, root)
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8; rename it.") from error
    except pa.ArrowException as error:
        raise DataError(f"the labels under {root} are of several kinds: {error}") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        for row in csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True):
            yield {name: value for name, value in row.items() if name is not None}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is no JSON object; expected " + '{"path": ..., "label": ...}.')
            yield row


def _column(path: Path, columns: dict[str, None], wanted: str | None, known: tuple[str, ...], flag: str) -> str:
    listed = f"the columns are {', '.join(columns) or 'none'}"
    if wanted is not None and wanted not in columns:
        raise DataError(f"{path} has no column {wanted!r}{nearest(wanted, columns)}; {listed}.")
    found = wanted or next((name for name in known if name in columns), None)
    if found is None:
        raise DataError(f"{path} has none of the columns {', '.join(known[:3])} ...; {listed}; name one with {flag}.")
    return found


def located(name: str, split: datasets.Dataset, folders: tuple[Path, ...], *, allow_outside: bool) -> datasets.Dataset:
    """A split whose images may be paths that its maker wrote down: relative to the first folder, made absolute.

    Raises DataError for one that leads out of the folders: whoever made the data set could name any file here.
    """
    roots = _absolute(folders)
    chunks = [
        _located(chunk, roots, f"split {name}", allow_outside=allow_outside)
        for chunk in split.data.column("image").chunks
    ]
    images = pa.chunked_array(chunks, split.data.schema.field("image").type)
    return in_memory(pa.table({"image": images, "label": split.data.column("label")}), split.info, name)


def _located(chunk: pa.Array, folders: Sequence[str], where: str, *, allow_outside: bool) -> pa.Array:
    data, path = chunk.flatten()
    named = pc.and_(pc.is_null(data), pc.is_valid(path))
    if not pc.any(named).as_py():
        return chunk
    pairs = zip(named.to_pylist(), path.to_pylist(), strict=True)
    files = [
        str(_named_file(folders, one, where, allow_outside=allow_outside)) if by_name else one for by_name, one in pairs
    ]
    return pa.StructArray.from_arrays([data, pa.array(files, pa.string())], ["bytes", "path"])


def _absolute(folders: Iterable[Path]) -> list[str]:
    return [os.path.abspath(folder) for folder in folders]  # noqa: PTH100  (resolve() would follow links)


def _named_file(folders: Sequence[str], name: Any, where: str, *, allow_outside: bool) -> Path:
    """The file that a data set in these folders names, `where` it does. Raises DataError for one outside of them.

    By name alone: a link that the folder's owner put there may lead where it likes.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: {name!r} is no path of an image.")
    file = os.path.normpath(os.path.join(folders[0], name))  # noqa: PTH118  (hot loop)
    if not allow_outside and not any(file.startswith(f"{folder}{os.sep}") for folder in folders):
        raise DataError(f"{where}: {name} leads out of {folders[0]}; where that is meant, add --allow-outside.")
    return Path(file)
