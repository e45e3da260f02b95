"""How far an image is from everything a model was trained on, by its features: for "none of these classes".

A classifier has to choose one of its classes, however strange the image, and is often sure of it. The features that its
head reads tell more: the relative Mahalanobis distance (Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for
Improving Near-OOD Detection", eq. 1 to 4) is how much farther they are from the nearest class than from the training
images as a whole.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vitft.checkpoints.checkpoint import find_model
from vitft.errors import UsageError
from vitft.io.paths import expanded

FILE = "novelty.safetensors"
FEWEST = 50  # images of validation that distances are compared with
_SHRINKAGE = 0.01  # of a covariance towards its mean variance, so that few images do not make it singular
_LEAST_VARIANCE = 1e-12  # of features of length 1 that are all alike

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Novelty:
    """What the distance of an image is computed from, and the distances of images that the model was not trained on.

    With the means and the two covariances multiplied out, the distance of features z of length 1 is
    z @ quadratic @ z + min over the classes of (linear @ z + constant).
    """

    quadratic: Array  # (F, F): inverse covariance within the classes less that of all images
    linear: Array  # (C, F)
    constant: Array  # (C,)
    known: Array  # (N,), sorted: distances of validation images

    def distances(self, features: NDArray[np.floating]) -> Array:
        """The relative Mahalanobis distance of each image to its nearest class: (N, F) to (N,)."""
        z = _directions(features)
        found: Array = ((z @ self.quadratic) * z).sum(axis=1) + (z @ self.linear.T + self.constant).min(axis=1)
        return found

    def novelty(self, features: NDArray[np.floating]) -> Array:
        """The fraction of validation images that are less strange than each image: (N, F) to (N,)."""
        return self.rank(self.distances(features))

    def rank(self, distances: Array) -> Array:
        """The fraction of validation images with a lower distance than each: (N,) to (N,)."""
        return np.searchsorted(self.known, distances, side="left") / len(self.known)

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        arrays = {"quadratic": self.quadratic, "linear": self.linear, "constant": self.constant, "known": self.known}
        save_file(arrays, folder / FILE)  # in float64: the quadratic form is a small difference of large ones


def read_novelty(checkpoint: str | Path) -> Novelty:
    """What tells how strange an image is to a checkpoint. Raises UsageError if it has nothing to compare with."""
    folder = find_model(expanded(checkpoint))
    if not (folder / FILE).is_file():
        raise UsageError(
            f"{checkpoint}: does not say what it knows, to tell what it does not; the best checkpoint of a run with "
            f"{FEWEST} validation images or more does, unless --reference-images 0."
        )
    return Novelty(**load_file(folder / FILE))


def fit_novelty(features: NDArray[np.floating], labels: NDArray[np.int64], held_out: NDArray[np.floating]) -> Novelty:
    """Fit the distance to features of training images, (N, F), with their classes, (N,).

    `held_out` are features of validation images, (M, F): those of training images are closer than others will be.
    Classes without an image do not count.
    """
    z = _directions(features)
    classes, place = np.unique(labels, return_inverse=True)
    means = np.stack([z[place == number].mean(axis=0) for number in range(len(classes))])
    center = z.mean(axis=0)
    within, overall = _inverse_covariance(z - means[place]), _inverse_covariance(z - center)
    linear = 2 * (center @ overall - means @ within)
    constant = np.einsum("cf,fg,cg->c", means, within, means) - center @ overall @ center
    fitted = Novelty(within - overall, linear, constant, np.zeros(0))
    return replace(fitted, known=np.sort(fitted.distances(held_out)))


def _directions(features: NDArray[np.floating]) -> Array:
    """Features scaled to length 1: their length says more about contrast than about the class."""
    z = np.asarray(features, np.float64)
    directions: Array = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return directions


def _inverse_covariance(deviations: Array) -> Array:
    covariance = deviations.T @ deviations / len(deviations)
    size = len(covariance)
    mean_variance = max(np.trace(covariance) / size, _LEAST_VARIANCE)
    inverse = np.linalg.inv((1 - _SHRINKAGE) * covariance + _SHRINKAGE * mean_variance * np.eye(size))
    symmetric: Array = (inverse + inverse.T) / 2
    return symmetric
