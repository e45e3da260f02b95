"""Find the image and label columns of parquet files and hub datasets with any schema, and normalize them.

Fields of structs count as columns (`data.image`), lists of one element are unwrapped, and strings and bytes of any
arrow type become the plain types.
"""

import io
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.features.features import generate_from_arrow_type
from numpy.typing import NDArray
from PIL import Image

from vitft.data.sources.schema import (
    IMAGE_TYPE,
    MISSING,
    Notes,
    ReadOptions,
    Splits,
    group_rows,
    in_memory,
    role_of,
    to_int64,
)
from vitft.data.sources.tables import columns
from vitft.data.sources.tables.rows import SPLIT, Table, shorten
from vitft.errors import DataError, UsageError, nearest

Features = Mapping[str, Any]
Read = Callable[[list[str]], pa.Table]

# Usual names, the most specific first; `jpg` and `cls` are fields of WebDataset.
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixel_values", "pixels", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "category", "target", "cls")
FILE_NAMES = ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file")
_NO_LABELS = (
    "id", "idx", "index", "image_id", "key", "__key__", "__url__", "url", "width", "height", *SPLIT, "fold",
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """A column, or a field of a struct column."""

    path: tuple[str, ...]
    feature: Any

    @property
    def name(self) -> str:
        """Its dotted path."""
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"column {self.name!r}"

    @property
    def last(self) -> str:
        """Its own name, in lower case."""
        return self.path[-1].lower()

    @property
    def item(self) -> Any:
        """Its feature; for lists, the feature of the elements."""
        inner = self.feature
        while isinstance(inner, datasets.List | datasets.LargeList):
            inner = inner.feature
        return inner


def leaves(features: Features, parents: tuple[str, ...] = ()) -> dict[str, Leaf]:
    """All columns by name, and all fields of structs by dotted path."""
    by_name: dict[str, Leaf] = {}
    for name, feature in features.items():
        path = (*parents, name)
        if isinstance(feature, dict) and not _can_be_image(feature):
            by_name |= leaves(feature, path)
        else:
            by_name[".".join(path)] = Leaf(path, feature)
    return by_name


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features that `datasets` wrote into a schema, else those of the arrow types; None for unknown types."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        known = datasets.Features.from_dict(written)
    except Exception:  # no such key, invalid JSON, or features of another version
        known = {}
    features: dict[str, Any] = {}
    for field in schema:
        try:
            features[field.name] = known.get(field.name) or generate_from_arrow_type(field.type)
        except (ValueError, TypeError, NotImplementedError):
            features[field.name] = None
    return features


def find_columns(features: Features, image: str | None, label: str | None, notes: Notes) -> tuple[Leaf, Leaf | None]:
    """The image and label columns: the requested ones, else by type and name; the label may be None.

    Raises DataError if there is no image column, or if several columns are equally likely.
    """
    known = leaves(features)
    for wanted in filter(None, (image, label)):
        if wanted not in known:
            raise DataError(f"no column {wanted!r}{nearest(wanted, known)}; {_describe(known)}.")
    image_leaf = _image_column(known, notes) if image is None else known[image]
    return image_leaf, _label_column(known, image_leaf, notes) if label is None else known[label]


def _image_column(known: Mapping[str, Leaf], notes: Notes) -> Leaf:
    columns = list(known.values())
    images = [leaf for leaf in columns if isinstance(leaf.item, datasets.Image)]
    images = images or [leaf for leaf in columns if _can_be_image(leaf.item)]
    if not images:  # pixels as numbers, or file names
        named = [leaf for leaf in columns if leaf.last in IMAGE_NAMES]
        pixels = datasets.Array2D | datasets.Array3D
        images = [leaf for leaf in named if leaf.feature is not leaf.item or isinstance(leaf.feature, pixels)]
        named = [leaf for leaf in columns if leaf.last in (*FILE_NAMES, *IMAGE_NAMES)]
        images = images or [leaf for leaf in named if _is_text(leaf.feature)]
    if not images:
        raise DataError(f"no image column; {_describe(known)}; choose one with --image-column.")
    return _choose(images, (*IMAGE_NAMES, *FILE_NAMES), known, "image", notes)


def _label_column(known: Mapping[str, Leaf], image: Leaf, notes: Notes) -> Leaf | None:
    columns = [leaf for leaf in known.values() if leaf is not image]
    classes = [leaf for leaf in columns if isinstance(leaf.item, datasets.ClassLabel)]
    named = [leaf for leaf in columns if leaf.last in LABEL_NAMES and not isinstance(leaf.item, dict | datasets.Image)]
    if classes or named:
        return _choose([*classes, *(leaf for leaf in named if leaf not in classes)], LABEL_NAMES, known, "label", notes)
    rest = [leaf for leaf in columns if leaf.last not in (*FILE_NAMES, *_NO_LABELS)]
    rest = [leaf for leaf in rest if _is_text(leaf.feature) or _is_integer(leaf.feature)]
    if len(rest) != 1:
        return None
    notes.decide(f"the label is {rest[0]}, the only other one with names or whole numbers")
    return rest[0]


def _choose(candidates: list[Leaf], names: tuple[str, ...], known: Mapping[str, Leaf], role: str, notes: Notes) -> Leaf:
    """The candidate with the best name. Raises DataError for equally good ones."""
    if len(candidates) == 1:
        return candidates[0]
    ranked = [leaf for wanted in names for leaf in candidates if leaf.last == wanted]
    if not ranked or [leaf.last for leaf in ranked].count(ranked[0].last) > 1:
        raise DataError(
            f"{len(candidates)} columns could hold the {role}: {', '.join(leaf.name for leaf in candidates)}; "
            f"choose one with --{role}-column ({_describe(known)})."
        )
    others = ", ".join(leaf.name for leaf in candidates if leaf is not ranked[0])
    notes.decide(f"the {role} is {ranked[0]}, by its name; not read: {others}")
    return ranked[0]


def _can_be_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in _BYTES


_BYTES = ("binary", "large_binary", "binary_view")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def _is_integer(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).removeprefix("u").startswith("int")


def _describe(known: Mapping[str, Leaf]) -> str:
    """All columns with their types, for error messages."""
    return f"the columns are {', '.join(f'{name} ({_kind(leaf)})' for name, leaf in known.items())}"


def _kind(leaf: Leaf) -> str:
    if leaf.feature is None:
        return "?"
    kind = getattr(leaf.item, "dtype", None) if isinstance(leaf.item, datasets.Value) else None
    name = str(kind or getattr(leaf.item, "_type", type(leaf.item).__name__))
    return f"list of {name}" if leaf.item is not leaf.feature else name


# -- contents ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalized:
    """A table's images as structs of bytes and path, and its labels."""

    images: pa.ChunkedArray
    labels: pa.ChunkedArray | None
    classes: list[str] | None = None  # if the table declares them


def normalize(name: str, features: Features, read: Read, options: ReadOptions, notes: Notes) -> Normalized:
    """The images and labels of a split, or of one of its files; `read` reads some columns.

    Raises DataError for several images or labels in a row.
    """
    image, label = _find_split_columns(name, features, options, notes)
    table = read(list(dict.fromkeys(leaf.path[0] for leaf in (image, label) if leaf is not None)))
    images = pa.chunked_array(list(_images(_at(table, image), image)), IMAGE_TYPE)
    if label is None:
        return Normalized(images, None)
    labels = [_plain_labels(chunk, label) for chunk in _unwrap_lists(_at(table, label), label, "labels")]
    classes = None
    if isinstance(label.item, datasets.ClassLabel):
        classes = [*map(str, label.item.names)]
        labels = [_codes(chunk, classes, label) for chunk in labels]
    return Normalized(images, pa.chunked_array(labels, labels[0].type if labels else pa.null()), classes)


def _at(table: pa.Table, leaf: Leaf) -> list[pa.Array]:
    chunks = table.column(leaf.path[0]).chunks
    for name in leaf.path[1:]:
        chunks = [pc.struct_field(chunk, [name]) for chunk in chunks]
    return [chunk.storage if isinstance(chunk.type, pa.ExtensionType) else chunk for chunk in chunks]


def _unwrap_lists(chunks: list[pa.Array], leaf: Leaf, what: str) -> Iterator[pa.Array]:
    """Replace lists of one element by the element. Raises DataError for other lists."""
    row = 0
    for chunk in chunks:
        while _is_list(chunk.type):
            lengths = pc.fill_null(pc.list_value_length(chunk), 1)
            if (is_single := pc.equal(lengths, 1)).true_count != len(chunk):
                first = pc.index(is_single, False).as_py()
                raise DataError(
                    f"{leaf} holds {lengths[first].as_py()} {what} in row {row + first}; "
                    "vitft needs one image and one class in each row: choose another column, or keep one of them."
                )
            is_null = chunk.is_null()
            values = pc.list_flatten(chunk)
            chunk = values if not is_null.true_count else pc.replace_with_mask(
                pa.nulls(len(chunk), values.type), pc.invert(is_null), values)  # fmt: skip
        row += len(chunk)
        yield chunk


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _plain_labels(chunk: pa.Array, leaf: Leaf) -> pa.Array:
    """Labels of any text type as string, of any float or decimal type as float64; others unchanged.

    Raises DataError for bytes that are not text, and for types that labels cannot have.
    """
    kind = (chunk := _plain(chunk)).type
    if pa.types.is_binary(kind):
        try:
            return chunk.cast(pa.string())
        except pa.ArrowInvalid as error:
            raise DataError(f"{leaf} holds bytes that are not UTF-8 text; a class must be a name.") from error
    if pa.types.is_decimal(kind) or pa.types.is_floating(kind):  # some hold whole numbers
        return chunk.cast(pa.float64())
    if not any(is_kind(kind) for is_kind in _LABEL_KINDS):
        raise DataError(f"{leaf} holds {kind}; a class must be a name or a whole number.")
    return chunk


_LABEL_KINDS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_null)


def _codes(labels: pa.Array, names: list[str], leaf: Leaf) -> pa.Array:
    """Labels of declared classes as int64 codes, null where missing, however they are stored. Raises DataError."""
    if pa.types.is_string(labels.type):
        coded = labels.dictionary_encode()
        code_of = {name: code for code, name in enumerate(names)}
        codes = [_code(word, code_of, leaf) for word in coded.dictionary.to_pylist()]
        return pa.array(codes, pa.int64()).take(coded.indices)
    if pa.types.is_floating(labels.type):
        labels = pc.if_else(pc.is_nan(labels), None, labels)
    return to_int64(labels, str(leaf))


def _code(word: str, code_of: Mapping[str, int], leaf: Leaf) -> int | None:
    """The class that a text stands for, as in `datasets`: by name, else by number; None if it is missing."""
    for text in (word, word.strip()):
        if text in code_of:
            return code_of[text]
    if word.strip() in MISSING:
        return None
    number = int(word) if re.fullmatch(r"\s*(-1|[0-9]{1,9})\s*", word) else len(code_of)
    if number >= len(code_of):
        raise DataError(
            f"{leaf} holds {shorten(word)!r}, which is not one of the {len(code_of)} class names that the "
            f"dataset declares ({shorten(', '.join(code_of))})."
        )
    return number


def _images(chunks: list[pa.Array], leaf: Leaf) -> Iterator[pa.Array]:
    kind, depth = chunks[0].type if chunks else pa.null(), 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    encode: Callable[[Any], bytes]
    if depth == 1 and pa.types.is_integer(kind):
        encode = bytes  # of a file, as a list
    elif depth > 1 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        encode = partial(_encode, leaf)
    else:
        for chunk in _unwrap_lists(chunks, leaf, "images"):
            yield from _structs(chunk)
        return
    for chunk in chunks:
        files = [None if values is None else encode(values) for values in chunk.to_pylist()]
        yield from _structs(pa.array(files, pa.large_binary()))


def _encode(leaf: Leaf, pixels: list[Any]) -> bytes:
    """An image stored as nested lists of pixels, as PNG. Raises DataError."""
    try:
        array = np.asarray(pixels)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if array.min() < 0 or array.max() > 255 or (array % 1).any():
            raise ValueError(f"values from {array.min()} to {array.max()}")
        return to_png((array.squeeze(2) if array.shape[2:] == (1,) else array).astype(np.uint8))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{leaf} holds lists that are not pixels from 0 to 255: {str(error)[:100]}; store encoded images."
        ) from error


def to_png(image: NDArray[np.uint8]) -> bytes:
    """An image as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _structs(chunk: pa.Array) -> Iterator[pa.Array]:
    """Images of any type as structs of binary and string, in several arrays if one would exceed 2 GB."""
    if chunk.type == IMAGE_TYPE:
        yield chunk
        return
    try:
        yield datasets.Image(decode=False).cast_storage(_plain(chunk))
    except pa.ArrowInvalid:  # over 2 GB
        if len(chunk) < 2:
            raise
        half = len(chunk) // 2
        yield from _structs(chunk[:half])
        yield from _structs(chunk[half:])


def _plain(chunk: pa.Array) -> pa.Array:
    """An array, or a struct of arrays, with text and bytes of any type as string and binary."""
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.cast(chunk.type.value_type)
    if pa.types.is_struct(chunk.type):
        names = [field.name for field in chunk.type]
        return pa.StructArray.from_arrays([_plain(pc.struct_field(chunk, [name])) for name in names], names)
    if pa.types.is_large_string(chunk.type) or pa.types.is_string_view(chunk.type):
        return chunk.cast(pa.string())
    if pa.types.is_large_binary(chunk.type) or pa.types.is_binary_view(chunk.type):
        return chunk.cast(pa.binary())
    return chunk


def concatenate(parts: Sequence[tuple[str, Normalized]], name: str) -> datasets.Dataset:
    """One split from several tables, each with its origin. Raises DataError for labels that do not fit together."""
    images = pa.chunked_array([chunk for _, part in parts for chunk in part.images.chunks], IMAGE_TYPE)
    columns = {"image": images}
    without = [where for where, part in parts if part.labels is None]
    if without and len(without) < len(parts):
        raise DataError(f"split {name}: {without[0]} has no labels, but others do; label or remove it.")
    classes = None
    if not without:
        columns["label"], classes = _concatenate_labels(parts, name)
    return in_memory(columns, classes, name)


def _concatenate_labels(parts: Sequence[tuple[str, Normalized]], name: str) -> tuple[pa.ChunkedArray, list[str] | None]:
    """The labels, and their classes if all parts declare the same ones."""
    columns = [part.labels for _, part in parts if part.labels is not None]
    classes = parts[0][1].classes
    if any(part.classes != classes for _, part in parts):  # files may number the classes differently; the names agree
        classes = None
        for number, (where, part) in enumerate(parts):
            if part.classes is not None:
                columns[number] = _names_of_codes(columns[number], part.classes, where)
    kinds = {column.type for column in columns if not pa.types.is_null(column.type)}
    if len(kinds) > 1 and all(map(pa.types.is_integer, kinds)):
        kinds = {pa.int64()}
    if len(kinds) > 1:
        raise DataError(f"split {name}: its files have different label types ({', '.join(sorted(map(str, kinds)))}).")
    kind = next(iter(kinds), pa.null())
    chunks = [chunk.cast(kind) for column in columns for chunk in column.chunks]
    return pa.chunked_array(chunks, kind), classes


def _names_of_codes(codes: pa.ChunkedArray, names: list[str], where: str) -> pa.ChunkedArray:
    codes = pc.if_else(pc.less(codes.cast(pa.int64()), 0), None, codes.cast(pa.int64()))
    if (largest := pc.max(codes).as_py()) is not None and largest >= len(names):
        raise DataError(f"{where}: label {largest} but only {len(names)} class names.")
    return pa.chunked_array([pa.array(names, pa.string()).take(chunk) for chunk in codes.chunks], pa.string())


# -- splits -----------------------------------------------------------------------------------------


def _find_split_columns(name: str, features: Features, options: ReadOptions, notes: Notes) -> tuple[Leaf, Leaf | None]:
    """`find_columns` for a split. A test split may lack the requested label column. Raises DataError."""
    is_absent = options.label_column not in (None, *leaves(features)) and role_of(name) == "test"
    image, label = find_columns(features, options.image_column, None if is_absent else options.label_column, notes)
    label = None if is_absent else label
    labels = "no label" if label is None else f"the label {label.name!r}"
    notes.decide(f"split {name}: the image is {image}, {labels}")
    return image, label


def normalize_splits(raw: Splits, where: Path, options: ReadOptions, notes: Notes) -> Splits:
    """Splits with any features as splits with only the columns `image` and `label`. Raises DataError."""
    splits = {}
    for name, split in raw.items():
        part = normalize(name, split.features, partial(_table, split), options, notes)
        splits[name] = concatenate([(f"split {name}", part)], name)
    first = next(iter(raw.values()), None)
    features = first.features if first is not None else {}
    return divide(splits, features, partial(_table, first), where, options, notes)


def _table(split: datasets.Dataset, names: list[str]) -> pa.Table:
    if split._indices is None or not names:
        return split.data
    return split.select_columns(names).with_format("arrow")[:]


def divide(splits: Splits, features: Features, read: Read, where: Path, options: ReadOptions, notes: Notes) -> Splits:
    """Divide an only split by a split or fold column, found as in tables (see `columns`).

    `features` are those of the first split, and `read` reads some of its columns. Raises VitftError, also if no split
    has labels.
    """
    if splits and not any("label" in split.features for split in splits.values()):
        raise DataError(f"no labels; {_describe(leaves(features))}; name the label column with --label-column.")
    if len(splits) != 1 or role_of(next(iter(splits))) not in (None, "train"):
        if options.split_column or options.fold_column or options.fold is not None:
            own = ", ".join(splits)
            raise UsageError(f"the dataset has its own splits ({own}); leave --split-column and --fold out.")
        return splits
    ((only, split),) = splits.items()
    used = {leaf.path[0] for leaf in _find_split_columns(only, features, options, Notes()) if leaf is not None}
    names = [name for name, feature in features.items() if name not in used and _may_divide(feature)]
    table = read(names)
    cells = {name: table.column(name).to_pylist() for name in names}
    rows = Table(where, cells, array("q", range(len(split))), "row")
    row_splits, _ = columns.read_splits(rows, set(), options, notes)
    if row_splits is None:
        return {"train": split}
    return {name: split.select(selected) for name, selected in group_rows(row_splits).items()}


def _may_divide(feature: Any) -> bool:
    """Whether a column holds text, whole numbers, or yes and no."""
    is_class = isinstance(feature, datasets.ClassLabel)
    return is_class or _is_integer(feature) or getattr(feature, "dtype", "") in ("string", "large_string", "bool")
