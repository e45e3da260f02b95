"""Tar shards: where each member is, and a block is the images that follow one another.

A tar has no table of contents. To find its members takes a pass over it, whose result is kept on this disk.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from tarfile import (  # type: ignore[attr-defined]
    EmptyHeaderError,
    InvalidHeaderError,
    ReadError,
    TarFile,
    TruncatedHeaderError,
)
from typing import IO, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitft.data.streaming import remote
from vitft.data.streaming.remote import RemoteFile, Seekable
from vitft.data.streaming.shards import Shard
from vitft.errors import DataError
from vitft.io import console

BLOCK_BYTES = 16_000_000
"""Bytes of a block, unless a single image has more."""
_WINDOW = 1 << 23  # bytes fetched at a time for the pass


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class TarShard(Shard):
    """An uncompressed tar behind a URL: where its images are, in order, (count,) each."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def fetch(self, block: int, column: str) -> pa.LargeBinaryArray:
        """The images of a block, in one request."""
        ends = [*self.first[1:].tolist(), self.count]
        rows = range(int(self.first[block]), ends[block])
        starts, sizes = self.starts[rows.start : rows.stop], self.sizes[rows.start : rows.stop]
        begin = int(starts[0])
        data = remote.read_range(self.file.url, begin, int(starts[-1] + sizes[-1]))
        places = zip((starts - begin).tolist(), sizes.tolist(), strict=True)
        return pa.array([data[start : start + size] for start, size in places], pa.large_binary())


def tar_shard(file: RemoteFile, disk: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> TarShard:
    """A shard of the images at these places, in order. `disk`: see `Shard`."""
    first: list[int] = []
    begin = 0
    for row, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        if not first or start + size - begin > BLOCK_BYTES:
            first.append(row)
            begin = start
    return TarShard(file, len(starts), np.array(first, np.int64), disk, starts, sizes)


class Header(tarfile.TarInfo):
    """A member's header. Of its extended header, which tarfile reads whole, the size is limited."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        """Raises ReadError for one that is damaged, or cut off: tarfile would take that for the end of the archive."""
        try:
            return super().fromtarfile(tarfile)
        except (InvalidHeaderError, TruncatedHeaderError) as error:
            raise ReadError(f"the header at byte {tarfile.offset:,} is damaged") from error
        except EmptyHeaderError as error:
            if not tarfile.offset:  # of an empty file, tarfile says so
                raise
            raise ReadError(f"it is cut off at byte {tarfile.offset:,}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Raises DataError for an extended header of over a megabyte."""
        member = super().frombuf(buf, encoding, errors)
        if not member.isreg() and member.size > 1 << 20:
            raise DataError(f"a member's header declares {console.size(member.size)}; the archive is not safe to open.")
        return member


def walk(file: RemoteFile) -> Iterator[tuple[Member, IO[bytes]]]:
    """The regular files of a tar, in order, each with a stream to read it from before the next one.

    Raises OSError, DataError for an unsafe header, and what tarfile raises.
    """
    with TarFile(fileobj=_Stream(file), tarinfo=Header) as tar:
        while (one := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte for each
            content = tar.extractfile(one) if one.isreg() else None
            if content is not None:
                yield Member(one.name.removeprefix("./"), one.offset_data, one.size), content


class _Stream(Seekable):
    """A remote file, of which a window is in memory: for reading from the start to the end."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(file.size)
        self._url, self._begin, self._window = file.url, 0, b""

    def read(self, count: int = -1) -> bytes:
        count = self.wanted(count)
        inside = self._begin <= self.place and self.place + count <= self._begin + len(self._window)
        if count and not inside:
            end = min(self.length, self.place + max(count, _WINDOW))
            self._begin, self._window = self.place, remote.read_range(self._url, self.place, end)
        start = self.place - self._begin
        self.place += count
        return self._window[start : start + count] if count else b""
