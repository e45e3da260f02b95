"""uint8 images to the model's input, a whole batch at a time; pure functions of images and keys.

Shapes: images are uint8 (B, H, W, 3), boxes are int64 (B, 4) of top, left, height, width. The same
`preprocess` serves training, evaluation and prediction.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitft.config.train import LARGEST_SIDE, range_of
from vitft.data.resample import RADIUS, cropped
from vitft.errors import ModelError
from vitft.hardware.device import cpus, sent
from vitft.randomness import uniform

A = TypeVar("A")
B = TypeVar("B")
Images = Tensor | Sequence[Tensor]
"""uint8 (B, H, W, 3), or B images (H, W, 3) of several sizes."""

CROP_AREA = 0.08  # of the image: the least that a random crop shows; all of it is the most
CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a random crop

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's filters, by the numbers that a `preprocessor_config.json` has."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input; stored as `preprocessor_config.json`.

    The image is resized to (height, width); or its shorter side to `shortest_edge`, or both sides to
    `before_crop`, or not at all, and the centre is cropped. Then it is scaled by `rescale` and normalised by
    mean and std. Where these are single numbers the model reads gray, the image's luminance.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"
    rescale: float = 1 / 255
    shortest_edge: int | None = None
    before_crop: tuple[int, int] | None = None  # height and width
    value_range: tuple[float, float] | None = None  # black and white of images of more than 8 bits; see `data.color`
    resizes: bool = True
    flips_channels: bool = False  # to blue, green, red

    @property
    def channels(self) -> int:
        """Of the model's input: 3, or 1 for gray."""
        return len(self.mean)

    @property
    def said(self) -> str:
        """The size of the model's input, in pixels."""
        return f"{self.height}" if self.height == self.width else f"{self.height} x {self.width}"

    def check(self) -> None:
        """Raise ModelError for what no image could be made into, or no memory would hold."""
        for side in (self.height, self.width, self.shortest_edge, *(self.before_crop or ())):
            if side is not None and not (isinstance(side, int) and 1 <= side <= LARGEST_SIDE):
                raise ModelError(f"a side of {side} pixels; it must be 1 to {LARGEST_SIDE:,}.")
        for name, values in (("image_mean", self.mean), ("image_std", self.std), ("rescale_factor", (self.rescale,))):
            numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
            if len(numbers) != len(values) or (name == "image_std" and 0 in numbers):
                raise ModelError(f"{name} {values} is not usable; it takes finite numbers.")

    def to_json(self) -> dict[str, Any]:
        """The configuration as Transformers' image processors of both backends read it.

        Of a class that does this and no more, in older versions of Transformers too.
        """
        box = {"height": self.height, "width": self.width}
        edge, before = self.shortest_edge, self.before_crop
        size = {"shortest_edge": edge} if edge else {"height": before[0], "width": before[1]} if before else box
        crops = size is not box or not self.resizes
        kind = "ViT" if not crops else "DeiT" if before else "Bit"
        flips = {"do_flip_channel_order": True} if self.flips_channels else {}
        return {
            "image_processor_type": f"{'MobileViT' if flips else kind}ImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": self.resizes,
            "size": size,
            **({"do_center_crop": True, "crop_size": box} if crops else {"do_center_crop": False}),
            "resample": next(number for number, name in RESAMPLE.items() if name == self.resample),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": not flips,
            **({} if flips else {"image_mean": list(self.mean), "image_std": list(self.std)}),
            **flips,
            **({"value_range": list(self.value_range)} if self.value_range else {}),  # vitft's own; others ignore it
        }

    def ranged(self, value_range: str | None) -> "Preprocess":
        """The same preprocessing with a black and white of one's own, as the setting has it; None changes nothing."""
        return self if value_range is None else replace(self, value_range=range_of(value_range))

    def at(self, height: int, width: int | None = None) -> "Preprocess":
        """The same preprocessing for another input size, with the same margins; square where no width is given."""
        width = height if width is None else width
        down, across = height / self.height, width / self.width
        edge = self.shortest_edge and round(self.shortest_edge * max(down, across))
        before = self.before_crop and (round(self.before_crop[0] * down), round(self.before_crop[1] * across))
        return replace(self, height=height, width=width, shortest_edge=edge, before_crop=before)


def stored_range(stored: Any) -> tuple[float, float] | None:
    """The value_range in a preprocessor_config.json. Raises ModelError for one that is not usable."""
    if stored is None:
        return None
    black, white = map(float, stored)
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise ModelError(f"value_range {stored} is not usable; it takes black and white.")
    return black, white


@cache
def workers() -> ThreadPoolExecutor:
    """Threads for decoding and resizing, which both release Python's lock."""
    return ThreadPoolExecutor(cpus(), thread_name_prefix="vitft-image")


def in_groups(work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """`map` by the workers for what takes microseconds: several items a task, for to hand one over takes as long."""
    groups = [items[start : start + _GROUP] for start in range(0, len(items), _GROUP)]
    for results in workers().map(lambda group: [work(one) for one in group], groups):
        yield from results


_GROUP = 64


def each_of(cells: Sequence[dict[str, Any]]) -> Callable[..., Iterator[Any]]:
    """`map` for work on encoded images, {"bytes", "path"} each: by the workers, or right here when they are tiny.

    Of a tiny image most of the time is Python's, which threads cannot share; but they wait for files together.
    """
    held = [len(cell["bytes"]) for cell in cells if cell["bytes"] is not None]
    return map if len(held) == len(cells) and sum(held) < _TINY * len(cells) else workers().map


_TINY = 3000  # bytes on average: there threads begin to gain, by JPEGs of 96 and PNGs of 48 pixels


def resize(images: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Antialiased resize, uint8 (B, H, W, 3) -> (B, height, width, 3): columns, then rows, as Pillow's.

    For training: fast, and within 2/255. Where a score or a prediction is made, and for filters that torch
    has not, `pillow_resize` takes its place.
    """
    if images.shape[1:3] == (height, width):
        return images
    if resample not in ("bilinear", "bicubic"):
        return pillow_resize(images, height, width, resample)
    channels_last = images.permute(0, 3, 1, 2)
    if images.device.type == "cpu":
        resized = F.interpolate(channels_last, (height, width), mode=resample, antialias=True)
        return resized.permute(0, 2, 3, 1)
    # Elsewhere uint8 is not resized. Rounding between the passes clips bicubic overshoot as the CPU does.
    for size in ((images.shape[1], width), (height, width)):
        resized = F.interpolate(channels_last.float(), size, mode=resample, antialias=True)
        channels_last = resized.round_().clamp_(0, 255)
    return channels_last.to(torch.uint8).permute(0, 2, 3, 1)


def pillow_resize(
    images: Tensor, height: int, width: int, resample: str, box: tuple[float, float, float, float] | None = None
) -> Tensor:
    """The same by Pillow itself, so that a checkpoint's scores are those of Transformers' pipeline.

    One in 255 was seen to move a probability by 0.003; and where rows get fewer, Pillow 13 may begin
    with them, which moves bicubic pixels by up to 31. `box` is the part that is resized: left, top, right
    and bottom, in pixels of the image.
    """
    if box is None and images.shape[1:3] == (height, width):
        return images
    by = Image.Resampling[resample.upper()]
    resized = [np.array(Image.fromarray(image).resize((width, height), by, box)) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).to(images.device)


def fit(images: Tensor, how: Preprocess, *, exact: bool = True) -> Tensor:
    """The evaluation geometry: uint8 (B, H, W, 3) -> (B, height, width, 3), as Transformers' own.

    Not `exact` is for training: several times as fast, and within 2/255.
    """
    images = uncropped(images, how, exact=exact)
    rows, columns = images.shape[1:3]
    top, left = (rows - how.height) // 2, (columns - how.width) // 2
    if top < 0 or left < 0:
        images = F.pad(images, (0, 0, *(max(0, -left), max(0, how.width - columns + left)),
                                *(max(0, -top), max(0, how.height - rows + top))))  # fmt: skip
        top, left = max(0, top), max(0, left)
    return images[:, top : top + how.height, left : left + how.width]


def uncropped(images: Tensor, how: Preprocess, *, exact: bool = True) -> Tensor:
    """`fit` before its centre crop, if it has one. Doing it twice is doing it once.

    Where enlarging a long image whole would take more than the largest input (of 65,535 x 1 pixels it takes
    gigabytes), only the middle that the crop sees is made.
    """
    rows, columns = images.shape[1:3]
    if not how.resizes:
        return images
    if how.shortest_edge is not None:
        old = (rows, columns)
        # Transformers truncates the longer side.
        rows, columns = (max(how.shortest_edge, int(how.shortest_edge * side / min(old))) for side in old)
        if how.shortest_edge > min(old) and rows * columns > LARGEST_SIDE**2:
            top, left = (
                max(0, (side - max(how.shortest_edge, crop)) // 2)
                for side, crop in ((rows, how.height), (columns, how.width))
            )
            # As much is cut off at both ends, so a centre crop finds the same pixels. Columns first, as Pillow does
            # where rows get more.
            across, down = old[1] / columns, old[0] / rows
            box = (left * across, 0.0, (columns - left) * across, float(old[0]))
            images = pillow_resize(images, old[0], columns - 2 * left, how.resample, box)
            box = (0.0, top * down, float(columns - 2 * left), (rows - top) * down)
            return pillow_resize(images, rows - 2 * top, columns - 2 * left, how.resample, box)
    else:
        rows, columns = how.before_crop or (how.height, how.width)
    return (pillow_resize if exact else resize)(images, rows, columns, how.resample)


def normalize(images: Tensor, how: Preprocess, out: Tensor | None = None) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, C, H, W) in channels-last memory: x * rescale, - mean, / std.

    `out`, float32 (at least B, H, W, C), is memory to write to: fresh memory costs more than the
    arithmetic, because the system clears each new page.
    """
    if how.channels == 1:
        images = _luminance(images)
    elif how.flips_channels:
        images = images.flip(3)
    batch, height, width, channels = images.shape
    scale, shift = _scale_and_shift(how, width, images.device)
    floats = torch.empty(images.shape, device=images.device) if out is None else out[:batch]
    rows = floats.view(batch * height, width * channels)
    rows.copy_(images.reshape(batch * height, width * channels))
    torch.addcmul(shift, rows, scale, out=rows)
    return floats.permute(0, 3, 1, 2)


_LUMINANCE = (19595, 38470, 7471)  # of red, green and blue, in 65,536ths


def _luminance(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, H, W, 1) by ITU-R 601, rounded as Pillow does: gray stays what it is."""
    weights = torch.tensor(_LUMINANCE, dtype=torch.int32, device=images.device)
    return ((images.int() * weights).sum(dim=3, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


@cache
def _scale_and_shift(how: Preprocess, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One image row of factors and offsets: long rows keep the arithmetic in vector registers."""
    mean, std = (torch.tensor(values, device=device) for values in (how.mean, how.std))
    return (how.rescale / std).repeat(width), (-mean / std).repeat(width)


def preprocess(images: Images, how: Preprocess, out: Tensor | None = None, *, exact: bool = True) -> Tensor:
    """Evaluation and prediction: uint8 images of any sizes -> float32 (B, C, height, width)."""
    return normalize(fitted(images, how, exact=exact), how, out)


def fitted(images: Images, how: Preprocess, *, exact: bool = True) -> Tensor:
    """`fit` of images of any sizes, in threads: uint8 -> (B, height, width, 3)."""
    if isinstance(images, Tensor):
        return _joined(images.chunk(_pieces(images, exact)), lambda piece: fit(piece, how, exact=exact))
    return _joined(images, lambda image: fit(image[None], how, exact=exact))


def augment(
    images: Images, how: Preprocess, kind: str, seed: int, epoch: int, index: NDArray[np.int64],
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Training: flips and crops that are functions of (seed, epoch, sample index); shapes as preprocess."""
    if isinstance(images, Tensor) and images.device.type != "cpu" and _by_products(images, how, kind):
        return augment_by_products(images, how, kind, seed, epoch, index)
    return normalize(augmented(images, how, kind, seed, epoch, index), how, out)


def augmented(
    images: Images, how: Preprocess, kind: str, seed: int, epoch: int, index: NDArray[np.int64]
) -> Tensor:  # fmt: skip
    """`augment` before it is normalized: uint8 (B, height, width, 3), where the images are."""
    if kind == "crop":
        return crops(images, how, seed, epoch, index)
    return fitted(mirrored(images, flips(seed, epoch, index)) if kind == "flip" else images, how, exact=False)


def augment_by_products(
    images: Tensor, how: Preprocess, kind: str, seed: int, epoch: int, index: NDArray[np.int64]
) -> Tensor:  # fmt: skip
    """`augment` as matrix products: for images of one size on a GPU, as many kernels for a batch of any size.

    Within 1.6/255 of `augment` by threads, which rounds to whole numbers after each of its two passes.
    """
    count, (height, width) = len(images), images.shape[1:3]
    if kind == "crop":
        boxes = crop_boxes(np.tile([height, width], (count, 1)), seed, epoch, index)
    else:
        boxes = np.tile([0, 0, height, width], (count, 1))
    flip = np.zeros(count, bool) if kind == "none" else flips(seed, epoch, index)
    there, turned = (sent(torch.from_numpy(array), images.device) for array in (boxes, flip))
    planes = cropped(images, there, turned, how.height, how.width, how.resample)
    if how.channels == 1:
        planes = (planes * _constant(_LUMINANCE, images.device)[:, None, None]).sum(dim=1, keepdim=True) / 2**16
    elif how.flips_channels:
        planes = planes.flip(1)
    mean, std = (_constant(values, images.device)[:, None, None] for values in (how.mean, how.std))
    return (planes * how.rescale - mean) / std


def _by_products(images: Tensor, how: Preprocess, kind: str) -> bool:
    """Whether products give what is asked for: a resize of the whole image, or of a crop, by a filter they have."""
    whole = how.resizes and how.shortest_edge is None and how.before_crop is None
    resized = images.shape[1:3] != (how.height, how.width)
    return how.resample in RADIUS and (kind == "crop" or (whole and resized))


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def crops(images: Images, how: Preprocess, seed: int, epoch: int, index: NDArray[np.int64]) -> Tensor:
    """Random resized crops, flipped half of the time: uint8 images of any sizes -> (B, height, width, 3)."""
    flip = flips(seed, epoch, index)
    boxes = crop_boxes(np.array([image.shape[:2] for image in images]), seed, epoch, index)

    def crop(sample: int) -> Tensor:
        top, left, height, width = boxes[sample].tolist()
        piece = images[sample][None, top : top + height, left : left + width]
        piece = piece.flip(2) if flip[sample] else piece
        return resize(piece, how.height, how.width, how.resample)

    return _joined(range(len(images)), crop)


def flips(seed: int, epoch: int, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these samples an epoch shows mirrored: each half of the time."""
    flip: NDArray[np.bool_] = uniform(seed, "flip", epoch, index)[:, 0] < 0.5
    return flip


def mirrored(images: Images, flip: NDArray[np.bool_]) -> Images:
    """The images, those with `flip` left to right."""
    if isinstance(images, Tensor):
        chosen = sent(torch.from_numpy(flip), images.device)[:, None, None, None]
        return torch.where(chosen, images.flip(2), images)
    return [image.flip(1) if f else image for image, f in zip(images, flip, strict=True)]


def crop_boxes(sizes: NDArray[np.int64], seed: int, epoch: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Random resized crops (Szegedy et al. 2015, section 6), drawn as torchvision's `RandomResizedCrop` does.

    sizes is (B, 2) of height, width; index is (B,). The result is (B, 4). Area and aspect ratio are drawn up to
    ten times, until the box lies within the image; where none does, it is the largest one in the centre whose
    aspect ratio is allowed. So every box has an allowed aspect ratio (but for rounding), whatever the image's.
    """
    low, high = np.log(CROP_RATIO)
    boxes = _central(sizes)
    left = np.arange(len(sizes))  # those without a box
    for draw in range(10):
        drawn = uniform(seed, "crop", epoch, index[left], draw)
        area = sizes[left].prod(axis=1) * (CROP_AREA + (1 - CROP_AREA) * drawn[:, 0])
        aspect = np.exp(low + (high - low) * drawn[:, 1])
        box = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=1))).astype(np.int64)
        fits = ((box > 0) & (box <= sizes[left])).all(axis=1)
        corner = np.floor(drawn[:, 2:] * (sizes[left] - box + 1)).astype(np.int64)
        boxes[left[fits]] = np.concatenate([corner, box], axis=1)[fits]
        left = left[~fits]
        if not len(left):
            break
    return boxes


def _central(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest boxes in the centre whose aspect ratio is allowed: (B, 2) -> (B, 4)."""
    narrowest, widest = CROP_RATIO
    most = np.rint(np.stack([sizes[:, 1] / narrowest, sizes[:, 0] * widest], axis=1)).astype(np.int64)
    box = np.maximum(np.minimum(sizes, most), 1)
    return np.concatenate([(sizes - box) // 2, box], axis=1)


def _pieces(images: Tensor, exact: bool) -> int:
    return 1 if (images.is_cuda and not exact) or len(images) < 8 else min(len(images), cpus())


def _joined(pieces: Sequence[Any], work: Callable[[Any], Tensor]) -> Tensor:
    """Do the work on every piece, in threads where there are several, and join along the batch."""
    if len(pieces) == 1:
        return work(pieces[0])
    if len(pieces) <= cpus():
        return torch.cat(list(workers().map(work, pieces)))
    groups = np.array_split(np.arange(len(pieces)), cpus())  # a task a thread, not an image
    return torch.cat(list(workers().map(lambda group: torch.cat([work(pieces[i]) for i in group]), groups)))
