"""The same image, a little different each time it is seen."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vitft.scratch.tensors import Array

Pixels = NDArray[np.uint8]


def normalise(images: Pixels, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any = np.float32) -> Array:
    """uint8 (B, C, H, W) to numbers about 0: (x / 255 − mean) / std, channel by channel."""
    scale, shift = 1 / (255 * np.array(std)), -np.array(mean) / np.array(std)
    x: Array = images * scale.astype(dtype)[:, None, None]
    x += shift.astype(dtype)[:, None, None]
    return x


def flip(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Half of the images (B, C, H, W), mirrored left to right."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def crop(images: Pixels, border: int, rng: np.random.Generator) -> Pixels:
    """Each image (B, C, H, W) moved by up to `border` pixels; what comes in from outside is 0."""
    height, width = images.shape[2:]
    edge = (border, border)
    padded = np.pad(images, ((0, 0), (0, 0), edge, edge))
    seen = sliding_window_view(padded, (height, width), axis=(2, 3))  # (B, C, 2·border + 1, 2·border + 1, H, W)
    top, left = rng.integers(0, 2 * border + 1, (2, len(images)))
    return seen[np.arange(len(images)), :, top, left]
