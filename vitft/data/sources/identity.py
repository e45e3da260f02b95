"""What identifies an image: a name for people, and an id that depends on the image alone, not on its row.

An image file is identified by its path in the dataset; an image in a parquet file, an archive or on the hub, by its
content. So ids stay the same when images are added, removed or reordered. An image in a shard behind a URL is
identified by its place there, because its content would have to be fetched; shards do not change.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from itertools import chain

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitft.data.sources.schema import BLOCK, NAME, ROW, whole_numbers
from vitft.data.streaming.remote import reason
from vitft.data.streaming.shards import is_address, read_image
from vitft.errors import DataError
from vitft.hardware.pools import map_in_processes, processes
from vitft.io.console import without_secrets
from vitft.io.paths import composed

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_HASHED_WHOLE, _PIECE = 1 << 16, 1 << 14  # bytes; of larger images, a piece at the start, middle and end is hashed
_MANY, _LARGE = 5000, 10_000  # images that take longer to hash than processes to start: files, or of so many bytes
_PART = 500  # images hashed at a time


def has_names(split: datasets.Dataset) -> bool:
    """Whether the images are files that our own reader named."""
    return NAME in split.column_names


def is_streamed(split: datasets.Dataset) -> bool:
    """Whether the images are in shards that are fetched when they are needed."""
    return BLOCK in split.column_names


def blocks_of(split: datasets.Dataset) -> Rows:
    """The number of the part of a shard that each image of a streamed split is fetched with: (n,)."""
    return whole_numbers(split, BLOCK)


def rows_to_look_at(split: datasets.Dataset, count: int) -> list[int]:
    """At most `count` rows, evenly spaced; of a streamed split within the first part, so that no others are fetched."""
    among = np.flatnonzero(blocks_of(split) == blocks_of(split)[0]) if is_streamed(split) and len(split) else None
    rows = np.arange(len(split)) if among is None else among
    spaced = np.linspace(0, len(rows) - 1, min(len(rows), count)).round().astype(np.int64)
    return [int(row) for row in rows[np.unique(spaced)]]


def sample_id(split: datasets.Dataset, row: int) -> str:
    """What a person needs to find an image: its path relative to the dataset's folder, or `row 17`."""
    return sample_names(split, np.array([row]))[0]


def sample_names(split: datasets.Dataset, rows: Rows) -> list[str]:
    """The `sample_id` of each of these rows. Row numbers are those of the whole split, even in a selection."""
    if has_names(split):
        return list(split.data.column(NAME).take(pa.array(_table_rows(split, rows))).to_pylist())
    return [f"row {number}" for number in whole_numbers(split, ROW)[rows]]


def ids(split: datasets.Dataset, rows: Rows) -> list[str]:
    """The ids of these rows in `splits.json`: paths (with /, in Unicode form NFC), or 16 hex digits of the content."""
    if has_names(split):
        return [composed(path) for path in sample_names(split, rows)]
    return content_hashes(split, rows)


def keys_of(names: list[str]) -> Keys:
    """A 64-bit hash of each name."""
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def content_hashes(split: datasets.Dataset, rows: Rows) -> list[str]:
    """16 hex digits, a hash of each image's encoded bytes, the same for a file and for a table's cell.

    Above 64 KB it covers the size and 16 KB each at the start, the middle and the end.
    """
    main = threading.current_thread() is threading.main_thread()  # the only one that may fork
    slow = has_names(split) or split.data.column("image").nbytes > _LARGE * len(split.data)
    count = processes() if main and slow and len(rows) >= _MANY else 0
    parts = np.array_split(rows, max(1, -(-len(rows) // _PART)))  # all paths of a large split at once take much memory
    work = partial(_content_hashes, split)
    return list(chain.from_iterable(map_in_processes(work, parts, count) if count else map(work, parts)))


def _content_hashes(split: datasets.Dataset, rows: Rows) -> list[str]:
    hashes = [""] * len(rows)
    table_rows = _table_rows(split, rows)
    order = np.argsort(table_rows, kind="stable")
    first = 0  # the number of a chunk's first row
    for chunk in split.data.column("image").chunks:
        begin, end = np.searchsorted(table_rows[order], [first, first + len(chunk)])
        data, path = chunk.flatten()
        positions = order[begin:end]
        in_chunk = table_rows[positions] - first
        in_cell = data.is_valid().to_numpy(zero_copy_only=False)[in_chunk].tolist()
        paths = path.take(pa.array(in_chunk)).to_pylist()  # in bulk: one cell takes as long as opening a file
        for position, row, has_bytes, name in zip(positions.tolist(), in_chunk.tolist(), in_cell, paths, strict=True):
            hashes[position] = _hash_bytes(data[row]) if has_bytes else _hash_file(str(name))
        first += len(chunk)
    return hashes


def _hash_bytes(cell: pa.BinaryScalar) -> str:
    view = memoryview(cell.as_buffer())
    return _hash(len(view), lambda start, count: view[start : start + count])


def _hash_file(path: str) -> str:
    if is_address(path):
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{without_secrets(path)}: cannot be fetched: {reason(error)}.") from error
        return _hash(len(image), lambda start, count: image[start : start + count])
    try:
        file = os.open(path, _READ)
        try:
            return _hash(os.fstat(file).st_size, lambda start, count: os.pread(file, count, start))
        finally:
            os.close(file)
    except OSError:  # decoding it reports the error
        return _hash(-1, lambda start, count: path.encode())


def _hash(size: int, read: Callable[[int, int], bytes | memoryview]) -> str:
    digest = blake2b(size.to_bytes(8, "little", signed=True), digest_size=8)
    ends = [(0, _PIECE), (size // 2, _PIECE), (size - _PIECE, _PIECE)]
    for start, count in [(0, size)] if size <= _HASHED_WHOLE else ends:
        digest.update(read(start, count))
    return digest.digest()[::-1].hex()


def _table_rows(split: datasets.Dataset, rows: Rows) -> Rows:
    """The rows of a selection as rows of the table it was selected from."""
    if split._indices is None:
        return rows
    return np.asarray(split._indices.column(0).take(pa.array(rows)), np.int64)
