"""Whether a model may be trusted: the precision that is promised, and strangers told from images of its own dataset.

    python benchmarks/trust.py precision RUN
    python benchmarks/trust.py strangers RUN DATASET_OR_FOLDER ... [--images 1000] [--reference 2000 300 100]
    python benchmarks/trust.py without cat CIFAR10_FOLDER FOLDER

`precision` is of a run with validation and test predictions. `strangers` gives the area under the ROC curve (AUROC)
of each score of strangeness, for test images of the run's dataset and others, with so many training images to compare
with. `without` writes a dataset of all classes but one, FOLDER/kept, to train a model on, whose strangers are
FOLDER/left.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from imbalanced import write
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from vitft.config.train import TrainConfig
from vitft.data.augment import normalize
from vitft.data.loader import EvalLoader
from vitft.data.sources.source import class_indices, source_of
from vitft.evaluation.calibration import at_temperature, calibration, fit_temperature, threshold_for
from vitft.evaluation.evaluation import BATCH, read_images, reading
from vitft.evaluation.loading import load_model
from vitft.evaluation.metrics import wilson_interval
from vitft.evaluation.novelty import fit_novelty, read_novelty, reduced
from vitft.evaluation.results import read_results
from vitft.hardware.device import threads
from vitft.models.features import heads_input
from vitft.prediction.inputs import read_image
from vitft.prediction.strangers import _found

TRAINING = 12_000  # images of the dataset without a class, that one included
SHRINKAGE = 0.01  # of covariances, towards a multiple of the identity
NEIGHBOR = 10
Array = NDArray[np.float64]


def main() -> None:
    """Measure, and print a row for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("precision")
    one.add_argument("run", type=Path)
    one = parts.add_parser("strangers")
    one.add_argument("run")
    one.add_argument("strangers", nargs="+")
    one.add_argument("--images", type=int, default=1000, help="at most so many of each kind")
    one.add_argument("--reference", type=int, nargs="+", default=[2000], help="training images to compare with")
    one = parts.add_parser("without")
    one.add_argument("label")
    one.add_argument("dataset")
    one.add_argument("folder", type=Path)
    given = parser.parse_args()
    {"precision": precision, "strangers": strangers, "without": without}[given.part](given)


def precision(given: argparse.Namespace) -> None:
    """Thresholds that are chosen on validation images, on the test images; and the temperature."""
    results = read_results(given.run)
    chosen, test = (results.predictions(split) for split in ("validation", "test"))
    temperature = fit_temperature(chosen)
    before, after = calibration(test), calibration(at_temperature(test, temperature))
    print(f"temperature {temperature:.2f}: calibration error {before.error:.2%} to {after.error:.2%}, ", end="")
    print(f"Brier score {before.brier:.4f} to {after.brier:.4f}; {len(chosen.truth):,} validation images")
    print("precision, decided on validation, decided on test, right (95 % interval)")
    for wanted in (0.9, 0.95, 0.97, 0.99):
        found = threshold_for(chosen, wanted)
        if found is None:
            print(wanted, "none")
            continue
        decided = test.confidence >= found.confidence
        right = int((test.predicted == test.truth)[decided].sum())
        low, high = wilson_interval(right, int(decided.sum()))
        share = right / decided.sum()
        print(f"{wanted}, {found.coverage:.1%}, {decided.mean():.1%}, {share:.1%} ({low:.1%} to {high:.1%})")


@dataclass(frozen=True)
class Seen:
    """What the model makes of n images: features (n, F), logits (n, C), and of its own dataset the classes (n,)."""

    features: Array
    logits: Array
    truth: NDArray[np.int64]


def strangers(given: argparse.Namespace) -> None:
    """The AUROC of each score, and what `--none-of-these` finds."""
    loaded, (config, _) = load_model(given.run), reading(given.run, None)

    def own(split: str, limit: int) -> Seen:
        images = read_images(given.run, loaded, config, split=split, limit=limit)
        device = torch.device("cpu")
        loader = EvalLoader(images.store, images.truth, loaded.preprocess, batch_size=BATCH, device=device)
        return seen(loaded.model, (batch.pixels for batch in loader), images.truth)

    def others(name: str) -> Seen:
        read = (read_image(one, loaded.preprocess, config.max_pixels) for one in _found(name, (), given.images))
        good = (image for image in read if isinstance(image, torch.Tensor))
        batches = iter(lambda: list(islice(good, BATCH)), [])
        return seen(loaded.model, (normalize(torch.cat(batch), loaded.preprocess) for batch in batches), np.zeros(0))

    training, known = own("train", max(given.reference)), own("test", given.images)
    validation, novelty = own("validation", 10_000), read_novelty(given.run)
    print("strangers, reference, score, AUROC")
    for name in given.strangers:
        unknown = others(name)
        is_stranger = np.repeat([0, 1], [len(known.logits), len(unknown.logits)])
        for size in given.reference:
            places = np.random.default_rng(0).permutation(len(training.truth))[:size]
            fewer = Seen(training.features[places], training.logits[places], training.truth[places])
            low, high = scores(fewer, validation, known), scores(fewer, validation, unknown)
            low["ViM, as built"], high["ViM, as built"] = (
                novelty.strangeness(one.features.astype(np.float32), one.logits.astype(np.float32))
                for one in (known, unknown)
            )
            for score in low:
                found = roc_auc_score(is_stranger, np.concatenate([low[score], high[score]]))
                print(f"{name}, {len(places)}, {score}, {found:.3f}")
        for kept in (0.99, 0.95):
            found, mistaken = (
                (novelty.rank(one["ViM, as built"].astype(np.float32)) > kept).mean() for one in (high, low)
            )
            print(f"{name}: --none-of-these {kept} finds {found:.0%}, and mistakes {mistaken:.1%} of the test images")


def seen(model, batches: Iterator[torch.Tensor], truth: NDArray[np.int64]) -> Seen:
    """Features and logits of batches of model input."""
    features, logits = [], []
    for pixels in batches:
        with torch.no_grad(), threads(), heads_input(model) as read:
            logits.append(model(pixel_values=pixels).logits.double().numpy())
        features.append(read[0].double().flatten(1).numpy())
    return Seen(np.concatenate(features), np.concatenate(logits), truth)


def scores(training: Seen, validation: Seen, images: Seen) -> dict[str, Array]:
    """Each score of strangeness, high for strange images, (n,)."""
    energy = logsumexp(images.logits, axis=1)
    unit, known = (one.features / np.linalg.norm(one.features, axis=1, keepdims=True) for one in (images, training))
    neighbors = np.sort(1 - unit @ known.T, axis=1)
    return {
        "highest probability": -np.exp(images.logits.max(axis=1) - energy),  # Hendrycks & Gimpel 2017
        "energy": -energy,  # Liu et al. 2020
        "relative Mahalanobis": relative_mahalanobis(unit, known, training.truth),
        f"{NEIGHBOR}th neighbor": neighbors[:, min(NEIGHBOR, len(known)) - 1],  # Sun et al. 2022
        "ViM, scaled by training images": vim(training, training, images),
        "ViM, scaled by validation images": vim(training, validation, images),
    }


def relative_mahalanobis(features: Array, known: Array, truth: NDArray[np.int64]) -> Array:
    """The distance to the nearest class less that to all training images (Ren et al. 2021, eq. 3)."""
    classes, numbers = np.unique(truth, return_inverse=True)
    means = np.stack([known[truth == one].mean(axis=0) for one in classes])
    within, overall = inverse(known - means[numbers]), inverse(known - known.mean(axis=0))

    def distance(mean: Array, metric: Array) -> Array:
        apart = features - mean
        return ((apart @ metric) * apart).sum(axis=1)

    nearest = np.min([distance(mean, within) for mean in means], axis=0)
    return nearest - distance(known.mean(axis=0), overall)


def inverse(centered: Array) -> Array:
    """The inverse of a covariance, shrunk."""
    found = centered.T @ centered / len(centered)
    size = np.trace(found) / len(found)
    return np.linalg.inv((1 - SHRINKAGE) * found + SHRINKAGE * size * np.eye(len(found)))


def vim(training: Seen, scale: Seen, images: Seen) -> Array:
    """ViM (Wang et al. 2022), fitted to training images, with the scale of other ones."""
    single = [one.features.astype(np.float32) for one in (training, scale, images)]
    fitted = fit_novelty(single[0], single[1], *reduced(scale.logits.astype(np.float32)))
    return fitted.strangeness(single[2], images.logits.astype(np.float32))


def without(given: argparse.Namespace) -> None:
    """Write the images of all classes but one, and the test images of that one."""
    source = source_of(TrainConfig(dataset=given.dataset))
    for split in ("train", "test"):
        labels = class_indices(source.splits[split])
        rows = np.random.default_rng(0).permutation(len(labels))[: TRAINING if split == "train" else None]
        left = np.array(source.labels)[labels[rows]] == given.label
        if not left.any():
            raise SystemExit(f"{given.label}: no class of {split}; there are {', '.join(source.labels)}.")
        write(source, split, rows[~left].tolist(), given.folder / "kept" / split)
        if split == "test":
            write(source, split, rows[left].tolist(), given.folder / "left" / split)


if __name__ == "__main__":
    main()
