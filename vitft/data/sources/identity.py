"""Who an image is: what people call it, and a number that follows from the image alone, wherever it stands.

An image that is a file of its own is known by its path in the data set; one that lies in a parquet file, an
archive or on the hub, by its content. So the number stays when others are added, removed or reordered.
"""

import os
from collections.abc import Callable
from hashlib import blake2b

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitft.data.sources.schema import NAME, in_memory
from vitft.io.paths import composed

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
ROW = "row"  # the column that keeps the number of each row, whatever is selected of a split
_WHOLE, _PIECE = 1 << 16, 1 << 14  # bytes up to which all is hashed; of more, so many at start, middle and end


def numbered(split: datasets.Dataset) -> datasets.Dataset:
    """A split with the number of each row as another column."""
    if ROW in split.column_names:
        return split
    columns = {name: split.data.column(name) for name in split.column_names} | {ROW: pa.array(np.arange(len(split)))}
    features = datasets.Features({**split.features, ROW: datasets.Value("int64")})
    return in_memory(pa.table(columns), datasets.DatasetInfo(features=features), str(split.split or "") or None)


def row_numbers(split: datasets.Dataset) -> Rows:
    """The number of each row in the data set as it was opened: (n,)."""
    if ROW not in split.column_names:
        return np.arange(len(split))
    numbers = np.asarray(split.data.column(ROW).combine_chunks(), np.int64)
    return numbers if split._indices is None else numbers[split._indices.column(0).to_numpy()]


def has_own_files(split: datasets.Dataset) -> bool:
    """Whether the images are files that our own reader named."""
    return NAME in split.column_names


def sample_id(split: datasets.Dataset, row: int) -> str:
    """What a person needs to find an image: its path relative to the data set's folder, or `row 17`."""
    return sample_names(split, np.array([row]))[0]


def sample_names(split: datasets.Dataset, rows: Rows) -> list[str]:
    """The same of each of these rows; of a selection, the numbers are those of the whole split."""
    if has_own_files(split):
        return list(split.data.column(NAME).take(pa.array(_stored(split, rows))).to_pylist())
    return [f"row {number}" for number in row_numbers(split)[rows]]


def ids(split: datasets.Dataset, rows: Rows) -> list[str]:
    """What `splits.json` calls these rows: paths (with /, in Unicode's form NFC), or 16 hex digits of the content."""
    if has_own_files(split):
        return [composed(path) for path in sample_names(split, rows)]
    return [f"{key:016x}" for key in contents(split, rows).tolist()]


def keys_of(names: list[str]) -> Keys:
    """A 64-bit number for each of such names."""
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def contents(split: datasets.Dataset, rows: Rows) -> Keys:
    """A 64-bit number of each image's bytes, the same for a file and for a cell of a table: (n,).

    Of more than 64 KB it is of the size and of 16 KB each at the start, the middle and the end.
    """
    images = split.data.column("image")
    found = np.empty(len(rows), np.uint64)
    stored = _stored(split, rows)
    order = np.argsort(stored, kind="stable")
    first = 0  # the number of a chunk's first row
    for chunk in images.chunks:
        begin, end = np.searchsorted(stored[order], [first, first + len(chunk)])
        data, path = chunk.flatten()
        places = order[begin:end]
        wanted = stored[places] - first
        here = data.is_valid().to_numpy(zero_copy_only=False)[wanted].tolist()
        names = path.take(pa.array(wanted)).to_pylist()  # at once: a cell by itself takes as long as opening a file
        for place, row, is_here, name in zip(places.tolist(), wanted.tolist(), here, names, strict=True):
            found[place] = _of_bytes(data[row]) if is_here else _of_file(str(name))
        first += len(chunk)
    return found


def _of_bytes(cell: pa.BinaryScalar) -> int:
    view = memoryview(cell.as_buffer())
    return _digest(len(view), lambda start, count: view[start : start + count])


def _of_file(path: str) -> int:
    try:
        file = os.open(path, _READ)
    except OSError:
        return _digest(-1, lambda start, count: path.encode())  # its reader will say what is wrong
    try:
        return _digest(os.fstat(file).st_size, lambda start, count: os.pread(file, count, start))
    except OSError:
        return _digest(-1, lambda start, count: path.encode())
    finally:
        os.close(file)


def _digest(size: int, read: Callable[[int, int], bytes | memoryview]) -> int:
    hashed = blake2b(size.to_bytes(8, "little", signed=True), digest_size=8)
    whole = [(0, size)]
    for start, count in whole if size <= _WHOLE else [(0, _PIECE), (size // 2, _PIECE), (size - _PIECE, _PIECE)]:
        hashed.update(read(start, count))
    return int.from_bytes(hashed.digest(), "little")


def _stored(split: datasets.Dataset, rows: Rows) -> Rows:
    """Where the rows of a selection stand in the table that they were selected from."""
    if split._indices is None:
        return rows
    return np.asarray(split._indices.column(0).take(pa.array(rows)), np.int64)
