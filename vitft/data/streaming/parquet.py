"""Parquet shards: their footers and small columns are read at once, and a block is the images of a row group."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitft.data.streaming import remote
from vitft.data.streaming.remote import RemoteFile, Seekable
from vitft.data.streaming.shards import Shard
from vitft.errors import DataError
from vitft.io.console import size, without_secrets

_TAIL = 1 << 16  # bytes; most footers are shorter
_LARGEST = 1_000_000_000  # bytes of a row group, which is read as a whole
_MAGIC = b"PAR1"


@dataclass(frozen=True, eq=False)
class ParquetShard(Shard):
    """A parquet file behind a URL."""

    metadata: pq.FileMetaData

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self.metadata.schema.to_arrow_schema()

    def fetch(self, block: int, column: str) -> pa.LargeBinaryArray:
        """The images of a row group; those that are missing have no bytes."""
        chunks = _read_group(self, block, [column]).column(0).chunks
        chunks = [chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk for chunk in chunks]
        plain = [chunk.cast(pa.large_binary()) for chunk in chunks]
        whole = plain[0] if len(plain) == 1 else pa.concat_arrays(plain)
        return whole.fill_null(b"") if whole.null_count else whole

    def read_columns(self, names: Sequence[str]) -> pa.Table:
        """Small columns of all rows. Raises DataError."""
        try:
            tables = list(remote.in_requests(partial(_read_group, self, names=names), range(len(self.first))))
        except (OSError, ValueError) as error:
            reason = remote.reason(error) if isinstance(error, OSError) else "not a readable parquet file"
            raise DataError(f"{without_secrets(self.file.url)}: {reason}.") from error
        return pa.concat_tables(tables) if tables else self.schema.empty_table().select(names)


def open_parquet(file: RemoteFile, disk: int) -> ParquetShard:
    """Read the footer of a parquet file. `disk`: see `Shard`. Raises DataError, also if row groups are too large."""
    where = without_secrets(file.url)
    try:
        tail = remote.read_range(file.url, max(0, file.size - _TAIL), file.size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or length > file.size:
            raise ValueError("no footer")
        if length > len(tail):
            tail = remote.read_range(file.url, file.size - length, file.size)
        metadata = pq.read_metadata(pa.BufferReader(tail))
    except OSError as error:
        raise DataError(f"{where}: {remote.reason(error)}.") from error
    except (ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"{where} is not a readable parquet file.") from error
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    for number, group in enumerate(groups):
        if group.total_byte_size > _LARGEST:
            raise DataError(
                f"{where}: row group {number} has {size(group.total_byte_size)}, and is read as a whole; "
                "write smaller ones, as `vitft data pack` does."
            )
    first = np.cumsum([0, *(group.num_rows for group in groups)])[:-1]
    return ParquetShard(file, metadata.num_rows, first, disk, metadata)


def _read_group(shard: ParquetShard, group: int, names: Sequence[str]) -> pa.Table:
    """Columns of a row group. Raises OSError, and ValueError for corrupt data."""
    try:
        return _fetch_group(shard, group, names)
    except ValueError:  # perhaps it was damaged on the way
        return _fetch_group(shard, group, names)


def _fetch_group(shard: ParquetShard, group: int, names: Sequence[str]) -> pa.Table:
    """As `_read_group`. What is side by side is fetched in one request."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(chunk for name in names for chunk in _chunks(shard.metadata, group, name)):
        beside = spans and spans[-1][1] == start
        spans[-1:] = [(spans[-1][0], end)] if beside else [*spans[-1:], (start, end)]
    parts = [(start, remote.read_range(shard.file.url, start, end)) for start, end in spans]
    stream = _Parts(shard.file.size, parts)
    try:
        with pq.ParquetFile(stream, metadata=shard.metadata, page_checksum_verification=True) as file:
            table = file.read_row_group(group, columns=list(names), use_threads=False)
    except OSError as error:  # a page does not match its checksum
        raise ValueError(str(error)) from error
    if len(table) != shard.metadata.row_group(group).num_rows:  # headers of pages have no checksum
        raise ValueError(f"{len(table)} of {shard.metadata.row_group(group).num_rows} rows are there")
    return table


class _Parts(Seekable):
    """A file of which some parts are in memory."""

    def __init__(self, length: int, parts: list[tuple[int, bytes]]) -> None:
        super().__init__(length)
        self._parts = parts

    def read(self, count: int = -1) -> bytes:
        start, count = self.place, self.wanted(count)
        for begin, data in self._parts:
            if begin <= start and start + count <= begin + len(data):
                self.place += count
                return data[start - begin : start - begin + count]
        raise OSError(f"bytes {start} to {start + count} were not fetched")


def _chunks(metadata: pq.FileMetaData, group: int, column: str) -> list[tuple[int, int]]:
    """Where the values of a column are in a row group, start and end, a pair for each field of a struct."""
    found = []
    for number in range(metadata.num_columns):
        chunk = metadata.row_group(group).column(number)
        if chunk.path_in_schema.split(".")[0] == column:
            start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
            found.append((start, start + chunk.total_compressed_size))
    return found
