"""Which image is for training, validation and test: stratified, seeded, and recorded with a hash."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.data.choice import stratified
from vitft.data.schema import ROLES, role_of
from vitft.data.sources import Source, class_indices, sample_ids
from vitft.errors import DataError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows of one source split that play one role; the arrays are (n,) and of equal length."""

    name: str  # its role: train, validation or test
    source: str  # the source's split that the rows are of
    rows: Rows  # row numbers there, ascending
    labels: NDArray[np.int64]  # their class indices
    hash: str  # of the source split's name, the rows' ids and their class names


def make_splits(
    source: Source,
    *,
    val_fraction: float,
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
) -> dict[str, Split]:
    """Decide on train, validation and test: a pure function of the source and these settings.

    Validation is the source's own, else a stratified share of train; a class with one image stays in
    train. Samples of train are taken after that. What does not exist (a test split, say) has no key.
    Raises DataError if no split is of use.
    """
    names = {role: split_for(source, role) for role in ROLES}
    chosen: dict[str, tuple[str, Rows, Rows]] = {}
    for role, name in names.items():
        if name is not None and len(labels := class_indices(source.splits[name])):
            chosen[role] = (name, np.arange(len(labels)), labels)
    if not chosen:
        raise DataError(
            f"{source.name}: no split with images is called train, validation or test; "
            f"it has {', '.join(source.splits) or 'none'}."
        )
    if "train" in chosen and names["validation"] is None:
        name, rows, labels = chosen["train"]
        count = int(val_fraction * len(rows) + 0.5)
        apart = stratified(labels, rows, count, seed, "validation", leave_one=True)
        chosen["train"] = (name, rows[~apart], labels[~apart])
        if apart.any():
            chosen["validation"] = (name, rows[apart], labels[apart])
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    splits = {}
    for role in (role for role in ROLES if role in chosen):
        name, rows, labels = chosen[role]
        limit = limits[role]
        if limit is not None and limit < len(rows):
            taken = stratified(labels, rows, limit, seed, f"{role} sample")
            rows, labels = rows[taken], labels[taken]
        splits[role] = Split(role, name, rows, labels, split_hash(source, name, rows, labels))
    return splits


def split_for(source: Source, role: str) -> str | None:
    """The name of the source's split for a role; an only split, if not called otherwise, is train."""
    lower = {name.lower(): name for name in source.splits}
    found = next((lower[name] for name in ROLES[role] if name in lower), None)
    if found is None and role == "train" and len(lower) == 1:
        (only,) = source.splits
        return None if role_of(only) else str(only)
    return found


def manifest(source: Source, splits: dict[str, Split]) -> dict[str, Any]:
    """What `splits.json` records, JSON-ready: ids are relative paths of files, or row numbers."""
    return {
        "dataset": source.name,
        "revision": source.revision,
        "labels": list(source.labels),
        "splits": {
            role: {
                "source": split.source,
                "count": len(split.rows),
                "hash": split.hash,
                "ids": list(sample_ids(source.splits[split.source], split.rows)),
            }
            for role, split in splits.items()
        },
    }


def split_hash(source: Source, name: str, rows: Rows, labels: NDArray[np.int64]) -> str:
    """16 hex digits that name these samples, by their ids and class names."""
    ids = sample_ids(source.splits[name], rows)
    content = [name, list(ids), [source.labels[label] for label in labels]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
