"""Measure how much memory a parquet file needs, before decoding its values."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitft.errors import DataError
from vitft.io.console import size

_ROW_BYTES = 60  # memory for a row of nulls
_FREE, _MAX_RATIO = 256_000_000, 100  # bytes that any file may need, plus this many times its own size
_BATCH_ROWS = 1024


def check_memory(file: Path, columns: Sequence[str]) -> None:
    """Raise DataError if these columns need more memory than there is, or suspiciously more than the file's size.

    In a file, a row of nulls takes nothing, a repeated value a few bits (of a dictionary index), compressible data
    little; in memory they take their full size.
    """
    metadata = pq.read_metadata(file)
    total, file_size = psutil.virtual_memory().total, file.stat().st_size
    allowed = min(total, _FREE + _MAX_RATIO * file_size)
    needed = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if needed <= allowed:
        needed = _needed(file, metadata, columns, allowed)
    if needed <= allowed:
        return
    rows = f"{file}: its {metadata.num_rows:,} rows need {size(needed)}"
    if needed > total:
        raise DataError(f"{rows}, but this machine has {size(total)} of memory.")
    raise DataError(f"{rows} or more, from a file of {size(file_size)}; no image dataset compresses like that.")


def _needed(file: Path, metadata: pq.FileMetaData, columns: Sequence[str], allowed: int) -> int:
    """Memory that these columns need; counting stops above `allowed`. Raises OSError for a corrupt file."""
    groups = range(metadata.num_row_groups)
    with pq.ParquetFile(file, memory_map=True) as opened:
        for group in groups:
            # Reading a row raises for corrupt column statistics, where asking for the column chunk would crash.
            next(opened.iter_batches(1, row_groups=[group], columns=list(columns), use_threads=False), None)
    wanted = [c for c in range(metadata.num_columns) if metadata.schema.column(c).path.split(".")[0] in columns]
    chunks = [metadata.row_group(group).column(c) for group in groups for c in wanted]
    values = max(metadata.num_rows, *(chunk.num_values for chunk in chunks), 0)
    needed = int(_ROW_BYTES * values + sum(chunk.total_uncompressed_size for chunk in chunks))
    repeated = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page]
    if needed <= allowed < needed + sum(chunk.num_values * chunk.total_uncompressed_size for chunk in repeated):
        leaves = sorted({chunk.path_in_schema for chunk in repeated})
        with pq.ParquetFile(file, read_dictionary=leaves, memory_map=True) as opened:
            for batch in opened.iter_batches(_BATCH_ROWS, columns=leaves, use_threads=False):
                needed += sum(map(_length, batch.columns))
                if needed > allowed:
                    break
    return needed


def _length(array: pa.Array) -> int:
    """Bytes of an array's values. Dictionary-encoded values are counted, not decoded."""
    if pa.types.is_struct(array.type):
        return sum(map(_length, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _length(array.flatten())
    if pa.types.is_dictionary(array.type):
        return int(pc.sum(pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)).as_py() or 0)
    return int(array.nbytes)
