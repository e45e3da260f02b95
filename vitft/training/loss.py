"""The training loss: the sum over a micro-batch, which the step divides by the size of the whole batch."""

import torch.nn.functional as F
from torch import Tensor

from vitft.config.train import TrainConfig


def summed_loss(logits: Tensor, targets: Tensor, config: TrainConfig) -> Tensor:
    """Cross-entropy summed over the images of a micro-batch, a scalar.

    `logits` is float32 (B, C); `targets` is class indices (B,), or class probabilities (B, C) of mixed images.
    """
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=config.label_smoothing)
