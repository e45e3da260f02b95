"""A stratified choice of rows: seeded, exact in number, nested. A pure function."""

import numpy as np
from numpy.typing import NDArray

from vitft.randomness import words


def stratified(
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    take: int,
    seed: int,
    purpose: str,
    *,
    leave_one: bool = False,
) -> NDArray[np.bool_]:
    """Choose `take` of n rows, each class in proportion: (n,) class indices, (n,) row numbers -> (n,) mask.

    Within a class, rows come in the order of their random words, so a smaller choice lies within a
    greater one up to the rounding of the quotas. More than there is takes all. With `leave_one` every
    class keeps at least one row unchosen, so a class with a single row is never emptied.
    """
    sizes = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    quota = quotas(sizes, take, leave_one=leave_one)
    drawn = words(seed, purpose, 0, rows)
    order = np.lexsort((rows, drawn[:, 1], drawn[:, 0], labels))
    first = np.cumsum(sizes) - sizes  # where each class begins in that order
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[labels[order]]
    return np.asarray(rank < quota[labels])


def quotas(sizes: NDArray[np.int64], take: int, *, leave_one: bool = False) -> NDArray[np.int64]:
    """How many of each class: its share of `take`, rounded by largest remainder; the sum is exact."""
    room = np.maximum(sizes - 1, 0) if leave_one else sizes
    total, take = int(sizes.sum()), min(take, int(room.sum()))
    if total == 0:
        return np.zeros_like(sizes)
    shares, remainders = np.divmod(sizes.astype(np.int64) * take, total)
    quota = np.minimum(shares, room)
    by_remainder = np.lexsort((np.arange(len(sizes)), -remainders))
    while (left := take - int(quota.sum())) > 0:
        open_classes = by_remainder[(quota < room)[by_remainder]]
        quota[open_classes[:left]] += 1
    return quota
