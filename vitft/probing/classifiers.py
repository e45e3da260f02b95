"""Classifiers on features: logistic regression by penalty, nearest neighbors, and both of what few images allow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitft.evaluation.metrics import wilson_interval
from vitft.models.logistic import STRENGTHS, location_and_scale, regress
from vitft.randomness import permutation

PENALTIES = (1.0, *STRENGTHS, 3e-4, 1e-4)
NEIGHBORS = (1, 5, 10, 20, 50)
PER_CLASS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
DRAWS = 5
TEMPERATURE = 0.07  # of Wu et al. 2018 and Caron et al. 2021
_TOLERANCE = 1e-3  # accuracies are the same within half a point as with a hundredth of it, which takes twice as long
_CHUNK = 1024  # images whose similarities are in memory at once


@dataclass(frozen=True)
class Examples:
    """Features (N, F) and labels (N,), on one device. Labels of classes that no training image has are C and above."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Trial:
    """One classifier and its validation accuracy. `setting` is the penalty, or the number of neighbors."""

    setting: float
    correct: int
    count: int
    loss: float | None = None  # mean cross-entropy in nats; None for neighbors, whose votes are no probabilities

    @property
    def accuracy(self) -> float:
        """The fraction that is right."""
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, by Wilson."""
        return wilson_interval(self.correct, self.count)


@dataclass(frozen=True)
class Point:
    """A point of the few-shot curve: the validation accuracies of several draws of so many images per class."""

    per_class: int
    images: int  # in a draw: a class may have fewer
    penalty: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the draws."""
        return fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """The standard deviation over the draws; 0 for one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


class _Path:
    """Logistic regression on D draws of images, (D, N, F), by ever weaker penalties: each fit starts from the last."""

    def __init__(self, features: Tensor, labels: Tensor, held_out: Examples, classes: int) -> None:
        mean, scale = torch.vmap(location_and_scale)(features)
        self._mean, self._scale = mean[:, :, None], scale[:, None, None]
        self._inputs = (features - mean[:, None]) / self._scale
        self._labels, self._held_out, self._classes = labels, held_out, classes
        self._parameters: Tensor | None = None

    def next(self, penalty: float) -> tuple[list[Trial], Tensor]:
        """The trial of a penalty with each draw, and the validation logits, (D, M, C)."""
        self._parameters = regress(
            self._inputs, self._labels, self._classes, penalty, self._parameters, tolerance=_TOLERANCE
        )
        weight = self._parameters[:, :, :-1] / self._scale
        bias = self._parameters[:, :, -1:] - weight @ self._mean
        logits = self._held_out.features @ weight.mT + bias.mT
        truth = self._held_out.labels
        known = truth < self._classes
        correct = (logits.argmax(dim=2) == truth).sum(dim=1).tolist()
        losses = [F.cross_entropy(one[known], truth[known]).item() for one in logits]
        return [Trial(penalty, hits, len(truth), loss) for hits, loss in zip(correct, losses, strict=True)], logits


def logistic_trials(train: Examples, held_out: Examples, classes: int) -> tuple[list[Trial], Tensor]:
    """Logistic regression by penalty, strongest first: the trials, and the validation logits (M, C) of `best_of` them.

    Weaker penalties are left out once two in a row made the loss higher: they take longest, and would only fit the
    training images better.
    """
    path, trials = _Path(train.features[None], train.labels[None], held_out, classes), []
    best = held_out.features.new_zeros(0)
    for penalty in PENALTIES:
        (trial,), (logits,) = path.next(penalty)
        trials.append(trial)
        best = logits if best_of(trials) is trial else best
        losses = [trial.loss or 0.0 for trial in trials[-3:]]
        if len(losses) == 3 and losses[0] < losses[1] < losses[2]:
            break
    return trials, best


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest accuracy; of equals, the first."""
    return max(trials, key=lambda trial: trial.correct)


def neighbor_trials(train: Examples, held_out: Examples, classes: int) -> list[Trial]:
    """Nearest neighbors by cosine similarity s, each with a vote of exp(s / 0.07) (Wu et al. 2018, section 3.4)."""
    counts = sorted({min(count, len(train)) for count in NEIGHBORS})
    known, asked = F.normalize(train.features), F.normalize(held_out.features)
    correct = dict.fromkeys(counts, 0)
    for start in range(0, len(asked), _CHUNK):
        similarity, index = (asked[start : start + _CHUNK] @ known.T).topk(counts[-1], dim=1)
        votes, labels = (similarity / TEMPERATURE).exp(), train.labels[index]
        for count in counts:
            tally = votes.new_zeros(len(votes), classes).scatter_add_(1, labels[:, :count], votes[:, :count])
            correct[count] += int((tally.argmax(dim=1) == held_out.labels[start : start + _CHUNK]).sum())
    return [Trial(count, correct[count], len(held_out)) for count in counts]


def few_shot(
    train: Examples, held_out: Examples, classes: int, seed: int,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Point]:  # fmt: skip
    """The accuracy by images per class: logistic regression on 1, 2, 5, 10, ... images of each class, in five draws.

    The penalty of a point is the one with the highest mean accuracy over its draws, climbing from that of the point
    before until a weaker one is no better. A draw is a function of the seed, and a smaller number of images is a part
    of the next larger one. A class with fewer images gives all it has; the curve ends well before the number that half
    of the classes do not have.
    """
    labels = train.labels.cpu().numpy()
    sizes = np.bincount(labels, minlength=classes)
    limit = float(np.median(sizes[sizes > 0])) / 1.5  # a point next to the last one would say nothing new
    steps = [count for count in PER_CLASS if count <= limit]
    ranks = [rank_in_class(labels, permutation(seed, "few-shot", draw, len(labels))) for draw in range(DRAWS)]
    points: list[Point] = []
    place = 0  # among the penalties: the best one gets weaker as images are added
    for number, count in enumerate(steps, 1):
        rows = torch.from_numpy(np.stack([np.flatnonzero(rank < count) for rank in ranks])).to(train.labels.device)
        path = _Path(train.features[rows], train.labels[rows], held_out, classes)
        best: list[Trial] = []
        for candidate in range(max(place - 1, 0), len(PENALTIES)):
            trials, _ = path.next(PENALTIES[candidate])
            if not best or _correct(trials) > _correct(best):
                best, place = trials, candidate
            elif candidate > place:
                break
        images = int(np.minimum(sizes, count).sum())
        points.append(Point(count, images, PENALTIES[place], tuple(trial.accuracy for trial in best)))
        progress(number, len(steps))
    return points


def _correct(trials: Sequence[Trial]) -> int:
    return sum(trial.correct for trial in trials)


def rank_in_class(labels: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each image among those of its class, in this order: (N,) and (N,) -> (N,)."""
    sorted_ = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)
    rank[sorted_] = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[sorted_]]
    return rank
