"""Classifiers on features, against scikit-learn."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from vitft.probing import classifiers
from vitft.probing.classifiers import (
    NEIGHBORS,
    PENALTIES,
    Examples,
    best_of,
    few_shot,
    logistic_trials,
    neighbor_trials,
    rank_in_class,
)
from vitft.randomness import permutation

CLASSES = 4


def examples(count: int, seed: int, spread: float = 0.8) -> Examples:
    """Overlapping clusters of features, in float64, one class in two of every five."""
    centers = np.random.default_rng(0).normal(size=(CLASSES, 6))
    drawn = np.random.default_rng(seed)
    labels = drawn.choice(CLASSES, count, p=[0.4, 0.2, 0.2, 0.2])
    features = 3 + centers[labels] + spread * drawn.normal(size=(count, 6))
    return Examples(torch.from_numpy(features), torch.from_numpy(labels))


def part(whole: Examples, rows: Any) -> Examples:
    return Examples(whole.features[rows], whole.labels[rows])


TRAIN, HELD_OUT = examples(200, 1), examples(200, 2)


@pytest.fixture(autouse=True)
def _two_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "DRAWS", 2)


def theirs(train: Examples, held_out: Examples, penalty: float) -> Any:
    """Scikit-learn's logits, by the same standardization and penalty."""
    mean = train.features.mean(dim=0)
    scale = (train.features - mean).square().mean().sqrt()
    one, other = (
        np.pad(((some.features - mean) / scale).numpy(), ((0, 0), (0, 1)), constant_values=1.0)
        for some in (train, held_out)
    )
    model = LogisticRegression(C=1 / (len(train) * penalty), fit_intercept=False, tol=1e-8, max_iter=2000)
    return model.fit(one, train.labels.numpy()).decision_function(other)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    trials, logits = logistic_trials(TRAIN, HELD_OUT, CLASSES)
    for trial in trials:
        right = (theirs(TRAIN, HELD_OUT, trial.setting).argmax(axis=1) == HELD_OUT.labels.numpy()).sum()
        assert abs(trial.correct - right) <= 1  # an image on the border
    best = best_of(trials)
    assert int((logits.argmax(dim=1) == HELD_OUT.labels).sum()) == best.correct
    assert best.correct == max(trial.correct for trial in trials) > min(trial.correct for trial in trials)
    reference = torch.from_numpy(theirs(TRAIN, HELD_OUT, best.setting))
    assert torch.allclose(logits, reference, atol=0.02 * float(reference.abs().max()))
    assert best.loss == pytest.approx(torch.nn.functional.cross_entropy(reference, HELD_OUT.labels).item(), rel=0.01)


def test_of_equally_good_penalties_the_strongest_is_best() -> None:
    apart = examples(60, 1, spread=0.01)
    trials, _ = logistic_trials(apart, apart, CLASSES)
    assert [trial.accuracy for trial in trials][-1] == 1
    assert best_of(trials) is next(trial for trial in trials if trial.accuracy == 1)


def test_weaker_penalties_are_left_out_once_the_loss_has_risen_twice() -> None:
    shuffled = Examples(TRAIN.features[:40], TRAIN.labels[:40].roll(7))
    trials, _ = logistic_trials(shuffled, HELD_OUT, CLASSES)
    losses = [trial.loss or 0.0 for trial in trials]
    assert len(trials) < len(PENALTIES)
    assert losses[-3] < losses[-2] < losses[-1]


def test_an_image_of_a_class_without_training_images_is_wrong_and_not_in_the_loss() -> None:
    more = Examples(torch.cat([HELD_OUT.features, HELD_OUT.features[:10]]),
                    torch.cat([HELD_OUT.labels, torch.full((10,), CLASSES)]))  # fmt: skip
    (alone, _), (trials, _) = (logistic_trials(TRAIN, some, CLASSES) for some in (HELD_OUT, more))
    assert [(trial.correct, trial.count - 10) for trial in trials] == [(one.correct, one.count) for one in alone]
    assert [trial.loss for trial in trials] == pytest.approx([trial.loss for trial in alone])


def test_neighbors_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.probing.classifiers._CHUNK", 64)
    trials = neighbor_trials(TRAIN, HELD_OUT, CLASSES)
    assert tuple(trial.setting for trial in trials) == NEIGHBORS
    for trial in trials:
        model = KNeighborsClassifier(
            int(trial.setting), metric="cosine", algorithm="brute", weights=lambda apart: np.exp((1 - apart) / 0.07)
        )
        model.fit(TRAIN.features.numpy(), TRAIN.labels.numpy())
        assert trial.accuracy == model.score(HELD_OUT.features.numpy(), HELD_OUT.labels.numpy())
        assert trial.interval[0] < trial.accuracy < trial.interval[1]
    assert len({trial.correct for trial in trials}) > 2
    few = neighbor_trials(part(TRAIN, np.arange(7)), HELD_OUT, CLASSES)
    assert [trial.setting for trial in few] == [1, 5, 7]


def test_a_point_of_the_curve_is_the_mean_over_draws() -> None:
    points = few_shot(TRAIN, HELD_OUT, CLASSES, seed=3)
    labels = TRAIN.labels.numpy()
    assert [point.per_class for point in points] == [1, 2, 5, 10, 20]  # the classes have about 40
    assert points[0].mean < points[-1].mean
    for point in points[::2]:
        accuracies = []
        for draw in range(2):
            order = permutation(3, "few-shot", draw, len(labels))
            taken = np.concatenate([order[labels[order] == label][: point.per_class] for label in range(CLASSES)])
            logits = theirs(part(TRAIN, taken), HELD_OUT, point.penalty)
            accuracies.append((logits.argmax(axis=1) == HELD_OUT.labels.numpy()).mean())
        assert point.accuracies == pytest.approx(accuracies, abs=1.5 / len(HELD_OUT))
        assert point.mean == pytest.approx(np.mean(point.accuracies))
        assert point.spread == pytest.approx(np.std(point.accuracies, ddof=1))
        assert point.images == CLASSES * point.per_class


def test_a_curve_is_a_function_of_the_seed_and_small_classes_give_all_they_have() -> None:
    some = part(TRAIN, np.arange(60))
    rare = Examples(some.features, some.labels.where(torch.arange(60) < 57, 4))  # three images of a fifth class
    points = few_shot(rare, HELD_OUT, 5, seed=0)
    assert [(point.per_class, point.images) for point in points] == [(1, 5), (2, 10), (5, 23)]
    assert few_shot(rare, HELD_OUT, 5, seed=0) == points
    assert few_shot(rare, HELD_OUT, 5, seed=1) != points
    one_each = part(TRAIN, np.unique(TRAIN.labels.numpy(), return_index=True)[1])
    assert few_shot(one_each, HELD_OUT, CLASSES, seed=0) == []


def test_fewer_images_are_a_part_of_more() -> None:
    labels, order = np.array([2, 0, 2, 2, 0, 1]), np.array([3, 5, 0, 4, 2, 1])
    assert rank_in_class(labels, order).tolist() == [1, 1, 2, 0, 0, 0]
