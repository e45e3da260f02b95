"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): an image takes a share of the next one in the batch.

The next image of the whole batch, the first after the last. The order is random, so that is a random partner, and a
process needs only one image beside its own to mix as one process alone would.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from vitft.data.augmentation.boxes import overwrite
from vitft.data.augmentation.settings import Augmentation
from vitft.hardware.device import to_device
from vitft.randomness import uniform


@dataclass(frozen=True)
class Mixes:
    """For each of B samples: its own share, and the box that its partner fills; without one, it is mixed by mixup."""

    share: NDArray[np.float64]  # (B,)
    cut: NDArray[np.bool_]  # (B,): by CutMix
    boxes: NDArray[np.int64]  # (B, 4): top, left, bottom, right


def draw_mixes(how: Augmentation, height: int, width: int, epoch: int, index: NDArray[np.int64]) -> Mixes:
    """How the samples `index` (B,) are mixed: by CutMix or mixup, with probability 1/2 each if both are on.

    The share λ is from Beta(α, α) for each sample. CutMix's box has 1 - λ of the area and a uniform center; the part
    that lies outside of the image is cut off, and the share follows (Yun et al. 2019, equation 2 and algorithm A1).
    """
    drawn = uniform(how.seed, "mix", epoch, index)
    cut = drawn[:, 0] < (0.5 if how.mixup else 1.0) if how.cutmix else np.zeros(len(index), bool)
    alpha = np.where(cut, how.cutmix, how.mixup)
    share = betaincinv(alpha, alpha, drawn[:, 1])  # the quantile of the uniform number
    size = np.array([height, width])
    half = (np.sqrt(1 - share)[:, None] * size).astype(np.int64) // 2
    center = (drawn[:, 2:] * size).astype(np.int64)
    boxes = np.concatenate([np.maximum(center - half, 0), np.minimum(center + half, size)], axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / (height * width)
    return Mixes(np.where(cut, 1 - area, share), cut, boxes)


def mix(pixels: Tensor, mixes: Mixes, out: Tensor | None = None) -> Tensor:
    """Mix B images, each with the next: (B + 1, C, H, W) -> (B, C, H, W). `out` is a buffer of that shape."""
    blended = np.where(mixes.cut, 1.0, mixes.share)
    share = to_device(torch.from_numpy(blended).to(pixels.dtype), pixels.device)
    mixed = torch.lerp(pixels[1:], pixels[:-1], share[:, None, None, None], out=out)
    if mixes.cut.any():
        overwrite(mixed, np.where(mixes.cut[:, None], mixes.boxes, 0), pixels[1:])
    return mixed


def mix_labels(labels: Tensor, mixes: Mixes, classes: int) -> tuple[Tensor, Tensor]:
    """Of labels (B + 1,): those with the larger share of each image (B,), and class probabilities (B, classes)."""
    share = to_device(torch.from_numpy(mixes.share).float(), labels.device)
    own, partner = labels[:-1], labels[1:]
    whole = F.one_hot(labels, classes).float()
    return torch.where(share >= 0.5, own, partner), torch.lerp(whole[1:], whole[:-1], share[:, None])
