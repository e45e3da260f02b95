"""Labels that may be wrong, by what a model that has not seen the images says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from vitft.evaluation.split_predictions import Predictions

FEWEST = 20  # images: of fewer, neither of the two numbers that are fitted can be told
DOUBTED_FROM = 0.3
"""By default, labels are listed from this probability of being wrong on."""
_LOG_TEMPERATURES = np.linspace(-4, 4, 17)
_LOGIT_RATES = (-16.0, 4.0)  # of 1e-7 to 98 %
_SIGNIFICANT = 5.41  # of 1 %: e is at the edge of its range, so the statistic is half 0 and half chi-squared


@dataclass(frozen=True)
class LabelNoise:
    """The estimated fraction of wrong labels, and for each image the probability that its label is, (N,).

    `likely` is the most probable class of each image apart from its label, (N,).
    """

    rate: float
    wrong: NDArray[np.float64]
    likely: NDArray[np.int64]

    def places(self, from_probability: float = DOUBTED_FROM) -> list[int]:
        """The images whose label is wrong with at least this probability, the most probable first."""
        order: list[int] = np.argsort(-self.wrong, kind="stable").tolist()
        return [place for place in order if self.wrong[place] >= from_probability]


def label_noise(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> LabelNoise:
    """Estimate which labels are wrong: from logits or log-probabilities (N, C) and labels (N,), C at least 2.

    The model: with probability e a label was replaced by one of the C - 1 others, whichever (random classification
    noise, Angluin and Laird 1988), so label y has the probability (1 - e) p + e (1 - p) / (C - 1), where p is that of
    class y under softmax(logits / T). The likelihood of all labels is maximized over e and T: T makes the
    probabilities honest, without which doubt would only measure how sure a classifier is of itself. A label is then
    wrong with probability e (1 - p) / (C - 1), divided by that of the label. Where e > 0 explains the labels no better
    than e = 0 (likelihood ratio test at 1 %), no label is doubted: a model that knows nothing would doubt them all.
    """
    count, classes = logits.shape
    below = logits - logits.max(axis=1, keepdims=True)  # the best class has 0
    of_label = below[np.arange(count), labels]

    @lru_cache(len(_LOG_TEMPERATURES))
    def of_labels(log_t: float) -> NDArray[np.float64]:
        """The probability of each label at a temperature: (N,)."""
        colder = np.exp(-log_t).astype(below.dtype)
        p: NDArray[np.float64] = np.exp(of_label * colder).astype(float) / np.exp(below * colder).sum(axis=1)
        return p

    def parts(p: NDArray[np.float64], rate: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return (1 - rate) * p, rate * (1 - p) / (classes - 1)

    def loss(p: NDArray[np.float64], rate: float) -> float:
        right, wrong = parts(p, rate)
        return -float(np.log(np.maximum(right + wrong, 1e-300)).mean())

    def best_rate(log_t: float) -> tuple[float, float]:
        """The lowest loss at a temperature, and where: the loss is convex in e, so there is one such place."""
        p = of_labels(log_t)
        found = minimize_scalar(lambda x: loss(p, expit(x)), bounds=_LOGIT_RATES, method="bounded")
        return float(found.fun), float(expit(found.x))

    # All temperatures first: probabilities that are far off look like no noise at all, from where no way leads back.
    with_errors = _lowest(lambda log_t: best_rate(log_t)[0])
    without = _lowest(lambda log_t: loss(of_labels(log_t), 0.0))
    rate, p = best_rate(with_errors.x)[1], of_labels(with_errors.x)
    if 2 * count * (without.fun - with_errors.fun) < _SIGNIFICANT:
        rate = 0.0
    right, wrong = parts(p, rate)
    return LabelNoise(rate, wrong / np.maximum(right + wrong, 1e-300), _best_other(logits, labels))


def noise_of(said: Predictions) -> LabelNoise | None:
    """The same of the images of a split; None if there are too few, or one class.

    Images of classes that the model does not have are not doubted.
    """
    known = np.flatnonzero(said.truth < len(said.labels))
    if len(said.labels) < 2 or len(known) < FEWEST:
        return None
    logits = np.log(np.maximum(said.probabilities[known], np.finfo(np.float32).tiny))
    found = label_noise(logits, said.truth[known])
    wrong, likely = np.zeros(len(said.truth)), said.predicted.copy()
    wrong[known], likely[known] = found.wrong, found.likely
    return LabelNoise(found.rate, wrong, likely)


def _lowest(loss: Callable[[float], float]) -> Any:
    """Where a loss of the logarithm of a temperature is lowest, as scipy gives it."""
    start, step = min(_LOG_TEMPERATURES, key=loss), _LOG_TEMPERATURES[1] - _LOG_TEMPERATURES[0]
    return minimize_scalar(loss, bounds=(start - step, start + step), method="bounded")


def _best_other(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    others = logits.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    best: NDArray[np.int64] = others.argmax(axis=1)
    return best
