"""What every data set is brought to: columns `image` (bytes or path) and `label` (a class index)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitft.errors import DataError, nearest

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixel_values", "pixels")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "category", "target")
ROLES = {  # the names a split goes by; the first one present is taken
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}

Columns = tuple[str, str | None]


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read, where it does not say so itself."""

    image_column: str | None = None
    label_column: str | None = None
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


def find_columns(features: Mapping[str, Any], image: str | None, label: str | None) -> Columns:
    """The image and the label column: those asked for, else found by type and name; no label is None.

    Raises DataError where there is no image column or where several could be meant.
    """
    for wanted in filter(None, (image, label)):
        if wanted not in features:
            raise DataError(f"no column {wanted!r}{nearest(wanted, features)}; {_columns(features)}.")
    if image is None:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        images = images or [name for name, feature in features.items() if _like_image(feature)]
        image = _pick(images, IMAGE_NAMES, features, "image")
        if image is None:
            raise DataError(f"no image column; {_columns(features)}; name one with --image-column.")
    if label is None:
        rest = {name: feature for name, feature in features.items() if name != image}
        classes = [name for name, feature in rest.items() if isinstance(feature, datasets.ClassLabel)]
        plain = [name for name in LABEL_NAMES if name in rest and not _like_image(rest[name])]
        label = _pick(classes, LABEL_NAMES, features, "label") if classes else next(iter(plain), None)
    return image, label


def standardize(
    raw: Mapping[str, datasets.Dataset], image: str | None = None, label: str | None = None, notes: Notes | None = None
) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Bring splits to columns `image` (Image(decode=False)) and `label` (ClassLabel over all splits).

    Also returns the class names in index order. A split without labels (no column, or all missing or
    -1, as hub test splits are) is left out, and `notes` say so. Image data is not copied. Raises DataError.
    """
    columns = {name: _checked_columns(name, split, image, label) for name, split in raw.items()}
    values = {
        name: _label_values(split, label_name, name)
        for name, split in raw.items()
        if (label_name := columns[name][1]) is not None and len(split)
    }
    labeled = {name: found for name, found in values.items() if found is not None}
    if not labeled:
        features = next(iter(raw.values())).features if raw else {}
        raise DataError(f"no labels; {_columns(features)}; name the column of the classes with --label-column.")
    notes = notes or Notes()
    for name in raw.keys() - labeled.keys():
        notes.decide(f"split {name} is left out: none of its {len(raw[name]):,} images has a label")
    class_lists = [
        raw[name].features[columns[name][1]].names
        for name in labeled
        if isinstance(raw[name].features[columns[name][1]], datasets.ClassLabel)
    ]
    names = _class_names(class_lists, labeled.values())
    index = {name: i for i, name in enumerate(names)}
    splits = datasets.DatasetDict()
    for name, (codes, vocabulary) in sorted(labeled.items(), key=_by_role):
        remap = np.array([index[word] for word in vocabulary], np.int64)
        splits[name] = _dataset(name, raw[name], columns[name][0], remap[codes], names)
    return splits, names


def make_split(
    images: pa.Array, labels: Any, names: Iterable[str] | None = None, root: Path | None = None
) -> datasets.Dataset:
    """A raw split from image structs (see `image_structs`) and labels: values, or indices into `names`.

    `root` is the folder that the images' files lie under; samples are then known by their relative path.
    """
    table = pa.table({"image": images, "label": pa.array(labels)})
    kind = str(table.schema.field("label").type)
    label = datasets.Value(kind) if names is None else datasets.ClassLabel(names=list(names))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    homepage = "" if root is None else root.absolute().as_uri()
    return in_memory(table, datasets.DatasetInfo(features=features, homepage=homepage))


def image_structs(data: pa.Array | None, paths: list[str] | None = None) -> pa.Array:
    """The arrow form of an image column: structs of bytes and path, one of them usually null."""
    count = len(data) if data is not None else len(paths or ())
    data = pa.nulls(count, pa.binary()) if data is None else data
    files = pa.nulls(count, pa.string()) if paths is None else pa.array(paths, pa.string())
    return pa.StructArray.from_arrays([data, files], ["bytes", "path"])


def in_memory(table: pa.Table, info: datasets.DatasetInfo, split: str | None = None) -> datasets.Dataset:
    """Wrap an arrow table as a Dataset. A given fingerprint saves datasets from hashing all images."""
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    named = datasets.NamedSplit(re.sub(r"\W", "_", split)) if split else None  # it takes words alone
    return datasets.Dataset(table, info=info, split=named, fingerprint=fingerprint)


def _checked_columns(name: str, split: datasets.Dataset, image: str | None, label: str | None) -> Columns:
    # A test split may lack the label column that was asked for: then it is a split without labels.
    missing = label is not None and label not in split.features and role_of(name) == "test"
    found_image, found_label = find_columns(split.features, image, None if missing else label)
    return found_image, None if missing else found_label


def _pick(found: list[str], known: tuple[str, ...], features: Mapping[str, Any], what: str) -> str | None:
    named = [name for name in known if name in found]
    if not named and len(found) > 1:
        raise DataError(
            f"{len(found)} columns could hold the {what}: {', '.join(found)}; "
            f"name one with --{what}-column ({_columns(features)})."
        )
    return next(iter(named or found), None)


def _like_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _label_values(split: datasets.Dataset, column: str, name: str) -> tuple[np.ndarray, list[str]] | None:
    """(n,) codes and the class names they stand for; None if no row has a label."""
    feature = split.features[column]
    values = split.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
    if isinstance(feature, datasets.ClassLabel):
        words = list(feature.names)
        codes = np.asarray(pc.fill_null(values, -1).cast(pa.int64()))
        if len(codes) and codes.max() >= len(words):
            raise DataError(f"split {name}: label {codes.max()} but only {len(words)} class names.")
    else:
        kind = values.type
        if pa.types.is_floating(kind) and pc.all(pc.equal(values, pc.floor(values))).as_py():
            values = values.cast(pa.int64())
        elif pa.types.is_boolean(kind):
            values = values.cast(pa.string())
        elif not any(is_kind(kind) for is_kind in _LABEL_KINDS):
            raise DataError(
                f"column {column!r} of split {name} holds {kind}; a class must be a name or a whole number."
            )
        if pa.types.is_integer(values.type):
            values = pc.if_else(pc.equal(values, -1), None, values)
        elif not pa.types.is_null(kind):
            values = pc.if_else(pc.equal(values.cast(pa.string()), ""), None, values.cast(pa.string()))
        coded = values.dictionary_encode()
        words = [str(word) for word in coded.dictionary.to_pylist()]
        codes = np.asarray(pc.fill_null(coded.indices.cast(pa.int64()), -1))
    if not (codes >= 0).any():
        return None
    if (codes < 0).any():
        raise DataError(
            f"split {name}: {np.count_nonzero(codes < 0):,} of {len(codes):,} images have no label "
            f"(first: row {np.argmax(codes < 0)}); label them or take them out."
        )
    return codes, words


_LABEL_KINDS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)


def _class_names(class_lists: list[list[str]], found: Iterable[tuple[Any, list[str]]]) -> tuple[str, ...]:
    """A ClassLabel's own order if all splits share it, else the union: numbers by value, others by name."""
    found = list(found)
    if len(class_lists) == len(found) and all(names == class_lists[0] for names in class_lists):
        return tuple(class_lists[0])
    union = {word for _, words in found for word in words}
    if all(_is_whole(word) for word in union):
        return tuple(sorted(union, key=int))
    return tuple(sorted(union))


def _is_whole(word: str) -> bool:
    return len(word) < 20 and word.removeprefix("-").isdecimal() and str(int(word)) == word


def _dataset(
    name: str, split: datasets.Dataset, image: str, labels: np.ndarray, names: tuple[str, ...]
) -> datasets.Dataset:
    has_indices = split._indices is not None
    column = split.with_format("arrow")[:].column(image) if has_indices else split.data.column(image)
    chunks = [_structs(chunk) for chunk in column.chunks]
    structs = pa.chunked_array(chunks, type=_STRUCT)
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(names))}
    )
    info = datasets.DatasetInfo(features=features, homepage=split.info.homepage)
    return in_memory(pa.table({"image": structs, "label": pa.array(labels)}), info, name)


_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _structs(chunk: pa.Array) -> pa.Array:
    """Any arrow form of images as structs of bytes and path; a missing image gets zero bytes."""
    if chunk.type != _STRUCT:
        chunk = datasets.Image(decode=False).cast_storage(chunk)
    data, path = chunk.flatten()
    missing = pc.and_(pc.is_null(data), pc.is_null(path))
    if not pc.any(missing).as_py():
        return chunk
    data = pc.if_else(missing, pa.scalar(b"", pa.binary()), data)
    return pa.StructArray.from_arrays([data, path], ["bytes", "path"])


def _columns(features: Mapping[str, Any]) -> str:
    shown = (f"{name} ({getattr(feature, '_type', type(feature).__name__)})" for name, feature in features.items())
    return f"the columns are {', '.join(shown)}"
