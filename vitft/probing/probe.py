"""The first honest answer on a dataset: what the features of a pretrained backbone are worth, in one pass over it.

Everything is chosen and scored on validation images; test images are not read.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vitft.config.train import TrainConfig, not_default, train_command
from vitft.data.loader import EvalLoader
from vitft.data.sources.source import DatasetLike
from vitft.errors import ModelError, UsageError
from vitft.evaluation.evaluation import BATCH, NO_CLASS
from vitft.evaluation.metrics import Metrics, score
from vitft.evaluation.split_predictions import most_probable
from vitft.hardware.device import memory_guard, micro_batch, resolve_auto, threads
from vitft.hardware.processes import ALONE, Processes, join_processes
from vitft.io import console
from vitft.models.features import backbone
from vitft.probing.classifiers import Examples, Point, Trial, best_of, few_shot, logistic_trials, neighbor_trials
from vitft.training.cost.dry_run import size_of
from vitft.training.cost.estimate import cost, memory_bytes
from vitft.training.setup import Decoded, Prepared, prepare

FEW = 50  # validation images, on which the interval is more than 20 points wide
LONG_S = 600.0  # a pass over the images that takes longer gets a warning before it starts


@dataclass(frozen=True)
class Tuning:
    """What full fine-tuning of the same images with the same settings would take, by a trial on this machine."""

    epochs: float
    seconds: float  # of training and validation
    memory_bytes: int | None  # None if it cannot be estimated for this architecture


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. Every accuracy is of the same validation images.

    `metrics` has the scores of the best logistic regression, with its classes and confusions.
    """

    config: TrainConfig
    images: int  # training images
    width: int  # numbers per image: F
    logistic: list[Trial]
    neighbors: list[Trial]
    few_shot: list[Point]
    metrics: Metrics
    tuning: Tuning
    images_per_s: float  # of the backbone

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        trials = {
            name: [
                {kind: trial.setting, "accuracy": trial.accuracy, "accuracy_interval": list(trial.interval)}
                | ({} if trial.loss is None else {"loss": trial.loss})
                for trial in found
            ]
            for name, kind, found in (
                ("logistic_regression", "penalty", self.logistic),
                ("nearest_neighbors", "neighbors", self.neighbors),
            )
        }
        curve = [asdict(point) | {"mean": point.mean, "spread": point.spread} for point in self.few_shot]
        settings = {name: getattr(self.config, name) for name in ("dataset", "model", "image_size", "seed")}
        settings["dataset"] = console.without_secrets(str(self.config.dataset))
        return {
            "settings": settings, "train_images": self.images, "features": self.width,
            "images_per_s": self.images_per_s, "penalty": best_of(self.logistic).setting,
            "validation": self.metrics.to_dict(), **trials, "few_shot": curve, "full_tuning": asdict(self.tuning),
        }  # fmt: skip


def probe(config: TrainConfig | None = None, *, dataset: DatasetLike | None = None) -> ProbeResult:
    """Probe a pretrained backbone on a dataset: one pass over its training and validation images, and no training.

    Args:
        config: the dataset, the model and how they are read. Settings of optimization matter only for the estimate of
            what full fine-tuning would take.
        dataset: replaces `config.dataset`: a name, a path, a `Dataset` or `DatasetDict` of `datasets`.

    Returns:
        Accuracies on the validation images of logistic regression by penalty, of nearest neighbors, and by the number
        of training images per class.

    Raises:
        VitftError: with one line that says what is wrong; UsageError if there are no validation images.
    """
    config = config or TrainConfig()
    if config.from_scratch:
        raise UsageError("probe: new weights have no features worth probing; remove from_scratch.")
    config = config.model_copy(update={"freeze": "none", "skip_test": True})
    if isinstance(dataset, str | Path):
        config, dataset = config.model_copy(update={"dataset": str(dataset)}), None
    config = resolve_auto(config)
    processes = join_processes(config.device)
    prepared = prepare(config, dataset=dataset)
    if "validation" not in prepared.splits:
        held = "there are too few images to hold any out" if config.val_fraction else "--val-fraction 0 holds out none"
        raise UsageError(f"no validation images to score by: {held}; set --val-fraction, such as 0.2.")
    with memory_guard(prepared.config), threads(prepared.config.threads):
        tuning = processes.by_first(lambda: _tuning(prepared))
        decoded = prepared.with_settings(augment="none").decode(processes)
        train, _ = examples(decoded, "train", processes)
        held_out, elapsed_s = examples(decoded, "validation", processes)
        return processes.by_first(lambda: _result(decoded, train, held_out, tuning, elapsed_s))


def next_commands(config: TrainConfig) -> dict[str, str]:
    """The commands of a linear probe that is saved and of full fine-tuning, with the settings that were given."""
    given = (name for name in TrainConfig.model_fields if name in config.model_fields_set - {"freeze"})
    command = train_command(not_default(config, given))
    return {"linear probe": f"{command} --freeze backbone", "full fine-tuning": command}


def _tuning(prepared: Prepared) -> Tuning:
    """Try out on a few images what an image takes. Warns if the probe itself will take long."""
    memory = memory_bytes(prepared, micro_batch(prepared.config))  # before the trial, which uses memory, too
    with console.working("trying out how long it takes"):
        each = cost(prepared, enough_s=0.2)  # a longer trial would be much of a short probe
    images = sum(len(prepared.splits[role].rows) for role in prepared.used)
    if (took_s := images * each.evaluate_image_s) > LONG_S:
        fewer = max(100, int(round(LONG_S / 4 / each.evaluate_image_s, -2)))
        console.warn(
            f"reading {images:,} images will take about {console.duration(took_s)} on this {prepared.config.device}; "
            f"cheaper: --max-train-samples {fewer} --max-eval-samples {fewer}"
        )
    size = size_of(prepared, each)
    return Tuning(prepared.config.epochs, size.train_s + size.evaluate_s, memory)


def examples(decoded: Decoded, role: str, processes: Processes = ALONE) -> tuple[Examples, float]:
    """The features of a split's images, and the seconds that they took. Raises ModelError if they are not finite.

    The processes share the images, and each gets the features of all.
    """
    config, loaded = decoded.config, decoded.loaded
    device = torch.device(config.device)
    read = backbone(loaded.model.to(device).eval(), config.device, config.precision)
    loader = EvalLoader(
        *decoded.stores[role],
        loaded.preprocess,
        batch_size=BATCH,
        device=device,
        rank=processes.rank,
        world=processes.count,
    )
    started, features, labels = time.perf_counter(), [], []
    with console.working(f"reading features of {role}") as progress:
        for number, batch in enumerate(loader, 1):
            features.append(read(batch.pixels).flatten(1))
            labels.append(batch.labels)
            progress(number, len(loader))
    if processes.count > 1:
        features = [part.to(device) for part in processes.gather([part.cpu() for part in features])]
        labels = [part.to(device) for part in processes.gather([part.cpu() for part in labels])]
    examples = Examples(torch.cat(features), torch.cat(labels))
    if not examples.features.isfinite().all():
        raise ModelError(f"{config.model}: its features are not finite; add --precision fp32, or use another model.")
    return examples, time.perf_counter() - started


def _result(
    decoded: Decoded, train: Examples, held_out: Examples, tuning: Tuning, elapsed_s: float
) -> ProbeResult:  # fmt: skip
    """Fit and score everything. `elapsed_s`: of reading the validation images."""
    labels, others, split = decoded.loaded.labels, decoded.lacking("validation"), decoded.splits["validation"]
    classes = len(labels)
    with console.working("fitting classifiers") as progress:
        logistic, logits = logistic_trials(train, held_out, classes)
        neighbors = neighbor_trials(train, held_out, classes)
        curve = few_shot(train, held_out, classes, decoded.config.seed, progress)
    known = held_out.labels.where(held_out.labels < classes, NO_CLASS)
    losses = F.cross_entropy(logits, known, reduction="none", ignore_index=NO_CLASS)
    top = most_probable(logits.softmax(dim=1), min(5, classes))
    metrics = score(
        held_out.labels.cpu().numpy(), top.cpu().numpy(), losses.cpu().numpy(), labels, others,
        split=split.name, split_hash=split.hash, elapsed_s=elapsed_s,
    )  # fmt: skip
    if metrics.count < FEW:
        console.warn(f"{metrics.count} validation images say little; --val-fraction holds out more")
    return ProbeResult(
        decoded.config, len(train), train.features.shape[1], logistic, neighbors, curve, metrics, tuning,
        len(held_out) / max(elapsed_s, 1e-9),
    )  # fmt: skip
