"""Wrong labels: the noise model against labels drawn from it."""

import numpy as np
import pytest

from vitft.evaluation.label_noise import label_noise, noise_of
from vitft.evaluation.split_predictions import Predictions


def drawn(rate: float, count: int = 6000, classes: int = 6, sharper: float = 1.0) -> tuple[np.ndarray, ...]:
    """Logits, labels of which a fraction was replaced, and which those are; `sharper` multiplies honest logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (count, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (probabilities.cumsum(1) > rng.random((count, 1))).argmax(1)
    wrong = rng.random(count) < rate
    labels = np.where(wrong, (truth + rng.integers(1, classes, count)) % classes, truth)
    return sharper * logits, labels, wrong


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("sharper", [0.5, 1.0, 3.0])
def test_the_fraction_of_wrong_labels_is_estimated_however_sure_the_model_is(rate: float, sharper: float) -> None:
    logits, labels, _ = drawn(rate, sharper=sharper)
    assert label_noise(logits, labels).rate == pytest.approx(rate, abs=0.015)


def test_a_label_is_wrong_as_often_as_its_probability_says() -> None:
    logits, labels, wrong = drawn(0.1, count=40_000)
    probability = label_noise(logits, labels).wrong
    for low, high in ((0.05, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        within = (probability >= low) & (probability < high)
        assert within.sum() > 100
        assert wrong[within].mean() == pytest.approx(probability[within].mean(), abs=0.06)


def test_labels_that_fit_are_not_doubted() -> None:
    logits, labels, _ = drawn(0.0)
    assert len(label_noise(logits, labels).places()) <= 3


@pytest.mark.parametrize("count", [60, 1000])
def test_a_model_that_knows_nothing_doubts_nothing(count: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = label_noise(rng.normal(0, 1, (count, 10)), rng.integers(0, 10, count))
        assert (found.rate, found.places()) == (0.0, [])


def test_what_is_likely_instead_and_what_comes_first() -> None:
    logits, labels, wrong = drawn(0.1)
    found = label_noise(logits, labels)
    places = found.places()
    assert all(found.likely[place] != labels[place] for place in range(len(labels)))
    sure = [place for place in places if wrong[place] and found.wrong[place] > 0.99]
    assert len(sure) > 50
    assert [found.likely[place] for place in sure] == [logits[place].argmax() for place in sure]
    assert [found.wrong[place] for place in places] == sorted(found.wrong[found.wrong >= 0.3], reverse=True)
    assert found.places(0.9) == [place for place in places if found.wrong[place] >= 0.9]


def said(logits: np.ndarray, labels: np.ndarray, others: tuple[str, ...] = ()) -> Predictions:
    count, classes = logits.shape
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    ids = tuple(f"{number}.png" for number in range(count))
    known = tuple(map(str, range(classes)))
    return Predictions("test", "0" * 16, "test", known, others, ids, np.arange(count), labels, probabilities)


def test_predictions_that_were_kept_are_enough_and_unknown_classes_are_not_doubted() -> None:
    logits, labels, _ = drawn(0.1)
    expected = label_noise(logits, labels)
    found = noise_of(said(logits, labels))
    assert found.wrong == pytest.approx(expected.wrong, abs=1e-3)
    more = np.append(labels, [6, 6])
    with_others = noise_of(said(np.vstack([logits, np.full((2, 6), [9.0, 0, 0, 0, 0, 0])]), more, ("unknown",)))
    assert with_others.wrong[:-2] == pytest.approx(found.wrong)
    assert with_others.wrong[-2:].tolist() == [0, 0]
    assert noise_of(said(logits[:19], labels[:19])) is None
    assert noise_of(said(logits[:, :1], np.zeros(len(labels), np.int64))) is None
