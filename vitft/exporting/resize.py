"""Pillow's antialiased resize as matrix products, for images of any size, in operators that every format has.

Pillow (`Resample.c`) makes each output pixel a sum of input pixels with integer weights, 22 bits after the point, and
rounds to 8 bits after the columns and after the rows. Here the sums are matrix products in float32. Each weight is
split into three digits of 8 bits, so that products and sums are whole numbers below 2^24, which float32 has: the result
is Pillow's, in whatever order a runtime adds, for up to 258 pixels in a row behind each output pixel. (Of some images
that get much lower, Pillow 13 takes the rows first, which rounds otherwise: by 1/255, with bicubic by a few.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitft.data.augment import Preprocess

_ONE = 2.0**22  # of Pillow's weights
_DIGIT = 256.0


class Resize(nn.Module):
    """`augment.resize_and_crop` in a graph: uint8 (N, H, W, 3) -> whole numbers in float32 (N, height, width, 3)."""

    def __init__(self, how: Preprocess) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        """Resize all images of a batch, and crop or pad them."""
        how = self.how
        rows, columns = (torch.arange(size).double() for size in images.shape[1:3])  # the numbers of pixels
        heights, widths = rows[-1:] + 1, columns[-1:] + 1
        new_height, new_width = _resized(how, heights, widths)
        across = _weights(columns, widths, new_width, how.width, how.resample)
        down = _weights(rows, heights, new_height, how.height, how.resample)
        planes = images.permute(0, 3, 2, 1).float()  # (N, 3, W, H)
        planes = _pass(across, planes).transpose(2, 3)  # (N, 3, H, width)
        return _pass(down, planes).permute(0, 2, 3, 1)


def _resized(how: Preprocess, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The size before the crop: (1,) each."""
    if not how.resizes:
        return height, width
    if how.shortest_edge is not None:
        shorter, edge = torch.minimum(height, width), how.shortest_edge
        return tuple((edge * side / shorter).floor().clamp(min=edge) for side in (height, width))  # type: ignore[return-value]
    rows, columns = how.before_crop or (how.height, how.width)
    return torch.full_like(height, rows), torch.full_like(width, columns)


def _weights(pixel: Tensor, size: Tensor, resized: Tensor, out: int, resample: str) -> Tensor:
    """Pillow's integer weights of `size` pixels in the middle `out` of the `resized` ones: float64 (out, size)."""
    place = torch.arange(out).double() + ((resized - out) / 2).floor()
    scale = size / resized
    center = ((place + 0.5) * scale)[:, None]
    if resample == "nearest":
        weights = (pixel == center.floor()).double()
    else:
        kernel, radius = _FILTERS[resample]
        stretch = scale.clamp(min=1.0)
        first, last = (center - radius * stretch + 0.5).floor(), (center + radius * stretch + 0.5).floor()
        weights = kernel((pixel - center + 0.5) / stretch) * ((pixel >= first) & (pixel < last)).double()
        weights = weights / weights.sum(dim=1, keepdim=True)
    whole = (weights.abs() * _ONE + 0.5).floor() * weights.sign()
    shown = (place >= 0) & (place < resized)  # the others are padding
    return torch.where(shown[:, None], whole, 0.0)


def _pass(weights: Tensor, planes: Tensor) -> Tensor:
    """One pass of the resize, along the rows of (N, 3, size, B): (N, 3, out, B), rounded and clipped to 8 bits."""
    high = (weights / _DIGIT**2).floor()
    rest = weights - high * _DIGIT**2
    middle = (rest / _DIGIT).floor()
    digits = torch.cat([high, middle, rest - middle * _DIGIT]).float()  # (3 out, size)
    high, middle, low = (digits @ planes).chunk(3, dim=2)
    carried = high + _ONE / 2 / _DIGIT**2 + ((middle + (low / _DIGIT).floor()) / _DIGIT).floor()
    return (carried / (_ONE / _DIGIT**2)).floor().clamp(0, 255)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, _sinc(x) * (0.54 + 0.46 * (x * math.pi).cos()), 0.0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: Tensor) -> Tensor:
    angle = torch.where(x == 0, 1.0, x * math.pi)
    return torch.where(x == 0, 1.0, angle.sin() / angle)


_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "box": (_box, 0.5), "bilinear": (_triangle, 1.0), "hamming": (_hamming, 1.0), "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}  # fmt: skip
"""Pillow's filters and their radius, in output pixels where an image shrinks, else in input pixels."""
