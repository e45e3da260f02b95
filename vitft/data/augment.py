"""Turn uint8 images into model input, a whole batch at a time, by pure functions of images and random keys.

Images are uint8 (B, H, W, 3); boxes are int64 (B, 4): top, left, height, width. Training, evaluation and prediction
share one `Preprocess`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitft.config.train import LARGEST_SIDE, range_of
from vitft.data.augmentation.boxes import draw_boxes
from vitft.data.augmentation.operations import LUMINANCE, luminance
from vitft.data.augmentation.policies import operate
from vitft.data.augmentation.settings import Augmentation
from vitft.data.resample import RADIUS, crop_and_resize
from vitft.errors import ModelError
from vitft.hardware.device import cpus, many_launches_cost, to_device
from vitft.hardware.pools import map_in_threads
from vitft.randomness import uniform

Images = Tensor | Sequence[Tensor]
"""uint8 (B, H, W, 3), or B images (H, W, 3) of different sizes."""

Index = NDArray[np.int64]
"""Sample numbers: (B,)."""

CROP_AREA = 0.08  # smallest random crop, as a fraction of the image's area; the largest is the whole image
CROP_RATIO = (3 / 4, 4 / 3)  # range of a random crop's width / height

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's filters by the numbers that `preprocessor_config.json` uses."""

_OF_TORCH = ("bilinear", "bicubic")  # filters that `interpolate` has, with antialiasing


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes model input; stored as `preprocessor_config.json`.

    The image is resized to (height, width). With `shortest_edge`, its shorter side is resized to that length and the
    center is cropped; with `before_crop`, both sides are resized to that size before the center crop; with
    `resizes=False`, it is only center-cropped. Pixels are then multiplied by `rescale` and normalized by mean and std.
    With a single mean and std the model input is grayscale: the image's luminance.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"
    rescale: float = 1 / 255
    shortest_edge: int | None = None
    before_crop: tuple[int, int] | None = None  # height and width
    value_range: tuple[float, float] | None = None  # black and white of images with more than 8 bits: see `data.color`
    resizes: bool = True
    flips_channels: bool = False  # RGB to BGR

    @property
    def channels(self) -> int:
        """Channels of the model input: 3, or 1 for grayscale."""
        return len(self.mean)

    @property
    def size_text(self) -> str:
        """Size of the model input in pixels, for messages: `224`, or `224 x 196` (height x width)."""
        return f"{self.height}" if self.height == self.width else f"{self.height} x {self.width}"

    def check(self) -> None:
        """Raise ModelError for a size or a normalization that cannot be used."""
        for side in (self.height, self.width, self.shortest_edge, *(self.before_crop or ())):
            if side is not None and not (isinstance(side, int) and 1 <= side <= LARGEST_SIDE):
                raise ModelError(f"image side of {side} pixels; it must be 1 to {LARGEST_SIDE:,}.")
        for name, values in (("image_mean", self.mean), ("image_std", self.std), ("rescale_factor", (self.rescale,))):
            numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
            if len(numbers) != len(values) or (name == "image_std" and 0 in numbers):
                allowed = "finite numbers other than 0" if name == "image_std" else "finite numbers"
                raise ModelError(f"{name} {values} is invalid; use {allowed}.")

    def to_json(self) -> dict[str, Any]:
        """The configuration in the format of Transformers' image processors, slow and fast.

        It names an image processor class that does exactly these steps, also in older versions of Transformers.
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
            **({"value_range": list(self.value_range)} if self.value_range else {}),  # only vitft reads this key
        }

    def with_value_range(self, value_range: str | None) -> "Preprocess":
        """A copy with the black and white of the setting `value_range` ("BLACK:WHITE"); None changes nothing."""
        return self if value_range is None else replace(self, value_range=range_of(value_range))

    def with_size(self, height: int, width: int | None = None) -> "Preprocess":
        """A copy for another input size, with the crop margins scaled in proportion; `width` defaults to `height`."""
        width = height if width is None else width
        down, across = height / self.height, width / self.width
        edge = self.shortest_edge and round(self.shortest_edge * max(down, across))
        before = self.before_crop and (round(self.before_crop[0] * down), round(self.before_crop[1] * across))
        return replace(self, height=height, width=width, shortest_edge=edge, before_crop=before)


def parse_value_range(value: Any) -> tuple[float, float] | None:
    """`value_range` of a preprocessor_config.json as (black, white). Raises ModelError if it is invalid."""
    if value is None:
        return None
    black, white = map(float, value)
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise ModelError(f"value_range {value} is invalid; use two finite numbers, black below white.")
    return black, white


def resize(images: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Antialiased resize, uint8 (B, H, W, 3) -> (B, height, width, 3): columns first, then rows.

    For training: fast, and within 2/255 of Pillow. Scores and predictions use `pillow_resize`, and so do filters that
    neither torch has nor, where launches cost, the matrix products.
    """
    if images.shape[1:3] == (height, width):
        return images
    if resample not in _OF_TORCH:
        if resample in RADIUS and many_launches_cost(images.device):
            whole = _constant((0, 0, *images.shape[1:3]), images.device).expand(len(images), 4)
            straight = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            planes = crop_and_resize(images, whole, straight, height, width, resample)
            return planes.round_().to(torch.uint8).permute(0, 2, 3, 1)
        return pillow_resize(images, height, width, resample)
    channels_last = images.permute(0, 3, 1, 2)
    if images.device.type == "cpu":
        resized = F.interpolate(channels_last, (height, width), mode=resample, antialias=True)
        return resized.permute(0, 2, 3, 1)
    # Only the CPU resizes uint8. Rounding between the passes clips bicubic overshoot as the CPU does.
    for size in ((images.shape[1], width), (height, width)):
        resized = F.interpolate(channels_last.float(), size, mode=resample, antialias=True)
        channels_last = resized.round_().clamp_(0, 255)
    return channels_last.to(torch.uint8).permute(0, 2, 3, 1)


def pillow_resize(
    images: Tensor, height: int, width: int, resample: str, box: tuple[float, float, float, float] | None = None
) -> Tensor:
    """Resize by Pillow, as Transformers' pipeline does: uint8 (B, H, W, 3) -> (B, height, width, 3).

    A difference of 1/255 can change a probability by 0.003, and where the height shrinks, Pillow 13 may resize rows
    first, which changes bicubic pixels by up to 31. `box` is the region to resize: left, top, right, bottom in pixels.
    """
    if box is None and images.shape[1:3] == (height, width):
        return images
    filter_ = Image.Resampling[resample.upper()]
    resized = [np.array(Image.fromarray(image).resize((width, height), filter_, box)) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).to(images.device)


def _resize_and_crop(images: Tensor, preprocess: Preprocess, exact: bool) -> Tensor:
    images = apply_resize(images, preprocess, exact=exact)
    rows, columns = images.shape[1:3]
    top, left = (rows - preprocess.height) // 2, (columns - preprocess.width) // 2
    if top < 0 or left < 0:
        images = F.pad(images, (0, 0, *(max(0, -left), max(0, preprocess.width - columns + left)),
                                *(max(0, -top), max(0, preprocess.height - rows + top))))  # fmt: skip
        top, left = max(0, top), max(0, left)
    return images[:, top : top + preprocess.height, left : left + preprocess.width]


def apply_resize(images: Tensor, preprocess: Preprocess, *, exact: bool = True) -> Tensor:
    """The resize before the center crop, if there is one, of uint8 (B, H, W, 3). Applying it twice changes nothing.

    If a long image would become larger than the largest model input (65,535 x 1 pixels would take gigabytes), only
    the middle part that the crop can see is computed.
    """
    rows, columns = images.shape[1:3]
    if not preprocess.resizes:
        return images
    edge, resample = preprocess.shortest_edge, preprocess.resample
    if edge is not None:
        old = (rows, columns)
        # Transformers truncates the longer side.
        rows, columns = (max(edge, int(edge * side / min(old))) for side in old)
        if edge > min(old) and rows * columns > LARGEST_SIDE**2:
            top, left = (
                max(0, (side - max(edge, crop)) // 2)
                for side, crop in ((rows, preprocess.height), (columns, preprocess.width))
            )
            # Both ends lose the same number of pixels, so a center crop finds the same ones. Columns first, as Pillow
            # does where the height grows.
            across, down = old[1] / columns, old[0] / rows
            box = (left * across, 0.0, (columns - left) * across, float(old[0]))
            images = pillow_resize(images, old[0], columns - 2 * left, resample, box)
            box = (0.0, top * down, float(columns - 2 * left), (rows - top) * down)
            return pillow_resize(images, rows - 2 * top, columns - 2 * left, resample, box)
    else:
        rows, columns = preprocess.before_crop or (preprocess.height, preprocess.width)
    return (pillow_resize if exact else resize)(images, rows, columns, resample)


def normalize(images: Tensor, preprocess: Preprocess, out: Tensor | None = None) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, C, H, W) in channels-last memory: (x * rescale - mean) / std.

    `out`, float32 (at least B, H, W, C), is a buffer for the result. Reusing one saves more time than the arithmetic
    takes, because the system clears each new page.
    """
    if preprocess.channels == 1:
        images = luminance(images)
    elif preprocess.flips_channels:
        images = images.flip(3)
    batch, height, width, channels = images.shape
    scale, shift = _scale_and_shift(preprocess, width, images.device)
    floats = torch.empty(images.shape, device=images.device) if out is None else out[:batch]
    rows = floats.view(batch * height, width * channels)
    rows.copy_(images.reshape(batch * height, width * channels))
    torch.addcmul(shift, rows, scale, out=rows)
    return floats.permute(0, 3, 1, 2)


@cache
def _scale_and_shift(preprocess: Preprocess, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors and offsets for one image row: long rows keep the arithmetic in vector registers."""
    mean, std = (torch.tensor(values, device=device) for values in (preprocess.mean, preprocess.std))
    return (preprocess.rescale / std).repeat(width), (-mean / std).repeat(width)


def preprocess_images(images: Images, preprocess: Preprocess) -> Tensor:
    """Model input for evaluation and prediction: uint8 images of any sizes -> float32 (B, C, height, width)."""
    return normalize(resize_and_crop(images, preprocess), preprocess)


def resize_and_crop(images: Images, preprocess: Preprocess, *, exact: bool = True) -> Tensor:
    """Resize and center-crop uint8 images of any sizes, in threads -> (B, height, width, 3), as Transformers does.

    `exact=False` is for training: several times as fast, and within 2/255.
    """
    if isinstance(images, Tensor):
        # torch is done with a batch before threads have memory for their parts, which the system clears first.
        quick = not exact and preprocess.resample in _OF_TORCH
        pieces = 1 if quick or len(images) < 8 else min(len(images), cpus())
        return _joined(images.chunk(pieces), lambda piece: _resize_and_crop(piece, preprocess, exact))
    return _joined(images, lambda image: _resize_and_crop(image[None], preprocess, exact))


def augment(
    images: Images, preprocess: Preprocess, how: Augmentation, epoch: int, index: Index, out: Tensor | None = None
) -> Tensor:
    """Model input for training: uint8 images of any sizes -> float32 (B, C, height, width).

    Every change is a function of (seed, epoch, sample index), `index` being (B,). Erasing and mixing, which change the
    model input, come later. `out` is a buffer: see `normalize`.
    """
    if isinstance(images, Tensor) and _matmul_pays(images, preprocess, how.kind):
        return augment_by_matmul(images, preprocess, how, epoch, index)
    return normalize(augment_pixels(images, preprocess, how, epoch, index), preprocess, out)


def augment_pixels(images: Images, preprocess: Preprocess, how: Augmentation, epoch: int, index: Index) -> Tensor:
    """`augment` without normalization: uint8 (B, height, width, 3), on the device of the images."""
    images = _operated(images, preprocess, how, epoch, index)
    if how.kind == "crop":
        return random_crops(images, preprocess, how.seed, epoch, index)
    if how.kind != "none":
        images = flip_images(images, draw_flips(how.seed, epoch, index))
    return resize_and_crop(images, preprocess, exact=False)


def _operated(images: Images, preprocess: Preprocess, how: Augmentation, epoch: int, index: Index) -> Images:
    """The images after the operations of a policy: before the resize, for small images have fewer pixels."""
    if not how.operates:
        return images
    if isinstance(images, Tensor):
        return operate(images, how, _mean_color(preprocess, images.device), epoch, index)
    fill = _mean_color(preprocess, images[0].device)
    places = range(len(images))
    return list(map_in_threads(lambda i: operate(images[i][None], how, fill, epoch, index[i : i + 1])[0], places))


@cache
def _mean_color(preprocess: Preprocess, device: torch.device) -> Tensor:
    """The color that normalization makes 0: uint8 (3,)."""
    mean = torch.tensor(preprocess.mean, device=device) / preprocess.rescale
    return mean.round().clamp(0, 255).to(torch.uint8).expand(3)


def augment_by_matmul(images: Tensor, preprocess: Preprocess, how: Augmentation, epoch: int, index: Index) -> Tensor:
    """`augment` as matrix products: for same-size images on a GPU, with a fixed number of kernels per batch.

    Within 1.6/255 of the threaded version, which rounds to whole numbers after each of its two passes.
    """
    count, (height, width), device = len(images), images.shape[1:3], images.device
    if how.operates:
        images = operate(images, how, _mean_color(preprocess, device), epoch, index)
    if how.kind == "crop":
        boxes = draw_crop_boxes(np.tile([height, width], (count, 1)), how.seed, epoch, index)
    else:
        boxes = np.tile([0, 0, height, width], (count, 1))
    flip = np.zeros(count, bool) if how.kind == "none" else draw_flips(how.seed, epoch, index)
    box, mirror = (to_device(torch.from_numpy(array), device) for array in (boxes, flip))
    planes = crop_and_resize(images, box, mirror, preprocess.height, preprocess.width, preprocess.resample)
    if preprocess.channels == 1:
        planes = (planes * _constant(LUMINANCE, device)[:, None, None]).sum(dim=1, keepdim=True) / 2**16
    elif preprocess.flips_channels:
        planes = planes.flip(1)
    mean, std = (_constant(values, device)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return (planes * preprocess.rescale - mean) / std


def _matmul_pays(images: Tensor, preprocess: Preprocess, kind: str) -> bool:
    """Whether this is one resize, of the whole image or of a crop, by a filter that the matrix products support.

    And on a device where they are faster than a resize of each image.
    """
    if not many_launches_cost(images.device):
        return False
    whole = preprocess.resizes and preprocess.shortest_edge is None and preprocess.before_crop is None
    resized = images.shape[1:3] != (preprocess.height, preprocess.width)
    return preprocess.resample in RADIUS and (kind == "crop" or (whole and resized))


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def random_crops(images: Images, preprocess: Preprocess, seed: int, epoch: int, index: Index) -> Tensor:
    """Random resized crops, half of them flipped: uint8 images of any sizes -> (B, height, width, 3)."""
    flip = draw_flips(seed, epoch, index)
    boxes = draw_crop_boxes(np.array([image.shape[:2] for image in images]), seed, epoch, index)

    def crop(sample: int) -> Tensor:
        top, left, height, width = boxes[sample].tolist()
        piece = images[sample][None, top : top + height, left : left + width]
        piece = piece.flip(2) if flip[sample] else piece
        return resize(piece, preprocess.height, preprocess.width, preprocess.resample)

    return _joined(range(len(images)), crop)


def draw_flips(seed: int, epoch: int, index: Index) -> NDArray[np.bool_]:
    """Which samples an epoch shows mirrored, with probability 1/2 each: (B,) -> (B,)."""
    flip: NDArray[np.bool_] = uniform(seed, "flip", epoch, index)[:, 0] < 0.5
    return flip


def flip_images(images: Images, flip: NDArray[np.bool_]) -> Images:
    """Mirror left to right the images where `flip` (B,) is true."""
    if isinstance(images, Tensor):
        mask = to_device(torch.from_numpy(flip), images.device)[:, None, None, None]
        return torch.where(mask, images.flip(2), images)
    return [image.flip(1) if flipped else image for image, flipped in zip(images, flip, strict=True)]


def draw_crop_boxes(sizes: NDArray[np.int64], seed: int, epoch: int, index: Index) -> NDArray[np.int64]:
    """Boxes of random resized crops (Szegedy et al. 2015, section 6), as torchvision's `RandomResizedCrop` draws them.

    sizes is (B, 2): height, width; index is (B,); the result is (B, 4). See `draw_boxes`. If no box fits, it is the
    largest centered one with an allowed aspect ratio. So every box has an allowed aspect ratio, up to rounding,
    whatever the image's.
    """
    boxes, found = draw_boxes(sizes, (CROP_AREA, 1.0), CROP_RATIO, seed, "crop", epoch, index)
    return np.where(found[:, None], boxes, _center_boxes(sizes))


def _center_boxes(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest centered boxes with an allowed aspect ratio: (B, 2) -> (B, 4)."""
    narrowest, widest = CROP_RATIO
    largest = np.rint(np.stack([sizes[:, 1] / narrowest, sizes[:, 0] * widest], axis=1)).astype(np.int64)
    box = np.maximum(np.minimum(sizes, largest), 1)
    return np.concatenate([(sizes - box) // 2, box], axis=1)


def _joined(pieces: Sequence[Any], work: Callable[[Any], Tensor]) -> Tensor:
    """Run the work on every piece, in threads if there are several, and concatenate along the batch."""
    if len(pieces) == 1:
        return work(pieces[0])
    if len(pieces) <= cpus():
        return torch.cat(list(map_in_threads(work, pieces)))
    groups = np.array_split(np.arange(len(pieces)), cpus())  # one task per thread, not per image
    return torch.cat(list(map_in_threads(lambda group: torch.cat([work(pieces[i]) for i in group]), groups)))
