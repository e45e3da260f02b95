"""Images decoded once: uint8, in memory or, if they are large, in a file.

Small images keep their size. Larger ones are shrunk, never enlarged: to the exact model size if that is what the model
will see; for training crops, only so far that the smallest crop still has as many pixels as the model input. Shrunk
photos are cached on disk for the next run, up to a limit. What exceeds memory and the limit is decoded on demand.
"""

import errno
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Self, TypeVar

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augment import CROP_AREA, Images, Preprocess, apply_resize, resize
from vitft.data.decoder import (
    MAX_PIXELS,
    BadImage,
    Unavailable,
    are_tiny,
    choose_map,
    decode,
    encoded,
    header,
    image_info,
)
from vitft.data.sources.identity import is_streamed, sample_id
from vitft.data.stores import cache
from vitft.data.streaming import shards
from vitft.errors import DataError
from vitft.hardware.device import to_device
from vitft.hardware.pools import map_in_processes, map_in_threads, processes
from vitft.hardware.processes import Processes

IN_MEMORY = 2_000_000_000  # bytes; more goes to a file, which the system may page out
T = TypeVar("T")
_CHUNK = 64  # rows read and decoded at a time
_MANY = 5000  # tiny images that take longer to decode than processes to start
_SHARPER = 1.5  # JPEGs for crops are decoded to at least this multiple of the stored side; docs/benchmarks.md


@dataclass(frozen=True)
class Store:
    """The images of one split: `gather` returns any of them; `digest` identifies their pixels."""

    pixels: Tensor  # uint8, all images end to end, or the first of them
    offsets: NDArray[np.int64]  # (N + 1,)
    shapes: NDArray[np.int64]  # (N, 2): height, width
    digest: str
    load: Callable[[int], NDArray[np.uint8]] | None = None  # reads or decodes an image that is not in `pixels`

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.device

    @property
    def uniform(self) -> bool:
        """Whether all images have the same size."""
        return len(self) > 0 and bool((self.shapes == self.shapes[0]).all())

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return int(self.offsets[-1])

    def gather(self, index: NDArray[np.int64], *, stacked: bool = True) -> Images:
        """The images at these positions: (B, H, W, 3) if all have the same size and `stacked`, else a list.

        A list has views where possible: crops of large images need no copies.
        """
        if self.uniform and self.load is None and stacked:
            images = self.pixels.view(len(self), *self.shapes[0].tolist(), 3)
            return images[to_device(torch.from_numpy(index), self.pixels.device)]
        views = list((map if self.load is None else map_in_threads)(self._image, index.tolist()))
        return torch.stack(views) if self.uniform and stacked else views

    def _image(self, position: int) -> Tensor:
        height, width = self.shapes[position].tolist()
        start, end = self.offsets[position : position + 2].tolist()
        if self.load is not None and end > len(self.pixels):
            return torch.from_numpy(self.load(position))
        return self.pixels[start:end].view(height, width, 3)


def fits_on_device(store: Store, count: int, free_bytes: int) -> bool:
    """Whether `count` images like these have the same size and take at most a tenth of a device's free memory."""
    return store.uniform and store.size * count <= free_bytes // 10 * len(store)


@dataclass(frozen=True)
class Part:
    """Of a split that processes share, the images that this one has: those from `first` on, of `count` in all."""

    store: Store
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def shapes(self) -> NDArray[np.int64]:
        """Of the images that it has."""
        return self.store.shapes

    def among(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those positions in the split whose images it has."""
        return positions[(positions >= self.first) & (positions < self.first + len(self.store))]

    def gather(self, index: NDArray[np.int64]) -> Images:
        """The images at these positions in the split: see `Store.gather`."""
        return self.store.gather(index - self.first)


def move_to_device(store: Store, device: torch.device, free_bytes: int) -> Store:
    """The store on a device, if it fits there."""
    if not fits_on_device(store, len(store), free_bytes):
        return store
    if store.load is None:
        return replace(store, pixels=store.pixels.to(device))
    pixels = torch.empty((len(store), *store.shapes[0].tolist(), 3), dtype=torch.uint8, device=device)
    for index in np.array_split(np.arange(len(store)), -(-len(store) // _CHUNK)):
        images = store.gather(index)
        assert isinstance(images, Tensor)
        pixels[index[0] : index[-1] + 1] = images.to(device)
    return replace(store, pixels=pixels.view(-1), load=None)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    position: int
    name: str
    reason: str


class UnreadableError(DataError):
    """Images, with these `names`, that cannot be read and may not be skipped. `by_all`: all processes raise it."""

    def __init__(self, message: str, names: list[str], *, by_all: bool = False) -> None:
        super().__init__(message)
        self.names, self.by_all = names, by_all

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.names)  # between processes

    @classmethod
    def of(cls, skipped: list[Skipped], remedy: str) -> Self:
        """The error that names the first of the images."""
        first, more = skipped[0], f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        message = f"{first.name}: {first.reason}{more}; {remedy}, or add --on-bad-image skip."
        return cls(message, [image.name for image in skipped])

    @classmethod
    def for_now(cls, name: str, error: Unavailable) -> Self:
        """The error for an image that may be intact, and so is not skipped."""
        return cls(f"{name}: {error}; it may be intact: try again once it can be read.", [name])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn Unavailable into the error that names the image."""
    try:
        yield
    except Unavailable as error:
        raise UnreadableError.for_now(name, error) from error


def decode_all(
    rows: datasets.Dataset,
    preprocess: Preprocess,
    *,
    crops: bool,
    max_pixels: int,
    skip_bad: bool,
    training: bool = False,
    cache_gb: float = 0.0,
    whole: bool = False,
    name: str = "images",
    remedy: str = "fix or remove it",
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Store, list[Skipped]]:
    """Decode every row of a split, shrunk for evaluation or, with `crops`, for training crops.

    With `training`, large JPEGs may be decoded at a smaller size, which is much faster; scores never use those. Photos
    are cached for the next run under `name`, in a cache of at most `cache_gb`; files are identified by their times and
    samples of their content, or with `whole` by all of it. Raises UnreadableError, which names the first image that
    cannot be read and counts the others, unless `skip_bad`.
    """

    work = decoding(preprocess, crops=crops, max_pixels=max_pixels, training=training)

    def load(position: int) -> NDArray[np.uint8]:
        if cached and (image := cached[0].image(position)) is not None:
            return image
        row = kept_rows[position]
        try:
            image = work(rows[row]["image"])
            if cache.checksum(image) != sums[position]:
                raise BadImage("decodes to different pixels")
        except Unavailable as error:
            raise UnreadableError.for_now(sample_id(rows, row), error) from error
        except BadImage as error:
            raise DataError(f"{sample_id(rows, row)}: {error}; it has changed since the run began.") from error
        return image

    limit = int(cache_gb * 1e9)
    key = None
    if limit and first_is_large(rows, preprocess, max_pixels):
        key = cache.fingerprint(rows, *made_by(preprocess, crops, training, max_pixels), whole=whole)
    cached = key and cache.read(key, len(rows), IN_MEMORY, progress)
    sums: list[int] = []
    kept_rows: list[int] = []  # the rows that could be read
    if cached:
        entry, in_memory = cached
        sums, kept_rows = entry.sums.tolist(), list(range(len(rows)))
        return _store(entry.shapes, entry.digest, in_memory, load), []
    shapes: list[tuple[int, ...]] = []
    skipped: list[Skipped] = []
    hashed = PixelHash(by_sums=crops)
    pixels = _PixelBuffer()
    size = 0
    for row, image in _map_rows(rows, work, skipped, skip_bad, progress, remedy=remedy):
        raw = image.data.cast("B")
        sums.append(cache.checksum(image))
        hashed.add(image, sums[-1])
        shapes.append(image.shape[:2])
        kept_rows.append(row)
        size += len(raw)
        if pixels.size == size - len(raw) and size <= max(limit, IN_MEMORY):
            with suppress(OSError):  # a full disk is a limit too
                pixels.add(raw)
    store = _store(np.array(shapes, np.int64).reshape(-1, 2), hashed.digest, pixels.mapped(), load)
    if key and not skipped and store.load is None:
        cache.write(key, name, [store.pixels.numpy()], store.shapes, sums, store.digest, limit)
    return store, skipped


def decode_part(
    rows: datasets.Dataset, decode_rows: Callable[[datasets.Dataset], tuple[Store, list[Skipped]]], processes: Processes
) -> tuple[Store | Part, list[Skipped]]:
    """Of a split's rows, those of this process decoded; and the images that any process could not read.

    All processes have to call this. `decode_rows` is `decode_all` with its settings; where it raises UnreadableError in
    one process, all raise it, with `by_all`.
    """
    if processes.count == 1:
        return decode_rows(rows)
    mine = np.array_split(np.arange(len(rows)), processes.count)[processes.rank]
    store, bad, fault = None, list[Skipped](), None
    try:
        store, bad = decode_rows(rows.select(mine))
    except UnreadableError as error:
        fault = error
    bad = [replace(image, position=int(mine[image.position])) for image in bad]
    faults, bads, sizes = zip(*processes.gather([(fault, bad, len(mine) - len(bad))]), strict=True)
    for fault in filter(None, faults):
        raise UnreadableError(str(fault), fault.names, by_all=True)
    assert store is not None
    return Part(store, sum(sizes[: processes.rank]), sum(sizes)), [image for part in bads for image in part]


def decoding(
    preprocess: Preprocess, *, crops: bool, max_pixels: int, training: bool
) -> Callable[[dict[str, Any]], NDArray[np.uint8]]:  # fmt: skip
    """How `decode_all` decodes a row's image, {"bytes", "path"}, to what it stores, (H, W, 3). That raises BadImage."""

    def work(cell: dict[str, Any]) -> NDArray[np.uint8]:
        source = encoded(cell)
        min_side = _min_decoded_side(source, preprocess, crops, max_pixels) if training and preprocess.resizes else None
        image = decode(source, max_pixels, min_side, preprocess.value_range)
        return np.ascontiguousarray(shrink(image, preprocess, crops))

    return work


def made_by(preprocess: Preprocess, crops: bool, training: bool, max_pixels: int) -> tuple[Any, ...]:
    """What the stored pixels depend on besides the images, for the cache."""
    return preprocess, crops, training, max_pixels


class PixelHash:
    """A hash of the pixels of images, in order: of their bytes, or of their checksums.

    Images for crops are large, so that hashing their bytes would take as long as decoding them.
    """

    def __init__(self, *, by_sums: bool) -> None:
        self._by_sums, self._hash = by_sums, hashlib.blake2b(digest_size=8)

    def add(self, image: NDArray[np.uint8], checksum: int) -> None:
        """The next image, (H, W, 3)."""
        self._hash.update(np.array(image.shape).tobytes())
        self._hash.update(checksum.to_bytes(8, "little") if self._by_sums else image.data.cast("B"))

    @property
    def digest(self) -> str:
        """16 hex digits."""
        return self._hash.hexdigest()


def check_headers(
    rows: datasets.Dataset, *, max_pixels: int, skip_bad: bool,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Skipped]:  # fmt: skip
    """Open every image of a split without decoding it: the images whose headers `decode_all` would refuse.

    Raises DataError as `decode_all` does, unless `skip_bad`.
    """
    skipped: list[Skipped] = []
    work = lambda cell: image_info(encoded(cell), max_pixels).format  # noqa: E731
    for _ in _map_rows(rows, work, skipped, skip_bad, progress, is_quick=True):
        pass
    return skipped


def _map_rows(
    rows: datasets.Dataset, work: Callable[[dict[str, Any]], T], skipped: list[Skipped], skip_bad: bool,
    progress: Callable[[int, int], None], *, is_quick: bool = False, remedy: str = "fix or remove it",
) -> Iterator[tuple[int, T]]:  # fmt: skip
    """Row numbers and results of the work on each readable image; the others are added to `skipped`.

    `is_quick`: even of large images, the work is mostly Python code. Raises DataError at the end if there are any
    others, unless `skip_bad`.
    """

    def attempt(cell: dict[str, Any]) -> T | BadImage:
        try:
            return work(cell)
        except BadImage as error:
            return error

    def chunk(start: int) -> Iterator[T | BadImage]:
        cells = rows[start : start + _CHUNK]["image"]
        if streamed:
            shards.fetch_ahead(cell["path"] for cell in rows[start : start + 2 * _CHUNK]["image"])
        return choose_map(cells)(attempt, cells)

    starts, streamed = range(0, len(rows), _CHUNK), is_streamed(rows)
    count = processes() if len(rows) >= _MANY and (is_quick or are_tiny(rows[:_CHUNK]["image"])) else 0
    chunks = map_in_processes(lambda start: list(chunk(start)), starts, count) if count else map(chunk, starts)
    for start, results in zip(starts, chunks, strict=True):
        for row, result in enumerate(results, start):
            progress(row + 1, len(rows))
            if isinstance(result, Unavailable):
                raise UnreadableError.for_now(sample_id(rows, row), result) from result
            if isinstance(result, BadImage):
                skipped.append(Skipped(row, sample_id(rows, row), str(result)))
            else:
                yield row, result
    if skipped and not skip_bad:
        raise UnreadableError.of(skipped, remedy)


def _store(shapes: NDArray[np.int64], digest: str, pixels: Tensor, load: Callable[[int], NDArray[np.uint8]]) -> Store:
    """A store of images of these shapes; `load` is for those that are not in `pixels`."""
    offsets = np.concatenate([[0], np.cumsum(3 * shapes.prod(axis=1))])
    return Store(pixels, offsets, shapes, digest, None if len(pixels) == offsets[-1] else load)


def first_is_large(rows: datasets.Dataset, preprocess: Preprocess, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the first image is larger than the model input: small ones are decoded as fast as they are read."""
    for cell in rows.select(range(min(1, len(rows))))["image"]:
        with suppress(BadImage):
            width, height, _ = header(encoded(cell), max_pixels)
            return width * height > preprocess.height * preprocess.width
    return False


def shrink(image: NDArray[np.uint8], preprocess: Preprocess, crops: bool) -> NDArray[np.uint8]:
    """An image (H, W, 3) as it is stored: unchanged if small, else the size that training crops or the model need."""
    height, width = image.shape[:2]
    if height * width <= preprocess.height * preprocess.width:
        return image
    if not crops:  # the loader applies the center crop
        return apply_resize(torch.from_numpy(image)[None], preprocess)[0].contiguous().numpy()
    scale = _crop_scale(height, width, preprocess)
    if scale >= 1:
        return image
    size = max(1, round(height * scale)), max(1, round(width * scale))
    # Bicubic is sharper than the filter that resizes the crops afterwards: applying that one twice would blur.
    return resize(torch.from_numpy(image)[None], *size, "bicubic")[0].contiguous().numpy()


def _crop_scale(height: int, width: int, preprocess: Preprocess) -> float:
    """The factor by which to scale the sides so that the smallest crop has as many pixels as the model input.

    So no crop is enlarged that would not be if it were cut from the original, and a stored image has at most 12.5
    times the pixels of the model input.
    """
    return sqrt(preprocess.height * preprocess.width / (CROP_AREA * height * width))


def _min_decoded_side(source: bytes | Path, preprocess: Preprocess, crops: bool, max_pixels: int) -> int:
    """Pixels that the shorter side of a decoded image must have for training. Raises BadImage."""
    if crops:
        width, height, _ = header(source, max_pixels)
        return ceil(_SHARPER * _crop_scale(height, width, preprocess) * min(height, width))
    return preprocess.shortest_edge or max(preprocess.before_crop or (preprocess.height, preprocess.width))


class _PixelBuffer:
    """Bytes added image by image: in memory, then in a temporary file once they exceed IN_MEMORY."""

    def __init__(self) -> None:
        self.size = 0
        self._file: Any = BytesIO()  # or an unbuffered file

    def add(self, raw: memoryview) -> None:
        """Append bytes. Raises OSError if the disk is full, without losing what was added before."""
        if isinstance(self._file, BytesIO) and self.size + len(raw) > IN_MEMORY:
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (its mapping outlives this object)
            _write(file, self._file.getbuffer())
            self._file = file
        _write(self._file, raw)
        self.size += len(raw)

    def mapped(self) -> Tensor:
        """All bytes, uint8, without a copy."""
        if not self.size:
            return torch.empty(0, dtype=torch.uint8)
        if isinstance(self._file, BytesIO):
            return torch.frombuffer(self._file.getbuffer(), dtype=torch.uint8)[: self.size]
        # The mapping keeps the unlinked file alive until the process ends, however it ends.
        return torch.from_numpy(np.memmap(self._file, np.uint8, "r+", shape=(self.size,)))


def _write(file: Any, raw: bytes | memoryview) -> None:
    """Write all bytes, or raise OSError."""
    if file.write(raw) != len(raw):
        raise OSError(errno.ENOSPC, "No space left on device")
