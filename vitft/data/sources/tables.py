"""Data sets given as a table of image paths and labels: `rows` reads it, `columns` says what is what."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vitft.data.sources import columns
from vitft.data.sources.image_paths import Misnamed, Names, absolute, named_file, role_within
from vitft.data.sources.rows import Table, in_short, read_rows
from vitft.data.sources.schema import Notes, Reading, image_structs, in_memory, make_split, role_of
from vitft.errors import DataError
from vitft.io.paths import expanded

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")


def read_table(
    path: Path, reading: Reading, notes: Notes, root: Path | None = None
) -> dict[str, datasets.Dataset]:  # fmt: skip
    """Read a file of paths, labels and perhaps splits, by the columns that its rows have.

    Images are named relative to `root`, by default the folder that the table's paths start from. Raises VitftError.
    """
    folder = None if reading.image_folder is None else expanded(reading.image_folder)
    names = Names(path, folder, allow_outside=reading.allow_outside)
    table = read_rows(path, reading.encoding, columns.KNOWN, lambda cell: names.meant(cell)[0] is not None, notes)
    _tell_siblings(path, notes)
    image = columns.image_column(table, names, reading.image_column, notes)
    taken = {image, *columns.labels_by_name(table, reading.label_column)}
    assigned, used = columns.split_of_rows(table, taken, reading, notes)
    used = {image, *used}
    labels, telling = columns.labels_of_rows(table, used, image, reading.label_column, assigned or [], notes)
    if unused := [name for name in table.names if name not in used.union(telling)]:
        notes.decide(f"not used: column {columns.listed(unused)}")
    files = _files(table, image, names, assigned, notes)
    _tell_repeated(files, labels, assigned, notes)
    splits: dict[str, list[int]] = {}
    for row, name in enumerate(assigned or ["train"] * len(files)):
        splits.setdefault(name, []).append(row)
    root = Path(names.folders[0] if root is None else os.path.abspath(root))  # noqa: PTH100  (as in `absolute`)
    return {
        name: _split(root, [files[row] for row in rows], [labels[row] for row in rows]) for name, rows in splits.items()
    }


def _tell_siblings(path: Path, notes: Notes) -> None:
    """Tell of tables of other splits beside one that is called after its own: `val.csv` beside `train.csv`."""
    if (role := role_within(path.stem)) is None:
        return
    roles = {other.name: role_within(other.stem) for other in sorted(path.parent.glob(f"*{path.suffix}"))}
    if others := [name for name, its in roles.items() if its not in (None, role)]:
        notes.decide(f"{', '.join(others[:5])} beside it is not read; one table with a column split would hold all")


def _files(table: Table, image: str, names: Names, assigned: Sequence[str] | None, notes: Notes) -> list[str]:
    """The file of every row. Raises DataError for a cell that is no path, and where no file is there."""
    roles = {name: role_of(name) for name in set(assigned or ())}
    files, missing = [], []
    for row, cell in enumerate(table[image]):
        try:
            name = columns.cell_path(cell)
            if not isinstance(name, str):
                raise Misnamed(f"{in_short(repr(cell))} is no path of an image.")
            file, there = names.find(name, roles[assigned[row]] if assigned else None)
        except Misnamed as error:
            raise DataError(f"{table.where(row)}: {error}") from error
        files.append(file)
        if not there:
            missing.append(row)
    names.tell(notes)
    if missing:
        first = f"the first is {columns.cell_path(table[image][missing[0]])}, {table.unit} {table.lines[missing[0]]}"
        if len(missing) == len(files):
            raise DataError(
                f"{table.path}: none of the {len(files):,} images of column {image!r} is in {names.folders[0]}; "
                f"{first}; name the folder of the images with --image-folder."
            )
        notes.warn(f"{len(missing):,} of {len(files):,} images are not there: {first}")
    return files


def _tell_repeated(files: list[str], labels: Sequence[Any], assigned: Sequence[str] | None, notes: Notes) -> None:
    """Warn of images that stand in several rows: worse than twice, with two labels, or in two splits."""
    if len(set(files)) == len(files):
        return
    first: dict[str, int] = {}
    twice: list[str] = []
    labeled: list[str] = []
    leaked: list[str] = []
    for row, file in enumerate(files):
        earlier = first.setdefault(file, row)
        if earlier != row:
            other_split = assigned is not None and assigned[row] != assigned[earlier]
            (leaked if other_split else labeled if labels[row] != labels[earlier] else twice).append(file)
    for found, what in ((leaked, "in two splits"), (labeled, "with two labels"), (twice, "twice")):
        if found:
            notes.warn(f"{len(found):,} rows name an image {what}; the first is {found[0]}")


def _split(root: Path, files: list[str], labels: list[Any], names: Iterable[str] | None = None) -> datasets.Dataset:
    try:
        return make_split(image_structs(None, files), labels, names, root)
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8; rename it.") from error


def located(name: str, split: datasets.Dataset, folders: tuple[Path, ...], *, allow_outside: bool) -> datasets.Dataset:
    """A split whose images may be paths that its maker wrote down: relative to the first folder, made absolute.

    Raises DataError for one that leads out of the folders: whoever made the data set could name any file here.
    """
    roots = absolute(folders)
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
    try:
        files = [named_file(folders, one, allow_outside=allow_outside) if by_name else one for by_name, one in pairs]
    except Misnamed as error:
        raise DataError(f"{where}: {error}") from error
    return pa.StructArray.from_arrays([data, pa.array(files, pa.string())], ["bytes", "path"])
