"""Labels that may be wrong, by what a pretrained model sees in the other images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitft.config.train import TrainConfig
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import DatasetLike, Source, exclusion_line
from vitft.data.validation.check import KINDS, Finding
from vitft.errors import DataError, UsageError
from vitft.evaluation.label_noise import DOUBTED_FROM, label_noise
from vitft.hardware.device import memory_guard, resolve_auto, threads
from vitft.io import console
from vitft.models.logistic import location_and_scale, regress
from vitft.probing.classifiers import Examples, best_of, logistic_trials, rank_in_class
from vitft.probing.probe import examples
from vitft.randomness import permutation
from vitft.training.setup import prepare

KIND = "doubtful-label"
FOLDS = 10


@dataclass(frozen=True)
class Doubt:
    """An image whose label may be wrong: the label, what the image looks like, and the probability of that."""

    split: str
    image: str
    row: int
    label: str
    suggested: str
    probability: float


@dataclass(frozen=True)
class DoubtResult:
    """The doubtful labels, most doubtful first, and what they were found with.

    `rate` is the estimated fraction of wrong labels among all images, `accuracy` that of the classifiers on images that
    they were not fitted to, against the given labels.
    """

    config: TrainConfig
    source: Source
    images: int
    accuracy: float
    rate: float
    doubts: tuple[Doubt, ...]

    def findings(self) -> list[Finding]:
        """The doubts as findings of `vitft data check`."""
        return [
            Finding(one.split, one.image, KIND, KINDS[KIND][0],
                    f"is {one.label}, looks like {one.suggested}; wrong with {console.percent(one.probability, 0)}")
            for one in self.doubts
        ]  # fmt: skip

    def exclusions(self) -> list[str]:
        """Lines of a file for `--exclude`."""
        return [exclusion_line(one.split, one.image) for one in self.doubts]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "images": self.images, "accuracy": self.accuracy, "estimated_wrong_fraction": self.rate,
            "doubts": [vars(one) for one in self.doubts],
        }  # fmt: skip


def doubt(
    config: TrainConfig | None = None, *, dataset: DatasetLike | None = None, folds: int = FOLDS,
    from_probability: float = DOUBTED_FROM,
) -> DoubtResult:  # fmt: skip
    """Find labels of the training images that are probably wrong, by the features of a pretrained model.

    One pass over the images. Each image is then judged by a logistic regression on the features of the others, in
    `folds` parts. From its probabilities, the fraction of wrong labels and the probability that each is wrong are
    estimated: see `label_noise`.

    Args:
        config: the dataset, the model and how they are read.
        dataset: replaces `config.dataset`.
        folds: parts of the images; more take longer and use the images better.
        from_probability: list labels that are wrong with at least this probability.

    Raises:
        VitftError: with one line that says what is wrong.
    """
    config = config or TrainConfig()
    if config.from_scratch:
        raise UsageError("doubt: new weights have no features worth reading; remove from_scratch.")
    config = config.model_copy(update={"freeze": "none", "skip_test": True, "val_fraction": 0.0, "augment": "none"})
    if isinstance(dataset, str | Path):
        config, dataset = config.model_copy(update={"dataset": str(dataset)}), None
    prepared = prepare(resolve_auto(config), dataset=dataset)
    prepared = replace(prepared, splits={"train": prepared.splits["train"]})  # no other is read
    with memory_guard(prepared.config), threads(prepared.config.threads):
        decoded = prepared.decode()
        known, _ = examples(decoded, "train")
        labels = known.labels.cpu().numpy()
        if (count := len(labels)) < 2 * folds:
            remedy = f"give at most --folds {count // 2}" if count >= 4 else "add images"
            raise DataError(
                f"{prepared.source.name}: --folds {folds} needs at least {2 * folds} images, got {count}; {remedy}."
            )
        logits = _out_of_fold(known, len(decoded.loaded.labels), folds, config.seed)
    found = label_noise(logits, labels)
    split, names = decoded.splits["train"], decoded.loaded.labels
    images = sample_names(prepared.source.splits[split.source], split.rows)
    doubts = tuple(
        Doubt(
            split.source,
            images[i],
            int(split.numbers[i]),
            names[labels[i]],
            names[found.likely[i]],
            float(found.wrong[i]),
        )
        for i in found.places(from_probability)
    )
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    return DoubtResult(prepared.config, prepared.source, len(labels), accuracy, found.rate, doubts)


def _out_of_fold(known: Examples, classes: int, folds: int, seed: int) -> NDArray[np.float64]:
    """The logits of each image, (N, C), by a regression on the images of the other folds."""
    labels = known.labels.cpu().numpy()
    fold = rank_in_class(labels, permutation(seed, "doubt", 0, len(labels))) % folds
    logits = np.empty((len(labels), classes))
    penalty: float | None = None
    with console.working("fitting classifiers") as progress:
        for number in range(folds):
            rows, held = (torch.from_numpy(np.flatnonzero(which)) for which in (fold != number, fold == number))
            train, held_out = (Examples(known.features[part], known.labels[part]) for part in (rows, held))
            if penalty is None:  # the same for all: it hardly depends on the fold
                penalty = best_of(logistic_trials(train, held_out, classes)[0]).setting
            mean, scale = location_and_scale(train.features)
            fitted = regress((train.features - mean) / scale, train.labels, classes, penalty)
            found = ((held_out.features - mean) / scale) @ fitted[:, :-1].T + fitted[:, -1]
            logits[held.numpy()] = found.cpu().double().numpy()
            progress(number + 1, folds)
    return logits
