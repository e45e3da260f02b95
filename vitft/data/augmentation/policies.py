"""Which operations a sample goes through, and how strong: TrivialAugment, RandAugment, and color jitter."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augmentation.operations import apply
from vitft.data.augmentation.settings import Augmentation
from vitft.randomness import uniform

LEVELS = 30
NAMES = np.array([
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
])  # fmt: skip
JITTERED = ("brightness", "contrast", "color")


@dataclass(frozen=True)
class Policy:
    """A number of operations in a row, and how strong each is at the highest level."""

    operations: int
    level: int | None  # of 0 to 30; None: uniform
    shear: float
    translate: float  # fraction of the side
    rotate: float  # degrees
    enhance: float  # factors from 1 - enhance to 1 + enhance
    bits: int  # that posterize removes

    def draw(
        self, seed: int, epoch: int, index: NDArray[np.int64], number: int
    ) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
        """The names and strengths of the samples' first, second, ... operation: (B,), (B,)."""
        drawn = uniform(seed, "operation", epoch, index, number)
        names = NAMES[(drawn[:, 0] * len(NAMES)).astype(int)]
        level = np.floor(drawn[:, 1] * (LEVELS + 1)) if self.level is None else np.full(len(index), self.level)
        part = level / LEVELS
        either = part * np.where(drawn[:, 2] < 0.5, -1, 1)
        enhanced = 1 + self.enhance * either
        strengths = {
            "shear_x": self.shear * either, "shear_y": self.shear * either,
            "translate_x": self.translate * either, "translate_y": self.translate * either,
            "rotate": self.rotate * either,
            "brightness": enhanced, "color": enhanced, "contrast": enhanced, "sharpness": enhanced,
            "posterize": 8 - np.rint(self.bits * part), "solarize": 255 * (1 - part),
        }  # fmt: skip
        none = np.zeros(len(index))
        return names, np.select([names == name for name in strengths], [*strengths.values()], none)


POLICIES = {
    # Müller & Hutter 2021, "wide": table 6. Shifts of up to 32 pixels of 224, as torchvision makes them for ImageNet.
    "trivial": Policy(1, None, shear=0.99, translate=32 / 224, rotate=135, enhance=0.99, bits=6),
    # Cubuk et al. 2020, with two operations at level 9, torchvision's defaults; ranges of AutoAugment.
    "rand": Policy(2, 9, shear=0.3, translate=150 / 331, rotate=30, enhance=0.9, bits=4),
}


def operate(images: Tensor, how: Augmentation, fill: Tensor, epoch: int, index: NDArray[np.int64]) -> Tensor:
    """Apply to uint8 images (B, H, W, 3) the operations of the policy, if `how.kind` is one, and then color jitter.

    `fill`: see `operations.apply`. Color jitter multiplies brightness, contrast and color, in this order, by factors
    that are uniform between 1 - jitter and 1 + jitter.
    """
    if policy := POLICIES.get(how.kind):
        for number in range(policy.operations):
            images = apply(images, *policy.draw(how.seed, epoch, index, number), fill)
    if how.color_jitter:
        factors = 1 + how.color_jitter * (2 * uniform(how.seed, "jitter", epoch, index) - 1)
        for column, name in enumerate(JITTERED):
            images = apply(images, np.full(len(index), name), factors[:, column], fill)
    return images
