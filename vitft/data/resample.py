"""Crop, flip and resize a whole batch as two matrix products: y = R x Cᵀ.

An antialiased resize is linear and separable (Pillow's `Resample.c`): each output row is a weighted sum of input
rows, and each output column is a weighted sum of input columns. So resizing any box to any size is a product with a
matrix of row weights R (height, H) on the left and column weights C (width, W) on the right; reversing the rows of C
mirrors the image. On a GPU this takes a few kernels for a batch of any size instead of several for each image.
"""

import torch
from torch import Tensor

RADIUS = {"bilinear": 1.0, "bicubic": 2.0, "hamming": 1.0, "lanczos": 3.0}
"""Support of each filter, in output pixels when shrinking and in input pixels when enlarging.

Pillow's box and nearest are left out: where a pixel lies on an edge, rounding decides whether it counts.
"""


def crop_and_resize(images: Tensor, boxes: Tensor, flip: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Crop a box from each image, mirror it where `flip` is true, and resize it with antialiasing.

    images is (B, H, W, 3), of any dtype; boxes is (B, 4): top, left, height and width in pixels; flip is bool (B,);
    resample is a key of RADIUS. The result is float32 (B, 3, height, width), in the images' own range: the overshoot of
    bicubic and lanczos is clipped to 0..255 after each pass, as in Pillow. Within 1.6/255 of it, which rounds twice.
    """
    top, left, rows, columns = boxes.unbind(1)
    across = filter_weights(images.shape[2], left, columns, width, resample, flip)  # (B, width, W)
    down = filter_weights(images.shape[1], top, rows, height, resample)  # (B, height, H)
    planes = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    planes = planes @ across.mT[:, None]
    if overshoots := resample in ("bicubic", "lanczos"):
        planes.clamp_(0, 255)
    planes = down[:, None] @ planes
    return planes.clamp_(0, 255) if overshoots else planes


def filter_weights(
    size: int, start: Tensor, length: Tensor, out: int, resample: str, flip: Tensor | None = None
) -> Tensor:
    """Weights of `size` input pixels in each of `out` output pixels: (B, out, size); each row sums to 1.

    The output covers `length` input pixels from `start` on; both are (B,). Where `flip` (B,) is true, the output
    pixels are in reverse order.
    """
    place = torch.arange(out, device=start.device).expand(len(start), out)
    if flip is not None:
        place = torch.where(flip[:, None], out - 1 - place, place)
    scale = (length / out)[:, None]
    center = start[:, None] + (place + 0.5) * scale
    pixel = torch.arange(size, device=start.device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    distance = (pixel + 0.5 - center[:, :, None]) / scale.clamp(min=1.0)[:, :, None]
    weights = _FILTERS[resample](distance.abs()) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp_(min=0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys (1981), eq. 15, with a = -1/2 as in Pillow."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x - 4
    return torch.where(x < 1, near, torch.where(x < RADIUS["bicubic"], a * far, 0.0))


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x < 1, x.sinc() * (0.54 + 0.46 * (torch.pi * x).cos()), 0.0)


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x < RADIUS["lanczos"], x.sinc() * (x / 3).sinc(), 0.0)


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic, "hamming": _hamming, "lanczos": _lanczos}
