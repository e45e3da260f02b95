"""Tables of image paths and labels: `rows` reads the file, `columns` tells which column is which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitft.data.sources.schema import Notes, ReadOptions, Splits, group_rows, role_of, split_of_files
from vitft.data.sources.tables import columns
from vitft.data.sources.tables.image_paths import ImagePaths, PathError, absolute, role_within
from vitft.data.sources.tables.rows import Table, read_rows, shorten
from vitft.errors import DataError
from vitft.io.paths import expanded

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")


def read_table(path: Path, options: ReadOptions, notes: Notes, root: Path | None = None) -> Splits:
    """Read a file of paths, labels and optionally splits. Raises VitftError.

    Images are named relative to `root`, by default the folder where the table's paths start.
    """
    folder = None if options.image_folder is None else expanded(options.image_folder)
    image_paths = ImagePaths(path, folder, allow_outside=options.allow_outside)
    table = read_rows(path, options.encoding, lambda cell: image_paths.guess(cell)[0] is not None, notes)
    _note_sibling_tables(path, notes)
    image = columns.image_column(table, image_paths, options.image_column, notes)
    taken = {image, *columns.label_columns(table, options.label_column)}
    row_splits, used = columns.read_splits(table, taken, options, notes)
    used = {image, *used}
    labels, label_columns = columns.read_labels(table, used, image, options.label_column, row_splits or [], notes)
    if unused := [name for name in table.names if name not in used.union(label_columns)]:
        notes.decide(f"not used: column {columns.join_names(unused)}")
    files = _find_files(table, image, image_paths, row_splits, notes)
    _warn_of_repeated(files, labels, row_splits, notes)
    root = Path(image_paths.folders[0] if root is None else absolute([root])[0])
    return {
        name: split_of_files([files[row] for row in rows], [labels[row] for row in rows], None, root)
        for name, rows in group_rows(row_splits or ["train"] * len(files)).items()
    }


def _note_sibling_tables(path: Path, notes: Notes) -> None:
    """Note tables of other splits beside one that is named after its own: `val.csv` beside `train.csv`."""
    if (role := role_within(path.stem)) is None:
        return
    roles = {other.name: role_within(other.stem) for other in sorted(path.parent.glob(f"*{path.suffix}"))}
    if others := [name for name, other in roles.items() if other not in (None, role)]:
        notes.decide(f"not read: {', '.join(others[:5])}; to use several tables, merge them and add a column split")


def _find_files(table: Table, image: str, paths: ImagePaths, splits: list[str] | None, notes: Notes) -> list[str]:
    """The file of every row. Raises DataError for a cell that is not a path, and if no file exists."""
    roles = {name: role_of(name) for name in set(splits or ())}
    files, missing = [], []
    for row, cell in enumerate(table[image]):
        try:
            path = columns.cell_path(cell)
            if not isinstance(path, str):
                raise PathError(f"{shorten(repr(cell))} is not an image path.")
            file, exists = paths.find(path, roles[splits[row]] if splits else None)
        except PathError as error:
            raise DataError(f"{table.where(row)}: {error}") from error
        files.append(file)
        if not exists:
            missing.append(row)
    paths.report(notes)
    if missing:
        first = f"first: {columns.cell_path(table[image][missing[0]])}, {table.unit} {table.lines[missing[0]]}"
        if len(missing) == len(files):
            raise DataError(
                f"{table.path}: none of the {len(files):,} images in column {image!r} exist in "
                f"{paths.folders[0]} ({first}); give the folder of the images with --image-folder."
            )
        notes.warn(f"{len(missing):,} of {len(files):,} images do not exist ({first})")
    return files


def _warn_of_repeated(files: list[str], labels: Sequence[Any], splits: list[str] | None, notes: Notes) -> None:
    """Warn of images in several rows: in two splits, with two labels, or just twice."""
    if len(set(files)) == len(files):
        return
    first: dict[str, int] = {}
    repeated: dict[str, list[str]] = {"in two splits": [], "with two labels": [], "twice": []}
    for row, file in enumerate(files):
        earlier = first.setdefault(file, row)
        if earlier == row:
            continue
        if splits is not None and splits[row] != splits[earlier]:
            repeated["in two splits"].append(file)
        else:
            repeated["with two labels" if labels[row] != labels[earlier] else "twice"].append(file)
    for how, again in repeated.items():
        if again:
            notes.warn(f"{len(again):,} rows name an image {how} (first: {again[0]})")
