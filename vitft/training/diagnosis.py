"""Warnings about a run that learned nothing or became slow, with the likely cause."""

import os

import numpy as np

from vitft.config.train import TrainConfig
from vitft.evaluation.metrics import Metrics
from vitft.hardware.device import cpus
from vitft.io.console import counted
from vitft.training.optim import unusual_lr

_SLOW = 1 / 3  # of the best speed so far
_FEW_IMAGES, _FEW_STEPS = 20, 200


def learned_nothing(metrics: Metrics, config: TrainConfig, steps: int, weights: int) -> str | None:
    """A warning with the likely cause if a model is no better than predicting one class for every image; else None.

    `metrics` are of held-out images after `steps` optimizer steps of a model with so many `weights`.
    """
    true, predicted, count = metrics.cells.T
    images = np.bincount(true, weights=count)
    if metrics.count < _FEW_IMAGES or np.count_nonzero(images) < 2:
        return None
    commonest = int(images[: len(metrics.per_class) - len(metrics.others)].argmax())
    if len(set(predicted.tolist())) == 1:
        what = f"every image of {metrics.split} was predicted as {metrics.per_class[int(predicted[0])].label}"
    elif metrics.accuracy <= images[commonest] / metrics.count:
        label = metrics.per_class[commonest].label
        what = f"on {metrics.split} it is no better than predicting {label} for every image"
    else:
        return None
    return f"{what}: the model has learned nothing useful. {_cause(config, steps, weights)}"


def _cause(config: TrainConfig, steps: int, weights: int) -> str:
    if (unusual := unusual_lr(config, weights)) is not None:
        return f"{unusual}."
    if steps < _FEW_STEPS:
        few = f"{counted(steps, 'step')} can be too few"
        return f"{few}: try more --epochs, or a higher learning rate than --lr {config.lr:g}."
    return "Look at the labels (vitft data check), or try another --lr."


class PaceWatch:
    """Detects, once, that training has become much slower than it was."""

    def __init__(self) -> None:
        self._best, self._told = 0.0, False

    def slowed(self, images_per_s: float) -> str | None:
        """A warning the first time the speed falls to a third of the best so far; else None."""
        self._best = max(self._best, images_per_s)
        if self._told or images_per_s > _SLOW * self._best:
            return None
        self._told = True
        load = f" (load {os.getloadavg()[0]:.1f} on {cpus()} CPUs)" if hasattr(os, "getloadavg") else ""
        return (
            f"training has slowed from {self._best:.0f} to {images_per_s:.0f} images/s: "
            f"other programs may be using this machine{load}."
        )
