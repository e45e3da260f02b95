"""Choose images by random numbers drawn for each image's key, never for its position. Pure functions."""

import numpy as np
from numpy.typing import NDArray

from vitft.randomness import permutation, random_words

Labels = NDArray[np.int64]  # class indices
Mask = NDArray[np.bool_]
Sides = NDArray[np.int8]  # of each image: OPEN, TRAIN, HELD_OUT or TEST
Keys = NDArray[np.uint64]  # a number that identifies an image: see `identity`
OPEN, TRAIN, HELD_OUT, TEST = -1, 0, 1, 2  # the side an image must be on: any, training, held out, held out for a test


def hold_out(labels: Labels, keys: Keys, fraction: float, seed: int, purpose: str, sides: Sides | None = None) -> Mask:
    """Hold out about a fraction of n images: (n,) class indices, (n,) keys -> (n,) mask.

    An image is held out if the number drawn for it, in [0, 1), is below the fraction. This depends on nothing but the
    image, so adding or removing other images does not move it. A class of n images has n·fraction ± sqrt(n·fraction)
    held out. Two rules do look at other images, so that no class lacks one side:

    - A class of at least 1/fraction images with none below it holds out its lowest; so does a dataset with none at all.
    - A class with all images below it keeps its highest, so that no class is emptied.

    An image can therefore move only if it is, before or after, the only one of its class on its side. Images with
    equal keys stay together. `sides`, (n,), fixes the side of images that are not OPEN.
    """
    drawn = _random_words(keys, seed, purpose)
    sides = np.full(len(labels), OPEN, np.int8) if sides is None else sides
    free = sides == OPEN
    chosen = np.where(free, drawn < np.uint64(fraction * 2**64), sides == HELD_OUT)
    if fraction == 0 or len(labels) == 0:
        return np.asarray(chosen & ~free)
    sizes = np.bincount(labels)
    held_out = np.bincount(labels[chosen], minlength=len(sizes))
    lowest, highest = np.full(len(sizes), ~np.uint64(0)), np.zeros(len(sizes), np.uint64)
    np.minimum.at(lowest, labels[free], drawn[free])
    np.maximum.at(highest, labels[free], drawn[free])
    lacking = (held_out == 0) & (sizes * fraction >= 1)
    if not chosen.any() and not lacking.any() and len(labels) * fraction >= 0.5:
        several = np.flatnonzero(lowest < highest)
        lacking[several[np.argsort(lowest[several])[:1]]] = True
    chosen |= free & lacking[labels] & (drawn == lowest[labels])
    full = np.bincount(labels[chosen], minlength=len(sizes)) == sizes
    chosen &= ~(free & full[labels] & (drawn == highest[labels]))
    return chosen


def stratified_sample(labels: Labels, keys: Keys, count: int, seed: int, purpose: str) -> Mask:
    """Choose exactly `count` of n images, in proportion to class sizes: (n,) class indices, (n,) keys -> (n,) mask.

    Within a class, images are ordered by the numbers drawn for them. So a smaller sample is a subset of a larger one,
    up to the rounding of the quotas, and a dataset that grew by 1 % keeps about 99 % of its sample. A `count` above n
    takes all images.
    """
    sizes = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    quota = quotas(sizes, count)
    order = np.lexsort((keys, _random_words(keys, seed, purpose), labels))
    first = np.cumsum(sizes) - sizes  # where each class begins in that order
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[labels[order]]
    return np.asarray(rank < quota[labels])


def _random_words(keys: Keys, seed: int, purpose: str) -> NDArray[np.uint64]:
    """A random 64-bit number for each key."""
    drawn = random_words(seed, purpose, 0, keys)
    return drawn[:, 0] << np.uint64(32) | drawn[:, 1]


def quotas(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Images to take from each class: `count` in proportion to the sizes, rounded by largest remainder."""
    total = int(sizes.sum())
    count = min(count, total)
    if total == 0:
        return np.zeros_like(sizes)
    quota, remainders = np.divmod(sizes.astype(np.int64) * count, total)
    largest_first = np.lexsort((np.arange(len(sizes)), -remainders))
    quota[largest_first[: count - int(quota.sum())]] += 1
    return quota


REPEAT_BITS = 32  # of a draw, the lower bits are the image's position, the higher ones count its earlier draws


def uniform_order(labels: Labels, seed: int, epoch: int) -> NDArray[np.int64]:
    """An epoch of n images in random order, each once: (n,) class indices -> (n,) positions."""
    return permutation(seed, "order", epoch, len(labels))


def balanced_order(labels: Labels, seed: int, epoch: int) -> NDArray[np.int64]:
    """An epoch of n draws from n images with each class equally often, up to one draw: (n,) -> (n,).

    A draw is a position plus 2**32 times how often the epoch has drawn it before, so that repeats can be augmented
    differently. An image is only drawn again once all others of its class are.
    """
    count, sizes = len(labels), np.bincount(labels)
    classes = np.flatnonzero(sizes)
    order = permutation(seed, "balanced", epoch, count)
    order = order[np.argsort(labels[order], kind="stable")]  # by class
    first = np.cumsum(sizes) - sizes
    each, rest = divmod(count, len(classes))
    more = permutation(seed, "balanced classes", epoch, len(classes)) < rest  # which classes get one more
    parts = []
    for label, extra in zip(classes.tolist(), more.tolist(), strict=True):
        repeats, place = np.divmod(np.arange(each + extra), sizes[label])
        parts.append(order[first[label] + place] + (repeats << REPEAT_BITS))
    return np.concatenate(parts)[permutation(seed, "order", epoch, count)]


_LANES, _SPREAD = 16, 2


def streamed_order(blocks: NDArray[np.int64], seed: int, epoch: int, batch_size: int) -> NDArray[np.int64]:
    """An epoch of n images, each once, in an order that reads few blocks at a time: (n,) blocks -> (n,) positions.

    A block is what is fetched together. The blocks, in random order, are cut into 16 lanes of equally many images, and
    every batch takes from all lanes, in their order: several machines, which share a batch, need different blocks.
    Within a lane, an image moves back at random by up to two mean blocks, so that about 16 x 3 blocks are in use.
    """
    count, (names, block) = len(blocks), np.unique(blocks, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[permutation(seed, "blocks", epoch, len(names))] = np.arange(len(names))
    by_block = np.argsort(rank[block], kind="stable")
    drawn = random_words(seed, "order", epoch, np.arange(count, dtype=np.uint64))[:, 0] / 2**32
    reach = _SPREAD * count / max(1, len(names))
    order = np.empty(count, np.int64)
    for lane, images in enumerate(np.array_split(by_block, _LANES)):
        order[lane::_LANES] = images[np.argsort(np.arange(len(images)) + reach * drawn[images], kind="stable")]
    number = np.arange(count)
    return order[np.lexsort((number, number % _LANES, number // batch_size))]


def images_in_use(blocks: NDArray[np.int64]) -> int:
    """About how many of n images are in the blocks that `streamed_order` uses at a time."""
    return _LANES * (_SPREAD + 1) * len(blocks) // max(1, len(np.unique(blocks)))


def positions(draws: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions of the images of draws, of any shape: see `balanced_order`."""
    return draws & (1 << REPEAT_BITS) - 1
