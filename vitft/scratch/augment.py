"""Augmentation: the same image looks a little different in each epoch."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vitft.scratch.tensors import Array

Pixels = NDArray[np.uint8]


def normalize(images: Pixels, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any = np.float32) -> Array:
    """(x / 255 − mean) / std, channel by channel, of uint8 images (B, C, H, W)."""
    scale, shift = 1 / (255 * np.array(std)), -np.array(mean) / np.array(std)
    x: Array = images * scale.astype(dtype)[:, None, None]
    x += shift.astype(dtype)[:, None, None]
    return x


def flip(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror each image (B, C, H, W) left to right with probability ½."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def crop(images: Pixels, border: int, rng: np.random.Generator) -> Pixels:
    """Shift each image (B, C, H, W) by up to `border` pixels in each direction; pixels from outside are 0."""
    height, width = images.shape[2:]
    edge = (border, border)
    padded = np.pad(images, ((0, 0), (0, 0), edge, edge))
    crops = sliding_window_view(padded, (height, width), axis=(2, 3))  # (B, C, 2·border + 1, 2·border + 1, H, W)
    top, left = rng.integers(0, 2 * border + 1, (2, len(images)))
    return crops[np.arange(len(images)), :, top, left]
