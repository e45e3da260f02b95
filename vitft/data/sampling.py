"""Which images are chosen: by numbers drawn for each image's key, never for its place. Pure functions."""

import numpy as np
from numpy.typing import NDArray

from vitft.randomness import words

Keys = NDArray[np.uint64]  # a number that stands for an image: see `identity`
OPEN, TRAIN, HELD_OUT = -1, 0, 1  # what is settled of an image before the drawing: nothing, or its side


def apart(
    labels: NDArray[np.int64], keys: Keys, share: float, seed: int, purpose: str,
    settled: NDArray[np.int8] | None = None,
) -> NDArray[np.bool_]:  # fmt: skip
    """Set about a share of n images apart: (n,) class indices, (n,) keys -> (n,) mask.

    An image is apart if the number drawn for it, in [0, 1), is below the share: that depends on nothing but the
    image, so adding or removing others moves it nowhere. A class of n images has n·share ± sqrt(n·share) apart.
    Two rules look at the others, for classes that this leaves with nothing on one side:

    - A class of at least 1/share images with none below gives its lowest; a data set with none at all, too.
    - A class with all below keeps its highest, so no class is emptied.

    So an image moves only where it is, before or after, its class's only one on one side. Images with equal keys
    stay together. Of images that are `settled`, their side is kept.
    """
    drawn = _drawn(keys, seed, purpose)
    settled = np.full(len(labels), OPEN, np.int8) if settled is None else settled
    free = settled == OPEN
    chosen = np.where(free, drawn < np.uint64(share * 2**64), settled == HELD_OUT)
    if share == 0 or len(labels) == 0:
        return np.asarray(chosen & ~free)
    sizes = np.bincount(labels)
    taken = np.bincount(labels[chosen], minlength=len(sizes))
    lowest, highest = np.full(len(sizes), ~np.uint64(0)), np.zeros(len(sizes), np.uint64)
    np.minimum.at(lowest, labels[free], drawn[free])
    np.maximum.at(highest, labels[free], drawn[free])
    wanting = (taken == 0) & (sizes * share >= 1)
    if not chosen.any() and not wanting.any() and len(labels) * share >= 0.5:
        several = np.flatnonzero(lowest < highest)
        wanting[several[np.argsort(lowest[several])[:1]]] = True
    chosen |= free & wanting[labels] & (drawn == lowest[labels])
    full = np.bincount(labels[chosen], minlength=len(sizes)) == sizes
    chosen &= ~(free & full[labels] & (drawn == highest[labels]))
    return chosen


def stratified(labels: NDArray[np.int64], keys: Keys, take: int, seed: int, purpose: str) -> NDArray[np.bool_]:
    """Choose exactly `take` of n images, each class in proportion: (n,) class indices, (n,) keys -> (n,) mask.

    Within a class, images come in the order of the numbers drawn for them, so a smaller choice lies within a
    greater one up to the rounding of the quotas, and of a data set that grew by a percent about one percent of
    the choice is another. More than there is takes all.
    """
    sizes = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    quota = quotas(sizes, take)
    order = np.lexsort((keys, _drawn(keys, seed, purpose), labels))
    first = np.cumsum(sizes) - sizes  # where each class begins in that order
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[labels[order]]
    return np.asarray(rank < quota[labels])


def _drawn(keys: Keys, seed: int, purpose: str) -> NDArray[np.uint64]:
    """A random number of 64 bits for each key."""
    found = words(seed, purpose, 0, keys)
    return found[:, 0] << np.uint64(32) | found[:, 1]


def quotas(sizes: NDArray[np.int64], take: int) -> NDArray[np.int64]:
    """How many of each class: its share of `take`, rounded by largest remainder; the sum is exact."""
    total = int(sizes.sum())
    take = min(take, total)
    if total == 0:
        return np.zeros_like(sizes)
    shares, remainders = np.divmod(sizes.astype(np.int64) * take, total)
    quota = np.minimum(shares, sizes)
    by_remainder = np.lexsort((np.arange(len(sizes)), -remainders))
    while (left := take - int(quota.sum())) > 0:
        open_classes = by_remainder[(quota < sizes)[by_remainder]]
        quota[open_classes[:left]] += 1
    return quota
