"""What a parquet file takes in memory, counted before its values are made."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitft.errors import DataError
from vitft.io.console import size

_ROW_BYTES = 60  # in memory, of a row of nulls
_SLACK, _RATIO = 256_000_000, 100  # bytes that any file may take; as many times its own as images are compressed
_ROWS = 1024  # counted at a time


def check_room(file: Path, columns: Sequence[str]) -> None:
    """Raise DataError for a file of few bytes of which these columns take far more, or more than there is memory.

    A row of nulls takes nothing in a file, a value that repeats a few bits (it stands in a dictionary), and what
    compresses well little.
    """
    said = pq.read_metadata(file)
    there, own = psutil.virtual_memory().total, file.stat().st_size
    allowed = min(there, _SLACK + _RATIO * own)
    needed = sum(said.row_group(group).total_byte_size for group in range(said.num_row_groups))
    if needed <= allowed:
        needed = _needed(file, said, columns, allowed)
    if needed <= allowed:
        return
    if needed > there:
        raise DataError(
            f"{file}: its {said.num_rows:,} rows take {size(needed)}, and this machine has {size(there)} of memory."
        )
    raise DataError(
        f"{file}: its {said.num_rows:,} rows take {size(needed)} or more, and the file has {size(own)}; no data set of "
        "images is like that: is it damaged?"
    )


def _needed(file: Path, said: pq.FileMetaData, columns: Sequence[str], allowed: int) -> int:
    """Bytes that these columns take, or so many of them as are more than is allowed. Raises OSError for damage."""
    with pq.ParquetFile(file, memory_map=True) as opened:
        for group in range(said.num_row_groups):
            # Reading a row says so where a chunk's statistics are damaged; asking for the chunk ends the process.
            next(opened.iter_batches(1, row_groups=[group], columns=list(columns), use_threads=False), None)
    wanted = [c for c in range(said.num_columns) if said.schema.column(c).path.split(".")[0] in columns]
    chunks = [said.row_group(group).column(c) for group in range(said.num_row_groups) for c in wanted]
    values = max(said.num_rows, *(chunk.num_values for chunk in chunks), 0)
    needed = int(_ROW_BYTES * values + sum(chunk.total_uncompressed_size for chunk in chunks))
    repeated = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page]
    if needed <= allowed < needed + sum(chunk.num_values * chunk.total_uncompressed_size for chunk in repeated):
        leaves = sorted({chunk.path_in_schema for chunk in repeated})
        for length in _lengths(file, leaves):
            if (needed := needed + length) > allowed:
                break
    return needed


def _lengths(file: Path, leaves: Sequence[str]) -> Iterator[int]:
    """Bytes of the values of these leaves, a few rows at a time; a dictionary's are counted, not made."""
    with pq.ParquetFile(file, read_dictionary=list(leaves), memory_map=True) as opened:
        for batch in opened.iter_batches(_ROWS, columns=list(leaves), use_threads=False):
            yield sum(_length(column) for column in batch.columns)


def _length(array: pa.Array) -> int:
    if pa.types.is_struct(array.type):
        return sum(map(_length, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _length(array.flatten())
    if pa.types.is_dictionary(array.type):
        return int(pc.sum(pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)).as_py() or 0)
    return int(array.nbytes)
