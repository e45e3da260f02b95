"""The start of a new head: logistic regression on the features of the pretrained backbone.

Fine-tuning from a random head first distorts the features, because it adapts them to a head that means nothing (Kumar
et al. 2022, "Fine-Tuning can Distort Pretrained Features"). It also makes short runs depend on the seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vitft.config.train import TrainConfig
from vitft.errors import UsageError
from vitft.hardware.shards import write
from vitft.models.heads import head_of
from vitft.models.logistic import STRENGTHS, Loss, location_and_scale, regress

_MOST_IMAGES, _PER_CLASS = 10_000, 20  # the larger of the first and so many for each class
_MOST_CLASSES = 1000
_FOLDS = 5  # one of them chooses the strength
_FEW = 50  # images from which a held-out fifth says nothing


@dataclass(frozen=True)
class Fit:
    """A linear classifier: weight (C, F), bias (C,); and how its strength was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float | None  # on the held-out images; None if there were too few to hold out any
    held_out: int


def starts_from_features(config: TrainConfig, model: nn.Module, *, new_head: bool) -> bool:
    """Whether a run fits its head to features first: `auto` does for a new linear head on a pretrained backbone.

    For more than 1,000 classes, whose fit could take longer than the run, only `features` does.

    Raises UsageError if `features` is asked for, and the head is not one linear layer.
    """
    if config.head_init == "random" or config.from_scratch or not new_head:
        return False
    head = [model.get_submodule(name) for name in head_of(model)]
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    if len(head) == len(linear) == 1:
        return config.head_init == "features" or linear[0].out_features <= _MOST_CLASSES
    if config.head_init == "features":
        raise UsageError("head_init features: the head of this model is not one linear layer; use random.")
    return False


def images_for_head(images: int, classes: int, seen: int) -> int:
    """How many of the training images the head is fitted to, in a run whose steps see `seen` images in all.

    A pass over them without gradients takes about a third of a training pass over as many.
    """
    return min(images, max(_MOST_IMAGES, _PER_CLASS * classes), seen)


def fit_head(features: Tensor, labels: Tensor, classes: int, mean_loss: Loss = F.cross_entropy) -> Fit:
    """Fit multinomial logistic regression with an L2 penalty, chosen by the loss of a held-out fifth of the images.

    `features` is (N, F), in random order, `labels` (N,) in 0..C-1; `mean_loss` is of logits and labels. The penalty is
    on weights and biases, so a class without images gets finite ones.
    """
    mean, scale = location_and_scale(features)
    scaled = (features - mean) / scale
    strength, accuracy = STRENGTHS[0], None
    held_out = 0 if len(labels) < _FEW else len(labels) // _FOLDS
    if held_out:
        lowest, start = math.inf, None
        for candidate in STRENGTHS:  # each fit starts from the last, which is close
            start = regress(scaled[held_out:], labels[held_out:], classes, candidate, start, mean_loss)
            logits = scaled[:held_out] @ start[:, :-1].T + start[:, -1]
            loss = mean_loss(logits, labels[:held_out]).item()
            if loss >= lowest:
                break  # weaker penalties would only fit the other images better
            lowest, strength = loss, candidate
            accuracy = (logits.argmax(dim=1) == labels[:held_out]).float().mean().item()
    parameters = regress(scaled, labels, classes, strength, mean_loss=mean_loss)
    weight = parameters[:, :-1] / scale
    return Fit(weight, parameters[:, -1] - weight @ mean, strength, accuracy, held_out)


def write_head(model: nn.Module, fit: Fit, broadcast: Callable[[Tensor], Tensor]) -> None:
    """Write a fit into the model's head; `broadcast` makes all processes have the first one's."""
    head = model.get_submodule(head_of(model)[0])
    assert isinstance(head, nn.Linear)
    write(head.weight, broadcast(fit.weight.to(head.weight.device)))
    if head.bias is not None:
        write(head.bias, broadcast(fit.bias.to(head.bias.device)))
