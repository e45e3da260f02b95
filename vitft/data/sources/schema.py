"""What every data set is brought to: columns `image` (bytes or path) and `label` (a class index)."""

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

from vitft.errors import DataError
from vitft.io.paths import composed

ROLES = {  # the names a split goes by; the first one present is taken
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""The arrow form of an image, one of its fields usually null."""
NAME = "name"
"""The column with each image's path relative to the dataset's folder. Only splits of files that we named have it."""


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read, where it does not say so itself."""

    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    fold_column: str | None = None
    fold: int | None = None  # the one that is for validation
    image_folder: str | None = None  # that a table's names start from: its own by default
    encoding: str | None = None  # of a table: found by default
    allow_outside: bool = False  # whether a table may name files outside of its own folder


@dataclass
class Notes:
    """What readers decided, each a sentence for a person: "the labels are column 'breed': the only other column"."""

    decisions: list[str] = field(default_factory=list)  # what was taken for what, and why
    warnings: list[str] = field(default_factory=list)  # what is probably not as it was meant, with the remedy

    def decide(self, sentence: str) -> None:
        """Write down a decision, once."""
        if sentence not in self.decisions:
            self.decisions.append(sentence)

    def warn(self, sentence: str) -> None:
        """Write down a warning, once: it is shown before a training, and by `vitft data info`."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def _by_role(item: tuple[str, Any]) -> int:
    return [*ROLES].index(role) if (role := role_of(item[0])) else len(ROLES)


def role_of(name: str) -> str | None:
    """Training, validation or test: what a split is for, by its name; None for any other name."""
    return next((role for role, names in ROLES.items() if name.lower() in names), None)


def standardize(
    raw: Mapping[str, datasets.Dataset], notes: Notes | None = None
) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Bring splits of columns `image` and `label` to Image(decode=False) and a ClassLabel over all splits.

    Also returns the class names in index order. A split without labels (no column, or all missing or
    -1, as hub test splits are) is left out, and `notes` say so. Image data is not copied. Raises DataError.
    """
    notes = notes or Notes()
    values = {
        name: _label_values(split, "label", name)
        for name, split in raw.items()
        if "label" in split.features and len(split)
    }
    for name in raw.keys() - values.keys():
        notes.decide(f"split {name} is left out: it has no images" if not len(raw[name]) else
                     f"split {name} is left out: it has no column of labels")  # fmt: skip
    labeled = _labeled(values, raw, notes)
    if not labeled:
        raise DataError("no image has a label; name the column of the classes with --label-column.")
    _doubt(labeled, notes)
    names = _class_names(list(labeled.values()))
    index = {name: i for i, name in enumerate(names)}
    splits = datasets.DatasetDict()
    for name, one in sorted(labeled.items(), key=_by_role):
        remap = np.array([index[word] for word in one.words], np.int64)
        splits[name] = _dataset(name, raw[name], remap[one.codes], names)
    return splits, names


def make_split(
    images: pa.Array | pa.ChunkedArray, labels: Any, names: Iterable[str] | None = None, root: Path | None = None
) -> datasets.Dataset:
    """A raw split from image structs (see `image_structs`) and labels: values, or indices into `names`.

    With `root`, the dataset's folder, the split also gets the column NAME: each file's path relative to it.
    """
    table = pa.table({"image": images, "label": pa.array(labels)})
    kind = str(table.schema.field("label").type)
    label = datasets.Value(kind) if names is None else datasets.ClassLabel(names=list(names))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    if root is not None:
        table = table.append_column(NAME, _relative(images.field("path"), root))
        features[NAME] = datasets.Value("string")
    return in_memory(table, datasets.DatasetInfo(features=features))


def _relative(paths: pa.Array, root: Path) -> pa.Array:
    """Paths relative to a folder; those of files outside of it stay absolute."""
    return pc.replace_substring_regex(paths, f"^{re.escape(str(root.absolute()))}/", "")


def image_structs(data: pa.Array | None, paths: list[str] | None = None) -> pa.Array:
    """An image column of type IMAGE_TYPE, from bytes, paths or both."""
    count = len(data) if data is not None else len(paths or ())
    data = pa.nulls(count, pa.binary()) if data is None else data
    files = pa.nulls(count, pa.string()) if paths is None else pa.array(paths, pa.string())
    return pa.StructArray.from_arrays([data, files], ["bytes", "path"])


def in_memory(table: pa.Table, info: datasets.DatasetInfo, split: str | None = None) -> datasets.Dataset:
    """Wrap an arrow table as a Dataset. A given fingerprint saves datasets from hashing all images."""
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    named = datasets.NamedSplit(re.sub(r"\W", "_", split)) if split else None  # it takes words alone
    return datasets.Dataset(table, info=info, split=named, fingerprint=fingerprint)


def is_missing(text: str) -> bool:
    """Whether a label's text is what programs write where there is none."""
    return text in _MISSING


# What pandas.read_csv takes for missing.
_MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


@dataclass(frozen=True)
class _Labels:
    """The labels of a split: (n,) codes, -1 where there is none, and the class names they stand for."""

    codes: np.ndarray
    words: list[str]
    declared: bool = False  # whether the data set says what the classes are


def _label_values(split: datasets.Dataset, column: str, name: str) -> _Labels:
    """The labels of a split. Raises DataError for a column that can be none."""
    feature = split.features[column]
    values = split.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
    if isinstance(feature, datasets.ClassLabel):
        words = [composed(word) for word in feature.names]
        words = words if len(set(words)) == len(words) else list(feature.names)
        codes = np.asarray(pc.fill_null(values, -1).cast(pa.int64()))
        if len(codes) and codes.max() >= len(words):
            raise DataError(f"split {name}: label {codes.max()} but only {len(words)} class names.")
        return _Labels(codes, words, declared=True)
    where = f"column {column!r} of split {name}"
    need_classes(values.type, where)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
        if pc.all(pc.equal(values, pc.floor(values))).as_py():
            values = whole(values, where)
    coded = values.cast(pa.string()).dictionary_encode()
    words = [composed(word) for word in coded.dictionary.to_pylist()]
    known = [word for word in words if not is_missing(word)]
    place = {word: index for index, word in enumerate(dict.fromkeys(known))}
    remap = np.array([place.get(word, -1) for word in words] + [-1], np.int64)  # the last one: what is null
    return _Labels(remap[np.asarray(pc.fill_null(coded.indices.cast(pa.int64()), -1))], list(place))


def need_classes(kind: pa.DataType, where: str) -> None:
    """Raises DataError for a type that no label has, numbers with a fraction included: some of these are whole."""
    if not any(is_kind(kind) for is_kind in _LABEL_KINDS):
        raise DataError(f"{where} holds {kind}; a class must be a name or a whole number.")


def whole(numbers: pa.Array, where: str) -> pa.Array:
    """Numbers of any type as int64. Raises DataError for one that is none."""
    try:
        return numbers.cast(pa.int64())
    except pa.ArrowInvalid as error:
        wrong = next(one for one in numbers.to_pylist() if one is not None and (one % 1 != 0 or abs(one) >= 2**63))
        raise DataError(f"{where} holds {wrong:g}; a class must be a name or a whole number.") from error


_LABEL_KINDS = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string,
    pa.types.is_null,
)  # fmt: skip


def _labeled(found: Mapping[str, _Labels], raw: Mapping[str, datasets.Dataset], notes: Notes) -> dict[str, _Labels]:
    """The splits that have labels: all of their images then have. Raises DataError.

    -1 throughout a split, or beside other numbers, is no label; a class it is beside 1 alone.
    """
    only = {name for name, one in found.items() if one.words == ["-1"] and not one.declared}
    union = {word for name, one in found.items() if name not in only and not one.declared for word in one.words}
    labeled = {}
    for name, one in found.items():
        codes = np.full_like(one.codes, -1) if name in only else one.codes
        if "-1" in one.words and not one.declared and union != {"-1", "1"}:
            codes = np.where(codes == one.words.index("-1"), -1, codes)
        if not (codes >= 0).any():
            notes.decide(f"split {name} is left out: none of its {len(codes):,} images has a label")
        elif (codes < 0).any():
            row = int(np.argmax(codes < 0))
            raise DataError(
                f"split {name}: {np.count_nonzero(codes < 0):,} of {len(codes):,} images have no label "
                f"(first: {_image_name(raw[name], row)}); label them or take them out."
            )
        else:
            used = [word for word in one.words if one.declared or word != "-1" or union == {"-1", "1"}]
            if len(used) < len(one.words):
                place = {word: index for index, word in enumerate(used)}
                codes = np.array([place.get(word, -1) for word in one.words], np.int64)[codes]
            labeled[name] = _Labels(codes, used, one.declared)
    return labeled


def _image_name(split: datasets.Dataset, row: int) -> str:
    """A row for a person: its file, or its number."""
    (cells,) = split.with_format("arrow")[row].to_pylist()
    files = (cell["path"] for cell in cells.values() if isinstance(cell, dict) and cell.get("path"))
    return next(files, f"row {row}")


def _doubt(found: Mapping[str, _Labels], notes: Notes) -> None:
    """Warn of labels that hardly are classes. Raises DataError for those that are none: numbers to be predicted."""
    if any(one.declared for one in found.values()):
        return
    counts: Counter[str] = Counter()
    for one in found.values():
        counts.update(dict(zip(one.words, np.bincount(one.codes, minlength=len(one.words)).tolist(), strict=True)))
    images, some = counts.total(), ", ".join(list(counts)[:4])
    if all(map(_is_number, counts)) and any(float(word) % 1 for word in counts):
        if 2 * len(counts) > images:
            raise DataError(
                f"the labels are real numbers ({some}, ...), {len(counts):,} of them for {images:,} images: values to "
                "be predicted, and not classes; name the column of the classes with --label-column."
            )
        notes.warn(f"the labels are real numbers ({some}); each of the {len(counts):,} is taken for a class")
    elif len(counts) >= _MANY and 2 * sum(count == 1 for count in counts.values()) > len(counts):
        single = sum(count == 1 for count in counts.values())
        notes.warn(
            f"{single:,} of {len(counts):,} classes have one image ({some}, ...): is this the column of classes?"
        )


_MANY = 10  # classes of one image each


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _class_names(found: list[_Labels]) -> tuple[str, ...]:
    """The data set's own order if all splits share it, else the union: numbers by value, others by name."""
    if all(one.declared and one.words == found[0].words for one in found):
        return tuple(found[0].words)
    union = {word for one in found for word in one.words}
    if all(map(_is_whole, union)):
        return tuple(sorted(union, key=int))
    return tuple(sorted(union))


def _is_whole(word: str) -> bool:
    return len(word) < 20 and word.removeprefix("-").isdecimal() and str(int(word)) == word


def _dataset(name: str, split: datasets.Dataset, labels: np.ndarray, names: tuple[str, ...]) -> datasets.Dataset:
    table = split.data if split._indices is None else split.with_format("arrow")[:]
    structs = pa.chunked_array([_structs(chunk) for chunk in table.column("image").chunks], type=IMAGE_TYPE)
    columns = {"image": structs, "label": pa.array(labels)}
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(names))}
    if NAME in split.features:
        columns[NAME], features[NAME] = table.column(NAME), split.features[NAME]
    return in_memory(pa.table(columns), datasets.DatasetInfo(features=datasets.Features(features)), name)


def _structs(chunk: pa.Array) -> pa.Array:
    """Any arrow form of images as structs of bytes and path; a missing image gets zero bytes."""
    if chunk.type != IMAGE_TYPE:
        chunk = datasets.Image(decode=False).cast_storage(chunk)
    data, path = chunk.flatten()
    missing = pc.and_(pc.is_null(data), pc.is_null(path))
    if not pc.any(missing).as_py():
        return chunk
    data = pc.if_else(missing, pa.scalar(b"", pa.binary()), data)
    return pa.StructArray.from_arrays([data, path], ["bytes", "path"])
