"""The common form of every dataset: columns `image` (bytes or path) and `label` (class index), checked labels."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vitft.errors import DataError, UsageError, as_flag
from vitft.io.paths import composed

ROLES = {  # usual names of the splits; the first one present is used
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
Splits = dict[str, datasets.Dataset]
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""The arrow type of an image. Usually one of its fields is null."""
NAME = "name"
"""The column with each image's path relative to the dataset's folder. Only splits whose files we named have it."""
BLOCK = "block"
"""The column with the number of the part of a shard that each image is fetched with. Only streamed splits have it."""
ROW = "row"
"""The column with the number of each row in the dataset as it was opened, which selections keep."""
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
"""Texts that stand for a missing label: those of pandas.read_csv."""
_MANY_CLASSES = 10  # from here on, single-image classes are suspicious

COLUMNS = ("image_column", "label_column", "split_column", "fold_column", "fold")
"""The options that name columns."""
OF_TEXT = ("image_folder", "encoding")
"""The options of a table in a text file."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a dataset that is ambiguous by itself."""

    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    fold_column: str | None = None
    fold: int | None = None  # the fold used for validation
    image_folder: str | None = None  # where a table's relative paths start; default: the table's own folder
    encoding: str | None = None  # of a table; default: detected
    allow_outside: bool = False  # whether a table may name files outside of its folder
    streaming: bool = False  # whether the shards of a hub dataset are fetched when they are needed
    stream_gb: float = 20.0  # disk space for what is fetched

    def refuse(self, reason: str, *names: str) -> None:
        """Raise UsageError if one of these options is given, which have no effect for this `reason`."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise UsageError(f"{as_flag(name)} {value}: {reason}; leave it out.")


@dataclass
class Notes:
    """What readers decided, as sentences for the user: "the label is column 'breed': ..."."""

    decisions: list[str] = field(default_factory=list)  # what was chosen, and why
    warnings: list[str] = field(default_factory=list)  # what is probably wrong, and the remedy

    def decide(self, *sentences: str) -> None:
        """Record decisions, each once."""
        self.decisions += [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.decisions]

    def warn(self, *sentences: str) -> None:
        """Record warnings, each once. They are shown before training and by `vitft data info`."""
        self.warnings += [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.warnings]


def group_rows(names: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of the rows that have each name."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def role_of(name: str) -> str | None:
    """`train`, `validation` or `test`, from the name of a split; None for any other name."""
    return next((role for role, names in ROLES.items() if name.lower() in names), None)


def standardize(raw: Splits, notes: Notes | None = None) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Convert splits to columns `image`, `label` (a ClassLabel that all share) and ROW; also return the classes.

    Splits without labels (no column, or all missing or -1, like test splits on the hub) are left out with a note.
    Image data is not copied. Raises DataError.
    """
    notes = notes or Notes()
    labels = {
        name: _read_labels(split, name) for name, split in raw.items() if "label" in split.features and len(split)
    }
    for name in raw.keys() - labels.keys():
        notes.decide(f"split {name} is left out: it has no {'label column' if len(raw[name]) else 'images'}")
    labels = _drop_unlabeled(labels, raw, notes)
    if not labels:
        raise DataError("no image has a label; name the label column with --label-column.")
    _check_plausible(labels, notes)
    classes = _class_names(list(labels.values()))
    index = {name: i for i, name in enumerate(classes)}
    order = [*ROLES, None]
    splits = datasets.DatasetDict()
    for name, of_split in sorted(labels.items(), key=lambda item: order.index(role_of(item[0]))):
        remap = np.array([index[word] for word in of_split.names], np.int64)
        splits[name] = _standard_split(name, raw[name], remap[of_split.codes], classes)
    return splits, classes


def make_split(
    images: pa.Array | pa.ChunkedArray, labels: Any, names: Iterable[str] | None = None, root: Path | None = None
) -> datasets.Dataset:
    """A raw split from image structs (see `image_structs`) and labels: values, or indices into `names`.

    With `root`, the dataset's folder, the split also gets the column NAME: each file's path relative to it.
    """
    columns = {"image": images, "label": pa.array(labels)}
    if root is not None:  # files outside of it keep their absolute path
        columns[NAME] = pc.replace_substring_regex(images.field("path"), f"^{re.escape(str(root.absolute()))}/", "")
    return in_memory(columns, names)


def split_of_files(files: list[str], labels: Any, names: Iterable[str] | None, root: Path) -> datasets.Dataset:
    """A raw split of image files, by absolute path. Raises DataError for file names that are not UTF-8."""
    try:
        return make_split(image_structs(None, files), labels, names, root)
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8; rename it.") from error


def image_structs(data: pa.Array | None, paths: list[str] | None = None) -> pa.Array:
    """An image column of type IMAGE_TYPE, from bytes, paths or both."""
    count = len(data) if data is not None else len(paths or ())
    data = pa.nulls(count, pa.binary()) if data is None else data
    files = pa.nulls(count, pa.string()) if paths is None else pa.array(paths, pa.string())
    return pa.StructArray.from_arrays([data, files], ["bytes", "path"])


def in_memory(
    columns: Mapping[str, Any], classes: Iterable[str] | None = None, split: str | None = None
) -> datasets.Dataset:
    """Wrap arrow columns as a Dataset, with labels of these classes, if given, or else of any type.

    The random fingerprint keeps `datasets` from hashing all images.
    """
    table = pa.table(dict(columns))
    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.Image(decode=False)
    if classes is not None:
        features["label"] = datasets.ClassLabel(names=list(classes))
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    named = datasets.NamedSplit(re.sub(r"\W", "_", split)) if split else None  # only word characters are allowed
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), split=named, fingerprint=fingerprint)


def whole_numbers(split: datasets.Dataset, column: str) -> NDArray[np.int64]:
    """A column of whole numbers, in the order of the split: (n,)."""
    numbers = np.asarray(split.data.column(column).combine_chunks(), np.int64)
    return numbers if split._indices is None else numbers[split._indices.column(0).to_numpy()]


@dataclass(frozen=True)
class _Labels:
    """The labels of a split: (n,) codes into the class names, -1 where the label is missing."""

    codes: np.ndarray
    names: list[str]
    declared: bool = False  # whether the dataset itself lists its classes


def _read_labels(split: datasets.Dataset, name: str) -> _Labels:
    """The labels of a split. Raises DataError for a column that cannot hold classes."""
    feature = split.features["label"]
    values = split.select_columns(["label"]).with_format("arrow")[:].column("label").combine_chunks()
    if isinstance(feature, datasets.ClassLabel):
        names = [composed(word) for word in feature.names]
        names = names if len(set(names)) == len(names) else list(feature.names)
        codes = np.asarray(pc.fill_null(values, -1).cast(pa.int64()))
        if len(codes) and codes.max() >= len(names):
            raise DataError(f"split {name}: label {codes.max()} but only {len(names)} class names.")
        return _Labels(codes, names, declared=True)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
        if pc.all(pc.equal(values, pc.floor(values))).as_py():
            values = to_int64(values, f"column 'label' of split {name}")
    coded = values.cast(pa.string()).dictionary_encode()
    words = [composed(word) for word in coded.dictionary.to_pylist()]
    index = {word: i for i, word in enumerate(dict.fromkeys(word for word in words if word not in MISSING))}
    remap = np.array([index.get(word, -1) for word in words] + [-1], np.int64)  # the last one is for nulls
    return _Labels(remap[np.asarray(pc.fill_null(coded.indices.cast(pa.int64()), -1))], list(index))


def to_int64(numbers: pa.Array, where: str) -> pa.Array:
    """Numbers of any type as int64. Raises DataError for a number that is not whole or too large."""
    try:
        return numbers.cast(pa.int64())
    except pa.ArrowInvalid as error:
        wrong = next(x for x in numbers.to_pylist() if x is not None and (x % 1 != 0 or abs(x) >= 2**63))
        raise DataError(f"{where} holds {wrong:g}; a class must be a name or a whole number.") from error


def _drop_unlabeled(splits: Mapping[str, _Labels], raw: Splits, notes: Notes) -> dict[str, _Labels]:
    """The splits in which every image has a label. Raises DataError where only some images have one.

    -1 is a missing label, unless the only classes are -1 and 1.
    """
    found = {name: labels.names for name, labels in splits.items() if not labels.declared}
    only_minus_one = {name for name, names in found.items() if names == ["-1"]}
    classes = {word for name, names in found.items() if name not in only_minus_one for word in names}
    kept = {}
    for name, labels in splits.items():
        codes = np.full_like(labels.codes, -1) if name in only_minus_one else labels.codes
        names = labels.names
        if "-1" in names and not labels.declared and classes != {"-1", "1"}:
            code = names.index("-1")
            codes = np.where(codes == code, -1, codes - (codes > code))
            names = [word for word in names if word != "-1"]
        if not (codes >= 0).any():
            notes.decide(f"split {name} is left out: none of its {len(codes):,} images has a label")
        elif (codes < 0).any():
            row = int(np.argmax(codes < 0))
            raise DataError(
                f"split {name}: {np.count_nonzero(codes < 0):,} of {len(codes):,} images have no label "
                f"(first: {_image_name(raw[name], row)}); label or remove them."
            )
        else:
            kept[name] = _Labels(codes, names, labels.declared)
    return kept


def _image_name(split: datasets.Dataset, row: int) -> str:
    """A row's file, or its number."""
    (cells,) = split.with_format("arrow")[row].to_pylist()
    files = (cell["path"] for cell in cells.values() if isinstance(cell, dict) and cell.get("path"))
    return next(files, f"row {row}")


def _check_plausible(splits: Mapping[str, _Labels], notes: Notes) -> None:
    """Warn of labels that hardly look like classes. Raises DataError for regression targets."""
    if any(labels.declared for labels in splits.values()):
        return
    counts: Counter[str] = Counter()
    for labels in splits.values():
        in_split = np.bincount(labels.codes, minlength=len(labels.names)).tolist()
        counts.update(dict(zip(labels.names, in_split, strict=True)))
    images, examples = counts.total(), ", ".join(list(counts)[:4])
    single = sum(count == 1 for count in counts.values())
    if all(map(_is_number, counts)) and any(float(word) % 1 for word in counts):
        if 2 * len(counts) > images:
            raise DataError(
                f"the labels are real numbers ({examples}, ...), {len(counts):,} different ones for {images:,} images: "
                "regression targets, not classes; name the label column with --label-column."
            )
        notes.warn(f"the labels are real numbers ({examples}); each of the {len(counts):,} values becomes a class")
    elif len(counts) >= _MANY_CLASSES and 2 * single > len(counts):
        notes.warn(f"{single:,} of {len(counts):,} classes have one image ({examples}, ...): is this the label column?")


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _class_names(splits: list[_Labels]) -> tuple[str, ...]:
    """The dataset's own order if all splits declare it; otherwise sorted, by value if all are whole numbers."""
    if all(labels.declared and labels.names == splits[0].names for labels in splits):
        return tuple(splits[0].names)
    union = {word for labels in splits for word in labels.names}
    return tuple(sorted(union, key=int if all(map(_is_integer, union)) else None))


def _is_integer(word: str) -> bool:
    return len(word) < 20 and word.removeprefix("-").isdecimal() and str(int(word)) == word


def _standard_split(
    name: str, split: datasets.Dataset, labels: np.ndarray, classes: tuple[str, ...]
) -> datasets.Dataset:
    table = split.data if split._indices is None else split.with_format("arrow")[:]
    structs = pa.chunked_array([_fill_missing(chunk) for chunk in table.column("image").chunks], type=IMAGE_TYPE)
    columns = {"image": structs, "label": pa.array(labels), ROW: pa.array(np.arange(len(labels)))}
    columns |= {column: table.column(column) for column in (NAME, BLOCK) if column in split.features}
    return in_memory(columns, classes, name)


def _fill_missing(chunk: pa.Array) -> pa.Array:
    """Images with zero bytes instead of missing ones."""
    data, path = chunk.flatten()
    missing = pc.and_(pc.is_null(data), pc.is_null(path))
    if not pc.any(missing).as_py():
        return chunk
    data = pc.if_else(missing, pa.scalar(b"", pa.binary()), data)
    return pa.StructArray.from_arrays([data, path], ["bytes", "path"])
