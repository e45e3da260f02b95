"""Which column is the image and which the label, in parquet files and hub data sets of any schema.

Structs are looked into (`data.image`), a list of one is what it holds, and the texts and bytes of every arrow
type are brought to the plain ones.
"""

import io
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.features.features import generate_from_arrow_type
from PIL import Image

from vitft.data.sources import columns
from vitft.data.sources.rows import Table, in_short
from vitft.data.sources.schema import IMAGE_TYPE, Notes, Reading, in_memory, is_missing, need_classes, role_of, whole
from vitft.errors import DataError, UsageError, nearest

# Usual names, those that tell more first; `jpg` and `cls` are what datasets calls the fields of WebDataset.
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixel_values", "pixels", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "category", "target", "cls")
FILE_NAMES = ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file")
_NO_LABELS = (
    "id", "idx", "index", "image_id", "key", "__key__", "__url__", "url", "width", "height", *columns.SPLIT, "fold",
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """A column, or a field of a struct."""

    path: tuple[str, ...]
    feature: Any

    @property
    def last(self) -> str:
        """Its own name."""
        return self.path[-1].lower()

    @property
    def item(self) -> Any:
        """What it holds: of a list, what each of its elements is."""
        inner = self.feature
        while isinstance(inner, datasets.List | datasets.LargeList):
            inner = inner.feature
        return inner


def leaves(features: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Leaf]:
    """Every column by its name, and every field of a struct by its path with dots."""
    found: dict[str, Leaf] = {}
    for name, feature in features.items():
        path = (*above, name)
        if isinstance(feature, dict) and not _like_image(feature):
            found |= leaves(feature, path)
        else:
            found[".".join(path)] = Leaf(path, feature)
    return found


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features that datasets wrote into a schema, else those of the arrow types; None where there is none."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        known = datasets.Features.from_dict(written)
    except Exception:  # no such key, no JSON, or of a version with other features
        known = {}
    found: dict[str, Any] = {}
    for field in schema:
        try:
            found[field.name] = known.get(field.name) or generate_from_arrow_type(field.type)
        except (ValueError, TypeError, NotImplementedError):
            found[field.name] = None
    return found


def find_columns(
    features: Mapping[str, Any], image: str | None, label: str | None, notes: Notes
) -> tuple[Leaf, Leaf | None]:
    """The image and the label: those asked for, else found by type and name; no label is None.

    Raises DataError where there is no image, or where several columns could be meant.
    """
    known = leaves(features)
    for wanted in filter(None, (image, label)):
        if wanted not in known:
            raise DataError(f"no column {wanted!r}{nearest(wanted, known)}; {listed(features)}.")
    if image is None:
        image = _image_column(known, features, notes)
    if label is None:
        label = _label_column({name: leaf for name, leaf in known.items() if name != image}, features, notes)
    return known[image], None if label is None else known[label]


def _image_column(known: Mapping[str, Leaf], features: Mapping[str, Any], notes: Notes) -> str:
    images = [name for name, leaf in known.items() if isinstance(leaf.item, datasets.Image)]
    images = images or [name for name, leaf in known.items() if _like_image(leaf.item)]
    if not images:  # pixels as numbers, or names of files
        named = [name for name, leaf in known.items() if leaf.last in IMAGE_NAMES]
        images = [name for name in named if known[name].feature is not known[name].item or _is_pixels(known[name])]
        files = [name for name in known if known[name].last in (*FILE_NAMES, *IMAGE_NAMES)]
        images = images or [name for name in files if _is_text(known[name].feature)]
    found = _picked(images, (*IMAGE_NAMES, *FILE_NAMES), known, features, "image", notes)
    if found is None:
        raise DataError(f"no image column; {listed(features)}; name one with --image-column.")
    return found


def _label_column(known: Mapping[str, Leaf], features: Mapping[str, Any], notes: Notes) -> str | None:
    classes = [name for name, leaf in known.items() if isinstance(leaf.item, datasets.ClassLabel)]
    named = [
        name for name, leaf in known.items()
        if leaf.last in LABEL_NAMES and not isinstance(leaf.item, dict | datasets.Image)
    ]  # fmt: skip
    if classes or named:
        return _picked([*dict.fromkeys([*classes, *named])], LABEL_NAMES, known, features, "label", notes)
    rest = [
        name for name, leaf in known.items()
        if leaf.last not in (*FILE_NAMES, *_NO_LABELS) and (_is_text(leaf.feature) or _is_whole(leaf.feature))
    ]  # fmt: skip
    if len(rest) == 1:
        notes.decide(f"the label is column {rest[0]!r}: no other holds names or whole numbers")
        return rest[0]
    return None


def _picked(
    found: list[str], names: tuple[str, ...], known: Mapping[str, Leaf], features: Mapping[str, Any], what: str,
    notes: Notes,
) -> str | None:  # fmt: skip
    """The one of several columns whose name says most. Raises DataError where none says more than others."""
    ranked = [name for wanted in names for name in found if known[name].last == wanted]
    best = ranked[0] if ranked and sum(known[name].last == known[ranked[0]].last for name in ranked) == 1 else None
    if best is None and len(found) > 1:
        raise DataError(
            f"{len(found)} columns could hold the {what}: {', '.join(found)}; "
            f"name one with --{what}-column ({listed(features)})."
        )
    best = best or next(iter(found), None)
    if len(found) > 1:
        others = ", ".join(name for name in found if name != best)
        notes.decide(f"the {what} is column {best!r}, by its name; not read: {others}")
    return best


def _like_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool(feature) and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in _BYTES


_BYTES = ("binary", "large_binary", "binary_view")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def _is_whole(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).removeprefix("u").startswith("int")


def _is_pixels(leaf: Leaf) -> bool:
    return isinstance(leaf.feature, datasets.Array2D | datasets.Array3D)


def listed(features: Mapping[str, Any]) -> str:
    """The columns of a data set, each with its kind, for an error message."""
    shown = (f"{name} ({_kind(leaf)})" for name, leaf in leaves(features).items())
    return f"the columns are {', '.join(shown)}"


def _kind(leaf: Leaf) -> str:
    if leaf.feature is None:
        return "?"
    kind = getattr(leaf.item, "dtype", None) if isinstance(leaf.item, datasets.Value) else None
    name = str(kind or getattr(leaf.item, "_type", type(leaf.item).__name__))
    return f"list of {name}" if leaf.item is not leaf.feature else name


# -- contents ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """The images of a table as structs of bytes and path, and its labels."""

    images: pa.ChunkedArray
    labels: pa.ChunkedArray | None
    feature: Any  # ClassLabel where the table says what the classes are


def plain(table: pa.Table, image: Leaf, label: Leaf | None) -> Plain:
    """The two columns in their plain form. Raises DataError for lists of several."""
    images = pa.chunked_array(list(_images(_at(table, image), image)), IMAGE_TYPE)
    if label is None:
        return Plain(images, None, None)
    labels = [_text(chunk, label) for chunk in _of_one(_at(table, label), label, "labels")]
    for chunk in labels:
        need_classes(chunk.type, _column(label))
    feature = label.item
    if isinstance(feature, datasets.ClassLabel):
        feature = datasets.ClassLabel(names=[*map(str, feature.names)])
        labels = [_codes(chunk, feature.names, label) for chunk in labels]
    kind = labels[0].type if labels else pa.null()
    return Plain(images, pa.chunked_array(labels, kind), feature)


def _column(leaf: Leaf) -> str:
    """A column, or a field of one, for an error."""
    return f"column {'.'.join(leaf.path)!r}"


def _at(table: pa.Table, leaf: Leaf) -> list[pa.Array]:
    chunks = table.column(leaf.path[0]).chunks
    for name in leaf.path[1:]:
        chunks = [pc.struct_field(chunk, [name]) for chunk in chunks]
    return [chunk.storage if isinstance(chunk.type, pa.ExtensionType) else chunk for chunk in chunks]


def _of_one(chunks: list[pa.Array], leaf: Leaf, what: str) -> Iterator[pa.Array]:
    """Lists of one as what they hold."""
    row = 0
    for chunk in chunks:
        while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type) or _is_fixed(chunk.type):
            lengths = pc.fill_null(pc.list_value_length(chunk), 1)
            if (one := pc.equal(lengths, 1)).true_count != len(chunk):
                first = pc.index(one, False).as_py()
                raise DataError(
                    f"{_column(leaf)} holds {lengths[first].as_py()} {what} in row {row + first}; "
                    "an image has one class here: name another column, or take one of them."
                )
            gone = chunk.is_null()
            values = pc.list_flatten(chunk)
            chunk = values if not gone.true_count else pc.replace_with_mask(
                pa.nulls(len(chunk), values.type), pc.invert(gone), values)  # fmt: skip
        row += len(chunk)
        yield chunk


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _text(chunk: pa.Array, leaf: Leaf) -> pa.Array:
    """Labels of any type of text as string, of any type of fractions as float64; others as they are.

    Raises DataError for bytes that are no text.
    """
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.cast(chunk.type.value_type)
    if any(is_kind(chunk.type) for is_kind in _TEXT_KINDS):
        try:
            return chunk.cast(pa.string())
        except pa.ArrowInvalid as error:
            raise DataError(f"{_column(leaf)} holds bytes that are no UTF-8 text; a class must be a name.") from error
    fractions = pa.types.is_decimal(chunk.type) or pa.types.is_floating(chunk.type)
    return chunk.cast(pa.float64()) if fractions else chunk


_TEXT_KINDS = (
    pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_binary_view,
)  # fmt: skip


def _codes(labels: pa.Array, names: list[str], leaf: Leaf) -> pa.Array:
    """Labels of declared classes as int64, null where there is none, however they are stored. Raises DataError."""
    if pa.types.is_string(labels.type):
        coded = labels.dictionary_encode()
        place = {name: code for code, name in enumerate(names)}
        return pa.array([_code(word, place, leaf) for word in coded.dictionary.to_pylist()], pa.int64()).take(
            coded.indices
        )
    if pa.types.is_floating(labels.type):
        labels = pc.if_else(pc.is_nan(labels), None, labels)
    return whole(labels, _column(leaf))


def _code(word: str, place: Mapping[str, int], leaf: Leaf) -> int | None:
    """The class that a text means, as `datasets` reads it: by its name, else by its number; None for a missing one."""
    for text in (word, word.strip()):
        if text in place:
            return place[text]
    if is_missing(word.strip()):
        return None
    number = int(word) if re.fullmatch(r"\s*(-1|[0-9]{1,9})\s*", word) else len(place)
    if number >= len(place):
        raise DataError(
            f"{_column(leaf)} holds {in_short(word)!r}, none of the {len(place)} class names that the "
            f"data set declares ({in_short(', '.join(place))})."
        )
    return number


def _images(chunks: list[pa.Array], leaf: Leaf) -> Iterator[pa.Array]:
    for chunk in chunks:
        kind, depth = chunk.type, 0
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_fixed(kind):
            kind, depth = kind.value_type, depth + 1
        if depth == 1 and pa.types.is_integer(kind):  # a file as a list of its bytes
            files = [None if one is None else bytes(one) for one in chunk.to_pylist()]
            yield from _structs(pa.array(files, pa.large_binary()))
        elif depth > 1 and not pa.types.is_nested(kind) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            yield from _structs(pa.array([_encoded(one, leaf) for one in chunk.to_pylist()], pa.large_binary()))
        else:
            for inner in _of_one([chunk], leaf, "images"):
                yield from _structs(inner)


def _encoded(pixels: list[Any] | None, leaf: Leaf) -> bytes | None:
    """An image that is stored as nested lists of its pixels, as PNG. Raises DataError."""
    if pixels is None:
        return None
    try:
        array = np.asarray(pixels)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if array.min() < 0 or array.max() > 255 or (array % 1).any():
            raise ValueError(f"values from {array.min()} to {array.max()}")
        stream = io.BytesIO()
        Image.fromarray((array.squeeze(2) if array.shape[2:] == (1,) else array).astype(np.uint8)).save(stream, "PNG")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{_column(leaf)} holds lists that are no pixels of 0 to 255: {str(error)[:100]}; store encoded images."
        ) from error
    return stream.getvalue()


def _structs(chunk: pa.Array) -> Iterator[pa.Array]:
    """Images of any type as structs of binary and string, in as many pieces as these need."""
    if chunk.type == IMAGE_TYPE:
        yield chunk
        return
    try:
        yield datasets.Image(decode=False).cast_storage(_narrow(chunk))
    except pa.ArrowInvalid:  # more than 2 GB
        if len(chunk) < 2:
            raise
        half = len(chunk) // 2
        yield from _structs(chunk[:half])
        yield from _structs(chunk[half:])


def _narrow(chunk: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.cast(chunk.type.value_type)
    if pa.types.is_struct(chunk.type):
        names = [field.name for field in chunk.type]
        return pa.StructArray.from_arrays([_narrow(pc.struct_field(chunk, [name])) for name in names], names)
    if pa.types.is_large_string(chunk.type) or pa.types.is_string_view(chunk.type):
        return chunk.cast(pa.string())
    if pa.types.is_large_binary(chunk.type) or pa.types.is_binary_view(chunk.type):
        return chunk.cast(pa.binary())
    return chunk


def joined(parts: Sequence[tuple[str, Plain]], name: str) -> datasets.Dataset:
    """The split of several tables, each with where it is from. Raises DataError for labels that do not go together."""
    images = pa.chunked_array([chunk for _, part in parts for chunk in part.images.chunks], IMAGE_TYPE)
    columns: dict[str, Any] = {"image": images}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    without = [where for where, part in parts if part.labels is None]
    if without and len(without) < len(parts):
        raise DataError(f"split {name}: {without[0]} has no labels, and others have; take it out, or label it.")
    if not without:
        columns["label"], features["label"] = _joined_labels(parts, name)
    return in_memory(pa.table(columns), datasets.DatasetInfo(features=datasets.Features(features)), name)


def _joined_labels(parts: Sequence[tuple[str, Plain]], name: str) -> tuple[pa.ChunkedArray, Any]:
    declared = [part.feature.names if isinstance(part.feature, datasets.ClassLabel) else None for _, part in parts]
    labels = [part.labels for _, part in parts if part.labels is not None]
    if declared[0] is not None and all(names == declared[0] for names in declared):
        return pa.chunked_array([chunk for one in labels for chunk in one.chunks], labels[0].type), parts[0][1].feature
    for number, names in enumerate(declared):
        if names is not None:  # other numbers in other files: by name they are the same
            labels[number] = _by_name(labels[number], names, parts[number][0])
    kinds = {one.type for one in labels if not pa.types.is_null(one.type)}
    if len(kinds) > 1 and all(map(pa.types.is_integer, kinds)):
        kinds = {pa.int64()}
    if len(kinds) > 1:
        raise DataError(f"split {name}: its files differ in their labels ({', '.join(sorted(map(str, kinds)))}).")
    kind = next(iter(kinds), pa.null())
    chunks = [chunk.cast(kind) for one in labels for chunk in one.chunks]
    return pa.chunked_array(chunks, kind), datasets.Value(str(kind))


def _by_name(codes: pa.ChunkedArray, names: list[str], where: str) -> pa.ChunkedArray:
    codes = pc.if_else(pc.less(codes.cast(pa.int64()), 0), None, codes.cast(pa.int64()))
    if (largest := pc.max(codes).as_py()) is not None and largest >= len(names):
        raise DataError(f"{where}: label {largest} but only {len(names)} class names.")
    return pa.chunked_array([pa.array(names, pa.string()).take(chunk) for chunk in codes.chunks], pa.string())


# -- data sets --------------------------------------------------------------------------------------


def columns_of(name: str, features: Mapping[str, Any], reading: Reading, notes: Notes) -> tuple[Leaf, Leaf | None]:
    """`find_columns` of a split; one for testing may lack the label that was asked for. Raises DataError."""
    absent = reading.label_column not in (None, *leaves(features)) and role_of(name) == "test"
    label = None if absent else reading.label_column
    image, found = find_columns(features, reading.image_column, label, notes)
    found = None if absent else found
    told = "no label" if found is None else f"the label {'.'.join(found.path)!r}"
    notes.decide(f"split {name}: the image is column {'.'.join(image.path)!r}, {told}")
    return image, found


def plain_splits(
    raw: Mapping[str, datasets.Dataset], where: Path, reading: Reading, notes: Notes
) -> dict[str, datasets.Dataset]:
    """Splits of any features with columns `image` and `label` alone. Raises DataError."""
    found = {}
    for name, split in raw.items():
        image, label = columns_of(name, split.features, reading, notes)
        table = _read(split, [leaf.path[0] for leaf in (image, label) if leaf])
        found[name] = joined([(f"split {name}", plain(table, image, label))], name)
    need_labels(found, next(iter(raw.values())).features if raw else {})
    if (only := undivided(found, reading)) is not None:
        names = scalars(raw[only].features, columns_of(only, raw[only].features, reading, Notes()))
        return divided(found[only], _read(raw[only], names), names, where, reading, notes)
    return found


def _read(split: datasets.Dataset, names: Sequence[str]) -> pa.Table:
    if split._indices is None or not names:
        return split.data
    return split.select_columns(list(dict.fromkeys(names))).with_format("arrow")[:]


def need_labels(found: Mapping[str, datasets.Dataset], features: Mapping[str, Any]) -> None:
    """Raises DataError where no split has a column of labels."""
    if found and not any("label" in split.features for split in found.values()):
        raise DataError(f"no labels; {listed(features)}; name the column of the classes with --label-column.")


def undivided(found: Mapping[str, datasets.Dataset], reading: Reading) -> str | None:
    """The only split of a data set, if it may hold others. Raises UsageError where a column of splits is not it."""
    asked = reading.split_column or reading.fold_column or reading.fold is not None
    if len(found) == 1 and role_of(next(iter(found))) in (None, "train"):
        return next(iter(found))
    if asked:
        raise UsageError(
            f"the data set has splits of its own ({', '.join(found)}); leave --split-column and --fold out."
        )
    return None


def scalars(features: Mapping[str, Any], taken: tuple[Leaf, Leaf | None]) -> list[str]:
    """The columns of text and whole numbers that are neither the image nor the label."""
    used = {leaf.path[0] for leaf in taken if leaf is not None}
    kinds = ("string", "large_string", "bool")
    return [
        name for name, feature in features.items()
        if name not in used and (_is_whole(feature) or isinstance(feature, datasets.ClassLabel)
                                 or getattr(feature, "dtype", "") in kinds)
    ]  # fmt: skip


def divided(
    split: datasets.Dataset, table: pa.Table, names: list[str], where: Path, reading: Reading, notes: Notes
) -> dict[str, datasets.Dataset]:
    """A split by the column of splits or folds, found as `sources.columns` does in tables. Raises VitftError."""
    cells = [table.column(name).to_pylist() for name in names]
    rows = Table(where, names, cells, array("q", range(len(split))), "row")
    assigned, _ = columns.split_of_rows(rows, set(), reading, notes)
    if assigned is None:
        return {"train": split}
    numbers: dict[str, list[int]] = {}
    for row, name in enumerate(assigned):
        numbers.setdefault(name, []).append(row)
    return {name: split.select(chosen) for name, chosen in numbers.items()}
