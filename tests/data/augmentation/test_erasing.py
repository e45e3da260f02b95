"""Random erasing draws the boxes of its paper, and fills them with the mean color."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, uniform

from vitft.data.augmentation import boxes
from vitft.data.augmentation.erasing import draw_erased, erase

SOME = np.arange(6000)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_so_many_are_erased(probability: float) -> None:
    places, found = draw_erased(probability, 200, 200, 3, 1, SOME)
    # A box longer than the image is drawn again, ten times at most, which almost always finds one.
    assert abs(len(places) / len(SOME) - probability) < 4 * (0.25 / len(SOME)) ** 0.5
    assert len(places) == len(found) == len(set(places.tolist()))


def test_areas_ratios_and_places_are_uniform_as_in_the_paper() -> None:
    """Zhong et al. 2020, algorithm 1, by the accepted boxes of a plain loop over random numbers of another kind."""
    height, width = 300, 400
    _, found = draw_erased(1.0, height, width, 3, 1, SOME)
    top, left, tall, wide = found.T
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    rng, areas, ratios = np.random.default_rng(0), [], []
    while len(areas) < 6000:
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        if np.sqrt(area / ratio) <= height and np.sqrt(area * ratio) <= width:
            areas.append(area / (height * width))
            ratios.append(np.log(ratio))
    assert kstest(tall * wide / (height * width), areas).pvalue > 1e-4
    assert kstest(np.log(wide / tall), ratios).pvalue > 1e-4
    # Whole places among those that are possible, spread evenly over their range.
    part = (top + np.random.default_rng(1).random(len(top))) / (height - tall + 1)
    assert kstest(part, uniform.cdf).pvalue > 1e-4


@pytest.mark.parametrize("launches", [False, True], ids=["one by one", "at once"])
def test_a_box_becomes_zero_and_the_rest_stays(launches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "many_launches_cost", lambda device: launches)
    index = np.arange(100, 140)
    pixels = torch.full((40, 3, 32, 24), 7.0)
    erase(pixels, 0.5, 3, 1, index)
    places, found = draw_erased(0.5, 32, 24, 3, 1, index)
    expected = np.full((40, 3, 32, 24), 7.0)
    for place, (top, left, height, width) in zip(places, found, strict=True):
        expected[place, :, top : top + height, left : left + width] = 0
    assert np.array_equal(pixels.numpy(), expected)
    assert 10 < len(places) < 30


def test_what_is_erased_depends_on_seed_epoch_and_sample_alone() -> None:
    def erased(samples: list[int], seed: int = 3, epoch: int = 1) -> torch.Tensor:
        pixels = torch.ones(len(samples), 3, 16, 16)
        erase(pixels, 0.7, seed, epoch, np.array(samples))
        return pixels

    whole = erased([*range(12)])
    assert not whole.all()
    assert torch.equal(erased([11, 0, 5]), whole[[11, 0, 5]])
    for other in ((4, 1), (3, 2)):
        assert not torch.equal(erased([*range(12)], *other), whole)


@pytest.mark.parametrize(("probability", "shape"), [(0.0, (8, 8)), (1.0, (1, 900))])
def test_an_image_in_which_no_box_fits_stays(probability: float, shape: tuple[int, int]) -> None:
    """A box is at most 3.3 times as wide as high, and has at least 2 % of the pixels: here 18."""
    pixels = torch.ones(50, 1, *shape)
    erase(pixels, probability, 0, 0, np.arange(50))
    assert (pixels == 1).all()
