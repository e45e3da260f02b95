"""Which image is for training, validation and test: by its own identity, seeded, and recorded with a hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.data.sampling import HELD_OUT, OPEN, apart, stratified
from vitft.data.sources.identity import contents, has_own_files, ids, keys_of
from vitft.data.sources.schema import ROLES, role_of
from vitft.data.sources.source import Source, class_indices
from vitft.errors import DataError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows of one source split that play one role; rows, labels and ids are of equal length n."""

    name: str  # its role: train, validation or test
    source: str  # the source's split that the rows are of
    rows: Rows  # row numbers there: ascending, or as a run recorded them
    labels: NDArray[np.int64]  # their class indices
    ids: Sequence[str | int]  # who they are: see `identity.ids`; numbers of rows in runs of old
    hash: str  # of the source split's name, the ids and their class names

    def select(self, kept: NDArray[np.bool_], names: Sequence[str]) -> "Split":
        """The split with these of its rows: (n,) mask; `names` are those of the classes."""
        if kept.all():
            return self
        rows, labels = self.rows[kept], self.labels[kept]
        left = [one for one, stays in zip(self.ids, kept.tolist(), strict=True) if stays]
        return replace(self, rows=rows, labels=labels, ids=left, hash=split_hash(self.source, left, labels, names))

    def sampled(self, limit: int | None, seed: int, names: Sequence[str]) -> "Split":
        """The split with at most so many of its rows, stratified."""
        if limit is None or limit >= len(self.rows):
            return self
        keys = keys_of([str(one) for one in self.ids])
        return self.select(stratified(self.labels, keys, limit, seed, f"{self.name} sample"), names)


def make_splits(
    source: Source,
    *,
    val_fraction: float,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    settled: Mapping[str, NDArray[np.int8]] | None = None,
) -> dict[str, Split]:
    """Decide on train, validation and test: a pure function of the source and these settings.

    Validation is the source's own, else about a share of train: see `choice.apart`. Samples are taken after
    that. What does not exist (a test split, say) has no key. `settled` says of a source split's rows which side
    an earlier run had them on. Raises DataError if no split is of use.
    """
    names = {role: split_for(source, role) for role in ROLES}
    chosen = {
        role: split_of(source, role, name)
        for role, name in names.items()
        if name is not None and len(source.splits[name])
    }
    if not chosen:
        raise DataError(
            f"{source.name}: no split with images is called train, validation or test; "
            f"it has {', '.join(source.splits) or 'none'}."
        )
    if "train" in chosen and names["validation"] is None and val_fraction > 0:
        train = chosen["train"]
        keys = keys_of([str(one) for one in train.ids])
        sides = (settled or {}).get(train.source, np.full(len(keys), OPEN, np.int8))
        out = apart(train.labels, keys, val_fraction, seed, "validation", sides)
        chosen["train"] = train.select(~out, source.labels)
        if out.any():
            chosen["validation"] = replace(train.select(out, source.labels), name="validation")
    elif "train" in chosen and settled and val_fraction > 0:  # what was held out is not trained on
        train = chosen["train"]
        if train.source in settled:
            chosen["train"] = train.select(settled[train.source] != HELD_OUT, source.labels)
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    return {role: chosen[role].sampled(limits[role], seed, source.labels) for role in ROLES if role in chosen}


def split_of(source: Source, role: str, name: str) -> Split:
    """All rows of one of the source's splits, to play a role."""
    labels = class_indices(source.splits[name])
    rows = np.arange(len(labels))
    names = ids(source.splits[name], rows)
    return Split(role, name, rows, labels, names, split_hash(name, names, labels, source.labels))


def split_for(source: Source, role: str) -> str | None:
    """The name of the source's split for a role; an only split, if not called otherwise, is train."""
    lower = {name.lower(): name for name in source.splits}
    found = next((lower[name] for name in ROLES[role] if name in lower), None)
    if found is None and role == "train" and len(lower) == 1:
        (only,) = source.splits
        return None if role_of(only) else str(only)
    return found


def manifest(source: Source, splits: Mapping[str, Split]) -> dict[str, Any]:
    """What `splits.json` records, JSON-ready: who is in which split, and how many images there were in all.

    `by` says what the ids are; beside paths stand the hashes of what the files hold, in 16 hex digits each.
    """
    document: dict[str, Any] = {
        "dataset": source.name,
        "revision": source.revision,
        "labels": list(source.labels),
        "images": {str(name): len(split) for name, split in source.splits.items()},
        "splits": {},
    }
    for role, split in splits.items():
        rows = source.splits[split.source]
        listed = {"source": split.source, "count": len(split.rows), "hash": split.hash, "ids": list(split.ids)}
        if has_own_files(rows):
            listed |= {"by": "path", "contents": [f"{key:016x}" for key in contents(rows, split.rows).tolist()]}
        else:
            listed |= {"by": "content"}
        document["splits"][role] = listed
    return document


def split_hash(name: str, ids: Sequence[str | int], labels: NDArray[np.int64], names: Sequence[str]) -> str:
    """16 hex digits that name these images, by the source split's name, their ids and their class names."""
    content = [name, list(ids), [names[label] for label in labels.tolist()]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
