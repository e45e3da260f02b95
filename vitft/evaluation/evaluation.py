"""Score a model on a split, during a run or from a checkpoint."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vitft.checkpoints.checkpoint import find_model
from vitft.checkpoints.exported import exported_file
from vitft.checkpoints.metadata import Card, read_card
from vitft.config.train import TrainConfig
from vitft.data.augment import Preprocess
from vitft.data.decoder import decode, encoded
from vitft.data.loader import Batches, EvalLoader
from vitft.data.sources.schema import ReadOptions
from vitft.data.sources.source import ALIASES, DIGITS, DatasetLike, Source, source_of
from vitft.data.splits import Split
from vitft.data.stores.store import Part, Skipped, Store, decode_all, decode_part
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation.held_out import choose_split
from vitft.evaluation.loading import load_model
from vitft.evaluation.metrics import Metrics, score
from vitft.evaluation.split_predictions import LARGEST, most_probable, of_split
from vitft.hardware.device import autocast, find_device, find_precision, threads
from vitft.hardware.processes import ALONE, Processes, join_processes
from vitft.io import console
from vitft.io.paths import absolute, composed, expanded
from vitft.models.load import Loaded, read_config, set_attention
from vitft.spec import PRESETS

NO_CLASS = -1  # label, in the loss, of images whose class the model does not have
BATCH = 64  # images per forward pass, which saves no activations
Progress = Callable[[int, int], None]
"""Called with the number done and the total."""


def measure(
    model: Any, loader: Batches, labels: Sequence[str], split: Split,
    *, others: Sequence[str] = (), gather: Callable[[list[Any]], list[Any]] = lambda parts: parts,
    progress: Progress = lambda done, count: None,
) -> Metrics:  # fmt: skip
    """Score the model on a loader's images, joined over all processes by `gather`.

    `labels` are the model's classes, and `others` the classes that only the images have (see `matched`).
    """
    model.eval()
    started = time.perf_counter()
    keep = len(split.rows) * len(labels) <= LARGEST
    tops, losses, truths, probabilities = [], [], [], []
    with torch.no_grad():
        for number, batch in enumerate(loader, 1):
            logits = model(pixel_values=batch.pixels).logits.float()
            said = logits.softmax(dim=1)
            tops.append(most_probable(said, min(5, len(labels))))
            known = batch.labels.where(batch.labels < len(labels), NO_CLASS)
            losses.append(F.cross_entropy(logits, known, reduction="none", ignore_index=NO_CLASS))
            truths.append(batch.labels)
            probabilities += [said] if keep else []
            progress(number, len(loader))
    columns = (truths, tops, losses, *([probabilities] if keep else []))
    mine = tuple(torch.cat(parts).cpu().numpy() if parts else None for parts in columns)
    parts = [part for part in gather([mine]) if part[0] is not None]
    truth, top, loss, *every = (np.concatenate(column) for column in zip(*parts, strict=True))
    elapsed_s = time.perf_counter() - started
    scored = score(truth, top, loss, labels, others, split=split.name, split_hash=split.hash, elapsed_s=elapsed_s)
    return replace(scored, predictions=of_split(split, truth, every[0], labels, others)) if keep else scored


def evaluate(
    checkpoint: str | Path, *, dataset: DatasetLike | None = None, dataset_revision: str | None = None,
    split: str | None = None, max_eval_samples: int | None = None, batch_size: int = BATCH, device: str = "auto",
    precision: str | None = None, on_bad_image: str | None = None, max_pixels: int | None = None,
    image_column: str | None = None, label_column: str | None = None, split_column: str | None = None,
    fold_column: str | None = None, fold: int | None = None, image_folder: str | None = None,
    encoding: str | None = None, allow_outside: bool | None = None, value_range: str | None = None,
    streaming: bool | None = None, stream_gb: float | None = None,
    progress: Progress = lambda done, count: None,
    report_skipped: Callable[[list[Skipped]], None] = lambda skipped: None,
) -> Metrics:  # fmt: skip
    """Evaluate a checkpoint on a split.

    Args:
        checkpoint: a run (its best checkpoint is taken), one of its checkpoints, or a Transformers folder or hub id.
        dataset: a name, a path, or a `Dataset` or `DatasetDict` of `datasets`; by default the one it was trained on.
        split: by default test, else validation. Images keep the roles that the run recorded in `splits.json`, even if
            the dataset has grown or moved.
        batch_size: images per forward pass.
        progress: called with the number of images or batches done and the total.
        report_skipped: called with the images that could not be read, if `on_bad_image` is skip.

    The other arguments are those of `vitft eval`; by default they are as in training. Processes that torchrun started
    share the images, and all return the same.

    Returns:
        Scores of the split, of each class, and the confusion matrix.

    Raises:
        VitftError: with one line that says what is wrong; DataError if the checkpoint was trained on these images.
    """
    typed = {"dataset_revision": dataset_revision, "max_pixels": max_pixels, "on_bad_image": on_bad_image,
             "image_column": image_column, "label_column": label_column, "split_column": split_column,
             "fold_column": fold_column, "fold": fold, "image_folder": image_folder, "encoding": encoding,
             "value_range": value_range, "allow_outside": allow_outside, "streaming": streaming,
             "stream_gb": stream_gb}  # fmt: skip
    config, card = reading(checkpoint, dataset, typed)
    loaded = load_model(checkpoint)
    device = find_device(device)
    processes = join_processes(device)
    found = read_images(
        checkpoint, loaded, config, dataset=dataset, split=split, limit=max_eval_samples, processes=processes,
        progress=progress, report_skipped=report_skipped,
    )  # fmt: skip
    as_trained = card is not None and config.device == device
    precision = find_precision(precision or (config.precision if as_trained else "fp32"), device)
    model = loaded.model.to(device)
    if as_trained and config.attention != "auto" and hasattr(model, "set_attn_implementation"):  # no exported file
        set_attention(model, config.attention)
    loader = EvalLoader(
        found.store, found.truth, loaded.preprocess, batch_size=batch_size, device=torch.device(device),
        rank=processes.rank, world=processes.count,
    )  # fmt: skip
    with autocast(device, precision), threads(card.config.threads if card and card.config.device == device else None):
        metrics = measure(
            model, loader, loaded.labels, found.split, others=found.others, gather=processes.gather, progress=progress
        )
    return replace(metrics, temperature=card.temperature if card else None)


def reading(
    checkpoint: str | Path, dataset: DatasetLike | None, typed: Mapping[str, Any] = MappingProxyType({})
) -> tuple[TrainConfig, Card | None]:
    """The settings to read a checkpoint's dataset, or another one, with; and the checkpoint's metadata.

    `typed` are those that the user gave. Raises VitftError if it is unknown which dataset that is.
    """
    where = find_model(expanded(checkpoint))
    card = read_card(where) if where.is_dir() else None
    if dataset is None and (card is None or card.config.dataset is None):
        if not where.exists() and str(checkpoint) not in PRESETS:
            raise ModelError(f"{checkpoint}: no such folder here; if it is a hub id, add --dataset.")
        if where.exists() and exported_file(where) is None:
            read_config(where)  # raises for what is not a model at all
        raise no_dataset(checkpoint)
    config = card.config if card else TrainConfig()
    place = _place(dataset)
    if dataset is not None and (place is None or place != config.dataset):
        # Settings for reading the checkpoint's own dataset do not apply to another one.
        reset = {"dataset_revision", "exclude", *ReadOptions.__dataclass_fields__}
        unset = {name: TrainConfig.model_fields[name].default for name in reset}
        config = config.model_copy(update=unset | {"dataset": place})
    return config.model_copy(update={name: value for name, value in typed.items() if value is not None}), card


def no_dataset(checkpoint: str | Path) -> UsageError:
    """The error for a model without a record of its dataset, where one is needed."""
    return UsageError(f"{checkpoint}: it does not say what dataset it was trained on; add --dataset.")


def _place(dataset: DatasetLike | None) -> str | None:
    """The path or name of a dataset; None for one that was loaded in Python."""
    return absolute(str(dataset), (*ALIASES, DIGITS)) if isinstance(dataset, str | Path) else None


@dataclass(frozen=True)
class SplitImages:
    """The decoded images of a split, of which processes that share it have a part each.

    `truth` numbers the classes of all as the model does, and after them the `others`.
    """

    store: Store | Part
    truth: NDArray[np.int64]
    split: Split
    others: tuple[str, ...]
    rows: Any  # the split's rows of the dataset, with the encoded images
    max_pixels: int

    def original(self, place: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        """An image as it is, before any resize: (H, W, 3)."""
        return decode(encoded(self.rows[place]["image"]), self.max_pixels, value_range=preprocess.value_range)


def read_images(
    checkpoint: str | Path, loaded: Loaded, config: TrainConfig, *, dataset: DatasetLike | None = None,
    split: str | None = None, limit: int | None = None, processes: Processes = ALONE,
    progress: Progress = lambda done, count: None,
    report_skipped: Callable[[list[Skipped]], None] = lambda skipped: None,
) -> SplitImages:  # fmt: skip
    """Decode the images of a split for a checkpoint that was loaded; the arguments are those of `evaluate`.

    `config`: of `reading`. `limit`: at most so many images, stratified. `processes`: those that share them, which have
    to call this together. Raises VitftError, as `evaluate` does.
    """
    where = find_model(expanded(checkpoint))
    card = read_card(where) if where.is_dir() else None
    if loaded.scoring != "softmax":
        raise ModelError(
            f"{checkpoint}: scores each label separately ({loaded.scoring}), and accuracy needs one class per image; "
            "use predict, or fine-tune it for one class."
        )
    how = loaded.preprocess.with_value_range(config.value_range)
    source = source_of(config, None if _place(dataset) else dataset)
    for warning in source.warnings:
        console.warn(warning)
    chosen, own = choose_split(where, card, source, config, split, limit)
    truth, others = matched(chosen.labels, source.labels, loaded.labels, name=str(checkpoint), own=own)
    skip_bad = config.on_bad_image == "skip"
    rows = source.splits[chosen.source].select(chosen.rows)
    decode_rows = partial(
        decode_all, preprocess=how, crops=False, max_pixels=config.max_pixels, skip_bad=skip_bad, progress=progress,
        cache_gb=config.cache_gb, whole=config.check == "full", name=f"{source.name}, {chosen.name}",
    )  # fmt: skip
    store, skipped = decode_part(rows, decode_rows, processes)
    if skipped:
        places = {one.position for one in skipped}
        rows = rows.select([place for place in range(len(rows)) if place not in places])
    chosen, truth = without(chosen, skipped, source), np.delete(truth, [s.position for s in skipped])
    report_skipped(skipped)
    if unknown := int((truth >= len(loaded.labels)).sum()):
        console.warn(
            f"{unknown:,} of {len(truth):,} {chosen.name} images are of classes that the model does not have "
            f"({listed(others, 5)}): they count as wrong, and are left out of the loss"
        )
    return SplitImages(store, truth, chosen, others, rows, config.max_pixels)


def matched(
    labels: NDArray[np.int64], given: Sequence[str], known: Sequence[str], *, name: str, own: bool = False
) -> tuple[NDArray[np.int64], tuple[str, ...]]:  # fmt: skip
    """Match the classes of a dataset to the model's by name: the labels as the model numbers them, and further classes.

    `labels` index the `given` names of the dataset; `known` are the model's. If the dataset is the model's `own`,
    classes with images that the model lacks (it was trained without them) are numbered after its own. Raises DataError
    if another dataset has images of such classes, or if no image has a class of the model.
    """
    if tuple(given) == tuple(known):
        return labels, ()  # even if two classes share a name, as in ImageNet
    given, known = [composed(label) for label in given], [composed(label) for label in known]
    position = {label: index for index, label in enumerate(known)}
    occurs = np.bincount(labels, minlength=len(given)) > 0
    present = [label for label, there in zip(given, occurs.tolist(), strict=True) if there]
    others = tuple(dict.fromkeys(label for label in present if label not in position))
    if others and (not own or not position.keys() & set(present)):
        raise DataError(
            f"labels do not match: the data has [{listed(given)}], {name} knows [{listed(known)}]; "
            "evaluate on data with these classes, or fine-tune on yours."
        )
    position |= {label: len(known) + number for number, label in enumerate(others)}
    return np.array([position.get(label, NO_CLASS) for label in given], np.int64)[labels], others


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first names, and the total if there are more."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def without(split: Split, skipped: Sequence[Skipped], source: Source) -> Split:
    """The split without the images that could not be read; its hash is of the remaining ones."""
    if not skipped:
        return split
    kept = np.ones(len(split.rows), bool)
    kept[[s.position for s in skipped]] = False
    if not kept.any():
        raise DataError(f"{split.name} split: none of its {len(split.rows)} images can be read.")
    return split.select(kept, source.labels)
