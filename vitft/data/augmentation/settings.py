"""Which augmentations a run uses."""

from dataclasses import dataclass
from typing import Self

from vitft.config.train import TrainConfig

SETTINGS = ("augment", "color_jitter", "erase", "mixup", "cutmix")
"""The settings of TrainConfig that say which."""


@dataclass(frozen=True)
class Augmentation:
    """The random changes of training images. Each is a function of (seed, epoch, sample index).

    `kind`: none, flip, crop (random resized crop and flip), trivial or rand (flip, and the operations of that policy).
    """

    kind: str = "none"
    seed: int = 0
    color_jitter: float = 0.0  # see policies
    erase: float = 0.0  # probability: see erasing
    mixup: float = 0.0  # parameters of a Beta distribution: see mixing
    cutmix: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """The augmentations of a run's settings."""
        return cls(
            kind=config.augment, seed=config.seed, color_jitter=config.color_jitter, erase=config.erase,
            mixup=config.mixup, cutmix=config.cutmix,
        )  # fmt: skip

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that a target is several classes."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def only_flips(self) -> bool:
        """Whether an image has at most two forms, itself and its mirror image."""
        return self.kind in ("none", "flip") and not (self.color_jitter or self.erase or self.mixes)

    @property
    def operates(self) -> bool:
        """Whether stored images go through operations of `policies` before they are resized."""
        return self.kind in ("trivial", "rand") or self.color_jitter > 0
