"""Decoded images, once: uint8, in memory or, when large, in a file.

Small images keep their own size. Larger ones are reduced, never enlarged: to the exact model size where that is what
the model will see; where training crops, only so far that the smallest crop still has all the model's pixels. Those
are kept on disk for the next run, up to a bound; what exceeds memory and the bound is decoded anew each time.
"""

import errno
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data import cache
from vitft.data.augment import CROP_AREA, Images, Preprocess, apply_resize, choose_map, resize, thread_pool
from vitft.data.decoder import BadImage, decode, encoded, header, image_info
from vitft.data.sources.identity import sample_id
from vitft.errors import DataError
from vitft.hardware.device import to_device

IN_MEMORY = 2_000_000_000  # bytes; more goes to a file, which the system may page out
T = TypeVar("T")
_CHUNK = 64  # rows that are read and decoded at a time
_SHARPER = 1.5  # how many times the side of what crops are cut from a JPEG is at least decoded to; docs/benchmarks.md


@dataclass(frozen=True)
class Store:
    """The images of one split: `gather` gives any of them; `digest` names their pixels."""

    pixels: Tensor  # uint8, all images end to end
    offsets: NDArray[np.int64]  # (N + 1,)
    shapes: NDArray[np.int64]  # (N, 2) height, width
    digest: str
    anew: Callable[[int], NDArray[np.uint8]] | None = None  # reads or decodes an image that `pixels` does not hold

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def uniform(self) -> bool:
        """Whether all images have one size."""
        return len(self) > 0 and bool((self.shapes == self.shapes[0]).all())

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return int(self.offsets[-1])

    def gather(self, index: NDArray[np.int64], *, stacked: bool = True) -> Images:
        """The images of these positions: (B, H, W, 3) when all have one size and `stacked`, else a list.

        Those of a list are views where that can be: what is cut from large images needs no copy of them.
        """
        if self.uniform and self.anew is None and stacked:
            height, width = self.shapes[0].tolist()
            return self.pixels.view(len(self), height, width, 3)[to_device(torch.from_numpy(index), self.pixels.device)]
        images = (
            [self._image(int(i)) for i in index] if self.anew is None else list(thread_pool().map(self._image, index))
        )
        return torch.stack(images) if self.uniform and stacked else images

    def _image(self, position: int) -> Tensor:
        height, width = self.shapes[position].tolist()
        start, end = self.offsets[position : position + 2].tolist()
        if self.anew is not None and end > len(self.pixels):
            return torch.from_numpy(self.anew(position))
        return self.pixels[start:end].view(height, width, 3)


def move_to_device(store: Store, device: torch.device, free_bytes: int) -> Store:
    """The store on a device, where all its images have one size and take at most a tenth of what is free there."""
    if not store.uniform or store.size > free_bytes // 10:
        return store
    if store.anew is None:
        return replace(store, pixels=store.pixels.to(device))
    pixels = torch.empty((len(store), *store.shapes[0].tolist(), 3), dtype=torch.uint8, device=device)
    for index in np.array_split(np.arange(len(store)), -(-len(store) // _CHUNK)):
        images = store.gather(index)
        assert isinstance(images, Tensor)
        pixels[index[0] : index[-1] + 1] = images.to(device)
    return replace(store, pixels=pixels.view(-1), anew=None)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    position: int
    name: str
    reason: str


def decode_all(
    rows: datasets.Dataset,
    how: Preprocess,
    *,
    crops: bool,
    max_pixels: int,
    skip_bad: bool,
    training: bool = False,
    cache_gb: float = 0.0,
    whole: bool = False,
    name: str = "images",
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Store, list[Skipped]]:
    """Decode every row of a split, reduced for evaluation or, with `crops`, for training crops.

    `training`: large JPEGs may be decoded smaller, which is much faster; scores are never made from those.
    Photos are kept for the next run, under `name`, while all that is kept has at most `cache_gb`. They are
    found again by their files' times and samples, or by the `whole` content too.
    Raises DataError naming the first image that cannot be read and counting the others, unless `skip_bad`.
    """

    def work(cell: dict[str, Any]) -> NDArray[np.uint8] | BadImage:
        try:
            source = encoded(cell)
            enough = _enough(source, how, crops) if training and how.resizes else None
            return np.ascontiguousarray(shrink(decode(source, max_pixels, enough, how.value_range), how, crops))
        except BadImage as error:
            return error

    def anew(position: int) -> NDArray[np.uint8]:
        if found and (image := found[0].image(position)) is not None:
            return image
        result = work(rows[kept[position]]["image"])
        if isinstance(result, BadImage) or cache.checksum(result) != sums[position]:
            reason = result if isinstance(result, BadImage) else "has other pixels"
            raise DataError(f"{sample_id(rows, kept[position])}: {reason}; it has changed since the run began.")
        return result

    limit = int(cache_gb * 1e9)
    key = None
    if limit and _large(rows, how):
        made_by = (how, crops, training, max_pixels)
        key = cache.fingerprint(rows, *made_by, whole=whole)
    found = key and cache.read(key, len(rows), IN_MEMORY, progress)
    sums: list[int] = []
    kept: list[int] = []  # the rows that could be read
    if found:
        entry, held = found
        sums, kept = entry.sums.tolist(), list(range(len(rows)))
        return _store(entry.shapes, entry.digest, held, anew), []
    shapes, skipped = [], []
    hashed = hashlib.blake2b(digest_size=8)
    pixels = _Pixels()
    size = 0
    for position, result in enumerate(_results(rows, work)):
        progress(position + 1, len(rows))
        if isinstance(result, BadImage):
            skipped.append(Skipped(position, sample_id(rows, position), str(result)))
            continue
        raw = result.data.cast("B")
        sums.append(cache.checksum(result))
        hashed.update(np.array(result.shape).tobytes())
        # What crops are cut from is large: there its checksum stands for it, else this would take as long as decoding.
        hashed.update(sums[-1].to_bytes(8, "little") if crops else raw)
        shapes.append(result.shape[:2])
        kept.append(position)
        size += len(raw)
        if pixels.held == size - len(raw) and size <= max(limit, IN_MEMORY):
            with suppress(OSError):  # a full disk is a bound too
                pixels.add(raw)
    if not skip_bad:
        _refuse(skipped)
    store = _store(np.array(shapes, np.int64).reshape(-1, 2), hashed.hexdigest(), pixels.mapped(), anew)
    if key and not skipped and store.anew is None:
        cache.write(key, name, store.pixels, store.shapes, sums, store.digest, limit)
    return store, skipped


def check_headers(
    rows: datasets.Dataset, *, max_pixels: int, skip_bad: bool,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Skipped]:  # fmt: skip
    """Open every image of a split and decode no pixel: the images that `decode_all` would refuse for their headers.

    Raises DataError as `decode_all` does, unless `skip_bad`.
    """

    def work(cell: dict[str, Any]) -> BadImage | None:
        try:
            image_info(encoded(cell), max_pixels)
        except BadImage as error:
            return error
        return None

    skipped = []
    for position, error in enumerate(_results(rows, work)):
        if error is not None:
            skipped.append(Skipped(position, sample_id(rows, position), str(error)))
        progress(position + 1, len(rows))
    if not skip_bad:
        _refuse(skipped)
    return skipped


def _refuse(skipped: list[Skipped]) -> None:
    if skipped:
        more = f" (and {len(skipped) - 1} more like it)" if len(skipped) > 1 else ""
        first = skipped[0]
        raise DataError(f"{first.name}: {first.reason}{more}; mend or remove it, or add --on-bad-image skip.")


def _store(shapes: NDArray[np.int64], digest: str, pixels: Tensor, anew: Callable[[int], NDArray[np.uint8]]) -> Store:
    """A store of images of these shapes, of which `anew` makes those that `pixels` do not hold."""
    offsets = np.concatenate([[0], np.cumsum(3 * shapes.prod(axis=1))])
    return Store(pixels, offsets, shapes, digest, None if len(pixels) == offsets[-1] else anew)


def _large(rows: datasets.Dataset, how: Preprocess) -> bool:
    """Whether the first image is larger than the model's: small ones are decoded as fast as they are read."""
    for cell in rows.select(range(min(1, len(rows))))["image"]:
        with suppress(BadImage):
            width, height, _ = header(encoded(cell))
            return width * height > how.height * how.width
    return False


def shrink(image: NDArray[np.uint8], how: Preprocess, crops: bool) -> NDArray[np.uint8]:
    """The image as stored: its own size if small, else what training crops or the model need of it."""
    height, width = image.shape[:2]
    if height * width <= how.height * how.width:
        return image
    if not crops:
        return apply_resize(torch.from_numpy(image)[None], how)[0].contiguous().numpy()  # the loader crops
    scale = _crop_scale(height, width, how)
    if scale >= 1:
        return image
    size = max(1, round(height * scale)), max(1, round(width * scale))
    # Sharper than the filter that resizes crops, which comes after it: that one twice would blur.
    return resize(torch.from_numpy(image)[None], *size, "bicubic")[0].contiguous().numpy()


def _crop_scale(height: int, width: int, how: Preprocess) -> float:
    """How many times its side an image is stored for crops: the smallest crop of it is as large as the model's input.

    So no crop is enlarged that would not be if it were cut from the photo, and an image has at most 12.5 times the
    pixels of the model's input.
    """
    return sqrt(how.height * how.width / (CROP_AREA * height * width))


def _enough(source: bytes | Path, how: Preprocess, crops: bool) -> int:
    """Pixels of the shorter side that are all that training asks of an image. Raises BadImage."""
    if crops:
        width, height, _ = header(source)
        return ceil(_SHARPER * _crop_scale(height, width, how) * min(height, width))
    return how.shortest_edge or max(how.before_crop or (how.height, how.width))


def _results(rows: datasets.Dataset, work: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    for start in range(0, len(rows), _CHUNK):
        cells = rows[start : start + _CHUNK]["image"]
        yield from choose_map(cells)(work, cells)


class _Pixels:
    """Bytes that are added one image after the other: in memory, and when they grow large in a file."""

    def __init__(self) -> None:
        self.held = 0
        self._file: Any = BytesIO()  # or an unbuffered file

    def add(self, raw: memoryview) -> None:
        """Raises OSError where the disk is full; what was held before it still is."""
        if isinstance(self._file, BytesIO) and self.held + len(raw) > IN_MEMORY:
            spilt = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (its mapping outlives us)
            _write(spilt, self._file.getbuffer())
            self._file = spilt
        _write(self._file, raw)
        self.held += len(raw)

    def mapped(self) -> Tensor:
        """All that is held, without another copy of it."""
        if not self.held:
            return torch.empty(0, dtype=torch.uint8)
        if isinstance(self._file, BytesIO):
            return torch.frombuffer(self._file.getbuffer(), dtype=torch.uint8)[: self.held]
        # The mapping keeps the unlinked file alive; it goes with the process, however that ends.
        return torch.from_numpy(np.memmap(self._file, np.uint8, "r+", shape=(self.held,)))


def _write(file: Any, raw: bytes | memoryview) -> None:
    """All of it, or OSError."""
    if file.write(raw) != len(raw):
        raise OSError(errno.ENOSPC, "No space left on device")
