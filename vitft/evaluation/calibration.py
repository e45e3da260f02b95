"""Whether probabilities can be trusted, and the one number that makes them more honest: temperature scaling."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from vitft.evaluation.split_predictions import Predictions

BINS = 15
FEWEST = 50  # images that a temperature is fitted to
_SMALLEST = 1e-30  # in place of 0, before a logarithm
_RANGE = 0.05, 20.0  # of temperatures


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is similar: their number, mean confidence, and the fraction that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy.

    `error` is the expected calibration error: the mean difference between confidence and accuracy over bins with the
    same number of images (Nguyen and O'Connor 2015). `brier` is the mean squared error of all probabilities, 0 to 2
    (Brier 1950).
    """

    error: float
    brier: float
    bins: tuple[Bin, ...]


def calibration(predictions: Predictions, bins: int = BINS) -> Calibration:
    """Measure the calibration on the images whose class the model has. NaN if there is none."""
    known = predictions.truth < len(predictions.labels)
    probabilities, truth = predictions.probabilities[known].astype(np.float64), predictions.truth[known]
    if not len(truth):
        return Calibration(np.nan, np.nan, ())
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    found = tuple(Bin(len(part), float(confidence[part].mean()), float(right[part].mean())) for part in parts)
    error = sum(one.count * abs(one.confidence - one.accuracy) for one in found) / len(truth)
    of_truth = probabilities[np.arange(len(truth)), truth]
    brier = float(np.mean((probabilities**2).sum(axis=1) - 2 * of_truth + 1))
    return Calibration(error, brier, found)


def fit_temperature(predictions: Predictions) -> float | None:
    """The temperature T that minimizes the cross-entropy of softmax(logits / T) (Guo et al. 2017, section 4.2).

    Fit it on images that the model was not trained on. Above 1, the model was too sure of itself. It changes no
    decision. None for fewer than `FEWEST` images, and if all are right or all wrong: then there is no minimum.
    """
    known = predictions.truth < len(predictions.labels)
    truth = predictions.truth[known]
    right = predictions.predicted[known] == truth
    if len(right) < FEWEST or right.all() or not right.any():
        return None
    logits = _logits(predictions.probabilities[known])

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]))

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def at_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The predictions with probabilities softmax(logits / temperature)."""
    scaled = np.exp(log_softmax(_logits(predictions.probabilities) / temperature, axis=1))
    return replace(predictions, probabilities=scaled.astype(np.float32))


def _logits(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits up to a constant for each image, which softmax does not see: the logarithms of its probabilities."""
    logits: NDArray[np.float64] = np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST))
    return logits


@dataclass(frozen=True)
class Coverage:
    """What one gets by deciding only above a confidence: the fraction of images decided, and how many are right."""

    confidence: float
    coverage: float
    accuracy: float


def coverage_curve(predictions: Predictions, points: int = 100) -> list[Coverage]:
    """Coverage and accuracy for thresholds at evenly spaced fractions of the images, from few images to all."""
    order = np.argsort(-predictions.confidence, kind="stable")
    right = np.cumsum(predictions.predicted[order] == predictions.truth[order])
    counts = np.unique(np.linspace(1, len(order), min(points, len(order))).round().astype(int))
    return [
        Coverage(float(predictions.confidence[order[n - 1]]), n / len(order), float(right[n - 1] / n)) for n in counts
    ]


def threshold_for(predictions: Predictions, precision: float) -> Coverage | None:
    """The lowest confidence from which on at least the fraction `precision` of the decisions is right; None if none is.

    It decides as many of these images as that allows. On other images, precision and coverage are about the same, as
    far as the number of images tells.
    """
    return precise(thresholds(predictions), precision)


def precise(known: list[Coverage], precision: float) -> Coverage | None:
    """The first of `thresholds` that is right often enough."""
    return next((one for one in known if one.accuracy >= precision), None)


def thresholds(predictions: Predictions) -> list[Coverage]:
    """What `threshold_for` finds for any precision, from the lowest on: each decides less, and is right more often."""
    order = np.argsort(-predictions.confidence, kind="stable")
    confidence = predictions.confidence[order]
    fractions = np.cumsum(predictions.predicted[order] == predictions.truth[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.append(confidence[:-1] != confidence[1:], True)
    places = np.flatnonzero(last_of_equals)[::-1]  # those that decide most first
    best = np.maximum.accumulate(fractions[places])
    better = places[np.append(True, best[1:] > best[:-1])]
    return [Coverage(float(confidence[n]), float((n + 1) / len(order)), float(fractions[n])) for n in better]


def describe(predictions: Predictions, temperature: float | None) -> dict[str, float]:
    """The calibration as JSON values, also at a temperature that was fitted on other images."""
    before = calibration(predictions)
    said = {"error": before.error, "brier": before.brier}
    if temperature is not None:
        after = calibration(at_temperature(predictions, temperature))
        said |= {"temperature": temperature, "error_at_temperature": after.error, "brier_at_temperature": after.brier}
    return said
