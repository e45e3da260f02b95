"""Which images a checkpoint may be scored on, and trained on further: not those that it was trained on."""

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
from vitft.data.split_record import Record, news, read_record, recall, refuse_leak, settle
from vitft.data.splits import Split, make_splits, split_for, split_of
from vitft.errors import DataError, UsageError
from vitft.io import console
from vitft.io.paths import expanded


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint that weights come from, and what its run recorded, if that is still beside it."""

    card: Card
    record: Record | None


def lineage(checkpoint: Path) -> list[Ancestor]:
    """A checkpoint, the one that its run began from, and so on, as far as they are still there."""
    found: list[Ancestor] = []
    seen: set[Path] = set()
    while True:
        if is_run(checkpoint):
            checkpoint = next((f for f in (checkpoint / "best", checkpoint / "last") if f.is_dir()), checkpoint)
        card = read_card(checkpoint) if checkpoint not in seen else None
        if card is None:
            return found
        seen.add(checkpoint)
        run = run_of(checkpoint)
        record = None if run is None else read_record(run)
        found.append(Ancestor(card, record if record is not None and record.agrees(card.splits) else None))
        if card.config.from_scratch:
            return found
        checkpoint = expanded(card.config.model)


def choose_split(
    checkpoint: Path, card: Card | None, source: Source, config: TrainConfig, name: str | None, limit: int | None
) -> tuple[Split, bool]:
    """The split to score, and whether it is of the data set that the checkpoint's run was trained on.

    It is chosen by role, or by the data set's own name for it; without a name test, else validation.

    What the checkpoint's run recorded rules, where it lies beside it. Raises UsageError where there is no such
    split, DataError where the checkpoint was trained on images of it.
    """
    line = lineage(checkpoint) if card is not None else []
    records = [one.record for one in line if one.record is not None]
    own = card is not None and config.dataset == card.config.dataset
    known: dict[str, Split] = {}
    if line and line[0].record is not None:
        known = _recorded(line[0].record, source, own=own)
    elif card is not None:
        known = _drawn_again(card, source, own=own)
    places = {role: place for role in ROLES if (place := split_for(source, role)) and len(source.splits[place])}
    places |= {role: split.source for role, split in known.items()}
    by_place = {place: role for role, place in reversed(places.items())}  # train before what it lent
    role = _default(source, places) if name is None else name if name in places else by_place.get(name)
    if role is None:
        raise UsageError(f"split {name}: {source.name} has {', '.join(r for r in ROLES if r in places)}.")
    found = known.get(role) or split_of(source, role, places[role])
    if role != "train" and role not in known:
        refuse_leak(records, source, found, "take them out of it, or add --split train to score what was trained on.")
    return found.sampled(limit, config.seed, source.labels), own or role in known


def _default(source: Source, places: Mapping[str, str]) -> str:
    found = next((role for role in ("test", "validation") if role in places), None)
    if found is None:
        images = f"its {len(source.splits[places['train']]):,} images" if "train" in places else "what it has"
        raise UsageError(
            f"{source.name} has no test or validation split; to score {images}, trained on or not, add --split train."
        )
    return found


def _recorded(record: Record, source: Source, *, own: bool) -> dict[str, Split]:
    """What the run recorded, if this is its data set: the same place, or at least half of the same images."""
    found = recall(record, source, moved=not own)
    if not own:
        found = {role: s for role, s in found.items() if 2 * len(s.rows) >= len(record.splits[role].ids)}
    if own or found:
        for sentence in news(record, source, found):
            console.note(sentence)
    for role, one in record.splits.items():
        if own and role not in found and one.ids:
            raise DataError(
                f"none of the {len(one.ids):,} {role} images of {record.run} is in {source.name}: it is another data "
                "set now; say so with --dataset, and score what it holds out."
            )
    return found


def _drawn_again(card: Card, source: Source, *, own: bool) -> dict[str, Split]:
    """The splits of a checkpoint that lies outside of its run, as its settings draw them."""
    settings = card.config
    drawn = make_splits(
        source, val_fraction=settings.val_fraction, max_train_samples=settings.max_train_samples,
        max_eval_samples=settings.max_eval_samples, seed=settings.seed,
    )  # fmt: skip
    same = {role: split.hash == card.splits.get(role, {}).get("hash") for role, split in drawn.items()}
    if all(same.values()):
        return drawn
    if own:
        others = ", ".join(role for role, equal in same.items() if not equal)
        console.warn(
            f"the data has changed, or was split by an earlier version ({others}: another hash than the checkpoint "
            "says), and no splits.json lies beside the checkpoint: some of what is scored may have been trained on."
        )
        return drawn
    console.warn("no splits.json lies beside the checkpoint: whether these images were trained on cannot be told.")
    return {}


def settled_by(checkpoint: Path, source: Source, config: TrainConfig) -> dict[str, NDArray[np.int8]] | None:
    """On which side the runs that a checkpoint comes from had the images of a data set; None if nobody knows."""
    line = [one for one in lineage(checkpoint) if one.record is not None]
    records = [one.record for one in line if one.record is not None]
    moved = [one.card.config.dataset != config.dataset for one in line]
    return settle(records, moved, source) if records else None


def refuse_trained(checkpoint: Path, source: Source, splits: Mapping[str, Split]) -> None:
    """Raise DataError if the data set's own validation or test split holds what a checkpoint was trained on."""
    records = [one.record for one in lineage(checkpoint) if one.record is not None]
    for role, split in splits.items():
        if role != "train" and ("train" not in splits or split.source != splits["train"].source):
            refuse_leak(records, source, split, "leave them out with --exclude, or begin from another model.")
