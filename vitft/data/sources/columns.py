"""Which column of a table is what: the image, the label, the split, by what is in it and then by its name.

What several columns could be is refused, with the flag that decides it; all else is told.
"""

import ast
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vitft.data.sources.image_paths import Names
from vitft.data.sources.rows import Table, in_short, plain
from vitft.data.sources.schema import ROLES, Notes, Reading, is_missing
from vitft.errors import DataError, UsageError, nearest

# Usual names, as `plain` makes them, those that tell more first.
IMAGE = (
    "path", "file", "filename", "filepath", "filepaths", "imagepath", "imagefile", "imagefilename", "imagename",
    "image", "images", "img", "imgpath", "imgname", "photo", "picture", "imageid", "imgid", "id", "name",
)  # fmt: skip
LABEL = (
    "label", "labels", "finelabel", "labelname", "class", "classes", "classname", "classlabel", "category",
    "categoryname", "target", "classid", "labelid", "categoryid",
)  # fmt: skip
SPLIT = ("split", "datasplit", "splits", "subset", "partition", "usage", "set", "dataset", "phase")
_FOLD = ("fold", "folds", "kfold", "foldid", "cvfold", "cv")
KNOWN = {*IMAGE, *LABEL, *SPLIT, *_FOLD}
_FLAGS = {  # a column of yes and no, by the role of its yes
    "train": ("train", "istrain", "training", "istraining", "istrainingimage", "istrainingimg"),
    "validation": ("val", "isval", "valid", "isvalid", "validation", "isvalidation", "dev", "isdev"),
    "test": ("test", "istest", "testing", "istesting"),
}
_YES, _NO = {"1", "1.0", "true", "t", "yes", "y"}, {"0", "0.0", "false", "f", "no", "n"}
_WORDS = {  # what a split's name means, as `plain` makes it, beside schema.ROLES
    "train": ("trn", "trainset", "trainingset", "trainval", "trainvalid"),
    "validation": ("eval", "evaluation", "devel", "development", "valset", "validationset", "publictest"),
    "test": ("tst", "testset", "privatetest", "heldout", "holdout"),
}
_ROLE_OF = {plain(word): role for known in (ROLES, _WORDS) for role, words in known.items() for word in words}
_FEW = 20  # distinct values of a column that may be a split's or a fold's
_LOOKED_AT = 200  # rows by which columns are told apart

Assigned = list[str]
"""Of each row the split's name."""


def listed(names: Sequence[str], count: int = 6) -> str:
    """The first of some names, for a sentence, and how many there are."""
    return ", ".join(names[:count]) + (f", ... ({len(names)})" if len(names) > count else "")


def _asked(table: Table, wanted: str, flag: str) -> str:
    """The column that was asked for, by its name or its number. Raises DataError."""
    if wanted in table.names:
        return wanted
    alike = [name for name in table.names if plain(name) == plain(wanted)]
    if len(alike) == 1:
        return alike[0]
    if wanted.isdecimal() and 1 <= int(wanted) <= len(table.names):
        return table.names[int(wanted) - 1]
    raise DataError(
        f"{flag}: {table.path} has no column {wanted!r}{nearest(wanted, table.names)}; "
        f"the columns are {listed(table.names, 20)}."
    )


def cell_path(cell: Any) -> Any:
    """The path in a cell, which may be {"path": ...} as `datasets` writes it, or a number."""
    cell = cell.strip() if isinstance(cell, str) else cell
    if isinstance(cell, str) and cell.startswith("{") and cell.endswith("}"):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            try:
                cell = ast.literal_eval(cell)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return cell
    if isinstance(cell, dict):
        cell = cell.get("path") or cell.get("filename") or cell.get("file_name")
    return str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else cell


# -- the image ------------------------------------------------------------------------------------


def image_column(table: Table, names: Names, wanted: str | None, notes: Notes) -> str:
    """The column whose cells name files. Raises DataError where several name different ones, or none does."""
    if wanted is not None:
        return _asked(table, wanted, "--image-column")
    count = len(table.lines)
    rows = range(0, count, max(1, count // _LOOKED_AT))
    found: dict[str, list[tuple[str | None, bool]]] = {}
    for name, cells in zip(table.names, table.columns, strict=True):
        paths = [cell_path(cells[row]) for row in rows]
        found[name] = [names.meant(path) if isinstance(path, str) else (None, False) for path in paths]
    hits = {name: sum(file is not None for file, _ in files) for name, files in found.items()}
    exact = {name for name, files in found.items() if any(exactly for _, exactly in files)}
    likely = [name for name in table.names if hits[name] and (not exact or name in exact)]
    if len(likely) > 1:
        likely = [name for name in likely if plain(name) not in (*LABEL, *SPLIT)] or likely
    if len(likely) > 1:
        most = max(hits[name] for name in likely)
        likely = [name for name in likely if 2 * hits[name] > most]
    files = {name: [file for file, _ in found[name]] for name in likely}
    different = list({tuple(map(str, of)): name for name, of in files.items()}.values())
    if len(different) > 1:
        usual = [name for name in likely if plain(name) in IMAGE]
        if len(usual) != 1:
            raise DataError(f"{table.path}: columns {listed(likely)} name files; name one with --image-column.")
        likely = usual
    if likely:
        column = min(likely, key=lambda name: (_rank(name, IMAGE), table.names.index(name)))
        notes.decide(f"images: column {column!r}, for its cells name files")
        return column
    usual = sorted((n for n in table.names if plain(n) in IMAGE), key=lambda n: _rank(n, IMAGE))
    if not usual:
        raise DataError(
            f"{table.path}: no column names files in {names.folders[0]}; the columns are {listed(table.names, 20)}, "
            "name one with --image-column, or the folder of the images with --image-folder."
        )
    notes.decide(f"images: column {usual[0]!r}, by its name")
    return usual[0]


def _rank(name: str, known: Sequence[str]) -> int:
    return known.index(plain(name)) if plain(name) in known else len(known)


# -- the split ------------------------------------------------------------------------------------


def split_of_rows(table: Table, taken: set[str], reading: Reading, notes: Notes) -> tuple[Assigned | None, set[str]]:
    """The split of every row, and the columns that tell it; None where no column does.

    Raises DataError for columns that contradict one another, UsageError for a fold without a column or the reverse.
    """
    if reading.fold_column is not None and reading.fold is None:
        raise UsageError(f"--fold-column {reading.fold_column} needs --fold: the one that is for validation.")
    used: set[str] = set()
    rows: Assigned | None = None
    if reading.split_column is not None:
        column = _asked(table, reading.split_column, "--split-column")
        rows, used = _by_words(table, column, notes), {column}
    else:
        rest = [name for name in table.names if name not in taken]
        worded = [name for name in rest if _is_split(table[name])]
        flags = {name: role for name in rest if (role := _flag_of(name)) and _is_flag(table[name])}
        if all(not plain(name).startswith("is") for name in flags) and len(set(flags.values())) < 2:
            flags = {}  # `train` alone may be a class, where columns of 0 and 1 are classes
        named = [name for name in rest if plain(name) in SPLIT[:3] and name not in worded]
        if worded:
            column = _one_of(table, worded, notes)
            rows, used = _by_words(table, column, notes), {column}
        elif flags:
            rows, used = _by_flags(table, flags, notes), set(flags)
        elif named and reading.fold is None and 1 < len(_values(table[named[0]])) <= _FEW:
            rows, used = _by_words(table, named[0], notes), {named[0]}
        else:
            _warn_of_splits(table, rest, notes)
    folds = _fold_columns(table, taken | used, reading)
    if reading.fold is not None:
        rows = _by_fold(table, folds[0], reading.fold, rows, notes)
    for column in folds if reading.fold is None else ():
        some = listed(sorted(_values(table[column]), key=_as_number))
        notes.warn(
            f"column {column!r} looks like folds ({some}) and is not used; --fold K makes one of them validation"
        )
    return rows, used.union(folds)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _values(cells: Sequence[Any]) -> list[str]:
    """The distinct values of a column, missing ones apart; of many only the first."""
    found: dict[str, None] = {}
    for cell in cells:
        if len(found) > _FEW:
            break
        found[_text(cell)] = None
    return [value for value in found if not is_missing(value)]


def _is_split(cells: Sequence[Any]) -> bool:
    values = _values(cells)
    return bool(values) and all(plain(value) in _ROLE_OF for value in values)


def _flag_of(name: str) -> str | None:
    return next((role for role, names in _FLAGS.items() if plain(name) in names), None)


def _is_flag(cells: Sequence[Any]) -> bool:
    values = {value.casefold() for value in _values(cells)}
    return bool(values) and (values <= _YES | _NO)


def _one_of(table: Table, columns: list[str], notes: Notes) -> str:
    """One of several columns of splits: the only one, or that which is called so, or any where they agree."""
    chosen = min(columns, key=lambda name: _rank(name, SPLIT))
    others = [name for name in columns if name != chosen]

    def roles(name: str) -> list[str | None]:
        return [_ROLE_OF.get(plain(_text(cell))) for cell in table[name]]

    differing = [name for name in others if roles(name) != roles(chosen)]
    if differing and plain(chosen) != "split":
        raise DataError(f"{table.path}: columns {listed(columns)} hold different splits; name one with --split-column.")
    if differing:
        notes.warn(f"column {listed(differing)} holds another split than {chosen!r}, and is not used (--split-column)")
    return chosen


def _by_words(table: Table, column: str, notes: Notes) -> Assigned:
    """Splits by a column of their names; those of one role and several spellings are one."""
    cells = [_text(cell) for cell in table[column]]
    counts = Counter(cells)
    values = [value for value in counts if not is_missing(value)]
    if values and all(_as_number(value)[0] == 0 for value in values):
        raise DataError(
            f"{table.path}: column {column!r} has numbers ({listed(sorted(values, key=_as_number))}) where splits are "
            f"called train, validation, test; write these, or choose a fold: --fold-column {column} --fold K."
        )
    roles = {value: _ROLE_OF.get(plain(value)) for value in values}
    if "publictest" in map(plain, values) and any(
        role == "validation" and plain(value) != "publictest" for value, role in roles.items()
    ):
        roles |= {value: "test" for value in values if plain(value) == "publictest"}
    name_of = {}
    for value, role in roles.items():
        same = [other for other in values if roles[other] == role]
        # A split keeps its name, as runs have written it down, where that is known and there is only one.
        name_of[value] = value if role is None or (len(same) == 1 and value.lower() in ROLES[role]) else role
    blank = sum(counts[value] for value in counts if value not in roles)
    told = [
        f"{value} ({counts[value]:,})" + (f" is {name_of[value]}" if name_of[value] != value else "")
        for value in values
    ]
    if blank:
        said = f"{blank:,} rows say no split in column {column!r}, and are taken for training"
        (notes.warn if "train" in roles.values() else notes.decide)(said)
        name_of |= {value: next((n for n in name_of.values() if _ROLE_OF.get(plain(n)) == "train"), "train")
                    for value in counts if value not in roles}  # fmt: skip
    if strange := [value for value, role in roles.items() if role is None]:
        notes.warn(f"column {column!r}: no run uses the rows of {listed(strange)}; train, validation, test are used")
    notes.decide(f"splits: column {column!r}: {listed(told)}")
    return [name_of[cell] for cell in cells]


def _by_flags(table: Table, flags: dict[str, str], notes: Notes) -> Assigned:
    """Splits by columns of yes and no: what is none of them is train, or where train is one of them, test."""
    by_role: dict[str, str] = {}
    for name, role in flags.items():
        if role in by_role:
            raise DataError(f"{table.path}: columns {by_role[role]}, {name} both say what is {role}; remove one.")
        by_role[role] = name
    otherwise = "train" if "train" not in by_role else "test" if "test" not in by_role else "validation"
    assigned = []
    columns = [(role, table[name]) for role, name in by_role.items()]
    for row in range(len(table.lines)):
        roles = [role for role, cells in columns if _text(cells[row]).casefold() in _YES]
        if len(roles) > 1:
            raise DataError(f"{table.where(row)} is both {roles[0]} and {roles[1]}, by {listed(list(flags))}.")
        if not roles and len(by_role) == 3:
            raise DataError(f"{table.where(row)} is of no split, by {listed(list(flags))}.")
        assigned.append(roles[0] if roles else otherwise)
    counts = Counter(assigned)
    told = ", ".join(f"{role} {counts[role]:,}" for role in ROLES if role in counts)
    notes.decide(f"splits: column {', '.join(map(repr, flags))}: {told}")
    return assigned


def _warn_of_splits(table: Table, rest: list[str], notes: Notes) -> None:
    """Of columns that look like splits and are none."""
    for name in rest:
        values = _values(table[name])
        numbered = all(_as_number(value)[0] == 0 for value in values)
        if not 1 < len(values) <= _FEW or (plain(name) in _FOLD and numbered):
            continue
        words = [value for value in values if plain(value) in _ROLE_OF]
        if len({_ROLE_OF[plain(value)] for value in words}) > 1 or plain(name) in (*SPLIT, *_FOLD):
            notes.warn(
                f"column {name!r} looks like a split ({listed(values)}) and is not used; --split-column {name} uses it"
            )
        elif _flag_of(name) and _is_flag(table[name]):
            notes.warn(f"column {name!r} looks like a split and is not used; write train and {name} in a column split")


# -- folds ----------------------------------------------------------------------------------------


def _as_number(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _fold_columns(table: Table, taken: set[str], reading: Reading) -> list[str]:
    """The columns of folds; where a fold is asked for, one. Raises DataError for none or several then."""
    if reading.fold_column is not None:
        return [_asked(table, reading.fold_column, "--fold-column")]
    found = []
    for name in table.names:
        if name not in taken and plain(name).rstrip("0123456789") in _FOLD:
            values = _values(table[name])
            if 1 < len(values) <= _FEW and all(_as_number(value)[0] == 0 for value in values):
                found.append(name)
    if reading.fold is not None and len(found) != 1:
        what = f"columns {listed(found)} look like folds" if found else "no column looks like folds"
        raise DataError(f"{table.path}: {what}, of {listed(table.names, 20)}; name one with --fold-column.")
    return found


def _by_fold(table: Table, column: str, fold: int, rows: Assigned | None, notes: Notes) -> Assigned:
    """One fold of what else is train becomes validation."""
    values = [_as_number(_text(cell)) for cell in table[column]]
    known = sorted({value for value in values if value[0] == 0})
    if (0, float(fold), "") not in known:
        shown = listed([f"{value[1]:g}" for value in known])
        raise DataError(f"--fold {fold}: column {column!r} of {table.path} has the folds {shown or 'none'}.")
    assigned = list(rows) if rows is not None else ["train"] * len(values)
    if any(_ROLE_OF.get(plain(name)) == "validation" for name in assigned):
        notes.warn(f"--fold {fold} takes the place of the validation split; its rows without that fold are trained on")
    counts: Counter[str] = Counter()
    for row, (kind, number, text) in enumerate(values):
        role = _ROLE_OF.get(plain(assigned[row]))
        if role not in ("train", "validation"):
            continue
        if kind:
            raise DataError(f"{table.where(row)} has no number of a fold in column {column!r}, but {text!r}.")
        assigned[row] = "validation" if number == fold else "train"
        counts[f"{number:g}"] += 1
    trained = [f"{name} ({count:,})" for name, count in sorted(counts.items(), key=lambda one: float(one[0]))
               if float(name) != fold]  # fmt: skip
    notes.decide(f"folds: column {column!r}: {fold} ({counts[str(fold)]:,}) is validation, {listed(trained)} are train")
    return assigned


def labels_by_name(table: Table, wanted: str | None) -> set[str]:
    """The columns that are called as labels are, or the one that was asked for."""
    if wanted is not None:
        return {_asked(table, wanted, "--label-column")}
    return {name for name in table.names if plain(name) in LABEL}


# -- the label ------------------------------------------------------------------------------------


def labels_of_rows(
    table: Table, taken: set[str], image: str, wanted: str | None, splits: Assigned, notes: Notes
) -> tuple[list[str | None], list[str]]:
    """The label of every row, as text, None where it is missing; and the columns that tell it. Raises DataError.

    `splits` are those of the rows, if any, for a test split may be without labels.
    """
    if wanted is not None:
        column = _asked(table, wanted, "--label-column")
        notes.decide(f"labels: column {column!r}, as asked for")
        return _as_labels(table, column, notes), [column]
    rest = [name for name in table.names if name not in taken]
    usual = [name for name in rest if plain(name) in LABEL]
    if usual:
        column = _usual_label(table, usual, notes)
        return _as_labels(table, column, notes), [column]
    filled = [name for name in rest if _values(table[name])]
    binary = [name for name in filled if _is_flag(table[name]) and _values(table[name])]
    if len(binary) > 1 and (found := _one_hot(table, binary, splits)) is not None:
        notes.decide(f"labels: the one of {len(binary)} columns that is 1: {listed(binary)}")
        return found, binary
    if len(filled) == 1:
        return _only_column(table, filled[0], notes), filled
    if not filled:
        return _folder_names(table, image, notes), []
    raise DataError(f"{table.path}: columns {listed(filled, 12)} could be the label; name one with --label-column.")


def _usual_label(table: Table, usual: list[str], notes: Notes) -> str:
    """The column of labels, of those called so: names rather than their numbers, if the two say the same."""
    usual = sorted(usual, key=lambda name: _rank(name, LABEL))
    chosen = usual[0]
    for other in usual[1:]:
        pairs = {(_text(one), _text(two)) for one, two in zip(table[chosen], table[other], strict=True)}
        same = len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs})
        if same:
            if all(_as_number(one)[0] == 0 for one, _ in pairs) and any(_as_number(two)[0] for _, two in pairs):
                chosen = other
        elif plain(chosen) not in ("label", "labels"):
            raise DataError(f"{table.path}: columns {listed(usual)} could be the label; name one with --label-column.")
    notes.decide(f"labels: column {chosen!r}, by its name")
    return chosen


def _only_column(table: Table, column: str, notes: Notes) -> list[str | None]:
    labels = _as_labels(table, column, notes)
    distinct = set(labels)
    if len(distinct) == len(labels) >= 10:
        raise DataError(
            f"{table.path}: column {column!r}, the only one left for the label, is another in each of {len(labels):,} "
            f"rows; --label-column {column} takes it all the same."
        )
    notes.decide(f"labels: column {column!r}, the only other one")
    return labels


def _as_labels(table: Table, column: str, notes: Notes) -> list[str | None]:
    """Cells as the names of classes. Raises DataError for one that can be none, and for words beside numbers."""
    labels: list[str | None] = []
    kinds: dict[str, int] = {}
    known: dict[str, tuple[str, str | None]] = {}
    for row, cell in enumerate(table[column]):
        kind, label = known.get(cell) or known.setdefault(cell, _label(cell)) if isinstance(cell, str) else _label(cell)
        if label is None and kind:
            shown = in_short(repr(cell))
            raise DataError(f"{table.where(row)}: the label is {kind} ({shown}); a class is a name or a whole number.")
        if label is not None:
            kinds.setdefault(kind, row)
        labels.append(label)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise DataError(
            f"{table.path}: the labels are of several kinds: {one} on {table.unit} {table.lines[first]}, "
            f"{other} on {table.unit} {table.lines[second]}; write all of them the same way."
        )
    spelled = {cell for cell in set(table[column]) if isinstance(cell, str) and not is_missing(cell.strip())}
    if kinds.keys() == {"text"} and len(spelled) > len(stripped := {cell.strip() for cell in spelled}):
        odd = next(cell for cell in sorted(spelled) if cell != cell.strip() and cell.strip() in stripped & spelled)
        notes.warn(f"labels that differ in spaces around them alone are one class: {odd!r} and {odd.strip()!r}")
    return labels


def _label(cell: Any) -> tuple[str, str | None]:
    """A cell's kind, and the name of its class: without a kind it is missing, without a name it can be none."""
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
            if is_missing(cell := cell.strip()):
                return "", None
            if not cell.isascii() and not _is_unicode(cell):
                return "half of a surrogate pair, no text", None
            return "text", cell
        case list():
            return "a list", None
        case _:
            return "an object", None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_hot(table: Table, columns: list[str], splits: Assigned) -> list[str | None] | None:
    """The label by columns of 0 and 1, if every row but those of the test has just one 1."""
    labels: list[str | None] = []
    cells = [(name, table[name]) for name in columns]
    for row in range(len(table.lines)):
        said = [name for name, column in cells if _text(column[row]).casefold() in _YES]
        if len(said) > 1 or not (said or (splits and _ROLE_OF.get(plain(splits[row])) == "test")):
            return None
        labels.append(said[0] if said else None)
    return labels


def _folder_names(table: Table, image: str, notes: Notes) -> list[str | None]:
    """Of a mere list of paths: an image's label is the name of its folder."""
    paths = (str(cell_path(cell)).replace("\\", "/") for cell in table[image])
    folders = [path.rpartition("/")[0].rpartition("/")[2] for path in paths]
    if len(set(folders)) < 2:
        raise DataError(
            f"{table.path} names no labels: it has column {image!r} alone, and all images are in one folder; "
            "add a column label."
        )
    notes.decide(f"labels: the name of each image's folder, for there is no column but {image!r}")
    return [folder or None for folder in folders]
