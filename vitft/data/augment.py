"""uint8 images to the model's input, a whole batch at a time; pure functions of images and keys.

Shapes: images are uint8 (B, H, W, 3), boxes are int64 (B, 4) of top, left, height, width. The same
`preprocess` serves training, evaluation and prediction.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitft.config import LARGEST_SIDE, range_of
from vitft.errors import ModelError
from vitft.hardware import cpus
from vitft.randomness import uniform

Images = Tensor | Sequence[Tensor]
"""uint8 (B, H, W, 3), or B images (H, W, 3) of several sizes."""

CROP_AREA = 0.08  # of the image: the least that a random crop shows; all of it is the most
CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a random crop

_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input; stored as `preprocessor_config.json`.

    The image is resized to (height, width); or its shorter side to `shortest_edge`, or both sides to
    `before_crop`, and the centre is cropped. Then it is scaled to [0, 1] and normalised by mean and std.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    rescale: float = 1 / 255
    shortest_edge: int | None = None
    before_crop: tuple[int, int] | None = None  # height and width
    value_range: tuple[float, float] | None = None  # black and white of images of more than 8 bits; see `data.color`
    processor: str = "ViTImageProcessor"

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Preprocess":
        """Read a Transformers preprocessor configuration, of this or of older versions."""
        size = stored.get("size", 224)
        size = {"height": size, "width": size} if isinstance(size, int) else size
        edge = size.get("shortest_edge")
        crop = stored.get("crop_size", edge)
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        crops = stored.get("do_center_crop", False)
        box: Any = crop if crops or "height" not in size else size  # one edge and no crop: a plain resize to it
        before = (int(size["height"]), int(size["width"])) if crops and not edge else None
        number = stored.get("resample", 2)
        if number not in _RESAMPLE:
            raise ModelError(f"preprocessor_config.json: resample {number} is not supported; use 2 or 3.")
        normalizes = stored.get("do_normalize", True)
        found = cls(
            height=int(box["height"]),
            width=int(box["width"]),
            mean=tuple(stored.get("image_mean", cls.mean)) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(stored.get("image_std", cls.std)) if normalizes else (1.0, 1.0, 1.0),
            resample=_RESAMPLE[number],
            rescale=float(stored.get("rescale_factor", cls.rescale)) if stored.get("do_rescale", True) else 1.0,
            shortest_edge=edge if crops else None,
            before_crop=before,
            value_range=_pair(stored.get("value_range")),
            processor=str(stored.get("image_processor_type", stored.get("feature_extractor_type", cls.processor))),
        )
        found._check()
        return found

    def _check(self) -> None:
        """Raise ModelError for what no image could be made into, or no memory would hold."""
        for side in (self.height, self.width, self.shortest_edge, *(self.before_crop or ())):
            if side is not None and not (isinstance(side, int) and 1 <= side <= LARGEST_SIDE):
                raise ModelError(
                    f"preprocessor_config.json: a side of {side} pixels; it must be 1 to {LARGEST_SIDE:,}."
                )
        for name, values in (("image_mean", self.mean), ("image_std", self.std), ("rescale_factor", (self.rescale,))):
            numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
            if len(numbers) != (1 if name == "rescale_factor" else 3) or (name == "image_std" and 0 in numbers):
                raise ModelError(f"preprocessor_config.json: {name} {values} is not usable; it takes finite numbers.")

    def to_json(self) -> dict[str, Any]:
        """The configuration as Transformers' image processors of both backends read it."""
        box = {"height": self.height, "width": self.width}
        edge, before = self.shortest_edge, self.before_crop
        size = {"shortest_edge": edge} if edge else {"height": before[0], "width": before[1]} if before else box
        return {
            "image_processor_type": self.processor.replace("FeatureExtractor", "ImageProcessor"),
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            **({"do_center_crop": False} if size is box else {"do_center_crop": True, "crop_size": box}),
            "resample": {name: number for number, name in _RESAMPLE.items()}[self.resample],
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **({"value_range": list(self.value_range)} if self.value_range else {}),  # vitft's own; others ignore it
        }

    def ranged(self, value_range: str | None) -> "Preprocess":
        """The same preprocessing with a black and white of one's own, as the setting has it; None changes nothing."""
        return self if value_range is None else replace(self, value_range=range_of(value_range))

    def at(self, image_size: int) -> "Preprocess":
        """The same preprocessing for another input size."""
        scale = image_size / self.height
        edge = self.shortest_edge and round(self.shortest_edge * scale)
        before = self.before_crop and (round(self.before_crop[0] * scale), round(self.before_crop[1] * scale))
        return replace(self, height=image_size, width=image_size, shortest_edge=edge, before_crop=before)


def _pair(stored: Any) -> tuple[float, float] | None:
    if stored is None:
        return None
    black, white = map(float, stored)
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise ModelError(f"preprocessor_config.json: value_range {stored} is not usable; it takes black and white.")
    return black, white


@cache
def workers() -> ThreadPoolExecutor:
    """Threads for decoding and resizing, which both release Python's lock."""
    return ThreadPoolExecutor(cpus(), thread_name_prefix="vitft-image")


def each_of(cells: Sequence[dict[str, Any]]) -> Callable[..., Iterator[Any]]:
    """`map` for work on encoded images, {"bytes", "path"} each: by the workers, or right here when they are tiny.

    Of a tiny image most of the time is Python's, which threads cannot share; but they wait for files together.
    """
    held = [len(cell["bytes"]) for cell in cells if cell["bytes"] is not None]
    return map if len(held) == len(cells) and sum(held) < _TINY * len(cells) else workers().map


_TINY = 3000  # bytes on average: there threads begin to gain, by JPEGs of 96 and PNGs of 48 pixels


def resize(images: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Antialiased resize, uint8 (B, H, W, 3) -> (B, height, width, 3): columns, then rows, as Pillow's.

    For training: fast, and within 2/255. Where a score or a prediction is made, `pillow_resize` takes its
    place.
    """
    if images.shape[1:3] == (height, width):
        return images
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
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resized = [
        np.array(Image.fromarray(image).resize((width, height), filters[resample], box))
        for image in images.cpu().numpy()
    ]
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
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in channels-last memory: x * rescale, - mean, / std.

    `out`, float32 (at least B, H, W, 3), is memory to write to: fresh memory costs more than the
    arithmetic, because the system clears each new page.
    """
    batch, height, width, channels = images.shape
    scale, shift = _scale_and_shift(how, width, images.device)
    floats = torch.empty(images.shape, device=images.device) if out is None else out[:batch]
    rows = floats.view(batch * height, width * channels)
    rows.copy_(images.reshape(batch * height, width * channels))
    torch.addcmul(shift, rows, scale, out=rows)
    return floats.permute(0, 3, 1, 2)


@cache
def _scale_and_shift(how: Preprocess, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One image row of factors and offsets: long rows keep the arithmetic in vector registers."""
    mean, std = (torch.tensor(values, device=device) for values in (how.mean, how.std))
    return (how.rescale / std).repeat(width), (-mean / std).repeat(width)


def preprocess(images: Images, how: Preprocess, out: Tensor | None = None, *, exact: bool = True) -> Tensor:
    """Evaluation and prediction: uint8 images of any sizes -> float32 (B, 3, height, width)."""
    if isinstance(images, Tensor):
        pieces = images.chunk(_pieces(images, exact))
        return normalize(_joined(pieces, lambda piece: fit(piece, how, exact=exact)), how, out)
    return normalize(_joined(images, lambda image: fit(image[None], how, exact=exact)), how, out)


def augment(
    images: Images, how: Preprocess, kind: str, seed: int, epoch: int, index: NDArray[np.int64],
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Training: flips and crops that are functions of (seed, epoch, sample index); shapes as preprocess."""
    if kind == "none":
        return preprocess(images, how, out, exact=False)
    if kind == "flip":
        return preprocess(mirrored(images, flips(seed, epoch, index)), how, out, exact=False)
    return normalize(crops(images, how, seed, epoch, index), how, out)


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
        chosen = torch.from_numpy(flip).to(images.device)[:, None, None, None]
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
