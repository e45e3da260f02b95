"""Which images a checkpoint may be scored on, or fine-tuned on further: never those that it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitft.checkpoints.checkpoint import is_run, run_of
from vitft.checkpoints.metadata import Card, read_card
from vitft.config.train import TrainConfig
from vitft.data.sources.schema import ROLES
from vitft.data.sources.source import Source
from vitft.data.split_record import Record, describe_changes, read_record, recorded_sides, refuse_leak, restore_splits
from vitft.data.splits import Split, find_split_name, make_splits, whole_split
from vitft.errors import DataError, UsageError
from vitft.io import console
from vitft.io.paths import expanded


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint that weights come from, and the record of its run, if that is still beside it."""

    card: Card
    record: Record | None


def lineage(checkpoint: Path) -> list[Ancestor]:
    """A checkpoint, the checkpoint that its run started from, and so on, as far as they still exist."""
    ancestors: list[Ancestor] = []
    seen: set[Path] = set()
    while True:
        if is_run(checkpoint):
            names = (checkpoint / "best", checkpoint / "last")
            checkpoint = next((folder for folder in names if folder.is_dir()), checkpoint)
        card = read_card(checkpoint) if checkpoint not in seen else None
        if card is None:
            return ancestors
        seen.add(checkpoint)
        run = run_of(checkpoint)
        record = read_record(checkpoint) or (None if run is None else read_record(run))
        ancestors.append(Ancestor(card, record if record is not None and record.matches(card.splits) else None))
        if card.config.from_scratch:
            return ancestors
        checkpoint = expanded(card.config.model)


def _records(ancestors: list[Ancestor]) -> list[Record]:
    return [ancestor.record for ancestor in ancestors if ancestor.record is not None]


def choose_split(
    checkpoint: Path, card: Card | None, source: Source, config: TrainConfig, name: str | None, limit: int | None
) -> tuple[Split, bool]:
    """The split to score, and whether it belongs to the dataset that the checkpoint's run was trained on.

    `name` is a role or the dataset's own name for a split; None takes test, else validation. The record of the
    checkpoint's run, if it is beside the checkpoint, decides which images are in a split. Raises UsageError if there
    is no such split, and DataError if the checkpoint was trained on images of it.
    """
    ancestors = lineage(checkpoint) if card is not None else []
    own = card is not None and config.dataset is not None and config.dataset == card.config.dataset
    known: dict[str, Split] = {}
    if ancestors and ancestors[0].record is not None:
        known = _recorded(ancestors[0].record, source, own=own)
    elif card is not None:
        known = _redrawn(card, source, own=own)
    names = {role: found for role in ROLES if (found := find_split_name(source, role)) and len(source.splits[found])}
    names |= {role: split.source for role, split in known.items()}
    roles = {found: role for role, found in reversed(names.items())}  # a name with several roles means train
    role = _default_role(source, names) if name is None else name if name in names else roles.get(name)
    if role is None:
        raise UsageError(f"split {name}: {source.name} has {', '.join(role for role in ROLES if role in names)}.")
    split = known.get(role) or whole_split(source, role, names[role])
    if role != "train" and role not in known:
        remedy = "remove them from it, or add --split train to score training images."
        refuse_leak(_records(ancestors), source, split, remedy)
    return split.sampled(limit, config.split_seed, source.labels), own or role in known


def _default_role(source: Source, names: Mapping[str, str]) -> str:
    for role in ("test", "validation"):
        if role in names:
            return role
    images = f"its {console.counted(len(source.splits[names['train']]), 'image')}" if "train" in names else "its images"
    raise UsageError(
        f"{source.name} has no test or validation split; to score {images}, trained on or not, add --split train."
    )


def _recorded(record: Record, source: Source, *, own: bool) -> dict[str, Split]:
    """The recorded splits, if this is the run's dataset: in the same place, or with at least half of its images."""
    splits = restore_splits(record, source, moved=not own)
    if not own:
        splits = {r: split for r, split in splits.items() if 2 * len(split.rows) >= len(record.splits[r].ids)}
    if own or splits:
        for sentence in describe_changes(record, source, splits):
            console.note(sentence)
    for role, recorded in record.splits.items():
        if own and role not in splits and recorded.ids:
            raise DataError(
                f"none of the {len(recorded.ids):,} {role} images of {record.run} is in {source.name}, so this is "
                "another dataset now; name it with --dataset to score what it holds out."
            )
    return splits


def _redrawn(card: Card, source: Source, *, own: bool) -> dict[str, Split]:
    """The splits of a checkpoint outside of its run folder, drawn again with its settings."""
    config = card.config
    splits = make_splits(
        source, val_fraction=config.val_fraction, max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples, seed=config.split_seed, test_fraction=config.test_fraction,
    )  # fmt: skip
    changed = [role for role, split in splits.items() if split.hash != card.splits.get(role, {}).get("hash")]
    if not changed:
        return splits
    if own:
        console.warn(
            "there is no splits.json beside the checkpoint, and the data has changed or was split by an earlier "
            f"version ({', '.join(changed)}: not the hash in the checkpoint): scored images may have been trained on."
        )
        return splits
    console.warn("there is no splits.json beside the checkpoint: these images may have been trained on.")
    return {}


def earlier_sides(checkpoint: Path, source: Source, config: TrainConfig) -> dict[str, NDArray[np.int8]] | None:
    """The side that the runs a checkpoint comes from had each image on, by source split; None without a record."""
    ancestors = [ancestor for ancestor in lineage(checkpoint) if ancestor.record is not None]
    moved = [config.dataset is None or ancestor.card.config.dataset != config.dataset for ancestor in ancestors]
    return recorded_sides(_records(ancestors), moved, source) if ancestors else None


def refuse_trained(checkpoint: Path, source: Source, splits: Mapping[str, Split]) -> None:
    """Raise DataError if the dataset's own validation or test split has images that a checkpoint was trained on."""
    records = _records(lineage(checkpoint))
    for role, split in splits.items():
        if role != "train" and ("train" not in splits or split.source != splits["train"].source):
            refuse_leak(records, source, split, "leave them out with --exclude, or start from another model.")
