"""Shards behind URLs: where each image is, and how the blocks that hold them are fetched before they are needed.

The image in a row of a shard has an address, `URL#COLUMN/ROW`, by which any process finds it.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitft.data.streaming import blocks
from vitft.data.streaming.remote import RemoteFile
from vitft.io.paths import is_url

_AHEAD = 8  # blocks fetched at a time


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of images: how many, the first of each block, and the bytes on disk that the blocks of all may take.

    Once it is made, its images can be read by their addresses.
    """

    file: RemoteFile
    count: int
    first: NDArray[np.int64]
    disk: int

    def __post_init__(self) -> None:
        _shards[self.file.url] = self

    def block(self, row: int) -> int:
        """The number of the block with a row."""
        return int(np.searchsorted(self.first, row, "right")) - 1

    def fetch(self, block: int, column: str) -> pa.LargeBinaryArray:
        """The encoded images of a block. Raises OSError, and ValueError for corrupt data."""
        raise NotImplementedError

    def addresses(self, column: str) -> list[str]:
        """The address of each image."""
        return [f"{self.file.url}#{column}/{row}" for row in range(self.count)]


_shards: dict[str, Shard] = {}


def is_address(path: str | None) -> bool:
    """Whether the path of an image is its address in a shard that is open."""
    return path is not None and is_url(path) and path.rpartition("#")[0] in _shards


def read_image(address: str) -> bytes:
    """The encoded image at an address. Raises OSError, and ValueError for a corrupt shard."""
    shard, column, row = _found(address)
    block = shard.block(row)
    return bytes(_images(shard, column, block)[row - int(shard.first[block])].as_buffer())


def mean_size(address: str) -> int:
    """About the bytes of an encoded image: the mean of the shard."""
    shard, _, _ = _found(address)
    return shard.file.size // max(1, shard.count)


def fetch_ahead(wanted: Iterable[str]) -> None:
    """Fetch the blocks of these addresses in threads, if they are not here. Failures are left to the reader."""
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


def _images(shard: Shard, column: str, block: int) -> pa.LargeBinaryArray:
    name = f"{shard.file.url} {shard.file.version} {shard.file.size} {column} {block}"
    disk = shard.disk if shard.file.version else 0  # what has changed would not be noticed there
    return blocks.images(name, disk, partial(shard.fetch, block, column))
