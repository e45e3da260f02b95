"""Crop, mirror and resize a whole batch as two matrix products: y = R x Cᵀ.

An antialiased resize is linear and separable (Pillow's `Resample.c`): each output row is a weighted sum of input
rows, and each output column of input columns. So a crop of any box to any size is a product with a matrix of row
weights R (height, H) on the left and one of column weights C (width, W) on the right, and mirroring turns the rows
of C around. On a GPU that is a handful of kernels for a batch of any size, where cropping one image after the other
is several for each.
"""

import torch
from torch import Tensor

RADIUS = {"bilinear": 1.0, "bicubic": 2.0}
"""How far a filter reaches, in output pixels where it shrinks and in input pixels where it enlarges."""


def cropped(images: Tensor, boxes: Tensor, flip: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Cut a box out of each image, mirror it where `flip` says so, and resize it, antialiased.

    images is (B, H, W, 3), of any dtype; boxes is (B, 4) of top, left, height and width in pixels; flip is (B,), bool;
    resample is a key of RADIUS. The result is float32 (B, 3, height, width), in the images' own range: bicubic
    overshoot is clipped to 0..255 after each pass, as Pillow does. Within 1.6 of 255 of Pillow's, which rounds twice.
    """
    top, left, rows, columns = boxes.unbind(1)
    across = weights(images.shape[2], left, columns, width, resample, flip)  # (B, width, W)
    down = weights(images.shape[1], top, rows, height, resample)  # (B, height, H)
    planes = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    clips = resample != "bilinear"
    for matrix, product in ((across.mT, torch.matmul), (down, lambda x, r: torch.matmul(r, x))):
        planes = product(planes, matrix[:, None])
        if clips:
            planes = planes.clamp_(0, 255)
    return planes


def weights(size: int, start: Tensor, length: Tensor, out: int, resample: str, flip: Tensor | None = None) -> Tensor:
    """Filter weights of `out` pixels over `length` of `size` pixels from `start` on: (B, out, size), rows sum to 1.

    start and length are (B,). Where `flip` (B,) holds, the first output pixel is the last of the others.
    """
    place = torch.arange(out, device=start.device).expand(len(start), out)
    if flip is not None:
        place = torch.where(flip[:, None], out - 1 - place, place)
    scale = (length / out)[:, None]
    center = start[:, None] + (place + 0.5) * scale
    pixel = torch.arange(size, device=start.device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    distance = (pixel + 0.5 - center[:, :, None]) / scale.clamp(min=1.0)[:, :, None]
    found = _FILTERS[resample](distance.abs()) * inside[:, None]
    return found / found.sum(dim=2, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp_(min=0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys (1981), eq. 15: with a = -1/2, as Pillow has it."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x - 4
    return torch.where(x < 1, near, torch.where(x < RADIUS["bicubic"], a * far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
