"""The images of a large split, each decoded when it is first needed: the first step waits for its batch alone.

What was decoded is kept, as in `store`: in memory and beyond IN_MEMORY in a temporary file, up to a limit; what exceeds
that is decoded each time. All processes of a machine that train together, and those that they fork to prepare batches,
share what is kept, and what is known of it, in files without names. Once all images are, they are cached for later
runs.
"""

import hashlib
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augment import Images, Preprocess
from vitft.data.decoder import MAX_PIXELS, BadImage, Unavailable, are_tiny
from vitft.data.sources.identity import blocks_of, is_streamed, rows_to_look_at, sample_id
from vitft.data.stores import cache
from vitft.data.stores.store import IN_MEMORY, PixelHash, Skipped, UnreadableError, decoding, first_is_large, made_by
from vitft.data.streaming import shards
from vitft.hardware.pools import map_in_threads, shared_lock
from vitft.hardware.processes import ALONE, Processes
from vitft.io import console

PHOTOS, SMALL = 1000, 100_000
"""Splits of more images are large: of photos, which are larger than the model input, and of small images.

Decoding those takes two cores a few seconds.
"""
_SAMPLE = 64  # images whose pixels identify the decoder
_KNOWN = np.dtype(
    [
        ("start", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("sum", "<u8"),
        ("identity", "V16"),
        ("taken", "?"),
        ("bad", "?"),
    ]
)


def is_large(rows: datasets.Dataset, preprocess: Preprocess, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether decoding all images would keep the first step waiting: also if they have to be fetched."""
    return is_streamed(rows) or len(rows) > (PHOTOS if first_is_large(rows, preprocess, max_pixels) else SMALL)


class LazyStore:
    """The images of one split, decoded when they are gathered.

    In place of an image that cannot be read, with `skip_bad`, the next image of its class is shown: the batch keeps its
    size and its labels, and depends on the images alone, not on the process that meets it.
    """

    device = torch.device("cpu")

    def __init__(
        self, rows: datasets.Dataset, labels: NDArray[np.int64], preprocess: Preprocess, *, crops: bool,
        max_pixels: int, skip_bad: bool, cache_gb: float = 0.0, whole: bool = False, name: str = "images",
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        """As for `decode_all`; `labels` is (N,). Decodes a few images. Raises UnreadableError as `gather` does.

        `processes`: those that show the images of this split together; all of them have to make the store.
        """
        self._rows, self._labels, self._skip_bad, self._name = rows, labels, skip_bad, name
        self.blocks = blocks_of(rows) if is_streamed(rows) else None
        """The number of the part of a shard that each image is fetched with, (N,); None if nothing is fetched."""
        self._decode = decoding(preprocess, crops=crops, max_pixels=max_pixels, training=True)
        # Threads that decode tiny images hinder each other: it is mostly Python code.
        self._map = map if are_tiny(rows[rows_to_look_at(rows, _SAMPLE)]["image"]) else map_in_threads
        self._limit, self._by_sums = int(cache_gb * 1e9), crops
        self._whole, self._made_by = whole, made_by(preprocess, crops, True, max_pixels)
        self._caches = self._limit > 0 and self.blocks is None and first_is_large(rows, preprocess, max_pixels)
        self._entry = self._open_entry() if self._caches else None
        self._kept = _Kept(len(rows), max(self._limit, IN_MEMORY), processes)
        self._known = self._kept.known
        self._is_first = processes.is_first_here
        self._writing: Thread | None = None
        self._met: set[int] = set()  # positions that could not be read
        self._told: set[int] = set()
        self.skipped: list[Skipped] = []
        """The images that could not be read, as far as `attend` has found them."""
        self.digest = self._sample_digest()

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, index: NDArray[np.int64], *, stacked: bool = True) -> Images:
        """The images at these positions: (B, H, W, 3) if all have the same size and `stacked`, else a list.

        Raises UnreadableError, which names an image, if it cannot be read and may not be skipped, or has changed.
        """
        wanted = index.tolist()
        images: dict[int, Tensor] = {}
        shown = {position: position for position in wanted}
        while shown:
            read = self._read(sorted({*shown.values()}))
            images |= {position: read[other] for position, other in shown.items() if other in read}
            shown = {position: self._next(position, other) for position, other in shown.items() if other not in read}
        views = [images[position] for position in wanted]
        alike = stacked and len({view.shape for view in views}) == 1
        return torch.stack(views) if alike else views

    def fetch_ahead(self, index: NDArray[np.int64]) -> None:
        """Begin to fetch what the images at these positions need, in this order. Returns at once."""
        if self.blocks is not None and len(index := index[self._known["start"][index] == 0]):
            first = np.unique(self.blocks[index], return_index=True)[1]
            shards.fetch_ahead(cell["path"] for cell in self._rows[index[np.sort(first)]]["image"])

    def attend(self) -> None:
        """Between two steps: tell of images that could not be read, and once all are there, cache them."""
        if self._entry is not None and self._kept.is_cache_corrupt:
            if self._is_first:
                cache.discard(self._entry.key)
            self._entry, self._caches = None, False  # to cache it again would need the identities of all files
        if self._kept.bad > len(self._met):
            for position in np.flatnonzero(self._known["bad"]).tolist():
                if position not in self._met:
                    self._met.add(position)
                    bad = Skipped(position, sample_id(self._rows, position), self._fault(position))
                    self.skipped.append(bad)
                    self.tell(bad)
        if not self._caches or not self._is_first:
            return
        if self._entry is None and self._writing is None and self._kept.images == len(self):
            self._writing = Thread(target=self._cache, daemon=True)
            self._writing.start()

    def tell(self, bad: Skipped) -> None:
        """Tell, once, of an image that could not be read, here or on another machine."""
        if bad.position not in self._told:
            self._told.add(bad.position)
            console.warn(f"skipped {bad.name} (train): {bad.reason}; another image of its class is shown")

    def close(self) -> None:
        """Finish what is being cached."""
        if self._writing is not None and self._writing.is_alive():
            with console.working("caching the decoded photos"):
                self._writing.join()

    def _read(self, positions: Sequence[int]) -> dict[int, Tensor]:
        """The images at these positions that can be read."""
        known = self._known
        found = {p: self._kept.view(known[p]) for p in positions if self._kept.has(known[p])}
        missing = [p for p in positions if p not in found and not known["bad"][p]]
        if self._entry is not None and not self._kept.is_cache_corrupt:
            cached = zip(missing, map_in_threads(self._cached, missing), strict=True)
            found |= {p: image for p, image in cached if image is not None}
            missing = [p for p in missing if p not in found]
        if missing:
            cells = zip(missing, self._rows[missing]["image"], strict=True)
            decoded = self._map(lambda numbered: self._decoded(*numbered), cells)
            found |= {p: image for p, image in zip(missing, decoded, strict=True) if image is not None}
        return found

    def _open_entry(self) -> cache.OpenEntry | None:
        """What an earlier run has cached. To find it, a part of each file is read."""
        if not any(entry.images == len(self) for entry in cache.entries()):
            return None
        key = cache.fingerprint(self._rows, *self._made_by, whole=self._whole)
        return cache.peek(key, len(self)) if key else None

    def _cached(self, position: int) -> Tensor | None:
        """An image from the cache, kept in memory if there is room; None if it is not what was written."""
        entry, image = self._entry, None
        with suppress(OSError):
            if entry is not None and (image := entry.image(position)) is None:
                self._kept.is_cache_corrupt = True  # `attend` removes it: this may be a forked process
        if entry is None or image is None:
            return None
        known = self._known[position : position + 1]
        known["sum"], known["height"], known["width"] = entry.sums[position], *image.shape[:2]
        self._kept.add(known, image, in_memory=True)
        return torch.from_numpy(image)

    def _decoded(self, position: int, cell: dict[str, Any]) -> Tensor | None:
        """Decode an image, and keep it if there is room; None if it cannot be read and may be skipped."""
        known = self._known[position : position + 1]
        seen = int(known["sum"][0])  # not 0 if it was decoded before, and not kept
        if self._caches:
            with suppress(OSError):  # before it is decoded: if the file changes later, what is cached is not its pixels
                known["identity"] = np.frombuffer(cache.identity(cell, self._whole), "V16")
        try:
            image = self._decode(cell)
            total = cache.checksum(image)
            if seen not in (0, total):
                raise BadImage("decodes to different pixels")
        except BadImage as error:
            name = sample_id(self._rows, position)
            if isinstance(error, Unavailable):
                raise UnreadableError.for_now(name, error) from error
            if seen:
                raise UnreadableError(f"{name}: {error}; it has changed since the run began.", []) from error
            if not self._skip_bad:
                raise UnreadableError.of([Skipped(position, name, str(error))], "fix it") from error
            self._kept.count_bad(known)
            return None
        known["sum"], known["height"], known["width"] = total, *image.shape[:2]
        self._kept.add(known, image)
        return torch.from_numpy(image)

    def _next(self, position: int, other: int) -> int:
        """After `other`, the next image of the class, cyclically. Raises UnreadableError if that is the first again."""
        of_class = np.flatnonzero(self._labels == self._labels[position])
        following = int(of_class[(np.searchsorted(of_class, other) + 1) % len(of_class)])
        if following == position:
            names = [sample_id(self._rows, one) for one in of_class.tolist()]
            why = f"{sample_id(self._rows, position)}: {self._fault(position)}"
            raise UnreadableError(f"{why}; nor can any other image of its class be read: fix one of them.", names)
        return following

    def _fault(self, position: int) -> str:
        try:
            self._decode(self._rows[position]["image"])
        except BadImage as error:
            return str(error)
        return "could not be read"

    def _sample_digest(self) -> str:
        """A hash of the pixels of some images, which another decoder would change."""
        some = np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLE)).astype(np.int64)).tolist()
        if self.blocks is not None:
            some = rows_to_look_at(self._rows, _SAMPLE)
        read = self._read(some)
        sums = [cache.checksum(read[p].numpy()) if p in read else -1 for p in some]
        return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()

    def _cache(self) -> None:
        known, pixels = self._known, PixelHash(by_sums=self._by_sums)
        shapes = np.stack([known["height"], known["width"]], axis=1).astype(np.int64)
        for position in range(len(self)):
            pixels.add(self._kept.view(known[position]).numpy(), int(known["sum"][position]))
        images = (self._kept.view(known[position]).numpy() for position in range(len(self)))
        key = cache.key_of((one.tobytes() for one in known["identity"]), *self._made_by, whole=self._whole)
        cache.write(key, self._name, images, shapes, known["sum"].tolist(), pixels.digest, self._limit)


class _Kept:
    """Pixels of images, in memory and then in a file, and a table of what is known of them, which processes share."""

    def __init__(self, count: int, limit: int, processes: Processes) -> None:
        """For so many images; `limit`: bytes, at least IN_MEMORY."""
        self._room = limit
        table_size = max(1, count) * _KNOWN.itemsize + _COUNTS
        shared = processes.share_files(lambda: [_memory(), _temporary(), _memory()])
        *self._files, table = (os.fdopen(file, "r+b", 0) for file in shared)  # closed with this object
        self._maps: list[Tensor] = []
        for file, size in zip(self._files, (IN_MEMORY, limit - IN_MEMORY), strict=True):
            try:
                os.truncate(file.fileno(), size)  # takes no room until it is written to
                pixels = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8) if size else torch.empty(0)
            except OSError:  # so large a file, or so much address space, is not allowed
                self._room, pixels = IN_MEMORY * len(self._maps), torch.empty(0)
            self._maps.append(pixels)
        os.truncate(table.fileno(), table_size)
        mapped = mmap.mmap(table.fileno(), table_size)
        # Zeros at first: `start` is one more than where the pixels are, and 0 until they are there.
        self.known = np.frombuffer(mapped, _KNOWN, count, _COUNTS)
        # End of the pixels; images kept, images that are bad; whether the cache is corrupt.
        self._counts = np.frombuffer(mapped, "<i8", _COUNTS // 8)
        self._table = table
        alone = processes.here == 1 or sys.platform != "linux"
        self._lock = shared_lock() if alone else _FileLock(table.fileno())

    @property
    def images(self) -> int:
        """How many are kept."""
        return int(self._counts[1])

    @property
    def bad(self) -> int:
        """How many could not be read."""
        return int(self._counts[2])

    @property
    def is_cache_corrupt(self) -> bool:
        """Whether a process has read something else from it than was written."""
        return bool(self._counts[3])

    @is_cache_corrupt.setter
    def is_cache_corrupt(self, corrupt: bool) -> None:
        self._counts[3] = corrupt

    def count_bad(self, known: NDArray[Any]) -> None:
        """Note that an image, `known` (1,), could not be read."""
        with self._lock:
            self._counts[2] += int(not known["bad"][0])
            known["bad"] = True

    def has(self, known: Any) -> bool:
        """Whether an image is there. Another process may be allowed larger files than this one."""
        return bool(0 < known["start"] <= self._room)

    def view(self, known: Any) -> Tensor:
        """An image that is kept: (H, W, 3)."""
        part, place = self._place(int(known["start"]) - 1)
        height, width = int(known["height"]), int(known["width"])
        return self._maps[part][place : place + 3 * height * width].view(height, width, 3)

    def add(self, known: NDArray[Any], image: NDArray[np.uint8], *, in_memory: bool = False) -> None:
        """Keep an image, in memory or also in the file, and note where in `known` (1,), unless there is no room."""
        raw = image.data.cast("B")
        with self._lock:
            start = int(self._counts[0])
            if start < IN_MEMORY < start + len(raw):
                start = IN_MEMORY
            if known["taken"][0] or start + len(raw) > (IN_MEMORY if in_memory else self._room):
                return
            known["taken"], self._counts[0] = True, start + len(raw)
        part, place = self._place(start)
        with suppress(OSError):  # a full disk is a limit too
            done = 0
            while done < len(raw):
                done += os.pwrite(self._files[part].fileno(), raw[done:], place + done)
            known["start"] = start + 1
            with self._lock:
                self._counts[1] += 1

    def _place(self, start: int) -> tuple[int, int]:
        """In which file that is, and where."""
        return (0, start) if start < IN_MEMORY else (1, start - IN_MEMORY)


class _FileLock:
    """A lock that all processes and threads share which have the same file open; it ends with a process that has it."""

    def __init__(self, file: int) -> None:
        import fcntl  # Windows has none

        self._path, self._held = f"/proc/self/fd/{file}", -1
        self._flock, self._exclusive, self._unlock = fcntl.flock, fcntl.LOCK_EX, fcntl.LOCK_UN

    def __enter__(self) -> None:
        handle = os.open(self._path, os.O_RDWR)  # locks are of a handle, so that threads wait for each other, too
        self._flock(handle, self._exclusive)
        self._held = handle

    def __exit__(self, *_: object) -> None:
        handle = self._held
        self._flock(handle, self._unlock)  # a process that was forked meanwhile has it open, too
        os.close(handle)


_COUNTS = 32  # bytes


def _memory() -> int:
    """A file without a name, in memory where there is such a thing."""
    return os.memfd_create("vitft") if hasattr(os, "memfd_create") else _temporary()


def _temporary() -> int:
    """A file without a name, on the disk."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
