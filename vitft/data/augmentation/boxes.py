"""Boxes within images: random ones, by area and aspect ratio, and what is done inside of them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.hardware.device import many_launches_cost, to_device
from vitft.randomness import uniform

ATTEMPTS = 10


def draw_boxes(
    sizes: NDArray[np.int64], areas: tuple[float, float], ratios: tuple[float, float],
    seed: int, purpose: str, epoch: int, index: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # fmt: skip
    """Boxes (B, 4), top, left, height, width, of images of `sizes` (B, 2), and which of them fit the image (B,).

    The area is uniform in `areas`, fractions of the image's; width / height is log-uniform in `ratios`; the place is
    uniform. All are drawn up to ten times until the box lies within the image.
    """
    low, high = np.log(ratios)
    smallest, largest = areas
    boxes = np.zeros((len(sizes), 4), np.int64)
    found = np.zeros(len(sizes), bool)
    remaining = np.arange(len(sizes))  # samples without a box
    for draw in range(ATTEMPTS):
        if not len(remaining):
            break
        drawn = uniform(seed, purpose, epoch, index[remaining], draw)
        area = sizes[remaining].prod(axis=1) * (smallest + (largest - smallest) * drawn[:, 0])
        aspect = np.exp(low + (high - low) * drawn[:, 1])
        box = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=1))).astype(np.int64)
        fits = ((box > 0) & (box <= sizes[remaining])).all(axis=1)
        corner = np.floor(drawn[:, 2:] * (sizes[remaining] - box + 1)).astype(np.int64)
        boxes[remaining[fits]] = np.concatenate([corner, box], axis=1)[fits]
        found[remaining[fits]] = True
        remaining = remaining[~fits]
    return boxes, found


def overwrite(pixels: Tensor, edges: NDArray[np.int64], source: Tensor) -> None:
    """In place, the inside of a box of each image becomes what `source` has there.

    pixels is (B, C, H, W), edges (B, 4): top, left, bottom, right, equal where there is no box; source is broadcast.
    """
    height, width = pixels.shape[2:]
    if many_launches_cost(pixels.device):
        top, left, bottom, right = to_device(torch.from_numpy(edges), pixels.device).T[:, :, None]
        down, across = (torch.arange(side, device=pixels.device) for side in (height, width))
        rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
        torch.where(rows[:, None, :, None] & columns[:, None, None, :], source, pixels, out=pixels)
        return
    source = source.expand_as(pixels)
    for place in np.flatnonzero((edges[:, :2] < edges[:, 2:]).all(axis=1)).tolist():
        top, left, bottom, right = edges[place].tolist()
        pixels[place, :, top:bottom, left:right] = source[place, :, top:bottom, left:right]
