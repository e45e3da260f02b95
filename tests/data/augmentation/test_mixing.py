"""Mixup and CutMix follow their papers, and targets follow the pixels."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from vitft.config.train import TrainConfig
from vitft.data.augmentation import boxes
from vitft.data.augmentation.mixing import Mixes, draw_mixes, mix, mix_labels
from vitft.data.augmentation.settings import Augmentation
from vitft.training.loss import summed_loss

SOME = np.arange(4000)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_from_a_beta_distribution(alpha: float) -> None:
    mixes = draw_mixes(Augmentation(mixup=alpha), 16, 16, 2, SOME)
    assert not mixes.cut.any()
    assert kstest(mixes.share, beta(alpha, alpha).cdf).pvalue > 1e-4


def test_boxes_are_those_of_the_paper() -> None:
    """Yun et al. 2019, algorithm A1, with the numbers that were drawn, in plain Python."""
    height, width = 20, 30
    mixes = draw_mixes(Augmentation(cutmix=1.0), height, width, 2, SOME)
    assert mixes.cut.all()
    top, left, bottom, right = mixes.boxes.T
    area = (bottom - top) * (right - left) / (height * width)
    assert mixes.share == pytest.approx(1 - area)
    assert (mixes.boxes >= 0).all()
    assert (bottom <= height).all()
    assert (right <= width).all()
    # Without the cut at the border, the sides are even numbers, in the image's proportion.
    whole = (top > 0) & (left > 0) & (bottom < height) & (right < width) & (area > 0)
    assert whole.sum() > 400
    tall, wide = (bottom - top)[whole], (right - left)[whole]
    assert not (tall % 2).any()
    assert not (wide % 2).any()
    assert np.abs(tall / height - wide / width).max() < 2 / height
    # λ is uniform for α = 1, so that half of the boxes have sides of less than sqrt(1/2); the border cuts some.
    low = draw_mixes(Augmentation(cutmix=1.0), 1000, 1000, 0, SOME)
    inside = 4 * (low.boxes[:, 2] - low.boxes[:, 0]) * (low.boxes[:, 3] - low.boxes[:, 1])
    reached = np.array([_expected_share(u) for u in np.random.default_rng(0).random((20_000, 3))])
    assert inside.size == 4000
    assert low.share.mean() == pytest.approx(reached.mean(), abs=0.02)
    assert np.quantile(low.share, 0.25) == pytest.approx(np.quantile(reached, 0.25), abs=0.03)


def _expected_share(drawn: np.ndarray) -> float:
    """The paper's share of the own image, for a unit square."""
    side = np.sqrt(1 - drawn[0])
    sides = [min(place + side / 2, 1) - max(place - side / 2, 0) for place in drawn[1:]]
    return float(1 - sides[0] * sides[1])


def test_with_both_each_has_half_of_the_images() -> None:
    mixes = draw_mixes(Augmentation(mixup=0.8, cutmix=1.0), 16, 16, 2, SOME)
    assert 1850 < mixes.cut.sum() < 2150
    assert kstest(mixes.share[~mixes.cut], beta(0.8, 0.8).cdf).pvalue > 1e-4


@pytest.mark.parametrize("launches", [False, True], ids=["one by one", "at once"])
def test_images_and_labels_are_mixed_in_the_same_shares(launches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "many_launches_cost", lambda device: launches)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(4, 3, 6, 8)).astype(np.float32)
    mixes = Mixes(np.array([0.3, 1 - 12 / 48, 1.0]), np.array([False, True, False]),
                  np.array([[0, 0, 6, 8], [1, 2, 4, 6], [0, 0, 0, 0]]))  # fmt: skip
    expected = np.empty((3, 3, 6, 8))
    expected[0] = 0.3 * pixels[0].astype(float) + 0.7 * pixels[1]
    expected[1] = pixels[1]
    expected[1][:, 1:4, 2:6] = pixels[2][:, 1:4, 2:6]
    expected[2] = pixels[2]
    given = torch.from_numpy(pixels.copy())
    for out in (None, torch.empty(3, 3, 6, 8)):
        assert mix(given, mixes, out).numpy() == pytest.approx(expected, abs=1e-6)
    labels, probabilities = mix_labels(torch.tensor([4, 0, 2, 2]), mixes, 5)
    assert labels.tolist() == [0, 0, 2]  # the larger share
    assert probabilities.numpy() == pytest.approx(
        np.array([[0.7, 0, 0, 0, 0.3], [0.75, 0, 0.25, 0, 0], [0, 0, 1, 0, 0]]), abs=1e-6
    )


def test_the_loss_of_mixed_labels_with_smoothing_is_the_cross_entropy_of_the_shares() -> None:
    """In float64: each share of the smoothed target times the negative logarithm of the softmax."""
    rng = np.random.default_rng(1)
    logits, share, smoothing = rng.normal(size=(2, 5)), np.array([0.3, 0.9]), 0.1
    mixes = Mixes(share, np.zeros(2, bool), np.zeros((2, 4), np.int64))
    _, probabilities = mix_labels(torch.tensor([4, 0, 2]), mixes, 5)
    target = np.array([[0.7, 0, 0, 0, 0.3], [0.9, 0, 0.1, 0, 0]]) * (1 - smoothing) + smoothing / 5
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    actual = summed_loss(torch.from_numpy(logits).float(), probabilities, TrainConfig(label_smoothing=smoothing))
    assert actual.item() == pytest.approx(-(target * logs).sum(), rel=1e-5)
