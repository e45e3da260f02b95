"""Policies draw every operation at the strengths of their papers."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.data.augmentation.test_operations import FILL, pictures
from vitft.data.augmentation.operations import OPERATIONS, apply
from vitft.data.augmentation.policies import LEVELS, POLICIES, operate
from vitft.data.augmentation.settings import Augmentation

# As torchvision's TrivialAugmentWide and RandAugment list them (0.29, `_augmentation_space`): at level i of 30, the
# largest strength; of posterize, the bits that stay.
WIDE = {
    "shear_x": 0.99, "shear_y": 0.99, "translate_x": 32 / 224, "translate_y": 32 / 224, "rotate": 135.0,
    "brightness": 0.99, "color": 0.99, "contrast": 0.99, "sharpness": 0.99,
}  # fmt: skip
RAND_AT_9 = {
    "shear_x": 0.09, "shear_y": 0.09, "translate_x": 0.3 * 150 / 331, "translate_y": 0.3 * 150 / 331, "rotate": 9.0,
    "brightness": 0.27, "color": 0.27, "contrast": 0.27, "sharpness": 0.27,
}  # fmt: skip
FACTORS = {"brightness", "color", "contrast", "sharpness"}


def draw(kind: str, count: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return POLICIES[kind].draw(7, 3, np.arange(count), number)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_operation_is_drawn_equally_often(kind: str) -> None:
    names, _ = draw(kind, 14_000)
    counts = Counter(names.tolist())
    assert set(counts) == {"identity", *OPERATIONS}
    assert all(850 < count < 1150 for count in counts.values())  # 1000 ± 5 standard deviations


def test_trivial_augment_draws_every_level_with_either_sign() -> None:
    names, strengths = draw("trivial", 40_000)
    steps = np.arange(LEVELS + 1) / LEVELS
    for name, largest in WIDE.items():
        drawn = strengths[names == name] - (name in FACTORS)
        expected = {round(sign * largest * step, 9) + 0.0 for step in steps for sign in (-1, 1)}
        assert {round(value, 9) + 0.0 for value in drawn.tolist()} == expected, name
    assert (
        set(strengths[names == "posterize"]) == {8 - round(level / (30 / 6)) for level in range(31)} == {*range(2, 9)}
    )
    assert strengths[names == "solarize"].min() == 0
    assert np.unique(strengths[names == "solarize"]) == pytest.approx(np.linspace(0, 255, 31))


def test_rand_augment_is_at_level_9_twice() -> None:
    names, strengths = draw("rand", 4_000)
    for name, strength in RAND_AT_9.items():
        drawn = np.unique(np.round(strengths[names == name] - (name in FACTORS), 9))
        assert drawn == pytest.approx([-strength, strength]), name
    assert set(strengths[names == "posterize"]) == {7}  # 8 - round(9 / (30 / 4))
    assert set(strengths[names == "solarize"]) == {178.5}
    again, _ = draw("rand", 4_000, 1)
    assert 200 < (names == again).sum() < 400  # of 4,000, 1 in 14: the two are drawn apart
    images, index = pictures(40, 10, 10), np.arange(40)
    policy, how = POLICIES["rand"], Augmentation("rand", seed=7)
    expected = images
    for number in range(2):
        expected = apply(expected, *policy.draw(7, 3, index, number), FILL)
    assert torch.equal(operate(images, how, FILL, 3, index), expected)


def test_color_jitter_draws_factors_on_both_sides_of_one() -> None:
    gray = torch.full((2000, 1, 1, 3), 100, dtype=torch.uint8)  # contrast and color change nothing here
    jittered = operate(gray, Augmentation("none", color_jitter=0.4), FILL, 0, np.arange(2000)).float()
    assert 60 <= jittered.min() < 61
    assert 139 <= jittered.max() <= 140
    assert abs(jittered.mean() - 99.5) < 3  # truncated; five standard errors
    colored = torch.tensor([200, 50, 120], dtype=torch.uint8).expand(300, 4, 4, 3)
    changed = operate(colored, Augmentation("none", color_jitter=0.4), FILL, 0, np.arange(300)).float()
    spread = (changed.amax(3) - changed.amin(3))[:, 0, 0] / changed.mean(3)[:, 0, 0]
    assert spread.std() > 0.1  # the color is less or more vivid, whatever the brightness
