"""Image operations on batches of uint8 images (B, H, W, 3), each with a strength of its own, on any device.

They are Pillow's: colors as `ImageOps` and `ImageEnhance` to the bit, geometry as `Image.transform` with bilinear
sampling to one gray level. Most colors are a table of 256 values for each channel of an image; geometry is an affine
map from output to input pixels. Both are applied once for all images of a batch, whichever operation each has.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitft.hardware.device import to_device

LUMINANCE = (19595, 38470, 7471)  # weights of red, green and blue, in 65,536ths

Strengths = Tensor
"""float32 (B,)."""


def apply(images: Tensor, names: NDArray[np.str_], strengths: NDArray[np.float64], fill: Tensor) -> Tensor:
    """A copy of the images with one operation on each: a name of OPERATIONS or "identity", and its strength, both (B,).

    `fill`, uint8 (3,), is the color of pixels from outside of the image.
    """
    result = images.clone()
    whole = torch.from_numpy(strengths.astype(np.float32))

    def drew(name: str) -> Tensor:
        return torch.from_numpy(np.flatnonzero(names == name))

    def given(rows: Tensor) -> Strengths:
        return to_device(whole[rows], images.device)

    rows = {name: drew(name) for name in np.unique(names).tolist()}
    maps = {name: MAPS[name](given(rows[name]), *images.shape[1:3]) for name in MAPS if name in rows}
    if maps:
        at = to_device(torch.cat([rows[name] for name in maps]), images.device)
        result[at] = warp(images[at], torch.cat([*maps.values()]), fill)
    places = {name: to_device(rows[name], images.device) for name in (*TABLES, *BLENDS) if name in rows}
    tables = {name: TABLES[name](images[places[name]], given(rows[name])) for name in TABLES if name in rows}
    if tables:
        at = torch.cat([places[name] for name in tables])
        result[at] = look_up(images[at], torch.cat([*tables.values()]))
    for name in BLENDS:
        if name in rows:
            result[places[name]] = BLENDS[name](images[places[name]], given(rows[name]))
    return result


# -- geometry: matrices (B, 6) as Pillow's AFFINE: x' = a x + b y + c, y' = d x + e y + f --------------------------


def _matrix(strength: Strengths, **entries: Tensor) -> Tensor:
    zero, one = torch.zeros_like(strength), torch.ones_like(strength)
    identity = {"a": one, "b": zero, "c": zero, "d": zero, "e": one, "f": zero}
    return torch.stack([*(identity | entries).values()], dim=1)


def _shear_x(strength: Strengths, height: int, width: int) -> Tensor:
    return _matrix(strength, b=strength)


def _shear_y(strength: Strengths, height: int, width: int) -> Tensor:
    return _matrix(strength, d=strength)


def _translate_x(strength: Strengths, height: int, width: int) -> Tensor:
    return _matrix(strength, c=strength * width)


def _translate_y(strength: Strengths, height: int, width: int) -> Tensor:
    return _matrix(strength, f=strength * height)


def _rotate(strength: Strengths, height: int, width: int) -> Tensor:
    """By so many degrees counterclockwise, about the center."""
    angle = torch.deg2rad(strength)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _matrix(strength, a=cos, b=-sin, c=x - x * cos + y * sin, d=sin, e=cos, f=y - x * sin - y * cos)


MAPS: dict[str, Callable[[Strengths, int, int], Tensor]] = {
    "shear_x": _shear_x, "shear_y": _shear_y, "translate_x": _translate_x, "translate_y": _translate_y,
    "rotate": _rotate,
}  # fmt: skip
"""Strengths: the shear; a fraction of the width or height, to the left or up; degrees."""


def warp(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Sample each image at the places that its matrix (B, 6) gives for the output pixels, bilinearly."""
    height, width = images.shape[1:3]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    a, b, c, d, e, f = matrices.T[:, :, None, None]
    across, down = a * x + b * y + c, d * x + e * y + f
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    grid = torch.stack([2 * across / width - 1, 2 * down / height - 1], dim=3)
    planes = images.permute(0, 3, 1, 2).float()
    sampled = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[..., None], sampled.round_().to(torch.uint8).permute(0, 2, 3, 1), fill)


# -- colors by tables (B, 3, 256) ----------------------------------------------------------------------------------


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by its entry in the table (B, 3, 256) of its image and channel."""
    return tables.flatten()[_bins(images)]


def _bins(images: Tensor) -> Tensor:
    """256 numbers for each image and channel: int64 (B, H, W, 3)."""
    channels = torch.arange(0, 256 * 3 * len(images), 256, device=images.device)
    return images + channels.view(-1, 1, 1, 3)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device)


def _brightness(images: Tensor, factor: Strengths) -> Tensor:
    return _blend(torch.zeros((), device=images.device), _values(images), factor[:, None, None]).expand(-1, 3, -1)


def _contrast(images: Tensor, factor: Strengths) -> Tensor:
    gray = luminance(images).long()
    pixels = gray[0].numel()
    mean = (2 * gray.sum(dim=(1, 2, 3)) + pixels) // (2 * pixels)  # rounded
    return _blend(mean.float()[:, None, None], _values(images), factor[:, None, None]).expand(-1, 3, -1)


def _posterize(images: Tensor, bits: Strengths) -> Tensor:
    mask = 256 - 2 ** (8 - bits.long())
    return (_values(images) & mask[:, None, None]).to(torch.uint8).expand(-1, 3, -1)


def _solarize(images: Tensor, threshold: Strengths) -> Tensor:
    values = _values(images)
    inverted = torch.where(values < threshold[:, None, None], values, 255 - values)
    return inverted.to(torch.uint8).expand(-1, 3, -1)


def _autocontrast(images: Tensor, strength: Strengths) -> Tensor:
    low, high = (bound.double()[:, :, None] for bound in (images.amin(dim=(1, 2)), images.amax(dim=(1, 2))))
    values = _values(images).double()
    scale = torch.full_like(high, 255) / (high - low)  # `255 / x` would multiply by the rounded 1 / x
    stretched = (values * scale + -low * scale).trunc().clamp_(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalize(images: Tensor, strength: Strengths) -> Tensor:
    bins = _bins(images).flatten()
    counts = torch.zeros(256 * 3 * len(images), dtype=torch.long, device=images.device)
    # Unlike `bincount`, this does not wait for a GPU.
    counts = counts.scatter_add_(0, bins, torch.ones_like(bins)).view(-1, 3, 256)
    values = _values(images)
    brightest = torch.where(counts > 0, values, 0).argmax(dim=2, keepdim=True)
    step = (counts.sum(dim=2, keepdim=True) - counts.gather(2, brightest)) // 255
    below = counts.cumsum(dim=2) - counts
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, equalized, values).to(torch.uint8)


TABLES: dict[str, Callable[[Tensor, Strengths], Tensor]] = {
    "brightness": _brightness, "contrast": _contrast, "posterize": _posterize, "solarize": _solarize,
    "autocontrast": _autocontrast, "equalize": _equalize,
}  # fmt: skip
"""Strengths: a factor, 1 for no change; a factor; bits to keep; the value from which on to invert; none; none."""


# -- colors that look at more than one value -----------------------------------------------------------------------


def luminance(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, H, W, 1) by ITU-R 601, rounded as in Pillow: gray pixels keep their value."""
    return ((images.int() * _weights(images.device)).sum(dim=3, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


@cache
def _weights(device: torch.device) -> Tensor:
    """Of `luminance`: to move them to a GPU in each step would wait for it."""
    return torch.tensor(LUMINANCE, dtype=torch.int32, device=device)


def _color(images: Tensor, factor: Strengths) -> Tensor:
    return _blend(luminance(images).float(), images, factor[:, None, None, None])


def _sharpness(images: Tensor, factor: Strengths) -> Tensor:
    values = images.int()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    block = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = values.clone()  # pixels at the edges stay
    smooth[:, 1:-1, 1:-1] = (2 * (block + 4 * values[:, 1:-1, 1:-1]) + 13) // 26  # rounded
    return _blend(smooth.float(), images, factor[:, None, None, None])


BLENDS: dict[str, Callable[[Tensor, Strengths], Tensor]] = {"color": _color, "sharpness": _sharpness}
"""Strengths: factors, 1 for no change, 0 for gray or smooth."""

OPERATIONS = (*MAPS, *TABLES, *BLENDS)


def _blend(without: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`Image.blend`, uint8: from `without` (float32) at factor 0 to the images at 1, and beyond."""
    return (without + factor * (images - without)).trunc_().clamp_(0, 255).to(torch.uint8)
