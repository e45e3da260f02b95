"""uint8 images to the model's input, a whole batch at a time; pure functions of images and keys.

Shapes: images are uint8 (B, H, W, 3), boxes are int64 (B, 4) of top, left, height, width. The same
`preprocess` serves training, evaluation and prediction.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitft.errors import ModelError
from vitft.randomness import uniform

Images = Tensor | Sequence[Tensor]
"""uint8 (B, H, W, 3), or B images (H, W, 3) of several sizes."""

_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input; stored as `preprocessor_config.json`.

    The image is resized to (height, width); or, where `shortest_edge` is given, its shorter side
    to that and the centre cropped. Then it is scaled to [0, 1] and normalised by mean and std.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    rescale: float = 1 / 255
    shortest_edge: int | None = None
    processor: str = "ViTImageProcessor"

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Preprocess":
        """Read a Transformers preprocessor configuration, of this or of older versions."""
        size = stored.get("size", 224)
        size = {"height": size, "width": size} if isinstance(size, int) else size
        edge = size.get("shortest_edge")
        crop = stored.get("crop_size", edge)
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if edge and not stored.get("do_center_crop", False):
            edge, crop = None, {"height": edge, "width": edge}  # as Swin's: a plain resize at one size
        number = stored.get("resample", 2)
        if number not in _RESAMPLE:
            raise ModelError(f"preprocessor_config.json: resample {number} is not supported; use 2 or 3.")
        box = crop if edge else size if "height" in size else crop
        normalizes = stored.get("do_normalize", True)
        return cls(
            height=int(box["height"]),
            width=int(box["width"]),
            mean=tuple(stored.get("image_mean", cls.mean)) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(stored.get("image_std", cls.std)) if normalizes else (1.0, 1.0, 1.0),
            resample=_RESAMPLE[number],
            rescale=float(stored.get("rescale_factor", cls.rescale)),
            shortest_edge=edge,
            processor=stored.get("image_processor_type", stored.get("feature_extractor_type", cls.processor)),
        )

    def to_json(self) -> dict[str, Any]:
        """The configuration as Transformers' image processors of both backends read it."""
        box = {"height": self.height, "width": self.width}
        cropping = {"do_center_crop": True, "crop_size": box, "size": {"shortest_edge": self.shortest_edge}}
        return {
            "image_processor_type": self.processor.replace("FeatureExtractor", "ImageProcessor"),
            "do_convert_rgb": True,
            "do_resize": True,
            **(cropping if self.shortest_edge else {"do_center_crop": False, "size": box}),
            "resample": {name: number for number, name in _RESAMPLE.items()}[self.resample],
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def at(self, image_size: int) -> "Preprocess":
        """The same preprocessing for another input size."""
        edge = self.shortest_edge and round(self.shortest_edge * image_size / self.height)
        return replace(self, height=image_size, width=image_size, shortest_edge=edge)


@cache
def workers() -> ThreadPoolExecutor:
    """Threads for decoding and resizing, which both release Python's lock."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vitft-image")


def resize(images: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Antialiased resize, uint8 (B, H, W, 3) -> (B, height, width, 3), within 1/255 of Pillow's."""
    if images.shape[1:3] == (height, width):
        return images
    channels_last = images.permute(0, 3, 1, 2)
    if images.is_cuda or images.device.type == "mps":  # uint8 is resized on the CPU alone
        channels_last = channels_last.float()
    resized = F.interpolate(channels_last, (height, width), mode=resample, antialias=True)
    if resized.dtype != torch.uint8:
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.permute(0, 2, 3, 1)


def fit(images: Tensor, how: Preprocess) -> Tensor:
    """The evaluation geometry: uint8 (B, H, W, 3) -> (B, height, width, 3)."""
    if how.shortest_edge is None:
        return resize(images, how.height, how.width, how.resample)
    rows, columns = images.shape[1:3]
    scale = how.shortest_edge / min(rows, columns)
    # Transformers truncates the longer side.
    rows, columns = (max(how.shortest_edge, int(side * scale)) for side in (rows, columns))
    images = resize(images, rows, columns, how.resample)
    top, left = (rows - how.height) // 2, (columns - how.width) // 2
    if top < 0 or left < 0:
        images = F.pad(images, (0, 0, *(max(0, -left), max(0, how.width - columns + left)),
                                *(max(0, -top), max(0, how.height - rows + top))))  # fmt: skip
        top, left = max(0, top), max(0, left)
    return images[:, top : top + how.height, left : left + how.width]


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


def preprocess(images: Images, how: Preprocess, out: Tensor | None = None) -> Tensor:
    """Evaluation and prediction: uint8 images of any sizes -> float32 (B, 3, height, width)."""
    if isinstance(images, Tensor):
        pieces = images.chunk(_pieces(images))
        return normalize(_joined(pieces, lambda piece: fit(piece, how)), how, out)
    return normalize(_joined(images, lambda image: fit(image[None], how)), how, out)


def augment(
    images: Images, how: Preprocess, kind: str, seed: int, epoch: int, index: NDArray[np.int64],
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Training: flips and crops that are functions of (seed, epoch, sample index); shapes as preprocess."""
    if kind == "none":
        return preprocess(images, how, out)
    flip = uniform(seed, "flip", epoch, index)[:, 0] < 0.5
    if kind == "flip" and isinstance(images, Tensor):
        images = torch.where(torch.from_numpy(flip).to(images.device)[:, None, None, None],
                             images.flip(2), images)  # fmt: skip
        return preprocess(images, how, out)
    if kind == "flip":
        return preprocess(
            [image.flip(1) if f else image for image, f in zip(images, flip, strict=True)], how, out
        )
    sizes = np.array([image.shape[:2] for image in images])
    boxes = crop_boxes(sizes, uniform(seed, "crop", epoch, index))

    def crop(sample: int) -> Tensor:
        top, left, height, width = boxes[sample].tolist()
        piece = images[sample][None, top : top + height, left : left + width]
        piece = piece.flip(2) if flip[sample] else piece
        return resize(piece, how.height, how.width, how.resample)

    return normalize(_joined(range(len(images)), crop), how, out)


def crop_boxes(sizes: NDArray[np.int64], drawn: NDArray[np.float64]) -> NDArray[np.int64]:
    """Random resized crops (Szegedy et al. 2015, section 6): area 8 to 100 %, aspect 3/4 to 4/3.

    sizes is (B, 2) of height, width; drawn is (B, 4) in [0, 1): area, aspect, top, left. The result
    is (B, 4). A box that would leave the image is cut to it.
    """
    area = sizes.prod(axis=1) * (0.08 + 0.92 * drawn[:, 0])
    aspect = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * drawn[:, 1])
    wanted = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=1)
    box = np.clip(np.rint(wanted).astype(np.int64), 1, sizes)
    corner = np.floor(drawn[:, 2:] * (sizes - box + 1)).astype(np.int64)
    return np.concatenate([corner, box], axis=1)


def _pieces(images: Tensor) -> int:
    return 1 if images.is_cuda or len(images) < 8 else min(len(images), os.cpu_count() or 1)


def _joined(pieces: Sequence[Any], work: Callable[[Any], Tensor]) -> Tensor:
    """Do the work on every piece, in threads where there are several, and join along the batch."""
    if len(pieces) == 1:
        return work(pieces[0])
    if len(pieces) <= (os.cpu_count() or 1):
        return torch.cat(list(workers().map(work, pieces)))
    groups = np.array_split(np.arange(len(pieces)), (os.cpu_count() or 1))  # a task a thread, not an image
    return torch.cat(list(workers().map(lambda group: torch.cat([work(pieces[i]) for i in group]), groups)))
