"""How strange an image is to a model, by its features and logits: for "none of these classes".

A classifier has to choose one of its classes, however strange the image, and is often sure of it. Two things tell more
than its confidence: how much of the features, which the head reads, lies in directions in which the training images
hardly vary; and how small all logits are. ViM adds them (Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit
Matching", section 4): the length of the first, scaled to a logit, less the logarithm of the sum of the exponentials of
the logits. Two changes: features are taken from their mean, so that any head will do, and the scale is that of images
which the model was not trained on, since few training images have almost no length in these directions.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import logsumexp

from vitft.checkpoints.checkpoint import find_model
from vitft.checkpoints.exported import exported_file
from vitft.errors import ModelError, UsageError
from vitft.io.paths import expanded

FILE = "novelty.safetensors"
FEWEST = 50  # images of validation that others are compared with

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Novelty:
    """What the strangeness of an image is computed from, and that of images which the model was not trained on."""

    origin: Array  # (F,): the mean of the features of training images
    directions: Array  # (F, R), orthonormal: in which they vary least
    scale: Array  # (1,): from a length to a logit
    known: Array  # (M,), sorted: the strangeness of validation images

    def strangeness(self, features: Array, logits: Array) -> Array:
        """The score of each image, (N, F) and (N, C) to (N,): high for strange ones."""
        return self._strangeness(features, reduced(logits)[1])

    def _strangeness(self, features: Array, energy: Array) -> Array:
        length = np.linalg.norm((_flat(features) - self.origin) @ self.directions, axis=1)
        found: Array = self.scale * length - energy
        return found

    def rank(self, strangeness: Array) -> NDArray[np.float64]:
        """The fraction of validation images that are less strange than each: (N,) to (N,)."""
        return np.searchsorted(self.known, strangeness, side="left") / len(self.known)

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        arrays = {"origin": self.origin, "directions": self.directions, "scale": self.scale, "known": self.known}
        save_file(arrays, folder / FILE)


def read_novelty(checkpoint: str | Path) -> Novelty:
    """What tells how strange an image is to a checkpoint.

    Raises UsageError if it has nothing to compare with, and ModelError if another version of vitft wrote that.
    """
    folder = find_model(expanded(checkpoint))
    if exported_file(folder) is not None:
        raise UsageError(
            f"{checkpoint}: is exported, so it does not give the features by which strange images are told; for "
            "none of these, use the run it came from."
        )
    if not (folder / FILE).is_file():
        raise UsageError(
            f"{checkpoint}: does not say what it knows, to tell what it does not; the best checkpoint of a run with "
            f"{FEWEST} validation images or more does, unless --reference-images 0."
        )
    try:
        return Novelty(**load_file(folder / FILE))
    except TypeError:
        raise ModelError(
            f"{folder / FILE}: was written by another version of vitft; use that, or train again for none of these."
        ) from None


def reduced(logits: Array) -> tuple[Array, Array]:
    """All that counts of logits, (N, C): the largest, and the logarithm of the sum of the exponentials, (N,) each."""
    energy: Array = logsumexp(logits, axis=1)
    return logits.max(axis=1), energy


def fit_novelty(features: Array, held_out: Array, largest: Array, energy: Array) -> Novelty:
    """Learn what is strange from the features of training images, (N, F), and from validation images.

    The latter's features are (M, F), and their logits, `reduced`, (M,) each. The directions are those beyond half of
    the dimensions, or beyond half as many as there are training images.
    """
    features, held_out = _flat(features), _flat(held_out)
    origin = features.mean(axis=0)
    centered = (features - origin).astype(np.float64)
    _, directions = np.linalg.eigh(centered.T @ centered)  # those of the least variance first
    least = directions[:, : features.shape[1] - min(features.shape[1], len(features)) // 2]
    plain = Novelty(origin, np.ascontiguousarray(least, np.float32), np.ones(1, np.float32), np.zeros(0, np.float32))
    lengths = np.linalg.norm((held_out - origin) @ plain.directions, axis=1)
    scale = max(largest.mean(), 0.0) / max(lengths.mean(), np.finfo(np.float32).tiny)
    fitted = replace(plain, scale=np.array([scale], np.float32))
    return replace(fitted, known=np.sort(fitted._strangeness(held_out, energy)))


def _flat(features: Array) -> Array:
    """(N, F), of what a convolutional network gives its head as (N, F, 1, 1)."""
    return features.reshape(len(features), -1)
