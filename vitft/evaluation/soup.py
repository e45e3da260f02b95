"""Model soups: the average of the weights of several runs of one starting point (Wortsman et al. 2022).

Fine-tuned from the same weights, runs with other learning rates, augmentations or orders end in one basin of the loss;
their average is often better than each, and costs no more than one when it predicts. Parts are chosen on validation
images, which no part may have been trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitft.checkpoints.checkpoint import find_model, run_of, save_model
from vitft.checkpoints.metadata import Card, read_card
from vitft.data.augment import Preprocess
from vitft.data.loader import EvalLoader
from vitft.data.sources.source import Source, source_of
from vitft.data.split_record import FILE, refuse_leak, restore_splits
from vitft.data.splits import Split
from vitft.data.stores.store import decode_all
from vitft.errors import DataError, UsageError
from vitft.evaluation.calibration import fit_temperature
from vitft.evaluation.evaluation import BATCH, matched, measure, without
from vitft.evaluation.held_out import Ancestor, lineage
from vitft.evaluation.metrics import Metrics
from vitft.hardware.device import find_device, threads
from vitft.io.atomic import write_text
from vitft.io.paths import expanded
from vitft.models.load import load_trained

Weights = dict[str, Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """A run that was offered, its validation scores, and whether it is in the soup."""

    run: str
    metrics: Metrics
    chosen: bool


@dataclass(frozen=True)
class Soup:
    """A finished soup: its folder, its validation scores, and the runs that were offered, best first."""

    folder: Path
    metrics: Metrics
    parts: tuple[Part, ...]
    dataset: str

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        parts = [{"run": part.run, "chosen": part.chosen, "validation": part.metrics.summary()} for part in self.parts]
        return {"folder": str(self.folder), "validation": self.metrics.summary(), "parts": parts}


@dataclass(frozen=True)
class _Member:
    name: str  # as it was given
    short: str  # without the folders above it: a checkpoint can be shared
    folder: Path  # of its model, verified
    card: Card
    ancestors: list[Ancestor]


def soup(
    runs: Sequence[str | Path], output: str | Path, *, greedy: bool = False, dataset: str | Path | None = None,
    device: str = "auto", progress: Progress = lambda done, count: None,
) -> Soup:  # fmt: skip
    """Average the weights of runs that started from one model, and write a checkpoint folder.

    Args:
        runs: at least two, each a run (its best checkpoint is taken) or a checkpoint in one, of the same starting
            point, classes, input size and images.
        output: a new folder for the soup.
        greedy: start from the best run by validation accuracy, and add each other one, best first, that does not make
            the soup worse (Wortsman et al. 2022, recipe 1). By default all are averaged (uniform soup).
        dataset: where the dataset has moved to.
        device: auto, cpu, cuda or mps.
        progress: called with the number of models scored and an upper bound of the total.

    Raises:
        VitftError: with one line that says what is wrong: UsageError for runs that cannot be averaged, DataError for
            one that was trained on validation images of the others.
    """
    folder = expanded(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"output {output}: is there already; choose a new folder.")
    members = [_member(run) for run in runs]
    _check_alike(members)
    first = members[0]
    device = find_device(device)
    loaded = load_trained(first.folder)
    how, labels, network = loaded.preprocess, loaded.labels, loaded.model.to(device)
    config = first.card.config
    if dataset is not None:
        config = config.model_copy(update={"dataset": str(dataset)})
    if config.dataset is None:
        raise UsageError(f"{first.name}: its dataset was made in Python; a soup needs one with a name or a path.")
    source = source_of(config)
    split = _validation(members, source, moved=dataset is not None)
    truth, others = matched(split.labels, source.labels, labels, name=first.name, own=True)
    store, skipped = decode_all(
        source.splits[split.source].select(split.rows), how, crops=False, max_pixels=config.max_pixels,
        skip_bad=config.on_bad_image == "skip", cache_gb=config.cache_gb, name=f"{source.name}, validation",
    )  # fmt: skip
    split, truth = without(split, skipped, source), np.delete(truth, [image.position for image in skipped])
    loader = EvalLoader(store, truth, how, batch_size=BATCH, device=torch.device(device))
    scored = 0

    def score(weights: Weights) -> Metrics:
        nonlocal scored
        network.load_state_dict(weights)
        with threads():
            metrics = measure(network, loader, labels, split, others=others)
        scored += 1
        progress(scored, 2 * len(members))
        return metrics

    metrics_of = {member.folder: score(_weights(member, how, network)) for member in members}
    ranked = sorted(members, key=lambda one: (-metrics_of[one.folder].accuracy, metrics_of[one.folder].loss))
    chosen, total = [ranked[0]], _add({}, _weights(ranked[0], how, network))
    best = metrics_of[ranked[0].folder]
    for member in ranked[1:]:
        tried = _add(total, _weights(member, how, network))
        if greedy:
            metrics = score(_mean(tried, len(chosen) + 1))
            if metrics.accuracy < best.accuracy:
                continue
            best = metrics
        chosen, total = [*chosen, member], tried
    weights = _mean(total, len(chosen))
    metrics = best if greedy else score(weights)
    network.load_state_dict(weights)
    parts = tuple(Part(member.name, metrics_of[member.folder], member in chosen) for member in ranked)
    card = replace(
        ranked[0].card, scores={"validation": metrics.summary()},
        temperature=None if metrics.predictions is None else fit_temperature(metrics.predictions),
        parts=tuple(
            {"run": member.short, "step": member.card.step, "validation_accuracy": metrics_of[member.folder].accuracy}
            for member in chosen
        ),
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    splits = _splits_file(first).read_text(encoding="utf-8")
    save_model(folder, network.cpu(), how, card, beside=[lambda made: write_text(made / "splits.json", splits)])
    return Soup(folder, metrics, parts, config.dataset)


def _member(run: str | Path) -> _Member:
    """Find a run's checkpoint. Raises ModelError if there is none, UsageError if nothing says where it started."""
    folder = find_model(expanded(run))
    card = read_card(folder) if folder.is_dir() else None
    within = run_of(folder)
    if card is None or within is None:
        raise UsageError(f"{run}: is not a run of vitft train, so nothing says where it started; give run folders.")
    ancestors = lineage(folder)
    if ancestors[0].record is None:
        raise UsageError(f"{run}: has no splits.json of its own, so its images are unknown; leave it out.")
    short = f"{within.resolve().name}/{folder.relative_to(within).as_posix()}"
    return _Member(str(run), short, folder, card, ancestors)


def _check_alike(members: Sequence[_Member]) -> None:
    """Raise UsageError for runs whose average would mean nothing, or whose scores could not be compared."""
    if len(members) < 2:
        raise UsageError("a soup needs at least two runs.")
    first = members[0]
    for number, other in enumerate(members):
        if other.card.config.from_scratch:
            raise UsageError(f"{other.name}: started from new weights; a soup needs runs of one pretrained model.")
        if "validation" not in other.card.splits:
            raise UsageError(f"{other.name}: has no validation images, by which a soup is judged; set --val-fraction.")
        if any(other.folder == earlier.folder for earlier in members[:number]):
            raise UsageError(f"{other.name}: is given twice; leave one out.")
        for what, one, another in _facts(first.card, other.card):
            if one != another:
                raise UsageError(
                    f"{first.name} and {other.name} have other {what} ({_brief(one)} and {_brief(another)}): "
                    f"a soup needs runs of one starting point on the same images."
                )


def _facts(one: Card, other: Card) -> list[tuple[str, Any, Any]]:
    """What must agree, in words and as the two runs have it."""

    def setting(*names: str) -> tuple[Any, Any]:
        values = [tuple(getattr(card.config, name) for name in names) for card in (one, other)]
        return values[0], values[1]

    def images(role: str) -> tuple[Any, Any]:
        first, second = (card.splits.get(role, {}).get("hash") for card in (one, other))
        return first, second

    random = "random" in (one.config.head_init, other.config.head_init)
    return [
        ("starting points", *setting("model", "model_revision")),
        ("classes", one.labels, other.labels),
        ("input sizes", *setting("image_size")),
        ("datasets", *setting("dataset", "dataset_revision")),
        ("validation images", *images("validation")),
        ("training images", *images("train")),
        *([("random heads to start from: seeds", *setting("seed"))] if random else []),
    ]


def _brief(value: Any) -> str:
    text = ", ".join(str(one) for one in value if one is not None) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _validation(members: Sequence[_Member], source: Source, *, moved: bool) -> Split:
    """The validation images of all runs. Raises DataError if a run, or one before it, was trained on them."""
    record = members[0].ancestors[0].record
    assert record is not None  # see `_member`
    split = restore_splits(record, source, moved=moved).get("validation")
    if split is None:
        raise DataError(f"{source.name}: none of the validation images of {members[0].name} is in it.")
    for member in members:
        records = [ancestor.record for ancestor in member.ancestors if ancestor.record is not None]
        refuse_leak(records, source, split, "leave that run out.")
    return split


def _splits_file(member: _Member) -> Path:
    run = run_of(member.folder)
    assert run is not None  # see `_member`
    return run / FILE


def _weights(member: _Member, how: Preprocess, network: Any) -> Weights:
    """The weights of a run, on the CPU. Raises UsageError if they are of another architecture or input."""
    loaded = load_trained(member.folder)
    weights: Weights = loaded.model.state_dict()
    shapes, others = ({name: tensor.shape for name, tensor in one.items()} for one in (weights, network.state_dict()))
    if shapes != others or type(loaded.model) is not type(network):
        raise UsageError(f"{member.name}: is a {type(loaded.model).__name__} of other shapes; leave it out.")
    if loaded.preprocess != how:
        raise UsageError(f"{member.name}: prepares its images in another way; leave it out.")
    return weights


def _add(total: Weights, weights: Weights) -> Weights:
    """The sum in float64. Counts of batches, which are integers, stay those of the first run."""
    return {
        name: total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
        if tensor.is_floating_point()
        else total.get(name, tensor)
        for name, tensor in weights.items()
    }


def _mean(total: Weights, count: int) -> Weights:
    return {name: (tensor / count).float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}
