"""Random erasing (Zhong et al. 2020, algorithm 1): a box of the model input becomes noise."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augmentation.boxes import draw_boxes
from vitft.randomness import random_words, uniform

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

    Every erased value is drawn from a normal distribution of mean 0 and variance 1, which is what normalized pixels
    are like. The noise of a sample is always the same on one kind of device.
    """
    places, boxes = draw_erased(probability, pixels.shape[2], pixels.shape[3], seed, epoch, index)
    words = random_words(seed, "erased noise", epoch, index[places])
    noise = torch.Generator(pixels.device)
    for place, (top, left, height, width), (high, low, *_) in zip(
        places.tolist(), boxes.tolist(), words.tolist(), strict=True
    ):
        noise.manual_seed(high << 31 | low >> 1)
        drawn = torch.randn(height, width, pixels.shape[1], generator=noise, device=pixels.device)
        pixels[place, :, top : top + height, left : left + width] = drawn.permute(2, 0, 1)
