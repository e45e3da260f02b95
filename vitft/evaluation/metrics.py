"""The scores of a classifier, from the label, best classes and loss of every image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import isfinite, nan, sqrt
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vitft.errors import DataError, ModelError
from vitft.evaluation.calibration import describe
from vitft.evaluation.split_predictions import Predictions


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class as fractions, and how many images are of this class."""

    label: str
    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True)
class Score:
    """The scores of one model on one named split, as fractions; the loss is the mean cross-entropy in nats."""

    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 %, Wilson
    top5: float
    loss: float
    macro_f1: float
    balanced_accuracy: float  # mean recall of the classes that have images; NaN in the records of early versions
    count: int  # images
    split: str
    split_hash: str  # identifies the images of the split
    images_per_s: float

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Self:
        """The inverse of `summary`."""
        interval = tuple(summary["accuracy_interval"])
        return cls(**{"balanced_accuracy": nan, **summary, "accuracy_interval": interval})

    def by(self, name: str) -> float:
        """The number that chooses the better of two models by a metric, as `best_by` names it; higher is better."""
        value = float(getattr(self, name.replace("-", "_")))
        return -value if name == "loss" else value

    def summary(self) -> dict[str, Any]:
        """The scores as plain JSON values, under the names of the fields."""
        values = {item.name: getattr(self, item.name) for item in fields(Score)}
        return values | {"accuracy_interval": list(self.accuracy_interval)}


@dataclass(frozen=True)
class Metrics(Score):
    """A score with its details: each class, and the confusion matrix."""

    per_class: list[ClassScore]
    # (k, 3), sorted: true class, predicted class, number of images
    cells: NDArray[np.int64] = field(compare=False, repr=False)
    others: tuple[str, ...] = ()  # the last of per_class: true classes that the model does not have
    predictions: Predictions | None = field(default=None, compare=False, repr=False)  # None if they would be too many
    temperature: float | None = None  # of the checkpoint, fitted on validation images

    @cached_property
    def calibration(self) -> dict[str, float] | None:
        """How far confidence is from accuracy, also at the temperature: see `calibration.describe`."""
        return None if self.predictions is None else describe(self.predictions, self.temperature)

    @cached_property
    def confusion(self) -> dict[str, Any]:
        """`labels`, and `cells`: `[i, j, count]`, how many images of class `labels[i]` were called `labels[j]`.

        Pairs that do not occur are left out: for 1,000 classes, a matrix would take 15 MB. Early versions wrote one.
        """
        return {"labels": [row.label for row in self.per_class], "cells": self.cells.tolist()}

    @property
    def matrix(self) -> NDArray[np.int64]:
        """The confusion matrix, (C, C): rows are true classes. For few classes: see `confusion`."""
        matrix = np.zeros((len(self.per_class),) * 2, np.int64)
        matrix[self.cells[:, 0], self.cells[:, 1]] = self.cells[:, 2]
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """The summary, `per_class`, `confusion` and `calibration`."""
        classes = [asdict(row) for row in self.per_class]
        said = {} if self.calibration is None else {"calibration": self.calibration}
        return self.summary() | {"per_class": classes, "confusion": self.confusion} | said


def score(
    truth: NDArray[np.int64],
    top: NDArray[np.int64],
    losses: NDArray[np.floating[Any]],
    labels: Sequence[str],
    others: Sequence[str] = (),
    *,
    split: str,
    split_hash: str,
    elapsed_s: float,
) -> Metrics:
    """Score a split of n images: truth is (n,), top (n, k) with the best class first, losses (n,) in nats.

    k is 5, or the number of classes if there are fewer. `labels` are the classes by index. `others` are true classes
    that the model does not have, numbered after its own: their images are wrong, and left out of the mean loss.
    `elapsed_s` is the time to read and classify the images.

    Raises DataError if n is 0, ModelError if the mean loss is not finite, and ValueError if the arrays do not fit.
    """
    count, known, classes = len(truth), len(labels), len(labels) + len(others)
    if count == 0:
        raise DataError(f"split {split} has no images to evaluate; name another split")
    if top.shape != (count, min(5, known)) or losses.shape != (count,):
        raise ValueError(f"got truth {truth.shape}, top {top.shape}, losses {losses.shape}, {known} labels")
    if min(truth.min(), top.min()) < 0 or truth.max() >= classes or top.max() >= known:
        raise ValueError(f"a class index lies outside 0..{classes - 1}, or a prediction outside 0..{known - 1}")
    from vitft.evaluation.counts import Classification

    with TemporaryDirectory() as folder:  # evaluate creates a folder even if it keeps everything in memory
        metric = Classification(keep_in_memory=True, cache_dir=folder)
        found = (top == truth[:, None]).any(axis=1)
        got = metric.compute(
            references=truth, predictions=top[:, 0], found=found, losses=losses, classes=classes, known=known
        )
    if not isfinite(got["loss"]):
        raise ModelError(f"loss on {split} is {got['loss']}: the weights or inputs are not finite numbers")
    columns = (got[name].tolist() for name in ("precision", "recall", "f1", "count"))
    return Metrics(
        accuracy=got["correct"] / count,
        accuracy_interval=wilson_interval(got["correct"], count),
        top5=got["top5"],
        loss=got["loss"],
        macro_f1=got["macro_f1"],
        balanced_accuracy=got["balanced_accuracy"],
        count=count,
        split=split,
        split_hash=split_hash,
        images_per_s=count / max(elapsed_s, 1e-9),
        per_class=[ClassScore(*row) for row in zip((*labels, *others), *columns, strict=True)],
        cells=got["cells"],
        others=tuple(others),
    )


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of Wilson (1927) for `correct` of `count`: 95 % for z = 1.96.

    Unlike p ± z·sqrt(p(1-p)/n), it stays within 0 to 1, and holds near 0 and 1 and for few images. Raises ValueError
    unless 0 <= correct <= count and count > 0.
    """
    if not 0 <= correct <= count or count == 0:
        raise ValueError(f"{correct} of {count} is not a fraction")
    p = correct / count
    scale = 1 + z**2 / count
    center = (p + z**2 / (2 * count)) / scale
    half = z / scale * sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    # Exact at the ends, where rounding would leave a small error.
    return (0.0 if correct == 0 else center - half), (1.0 if correct == count else center + half)
