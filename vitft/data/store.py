"""Decoded images, once: uint8, in memory or, when large, in a file that is mapped.

Small images keep their own size. Larger ones are reduced, never enlarged: to the exact model size
where that is what the model will see, to a shorter side a little over it where training crops. Those are
kept on disk for the next run, up to a bound; what exceeds memory and the bound is decoded anew each time.
"""

import errno
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data import cache
from vitft.data.augment import Images, Preprocess, each_of, resize, uncropped, workers
from vitft.data.images import BadImage, decode, encoded, header
from vitft.data.sources import sample_id
from vitft.errors import DataError

IN_MEMORY = 2_000_000_000  # bytes; more goes to a file, which the system may page out
_CHUNK = 256  # rows that are read and decoded at a time


@dataclass(frozen=True)
class Store:
    """The images of one split: `gather` gives any of them; `digest` names their pixels."""

    pixels: Tensor  # uint8, all images end to end
    offsets: NDArray[np.int64]  # (N + 1,)
    shapes: NDArray[np.int64]  # (N, 2) height, width
    digest: str
    anew: Callable[[int], NDArray[np.uint8]] | None = None  # decodes an image that `pixels` does not hold

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def uniform(self) -> bool:
        """Whether all images have one size."""
        return len(self) > 0 and bool((self.shapes == self.shapes[0]).all())

    def gather(self, index: NDArray[np.int64]) -> Images:
        """The images of these positions: (B, H, W, 3) when all have one size, else a list."""
        if self.uniform and self.anew is None:
            height, width = self.shapes[0].tolist()
            return self.pixels.view(len(self), height, width, 3)[torch.from_numpy(index).to(self.pixels.device)]
        images = [self._image(int(i)) for i in index] if self.anew is None else list(workers().map(self._image, index))
        return torch.stack(images) if self.uniform else images

    def _image(self, position: int) -> Tensor:
        height, width = self.shapes[position].tolist()
        start, end = self.offsets[position : position + 2].tolist()
        if self.anew is not None and end > len(self.pixels):
            return torch.from_numpy(self.anew(position))
        return self.pixels[start:end].view(height, width, 3)


def resident(store: Store, device: torch.device, free_bytes: int) -> Store:
    """The store on a device, where all its images have one size and take at most a tenth of what is free there."""
    if not store.uniform or store.anew is not None or store.pixels.nbytes > free_bytes // 10:
        return store
    return replace(store, pixels=store.pixels.to(device))


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
    name: str = "images",
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Store, list[Skipped]]:
    """Decode every row of a split, reduced for evaluation or, with `crops`, for training crops.

    `training`: large JPEGs may be decoded smaller, which is much faster; scores are never made from those.
    Photos are kept for the next run, under `name`, while all that is kept has at most `cache_gb`.
    Raises DataError naming the first image that cannot be read and counting the others, unless `skip_bad`.
    """

    def work(cell: dict[str, Any]) -> NDArray[np.uint8] | BadImage:
        try:
            return reduced(decode(encoded(cell), max_pixels, _enough(how, crops) if training else None), how, crops)
        except BadImage as error:
            return error

    limit = int(cache_gb * 1e9)
    key = None
    if limit and _are_reduced(rows, how):
        key = cache.fingerprint(rows, how, crops, training, max_pixels)
        if found := cache.read(key):
            return Store(found[0], found[1]["offsets"], found[1]["shapes"], str(found[1]["digest"])), []
    offsets, shapes, kept, skipped = [0], [], [], []
    hashed = hashlib.blake2b(digest_size=8)
    pixels = _Pixels()
    for position, result in enumerate(_results(rows, work)):
        if isinstance(result, BadImage):
            skipped.append(Skipped(position, sample_id(rows, position), str(result)))
            continue
        raw = result.tobytes()
        hashed.update(np.array(result.shape).tobytes() + raw)
        shapes.append(result.shape[:2])
        kept.append(position)
        offsets.append(offsets[-1] + len(raw))
        if pixels.held == offsets[-2] and offsets[-1] <= max(limit, IN_MEMORY):
            with suppress(OSError):  # a full disk is a bound too
                pixels.add(raw)
        progress(position + 1, len(rows))
    if skipped and not skip_bad:
        more = f" (and {len(skipped) - 1} more like it)" if len(skipped) > 1 else ""
        first = skipped[0]
        raise DataError(f"{first.name}: {first.reason}{more}; mend or remove it, or add --on-bad-image skip.")

    def anew(position: int) -> NDArray[np.uint8]:
        result = work(rows[kept[position]]["image"])
        if isinstance(result, BadImage):  # it could be read before
            raise DataError(f"{sample_id(rows, kept[position])}: {result}; it has changed since the run began.")
        return result

    index = {"offsets": np.array(offsets, np.int64), "shapes": np.array(shapes, np.int64).reshape(-1, 2)}
    store = Store(
        pixels.mapped(), index["offsets"], index["shapes"], hashed.hexdigest(),
        None if pixels.held == offsets[-1] else anew,
    )  # fmt: skip
    if key is not None and not skipped and store.anew is None:
        cache.write(key, name, store.pixels, index | {"digest": np.array(store.digest)}, limit)
    return store, skipped


def _are_reduced(rows: datasets.Dataset, how: Preprocess) -> bool:
    """Whether the first image is larger than the model's: small ones are decoded as fast as they are read."""
    for cell in rows.select(range(min(1, len(rows))))["image"]:
        with suppress(BadImage):
            width, height, _ = header(encoded(cell))
            return width * height > how.height * how.width
    return False


def reduced(image: NDArray[np.uint8], how: Preprocess, crops: bool) -> NDArray[np.uint8]:
    """The image as stored: its own size if small, else what training crops or the model need of it."""
    height, width = image.shape[:2]
    if height * width <= how.height * how.width:
        return image
    tensor = torch.from_numpy(image)[None]
    if not crops:
        return uncropped(tensor, how)[0].contiguous().numpy()  # the loader crops
    scale = _crop_side(how) / min(height, width)
    if scale >= 1:
        return image
    return resize(tensor, round(height * scale), round(width * scale), how.resample)[0].numpy()


def _crop_side(how: Preprocess) -> float:
    """The shorter side of what crops are cut from: 256 for 224, as is usual."""
    return max(how.height, how.width) * 8 / 7


def _enough(how: Preprocess, crops: bool) -> int:
    """Pixels of the shorter side that are all that training asks of an image."""
    return ceil(_crop_side(how)) if crops else how.shortest_edge or max(how.before_crop or (how.height, how.width))


def _results(
    rows: datasets.Dataset, work: Callable[[dict[str, Any]], NDArray[np.uint8] | BadImage]
) -> Iterator[NDArray[np.uint8] | BadImage]:
    for start in range(0, len(rows), _CHUNK):
        cells = rows[start : start + _CHUNK]["image"]
        yield from each_of(cells)(work, cells)


class _Pixels:
    """Bytes that are added one image after the other: in memory, and when they grow large in a file."""

    def __init__(self) -> None:
        self.held = 0
        self._file: Any = BytesIO()  # or an unbuffered file

    def add(self, raw: bytes) -> None:
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
