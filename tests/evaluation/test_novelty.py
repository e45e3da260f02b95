"""Novelty: against the paper's formula written out, and on clusters whose strangers are known."""

from pathlib import Path

import numpy as np
import pytest

from vitft.evaluation.novelty import Novelty, fit_novelty, read_novelty

SIZE = 6


def clusters(count: int, seed: int, centers: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Features around centers that are far apart, wide in the first dimension and narrow in the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, centers, count)
    spread = np.array([0.3, *[0.03] * (SIZE - 1)])
    return 2 * np.eye(SIZE)[labels + 1] + 1 + spread * rng.standard_normal((count, SIZE)), labels


def mahalanobis(z: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    shrunk = 0.99 * covariance + 0.01 * np.trace(covariance) / SIZE * np.eye(SIZE)
    return float((z - mean) @ np.linalg.solve(shrunk, z - mean))


def test_distances_are_those_of_the_paper() -> None:
    features, labels = clusters(200, 0)
    others, _ = clusters(5, 1)
    found = fit_novelty(features, labels, others).distances(3 * others)  # lengths do not count
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = [z[labels == label].mean(axis=0) for label in range(3)]
    within = sum(np.outer(one - means[label], one - means[label]) for one, label in zip(z, labels, strict=True)) / 200
    overall = np.cov(z.T, bias=True)
    for one, distance in zip(others, found, strict=True):
        unit = one / np.linalg.norm(one)
        nearest = min(mahalanobis(unit, mean, within) for mean in means)
        assert distance == pytest.approx(nearest - mahalanobis(unit, z.mean(axis=0), overall), rel=1e-6)


def test_novelty_is_the_fraction_of_held_out_images_that_are_less_strange() -> None:
    features, labels = clusters(500, 0)
    held_out, _ = clusters(400, 1)
    novelty = fit_novelty(features, labels, held_out)
    fresh = novelty.novelty(clusters(2000, 2)[0])
    for fraction in (0.5, 0.9, 0.95):
        assert (fresh > fraction).mean() == pytest.approx(1 - fraction, abs=0.05)
    strangers = clusters(50, 3, centers=5)
    unknown = novelty.novelty(strangers[0][strangers[1] >= 3])
    assert (unknown == 1).all()
    wide = features[:1] + np.array([0.3, *[0.0] * (SIZE - 1)])  # as far, but in the direction in which images vary
    narrow = features[:1] + np.array([0.0] * (SIZE - 1) + [0.3])
    assert novelty.distances(narrow) > novelty.distances(wide) + 10


def test_a_file_has_the_same_bits(tmp_path: Path) -> None:
    features, labels = clusters(100, 0)
    novelty = fit_novelty(features, labels, clusters(60, 1)[0])
    novelty.write(tmp_path)
    read = read_novelty(tmp_path)
    assert isinstance(read, Novelty)
    strange = clusters(30, 4, centers=5)[0]
    np.testing.assert_array_equal(read.distances(strange), novelty.distances(strange))
    np.testing.assert_array_equal(read.novelty(strange), novelty.novelty(strange))


def test_few_images_and_constant_features_are_no_error() -> None:
    """Fewer images than features, a class of one image, and a feature that never changes."""
    features, labels = clusters(5, 0)
    features[:, -1] = 0
    features[:, 0] = np.abs(features[:, 0])
    found = fit_novelty(features, labels, features).novelty(np.zeros((1, SIZE)))
    assert np.isfinite(found).all()
    assert np.isfinite(fit_novelty(np.ones((4, 3)), np.zeros(4, np.int64), np.ones((2, 3))).distances(np.ones((1, 3))))
