"""Randomness as a function of (seed, purpose, epoch, index), never a state that is carried along.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
a block cipher of a counter. So what happens to a sample depends on nothing but its own numbers: not
on workers, not on the number of processes, not on where a run was stopped.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Encrypt counters (n, 4) of 32-bit words under a key of two words; the result is (n, 4) alike."""
    a, b, c, d = (counter[:, i].astype(np.uint64) for i in range(4))
    low, high = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _HALF) ^ b ^ np.uint64(low),
            second & _LOW,
            (first >> _HALF) ^ d ^ np.uint64(high),
            first & _LOW,
        )
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1)


def words(seed: int, purpose: str, epoch: int, index: NDArray[np.integer[Any]], draw: int = 0) -> NDArray[np.uint64]:
    """Four random 32-bit words for each index: (n,) -> (n, 4). `draw` numbers further fours."""
    counter = np.empty((len(index), 4), np.uint64)
    counter[:, 0] = index.astype(np.uint64) & _LOW
    counter[:, 1] = index.astype(np.uint64) >> _HALF
    counter[:, 2], counter[:, 3] = epoch, draw
    return philox(counter, (seed & 0xFFFFFFFF, zlib.crc32(purpose.encode()) ^ (seed >> 32)))


def uniform(seed: int, purpose: str, epoch: int, index: NDArray[np.int64], draw: int = 0) -> NDArray[np.float64]:
    """Four numbers in [0, 1) for each index: (n,) -> (n, 4)."""
    return words(seed, purpose, epoch, index, draw) / 2.0**32


def order(seed: int, purpose: str, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of range(count): the indices sorted by their random words."""
    drawn = words(seed, purpose, epoch, np.arange(count))
    return np.argsort(drawn[:, 0] << _HALF | drawn[:, 1], kind="stable")


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """One 64-bit seed for torch's generator, from (seed, purpose, numbers...)."""
    drawn = 0
    for number in numbers or (0,):
        first, second, *_ = words(seed ^ drawn, purpose, 0, np.array([number]))[0].tolist()
        drawn = first << 31 | second >> 1
    return drawn
