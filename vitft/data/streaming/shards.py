"""Parquet shards behind URLs: their footers and small columns at once, their images a row group at a time.

The image in a row of a shard has an address, `URL#COLUMN/ROW`, by which any process finds it.
"""

import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vitft.data.streaming import blocks, remote
from vitft.data.streaming.remote import RemoteFile
from vitft.errors import DataError
from vitft.io.console import size, without_secrets

_TAIL = 1 << 16  # bytes; most footers are shorter
_LARGEST = 1_000_000_000  # bytes of a row group, which is read as a whole
_AHEAD = 8  # row groups fetched at a time
_MAGIC = b"PAR1"


@dataclass(frozen=True, eq=False)
class Shard:
    """A parquet file behind a URL: the first row of each row group, and the bytes on disk that all shards may take."""

    file: RemoteFile
    metadata: pq.FileMetaData
    first: NDArray[np.int64]
    disk: int

    def block(self, row: int) -> int:
        """The number of a row's row group."""
        return int(np.searchsorted(self.first, row, "right")) - 1

    def chunks(self, group: int, column: str) -> list[tuple[int, int]]:
        """Where the values of a column are in a row group, start and end, a pair for each field of a struct."""
        found = []
        for number in range(self.metadata.num_columns):
            chunk = self.metadata.row_group(group).column(number)
            if chunk.path_in_schema.split(".")[0] == column:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                start = min(start, chunk.data_page_offset)
                found.append((start, start + chunk.total_compressed_size))
        return found


_shards: dict[str, Shard] = {}


def open_shard(file: RemoteFile, disk: int) -> Shard:
    """Read the footer of a parquet file. `disk`: bytes for blocks. Raises DataError."""
    try:
        tail = remote.read_range(file.url, max(0, file.size - _TAIL), file.size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or length > file.size:
            raise ValueError("no footer")
        if length > len(tail):
            tail = remote.read_range(file.url, file.size - length, file.size)
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except OSError as error:
        raise DataError(f"{without_secrets(file.url)}: {remote.reason(error)}.") from error
    except (ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"{without_secrets(file.url)} is not a readable parquet file.") from error
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    shard = Shard(file, metadata, np.cumsum([0, *rows])[:-1], disk)
    _shards[file.url] = shard
    return shard


def read_columns(shard: Shard, names: Sequence[str]) -> pa.Table:
    """Small columns of a whole shard. Raises DataError."""
    groups = range(shard.metadata.num_row_groups)
    try:
        tables = list(remote.in_requests(partial(_read_group, shard, names=names), groups))
    except (OSError, ValueError) as error:
        reason = remote.reason(error) if isinstance(error, OSError) else "not a readable parquet file"
        raise DataError(f"{without_secrets(shard.file.url)}: {reason}.") from error
    return pa.concat_tables(tables) if tables else shard.metadata.schema.to_arrow_schema().empty_table().select(names)


def _read_group(shard: Shard, group: int, names: Sequence[str]) -> pa.Table:
    """Columns of a row group. Raises OSError, and ValueError for corrupt data."""
    try:
        return _fetch_group(shard, group, names)
    except ValueError:  # perhaps it was damaged on the way
        return _fetch_group(shard, group, names)


def _fetch_group(shard: Shard, group: int, names: Sequence[str]) -> pa.Table:
    """As `_read_group`. What is side by side is fetched in one request."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(chunk for name in names for chunk in shard.chunks(group, name)):
        beside = spans and spans[-1][1] == start
        spans[-1:] = [(spans[-1][0], end)] if beside else [*spans[-1:], (start, end)]
    parts = [(start, remote.read_range(shard.file.url, start, end)) for start, end in spans]
    stream = _Parts(shard.file.size, parts)
    try:
        with pq.ParquetFile(stream, metadata=shard.metadata, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=list(names), use_threads=False)
    except OSError as error:  # a page does not match its checksum
        raise ValueError(str(error)) from error


class _Parts(io.RawIOBase):
    """A file of which some parts are in memory."""

    def __init__(self, length: int, parts: list[tuple[int, bytes]]) -> None:
        self._length, self._parts, self._place = length, parts, 0

    def read(self, count: int = -1) -> bytes:
        start, count = self._place, self._length - self._place if count < 0 else count
        for begin, data in self._parts:
            if begin <= start and start + count <= begin + len(data):
                self._place += count
                return data[start - begin : start - begin + count]
        raise OSError(f"bytes {start} to {start + count} were not fetched")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


# -- images -----------------------------------------------------------------------------------------


def addresses(shard: Shard, column: str) -> list[str]:
    """The address of each image of a shard. Raises DataError if its row groups are too large, or hold no images."""
    for group in range(shard.metadata.num_row_groups):
        if (needed := shard.metadata.row_group(group).total_byte_size) > _LARGEST:
            raise DataError(
                f"{without_secrets(shard.file.url)}: row group {group} has {size(needed)}, and is read as a whole; "
                "write smaller ones, as `vitft data pack` does."
            )
    return [f"{shard.file.url}#{column}/{row}" for row in range(shard.metadata.num_rows)]


def is_address(path: str | None) -> bool:
    """Whether the path of an image is its address in a shard."""
    return path is not None and remote.is_url(path)


def read_image(address: str) -> bytes:
    """The encoded image at an address. Raises OSError, and ValueError for a corrupt shard."""
    shard, column, row = _found(address)
    group = shard.block(row)
    return bytes(_images(shard, column, group)[row - int(shard.first[group])].as_buffer())


def fetch_ahead(wanted: Iterable[str]) -> None:
    """Fetch the row groups of these addresses in threads, if they are not here. Failures are left to the reader."""
    for address in wanted:
        shard, column, row = _found(address)
        block = (shard, column, shard.block(row))
        if block not in _coming:
            _coming.add(block)
            _queue.put(block)
    while _coming and len(_threads) < _AHEAD:
        # Not a pool of concurrent.futures: a program that ends would wait for its requests.
        _threads.append(Thread(target=_fetch_queued, name="vitft-fetch", daemon=True))
        _threads[-1].start()


_Block = tuple[Shard, str, int]
_queue: SimpleQueue[_Block] = SimpleQueue()
_coming: set[_Block] = set()  # in the queue, or being fetched
_threads: list[Thread] = []


def _fetch_queued() -> None:
    while True:
        block = _queue.get()
        with suppress(OSError, ValueError):  # the reader will try again, and say so
            _images(*block)
        _coming.discard(block)


def _forget_threads() -> None:
    """A forked process has none of them."""
    global _queue
    _queue = SimpleQueue()
    _coming.clear()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _found(address: str) -> tuple[Shard, str, int]:
    url, _, place = address.rpartition("#")
    column, _, row = place.rpartition("/")
    return _shards[url], column, int(row)


def _images(shard: Shard, column: str, group: int) -> pa.LargeBinaryArray:
    name = f"{shard.file.url} {shard.file.version} {shard.file.size} {column} {group}"
    return blocks.images(name, shard.disk, _Fetch(shard, column, group))


@dataclass(frozen=True, eq=False)
class _Fetch:
    """Fetches a block."""

    shard: Shard
    column: str
    group: int

    def __call__(self) -> pa.LargeBinaryArray:
        chunk = _read_group(self.shard, self.group, [self.column]).column(0).combine_chunks()
        if isinstance(chunk, pa.ChunkedArray):
            chunk = pa.concat_arrays(chunk.chunks)
        if pa.types.is_struct(chunk.type):
            chunk = chunk.field("bytes") if chunk.type.get_field_index("bytes") >= 0 else pa.nulls(len(chunk))
        return chunk.cast(pa.large_binary()).fill_null(b"")
