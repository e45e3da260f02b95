"""Which column of a table is the image, the label, the split: by its content first, then by its name.

Ambiguous tables are refused with the flag that decides; every choice is noted.
"""

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from vitft.data.sources.schema import MISSING, ROLES, Notes, ReadOptions
from vitft.data.sources.tables.image_paths import ImagePaths
from vitft.data.sources.tables.rows import FOLD, IMAGE, LABEL, SPLIT, Table, shorten, simplify
from vitft.errors import DataError, UsageError, nearest

_FLAGS = {  # columns of yes and no, and the role that a yes gives
    **dict.fromkeys(("train", "istrain", "training", "istraining", "istrainingimage", "istrainingimg"), "train"),
    **dict.fromkeys(("val", "isval", "valid", "isvalid", "validation", "isvalidation", "dev", "isdev"), "validation"),
    **dict.fromkeys(("test", "istest", "testing", "istesting"), "test"),
}
_YES, _NO = {"1", "1.0", "true", "t", "yes", "y"}, {"0", "0.0", "false", "f", "no", "n"}
_WORDS = {  # names of splits, as `simplify` writes them, in addition to schema.ROLES
    "train": ("trn", "trainset", "trainingset", "trainval", "trainvalid"),
    "validation": ("eval", "evaluation", "devel", "development", "valset", "validationset", "publictest"),
    "test": ("tst", "testset", "privatetest", "heldout", "holdout"),
}
_ROLE_OF = {simplify(word): role for known in (ROLES, _WORDS) for role, words in known.items() for word in words}
_MAX_SPLITS = 20  # distinct values of a split or fold column
_SAMPLE_ROWS = 200  # for detecting the image column


def join_names(names: Sequence[str], count: int = 6) -> str:
    """The first of some names, and how many there are."""
    return ", ".join(names[:count]) + (f", ... ({len(names)})" if len(names) > count else "")


def _ambiguous(table: Table, columns: Sequence[str], what: str, flag: str) -> DataError:
    return DataError(f"{table.path}: columns {join_names(columns, 12)} {what}; choose one with {flag}.")


def _requested(table: Table, wanted: str, flag: str) -> str:
    """The column requested by a flag, by name or number. Raises DataError."""
    if wanted in table.names:
        return wanted
    similar = [name for name in table.names if simplify(name) == simplify(wanted)]
    if len(similar) == 1:
        return similar[0]
    if wanted.isdecimal() and 1 <= int(wanted) <= len(table.names):
        return table.names[int(wanted) - 1]
    raise DataError(
        f"{flag}: {table.path} has no column {wanted!r}{nearest(wanted, table.names)}; "
        f"the columns are {join_names(table.names, 20)}."
    )


def cell_path(cell: Any) -> Any:
    """The path in a cell, which may also be {"path": ...}, as `datasets` writes it, or a number."""
    cell = cell.strip() if isinstance(cell, str) else cell
    if isinstance(cell, str) and cell.startswith("{") and cell.endswith("}"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                cell = parse(cell)
                break
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("filename") or cell.get("file_name")
    return str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else cell


# -- the image ------------------------------------------------------------------------------------


def image_column(table: Table, image_paths: ImagePaths, wanted: str | None, notes: Notes) -> str:
    """The column whose cells name files. Raises DataError if several name different files, or none does."""
    if wanted is not None:
        return _requested(table, wanted, "--image-column")
    count = len(table.lines)
    rows = range(0, count, max(1, count // _SAMPLE_ROWS))
    guesses: dict[str, list[tuple[str | None, bool]]] = {}
    for name, cells in table.columns.items():
        paths = [cell_path(cells[row]) for row in rows]
        guesses[name] = [image_paths.guess(path) if isinstance(path, str) else (None, False) for path in paths]
    hits = {name: sum(file is not None for file, _ in files) for name, files in guesses.items()}
    exact = {name for name, files in guesses.items() if any(is_exact for _, is_exact in files)}
    likely = [name for name in table.names if hits[name] and (not exact or name in exact)]
    likely = [name for name in likely if simplify(name) not in (*LABEL, *SPLIT)] or likely
    most = max((hits[name] for name in likely), default=0)
    likely = [name for name in likely if 2 * hits[name] > most]
    if len({tuple(str(file) for file, _ in guesses[name]) for name in likely}) > 1:
        usual = [name for name in likely if simplify(name) in IMAGE]
        if len(usual) != 1:
            raise _ambiguous(table, likely, "name files", "--image-column")
        likely = usual
    candidates = likely or [name for name in table.names if simplify(name) in IMAGE]
    if not candidates:
        raise DataError(
            f"{table.path}: no column names files in {image_paths.folders[0]}; the columns are "
            f"{join_names(table.names, 20)}; choose one with --image-column, or give the folder of the images with "
            "--image-folder."
        )
    column = min(candidates, key=lambda name: _rank(name, IMAGE))
    notes.decide(f"images: column {column!r}, {'whose cells name files' if likely else 'by its name'}")
    return column


def _rank(name: str, known: Sequence[str]) -> int:
    return known.index(simplify(name)) if simplify(name) in known else len(known)


# -- the split ------------------------------------------------------------------------------------


def read_splits(table: Table, taken: set[str], options: ReadOptions, notes: Notes) -> tuple[list[str] | None, set[str]]:
    """The split of every row, None if no column gives it; and the columns used.

    Raises DataError for contradictory columns, UsageError for a fold column without a fold.
    """
    if options.fold_column is not None and options.fold is None:
        raise UsageError(f"--fold-column {options.fold_column} needs --fold, the fold used for validation.")
    used: set[str] = set()
    splits: list[str] | None = None
    if options.split_column is not None:
        column = _requested(table, options.split_column, "--split-column")
        splits, used = _by_names(table, column, notes), {column}
    else:
        rest = [name for name in table.names if name not in taken]
        words = {name: {*map(simplify, _values(table[name]))} for name in rest}
        by_content = [name for name in rest if words[name] and words[name] <= _ROLE_OF.keys()]
        flags = {name: role for name in rest if (role := _FLAGS.get(simplify(name))) and _is_binary(table[name])}
        if all(not simplify(name).startswith("is") for name in flags) and len(set(flags.values())) < 2:
            flags = {}  # in a one-hot table, a lone column `train` may be a class
        by_name = [name for name in rest if simplify(name) in SPLIT[:3]]
        if by_content:
            column = _choose_split_column(table, by_content, notes)
            splits, used = _by_names(table, column, notes), {column}
        elif flags:
            splits, used = _by_flags(table, flags, notes), set(flags)
        elif by_name and options.fold is None and 1 < len(_values(table[by_name[0]])) <= _MAX_SPLITS:
            splits, used = _by_names(table, by_name[0], notes), {by_name[0]}
        else:
            _warn_of_unused_splits(table, rest, notes)
    folds = _fold_columns(table, taken | used, options)
    if options.fold is not None:
        splits = _by_fold(table, folds[0], options.fold, splits, notes)
    for column in folds if options.fold is None else ():
        values = join_names(sorted(_values(table[column]), key=float))
        notes.warn(f"column {column!r} looks like folds ({values}) and is not used; --fold K validates on one of them")
    return splits, used.union(folds)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _values(cells: Sequence[Any]) -> list[str]:
    """The distinct values of a column without missing ones; of many values, only the first."""
    values: dict[str, None] = {}
    for cell in cells:
        if len(values) > _MAX_SPLITS:
            break
        values[_text(cell)] = None
    return [value for value in values if value not in MISSING]


def _is_binary(cells: Sequence[Any]) -> bool:
    values = {value.casefold() for value in _values(cells)}
    return bool(values) and (values <= _YES | _NO)


def _are_numbers(values: Collection[str]) -> bool:
    return all(_number(value) is not None for value in values)


def _choose_split_column(table: Table, columns: list[str], notes: Notes) -> str:
    """The split column with the best name. Raises DataError if others disagree, unless it is called `split`."""
    chosen = min(columns, key=lambda name: _rank(name, SPLIT))

    def roles(name: str) -> list[str | None]:
        return [_ROLE_OF.get(simplify(_text(cell))) for cell in table[name]]

    differing = [name for name in columns if name != chosen and roles(name) != roles(chosen)]
    if differing and simplify(chosen) != "split":
        raise _ambiguous(table, columns, "hold different splits", "--split-column")
    if differing:
        notes.warn(f"column {join_names(differing)} differs from {chosen!r} and is not used (see --split-column)")
    return chosen


def _by_names(table: Table, column: str, notes: Notes) -> list[str]:
    """Splits from a column of their names; spellings of one role are merged."""
    cells = [_text(cell) for cell in table[column]]
    counts = Counter(cells)
    values = [value for value in counts if value not in MISSING]
    if values and _are_numbers(values):
        raise DataError(
            f"{table.path}: column {column!r} holds numbers ({join_names(sorted(values, key=float))}), not "
            f"train, validation, test; write these, or use it for folds: --fold-column {column} --fold K."
        )
    roles = {value: _ROLE_OF.get(simplify(value)) for value in values}
    public = [value for value in values if simplify(value) == "publictest"]
    if public and any(role == "validation" and value not in public for value, role in roles.items()):
        roles |= dict.fromkeys(public, "test")
    name_of = {}
    for value, role in roles.items():
        is_only = sum(other == role for other in roles.values()) == 1
        # Existing runs recorded the split's own name, so it is kept where it is a usual one.
        name_of[value] = value if role is None or (is_only and value.lower() in ROLES[role]) else role
    names = [
        f"{value} ({counts[value]:,})" + (f" is {name_of[value]}" if name_of[value] != value else "")
        for value in values
    ]
    if blank := sum(counts[value] for value in counts if value not in roles):
        sentence = f"{blank:,} rows have no split in column {column!r} and are used for training"
        (notes.warn if "train" in roles.values() else notes.decide)(sentence)
        train = next((name for name in name_of.values() if _ROLE_OF.get(simplify(name)) == "train"), "train")
        name_of |= {value: train for value in counts if value not in roles}
    if unused := [value for value, role in roles.items() if role is None]:
        notes.warn(f"column {column!r}: rows of {join_names(unused)} are not used; only train, validation, test are")
    notes.decide(f"splits: column {column!r}: {join_names(names)}")
    return [name_of[cell] for cell in cells]


def _by_flags(table: Table, flags: dict[str, str], notes: Notes) -> list[str]:
    """Splits from columns of yes and no. Rows without a yes are train or, if that has a column, test."""
    by_role: dict[str, str] = {}
    for name, role in flags.items():
        if role in by_role:
            raise DataError(f"{table.path}: columns {by_role[role]}, {name} both mark {role}; remove one.")
        by_role[role] = name
    default = "train" if "train" not in by_role else "test" if "test" not in by_role else "validation"
    splits = []
    columns = [(role, table[name]) for role, name in by_role.items()]
    for row in range(len(table.lines)):
        roles = [role for role, cells in columns if _text(cells[row]).casefold() in _YES]
        if len(roles) > 1:
            raise DataError(f"{table.where(row)} is both {roles[0]} and {roles[1]}, by {join_names(list(flags))}.")
        if not roles and len(by_role) == 3:
            raise DataError(f"{table.where(row)} is in no split, by {join_names(list(flags))}.")
        splits.append(roles[0] if roles else default)
    counts = Counter(splits)
    summary = ", ".join(f"{role} {counts[role]:,}" for role in ROLES if role in counts)
    notes.decide(f"splits: column {', '.join(map(repr, flags))}: {summary}")
    return splits


def _warn_of_unused_splits(table: Table, rest: list[str], notes: Notes) -> None:
    """Warn of columns that look like splits but are not used."""
    for name in rest:
        values = _values(table[name])
        is_fold = simplify(name) in FOLD and _are_numbers(values)
        if not 1 < len(values) <= _MAX_SPLITS or is_fold:
            continue
        roles = {_ROLE_OF.get(simplify(value)) for value in values} - {None}
        if len(roles) > 1 or simplify(name) in (*SPLIT, *FOLD):
            notes.warn(
                f"column {name!r} looks like a split ({join_names(values)}) and is not used; "
                f"--split-column {name} uses it"
            )
        elif simplify(name) in _FLAGS and _is_binary(table[name]):
            notes.warn(f"column {name!r} looks like a split and is not used; write train and {name} in a column split")


# -- folds ----------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fold_columns(table: Table, taken: set[str], options: ReadOptions) -> list[str]:
    """The columns that look like folds; exactly one if a fold is requested. Raises DataError."""
    if options.fold_column is not None:
        return [_requested(table, options.fold_column, "--fold-column")]
    columns = []
    for name in table.names:
        if name not in taken and simplify(name).rstrip("0123456789") in FOLD:
            values = _values(table[name])
            if 1 < len(values) <= _MAX_SPLITS and _are_numbers(values):
                columns.append(name)
    if options.fold is not None and len(columns) != 1:
        what = f"columns {join_names(columns)} look like folds" if columns else "no column looks like folds"
        raise DataError(f"{table.path}: {what}, of {join_names(table.names, 20)}; choose one with --fold-column.")
    return columns


def _by_fold(table: Table, column: str, fold: int, splits: list[str] | None, notes: Notes) -> list[str]:
    """Turn one fold of the training and validation rows into the validation split."""
    numbers = [_number(_text(cell)) for cell in table[column]]
    known = sorted({number for number in numbers if number is not None})
    if fold not in known:
        folds = join_names([f"{number:g}" for number in known])
        raise DataError(f"--fold {fold}: column {column!r} of {table.path} has the folds {folds or 'none'}.")
    splits = list(splits) if splits is not None else ["train"] * len(numbers)
    if any(_ROLE_OF.get(simplify(name)) == "validation" for name in splits):
        notes.warn(f"--fold {fold} replaces the validation split; its rows of other folds are used for training")
    counts: Counter[float] = Counter()
    for row, number in enumerate(numbers):
        if _ROLE_OF.get(simplify(splits[row])) not in ("train", "validation"):
            continue
        if number is None:
            raise DataError(
                f"{table.where(row)} has {_text(table[column][row])!r} in column {column!r}, not the number of a fold."
            )
        splits[row] = "validation" if number == fold else "train"
        counts[number] += 1
    validated = counts.pop(fold, 0)
    trained = join_names([f"{number:g} ({count:,})" for number, count in sorted(counts.items())])
    notes.decide(f"folds: column {column!r}: {fold} ({validated:,}) is validation, {trained} are train")
    return splits


# -- the label ------------------------------------------------------------------------------------


def label_columns(table: Table, wanted: str | None) -> set[str]:
    """The columns with usual names of labels, or the requested one."""
    if wanted is not None:
        return {_requested(table, wanted, "--label-column")}
    return {name for name in table.names if simplify(name) in LABEL}


def read_labels(
    table: Table, taken: set[str], image: str, wanted: str | None, splits: list[str], notes: Notes
) -> tuple[list[str | None], list[str]]:
    """The label of every row as text, None if it is missing; and the columns used. Raises DataError.

    `splits` are those of the rows, if any: in a one-hot table, rows of a test split may have no label.
    """
    if wanted is not None:
        column = _requested(table, wanted, "--label-column")
        notes.decide(f"labels: column {column!r}, as requested")
        return _as_labels(table, column, notes), [column]
    rest = [name for name in table.names if name not in taken]
    usual = [name for name in rest if simplify(name) in LABEL]
    if usual:
        column = _choose_label_column(table, usual, notes)
        return _as_labels(table, column, notes), [column]
    filled = [name for name in rest if _values(table[name])]
    binary = [name for name in filled if _is_binary(table[name])]
    if len(binary) > 1 and (labels := _one_hot(table, binary, splits)) is not None:
        notes.decide(f"labels: one-hot in {len(binary)} columns: {join_names(binary)}")
        return labels, binary
    if len(filled) == 1:
        return _only_column(table, filled[0], notes), filled
    if not filled:
        return _folder_names(table, image, notes), []
    raise _ambiguous(table, filled, "could be the label", "--label-column")


def _choose_label_column(table: Table, usual: list[str], notes: Notes) -> str:
    """The label column with the best name. Of class names and their numbers, the names. Raises DataError."""
    usual = sorted(usual, key=lambda name: _rank(name, LABEL))
    chosen = usual[0]
    for other in usual[1:]:
        pairs = {(_text(a), _text(b)) for a, b in zip(table[chosen], table[other], strict=True)}
        first, second = {a for a, _ in pairs}, {b for _, b in pairs}
        if len(pairs) == len(first) == len(second):  # the same classes, written in two ways
            if _are_numbers(first) and not _are_numbers(second):
                chosen = other
        elif simplify(chosen) not in ("label", "labels"):
            raise _ambiguous(table, usual, "could be the label", "--label-column")
    notes.decide(f"labels: column {chosen!r}, by its name")
    return chosen


def _only_column(table: Table, column: str, notes: Notes) -> list[str | None]:
    labels = _as_labels(table, column, notes)
    if len(set(labels)) == len(labels) >= 10:
        raise DataError(
            f"{table.path}: column {column!r}, the only candidate for the label, differs in each of {len(labels):,} "
            f"rows; --label-column {column} uses it anyway."
        )
    notes.decide(f"labels: column {column!r}, the only other one")
    return labels


def _as_labels(table: Table, column: str, notes: Notes) -> list[str | None]:
    """Cells as class names. Raises DataError for a cell that cannot be one, and for text mixed with numbers."""
    labels: list[str | None] = []
    kinds: dict[str, int] = {}
    known: dict[str, tuple[str, str | None]] = {}
    for row, cell in enumerate(table[column]):
        kind, label = known.get(cell) or known.setdefault(cell, _label(cell)) if isinstance(cell, str) else _label(cell)
        if label is None and kind:
            shown = shorten(repr(cell))
            raise DataError(f"{table.where(row)}: the label is {kind} ({shown}); a class is a name or a whole number.")
        if label is not None:
            kinds.setdefault(kind, row)
        labels.append(label)
    if len(kinds) > 1:
        (kind_a, row_a), (kind_b, row_b) = list(kinds.items())[:2]
        raise DataError(
            f"{table.path}: the labels are of several types: {kind_a} on {table.unit} {table.lines[row_a]}, "
            f"{kind_b} on {table.unit} {table.lines[row_b]}; write all of them the same way."
        )
    spelled = {cell for cell in table[column] if isinstance(cell, str) and cell.strip() not in MISSING}
    for one, other in pairwise(sorted(spelled, key=lambda cell: (cell.strip(), -len(cell)))):
        if one.strip() == other.strip():
            notes.warn(f"labels that differ only in surrounding spaces are one class: {one!r} and {other!r}")
            break
    return labels


def _label(cell: Any) -> tuple[str, str | None]:
    """A cell's type and class name. A missing label has neither; an impossible one has only a type."""
    match cell:
        case None:
            return "", None
        case bool():
            return "true or false", str(cell).lower()
        case int():
            return ("a number", str(cell)) if abs(cell) < 2**63 else ("a number of over 63 bits", None)
        case float():
            if math.isnan(cell):
                return "", None
            return "a number", str(int(cell)) if cell.is_integer() and abs(cell) < 2**53 else repr(cell)
        case str():
            if (cell := cell.strip()) in MISSING:
                return "", None
            if _SURROGATE.search(cell):
                return "half of a surrogate pair, not text", None
            return "text", cell
        case list():
            return "a list", None
        case _:
            return "an object", None


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _one_hot(table: Table, columns: list[str], splits: list[str]) -> list[str | None] | None:
    """The label from one-hot columns; None if a row has several ones, or a row outside of the test split has none."""
    labels: list[str | None] = []
    cells = [(name, table[name]) for name in columns]
    for row in range(len(table.lines)):
        hot = [name for name, column in cells if _text(column[row]).casefold() in _YES]
        if len(hot) > 1 or not (hot or (splits and _ROLE_OF.get(simplify(splits[row])) == "test")):
            return None
        labels.append(hot[0] if hot else None)
    return labels


def _folder_names(table: Table, image: str, notes: Notes) -> list[str | None]:
    """In a mere list of paths, an image's label is the name of its folder."""
    paths = (str(cell_path(cell)).replace("\\", "/") for cell in table[image])
    folders = [path.rpartition("/")[0].rpartition("/")[2] for path in paths]
    if len(set(folders)) < 2:
        raise DataError(
            f"{table.path} has no labels: its only column is {image!r}, and all images are in one folder; "
            "add a column label."
        )
    notes.decide(f"labels: the name of each image's folder, since the only column is {image!r}")
    return [folder or None for folder in folders]
