"""Calibration: against definitions written out, known distributions, and PyTorch's optimizer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitft.evaluation.calibration import (
    at_temperature,
    calibration,
    coverage_curve,
    describe,
    fit_temperature,
    threshold_for,
)
from vitft.evaluation.split_predictions import Predictions

CLASSES = 5


def predictions(logits: np.ndarray, truth: np.ndarray) -> Predictions:
    probabilities = torch.from_numpy(logits).softmax(1).float().numpy()
    labels = tuple(map(str, range(logits.shape[1])))
    ids = tuple(map(str, range(len(truth))))
    return Predictions("test", "hash", "test", labels, ("other",), ids, np.arange(len(truth)), truth, probabilities)


def drawn(count: int, sharper: float = 1.0, seed: int = 0) -> Predictions:
    """Images whose class is drawn from the model's own probabilities; the logits are then `sharper` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, CLASSES))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (probabilities.cumsum(1) > rng.random((count, 1))).argmax(1)
    return predictions(sharper * logits, truth)


def test_the_error_is_the_mean_gap_over_bins_of_equally_many_images() -> None:
    found = drawn(30)
    pairs = sorted(zip(found.confidence.tolist(), (found.predicted == found.truth).tolist(), strict=True))
    expected = 0.0
    for start in range(0, 30, 10):
        part = pairs[start : start + 10]
        expected += abs(sum(c for c, _ in part) / 10 - sum(r for _, r in part) / 10) / 3
    assert calibration(found, bins=3).error == pytest.approx(expected)
    assert [one.count for one in calibration(found, bins=3).bins] == [10, 10, 10]


def test_the_brier_score_is_the_mean_squared_error_of_all_probabilities() -> None:
    found = drawn(50)
    hot = np.eye(CLASSES)[found.truth]
    assert calibration(found).brier == pytest.approx(((found.probabilities - hot) ** 2).sum(1).mean(), rel=1e-6)
    sure = predictions(100 * np.eye(CLASSES), np.arange(CLASSES))
    wrong = predictions(100 * np.eye(CLASSES), (np.arange(CLASSES) + 1) % CLASSES)
    assert (calibration(sure).brier, calibration(wrong).brier) == pytest.approx((0, 2))


def test_a_model_that_says_its_own_probabilities_is_calibrated_and_a_sharper_one_is_not() -> None:
    assert calibration(drawn(50_000)).error < 0.01
    assert calibration(drawn(50_000, sharper=3)).error > 0.1


@pytest.mark.parametrize("sharper", [0.4, 1.0, 2.5])
def test_the_temperature_undoes_what_made_the_logits_too_large(sharper: float) -> None:
    too_sure = drawn(20_000, sharper)
    temperature = fit_temperature(too_sure)
    assert temperature == pytest.approx(sharper, rel=0.05)
    after = at_temperature(too_sure, temperature)
    np.testing.assert_array_equal(after.predicted, too_sure.predicted)
    assert calibration(after).error < 0.015
    np.testing.assert_allclose(after.probabilities.sum(1), 1, atol=1e-5)


def test_the_temperature_is_where_lbfgs_finds_the_lowest_loss() -> None:
    found = drawn(500, sharper=2)
    logits, truth = torch.from_numpy(np.log(found.probabilities)).double(), torch.from_numpy(found.truth)
    scale = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / scale.exp(), truth)
        value.backward()
        return value

    optimizer.step(loss)
    assert fit_temperature(found) == pytest.approx(float(scale.detach().exp()), rel=1e-3)


def test_without_right_and_wrong_images_there_is_no_temperature() -> None:
    truth = np.arange(60) % CLASSES
    logits = 3 * np.eye(CLASSES)[truth]
    assert fit_temperature(predictions(logits, truth)) is None
    assert fit_temperature(predictions(logits, (truth + 1) % CLASSES)) is None
    assert fit_temperature(predictions(logits, np.full(60, CLASSES))) is None, "no class of the model"
    assert fit_temperature(drawn(49)) is None, "too few"
    assert fit_temperature(drawn(50)) is not None


def test_images_of_other_classes_are_left_out_of_calibration() -> None:
    found = drawn(100)
    more = predictions(np.log(np.concatenate([found.probabilities, found.probabilities[:20]])),
                       np.concatenate([found.truth, np.full(20, CLASSES)]))  # fmt: skip
    assert calibration(more).error == pytest.approx(calibration(found).error, abs=1e-6)
    assert fit_temperature(more) == pytest.approx(fit_temperature(found), rel=1e-4)


def test_coverage_counts_the_surest_images_first() -> None:
    found = drawn(1000)
    curve = coverage_curve(found)
    assert (curve[-1].coverage, curve[-1].accuracy) == (1.0, pytest.approx((found.predicted == found.truth).mean()))
    for one in curve[::20]:
        decided = found.confidence >= one.confidence
        assert decided.mean() == pytest.approx(one.coverage, abs=2e-3)
        assert (found.predicted == found.truth)[decided].mean() == pytest.approx(one.accuracy, abs=2e-2)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.97])
def test_the_threshold_decides_as_many_as_the_precision_allows(precision: float) -> None:
    found = drawn(3000)
    threshold = threshold_for(found, precision)
    right, decided = found.predicted == found.truth, found.confidence >= threshold.confidence
    assert right[decided].mean() == pytest.approx(threshold.accuracy)
    assert threshold.accuracy >= precision
    assert decided.mean() == pytest.approx(threshold.coverage)
    for lower in np.unique(found.confidence[~decided]):
        assert right[found.confidence >= lower].mean() < precision


def test_the_threshold_holds_on_other_images() -> None:
    threshold = threshold_for(drawn(20_000, seed=1), 0.9)
    other = drawn(20_000, seed=2)
    decided = other.confidence >= threshold.confidence
    assert (other.predicted == other.truth)[decided].mean() == pytest.approx(0.9, abs=0.015)
    assert decided.mean() == pytest.approx(threshold.coverage, abs=0.02)


def test_equal_confidences_are_decided_together_or_not_at_all() -> None:
    logits = np.log(np.tile([[0.6, 0.1, 0.1, 0.1, 0.1]], (4, 1)))
    found = predictions(logits, np.array([0, 0, 0, 1]))
    assert threshold_for(found, 0.75).coverage == 1
    assert threshold_for(found, 0.8) is None


def test_it_is_described_before_and_at_the_temperature() -> None:
    found = drawn(5000, sharper=2)
    said = describe(found, 2.0)
    assert said["error_at_temperature"] < said["error"] / 2
    assert said["brier_at_temperature"] < said["brier"]
    assert describe(found, None).keys() == {"error", "brier"}
