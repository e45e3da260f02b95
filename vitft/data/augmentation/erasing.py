"""Random erasing (Zhong et al. 2020, algorithm 1): a box of the model input becomes the mean color."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augmentation.boxes import draw_boxes, overwrite
from vitft.randomness import uniform

AREAS = (0.02, 1 / 3)  # of a box, as fractions of the image's
RATIOS = (0.3, 1 / 0.3)  # width / height


def draw_erased(
    probability: float, height: int, width: int, seed: int, epoch: int, index: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the samples (B,) are erased, as positions (E,), and the boxes (E, 4): top, left, height, width."""
    chosen = np.flatnonzero(uniform(seed, "erase", epoch, index)[:, 0] < probability)
    sizes = np.tile([height, width], (len(chosen), 1))
    boxes, found = draw_boxes(sizes, AREAS, RATIOS, seed, "erased box", epoch, index[chosen])
    return chosen[found], boxes[found]


def erase(pixels: Tensor, probability: float, seed: int, epoch: int, index: NDArray[np.int64]) -> None:
    """Erase in place, with this probability each, normalized images (B, C, H, W) of the samples `index` (B,).

    Erased pixels become 0, the model's mean color: about as good as noise in that paper, and the same on every device.
    """
    height, width = pixels.shape[2:]
    places, boxes = draw_erased(probability, height, width, seed, epoch, index)
    edges = np.zeros((len(index), 4), np.int64)  # of those that stay, an empty box
    edges[places] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    overwrite(pixels, edges, pixels.new_zeros(()))
