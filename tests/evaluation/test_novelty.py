"""Novelty: against the paper's formula written out, and on clusters whose strangers are known."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vitft.errors import ModelError
from vitft.evaluation.novelty import FILE, Novelty, fit_novelty, read_novelty, reduced

SIZE, CLASSES = 8, 3
HEAD = np.eye(CLASSES, SIZE, dtype=np.float32)


def clusters(count: int, seed: int, side: float = 0.0) -> np.ndarray:
    """Features around three centers in three dimensions, hardly varying in the other five; or moved there."""
    rng = np.random.default_rng(seed)
    spread = np.array([0.5] * CLASSES + [0.05] * (SIZE - CLASSES))
    features = 6 * np.eye(CLASSES, SIZE)[rng.integers(0, CLASSES, count)] + spread * rng.standard_normal((count, SIZE))
    features[:, CLASSES] += side
    return features.astype(np.float32)


def logits(features: np.ndarray) -> np.ndarray:
    return features @ HEAD.T


def fitted(training: int = 300) -> Novelty:
    held_out = clusters(400, 1)
    return fit_novelty(clusters(training, 0), held_out, *reduced(logits(held_out)))


def test_scores_are_those_of_the_paper() -> None:
    features, held_out, others = clusters(300, 0), clusters(400, 1), clusters(5, 2, side=1.0)
    values, vectors = np.linalg.eig(np.cov(features.T.astype(np.float64), bias=True))
    rest = vectors[:, np.argsort(-values)[SIZE // 2 :]]
    lengths = {name: np.linalg.norm((part - features.mean(axis=0)) @ rest, axis=1)
               for name, part in (("held out", held_out), ("others", others))}  # fmt: skip
    scale = logits(held_out).max(axis=1).mean() / lengths["held out"].mean()
    virtual = scale * lengths["others"]
    # The probability of the virtual class, which the score orders images by.
    expected = np.exp(virtual) / (np.exp(virtual) + np.exp(logits(others)).sum(axis=1))
    found = fit_novelty(features, held_out, *reduced(logits(held_out))).strangeness(others, logits(others))
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), expected, rtol=1e-3)


@pytest.mark.parametrize("training", [300, 20])
def test_novelty_is_the_fraction_of_held_out_images_that_are_less_strange(training: int) -> None:
    novelty = fitted(training)

    def ranks(features: np.ndarray, times: float = 1.0) -> np.ndarray:
        return novelty.rank(novelty.strangeness(features, times * logits(features)))

    known = ranks(clusters(2000, 2))
    for fraction in (0.5, 0.9, 0.95):
        assert (known > fraction).mean() == pytest.approx(1 - fraction, abs=0.05)
    assert (ranks(clusters(50, 3, side=2.0)) > 0.99).all()
    assert ranks(clusters(50, 3), times=0.5).mean() > 0.7 > 0.6 > ranks(clusters(50, 3)).mean()  # small logits


def test_a_file_has_the_same_bits(tmp_path: Path) -> None:
    novelty, strange = fitted(), clusters(30, 4, side=0.2)
    novelty.write(tmp_path)
    read = read_novelty(tmp_path)
    scores = [one.strangeness(strange, logits(strange)) for one in (read, novelty)]
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(read.rank(scores[0]), novelty.rank(scores[0]))


def test_a_file_of_another_version_is_one_line(tmp_path: Path) -> None:
    save_file({"mean": np.zeros(3, np.float32)}, tmp_path / FILE)
    with pytest.raises(ModelError, match=r"novelty.safetensors: was written by another version"):
        read_novelty(tmp_path)


def test_features_that_are_all_alike_are_no_error() -> None:
    same = np.ones((60, 3), np.float32)
    found = fit_novelty(same[:1], same, *reduced(same))
    assert np.isfinite(found.strangeness(2 * same, same)).all()
    assert (found.rank(found.strangeness(same, same)) == 0).all()
