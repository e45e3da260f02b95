"""Split a dataset into train, validation and test: by each image's identity, seeded, and recorded with a hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from vitft.data.sampling import HELD_OUT, OPEN, TEST, TRAIN, Labels, Mask, Sides, hold_out, stratified_sample
from vitft.data.sources.identity import content_hashes, has_names, ids, is_streamed, keys_of
from vitft.data.sources.schema import ROLES, ROW, role_of, whole_numbers
from vitft.data.sources.source import Source, class_indices
from vitft.errors import DataError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows of one source split that play one role; all lists have the same length n."""

    name: str  # the role: train, validation or test
    source: str  # the source's split that the rows come from
    rows: Rows  # positions there: ascending, or in the order that a run recorded
    numbers: Rows  # their row numbers in all of that split: as positions, unless images were excluded
    labels: Labels  # class indices
    ids: Sequence[str | int]  # see `identity.ids`; row numbers in runs of early versions
    hash: str  # of the source split's name, the ids and their class names

    def select(self, mask: Mask, class_names: Sequence[str]) -> "Split":
        """The split restricted to the rows where the mask, (n,), is true."""
        if mask.all():
            return self
        labels = self.labels[mask]
        names = [name for name, selected in zip(self.ids, mask.tolist(), strict=True) if selected]
        digest = split_hash(self.source, names, labels, class_names)
        rows, numbers = self.rows[mask], self.numbers[mask]
        return replace(self, rows=rows, numbers=numbers, labels=labels, ids=names, hash=digest)

    def sampled(self, limit: int | None, seed: int, class_names: Sequence[str]) -> "Split":
        """A stratified sample of at most `limit` rows; None takes all."""
        if limit is None or limit >= len(self.rows):
            return self
        keys = keys_of([str(name) for name in self.ids])
        return self.select(stratified_sample(self.labels, keys, limit, seed, f"{self.name} sample"), class_names)


def make_splits(
    source: Source,
    *,
    val_fraction: float,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    test_fraction: float = 0.0,
    sides: Mapping[str, Sides] | None = None,
) -> dict[str, Split]:
    """Choose train, validation and test: a pure function of the source and these settings.

    Test and validation are the source's own splits, or else about `test_fraction` of train, and then `val_fraction` of
    what is left: see `sampling.hold_out`. Samples are drawn after that. A split that does not exist has no key. `sides`
    gives, by source split, the side that earlier runs had each row on. Raises DataError if no split can be used.
    """
    names = {role: find_split_name(source, role) for role in ROLES}
    splits = {
        role: whole_split(source, role, name)
        for role, name in names.items()
        if name is not None and len(source.splits[name])
    }
    if not splits:
        raise DataError(
            f"{source.name}: no split with images is named train, validation or test; "
            f"it has {', '.join(source.splits) or 'none'}."
        )
    if "train" in splits:
        train = splits["train"]
        fixed = (sides or {}).get(train.source, np.full(len(train.rows), OPEN, np.int8))
        kept = np.ones(len(train.rows), bool)
        if names["test"] is None:  # images of an earlier run's test stay that, and none of its others become it
            tested = np.select([fixed == TEST, fixed != OPEN], [HELD_OUT, TRAIN], OPEN)
            held_out = _drawn(train, test_fraction, seed, "test", tested)
            if held_out.any():
                splits["test"] = replace(train.select(held_out, source.labels), name="test")
                kept &= ~held_out
        if val_fraction > 0:
            rest, fixed = train.select(kept, source.labels), np.where(fixed == TEST, HELD_OUT, fixed)[kept]
            held_out = fixed == HELD_OUT
            if names["validation"] is None:
                held_out = _drawn(rest, val_fraction, seed, "validation", fixed)
                if held_out.any():
                    splits["validation"] = replace(rest.select(held_out, source.labels), name="validation")
            kept[kept] = ~held_out
        splits["train"] = train.select(kept, source.labels)
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    return {role: splits[role].sampled(limits[role], seed, source.labels) for role in ROLES if role in splits}


def _drawn(train: Split, fraction: float, seed: int, purpose: str, sides: Sides) -> Mask:
    """The images of a split to hold out: a mask (n,)."""
    return hold_out(train.labels, keys_of([str(name) for name in train.ids]), fraction, seed, purpose, sides)


def whole_split(source: Source, role: str, name: str) -> Split:
    """All rows of the source's split `name`, in a role."""
    split = source.splits[name]
    labels = class_indices(split)
    rows = np.arange(len(labels))
    names = ids(split, rows)
    digest = split_hash(name, names, labels, source.labels)
    return Split(role, name, rows, whole_numbers(split, ROW), labels, names, digest)


def find_split_name(source: Source, role: str) -> str | None:
    """The source's name for the split with this role; a single split that is not named for a role is train."""
    lower = {name.lower(): name for name in source.splits}
    found = next((lower[name] for name in ROLES[role] if name in lower), None)
    if found is None and role == "train" and len(lower) == 1:
        (only,) = source.splits
        return None if role_of(only) else str(only)
    return found


def manifest(source: Source, splits: Mapping[str, Split], *, contents: bool = True) -> dict[str, Any]:
    """The content of `splits.json`, JSON-ready: the images of each split, and the size of each source split.

    `classes` has the number of images of each of the `labels`; `decisions` and `warnings` say how the source was read.
    `by` says whether the ids are paths, content hashes, or places in shards. Paths come with `contents`, the hashes of
    `contents_of`.
    """
    hashes = contents_of(source, splits) if contents else {}
    document: dict[str, Any] = {
        "dataset": source.name,
        "revision": source.revision,
        "labels": list(source.labels),
        "images": {str(name): len(split) for name, split in source.splits.items()},
        "decisions": list(source.decisions),
        "warnings": list(source.warnings),
        "splits": {},
    }
    for role, split in splits.items():
        entry: dict[str, Any] = {
            "source": split.source,
            "count": len(split.rows),
            "hash": split.hash,
            "ids": list(split.ids),
            "classes": np.bincount(split.labels, minlength=len(source.labels)).tolist(),
        }
        by = {"by": _identified_by(source.splits[split.source])}
        document["splits"][role] = entry | by | ({"contents": hashes[role]} if role in hashes else {})
    return document


def _identified_by(rows: datasets.Dataset) -> str:
    if is_streamed(rows):
        return "shard"
    return "path" if has_names(rows) else "content"


def contents_of(source: Source, splits: Mapping[str, Split]) -> dict[str, list[str]]:
    """The content hashes of the images that are identified by their paths, by role: 16 hex digits each."""
    rows = {role: source.splits[split.source] for role, split in splits.items()}
    by_path = [role for role, split in rows.items() if _identified_by(split) == "path"]
    return {role: content_hashes(rows[role], splits[role].rows) for role in by_path}


def split_hash(name: str, ids: Sequence[str | int], labels: Labels, class_names: Sequence[str]) -> str:
    """16 hex digits that identify these images, by the source split's name, the ids and their class names."""
    content = [name, list(ids), [class_names[label] for label in labels.tolist()]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
