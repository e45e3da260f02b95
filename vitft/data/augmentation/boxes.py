"""Random boxes within images, by area and aspect ratio: for crops and for erasing."""

import numpy as np
from numpy.typing import NDArray

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
