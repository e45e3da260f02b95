"""Random numbers as a function of (seed, purpose, epoch, index), without generator state.

The generator is Philox-4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). A sample's random numbers therefore do not depend on data loader workers, the number of processes, or where
a run was interrupted.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox-4x32-10 of counters (n, 4) under a key of two words: (n, 4), all 32-bit words in uint64."""
    a, b, c, d = (counter[:, i].astype(np.uint64) for i in range(4))
    low, high = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _WORD_BITS) ^ b ^ np.uint64(low),
            second & _LOW_WORD,
            (first >> _WORD_BITS) ^ d ^ np.uint64(high),
            first & _LOW_WORD,
        )
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1)


def random_words(
    seed: int, purpose: str, epoch: int, index: NDArray[np.integer[Any]], draw: int = 0
) -> NDArray[np.uint64]:
    """Four random 32-bit words for each index: (n,) -> (n, 4). Another `draw` gives four more."""
    counter = np.empty((len(index), 4), np.uint64)
    counter[:, 0] = index.astype(np.uint64) & _LOW_WORD
    counter[:, 1] = index.astype(np.uint64) >> _WORD_BITS
    counter[:, 2], counter[:, 3] = epoch, draw
    return philox(counter, (seed & 0xFFFFFFFF, zlib.crc32(purpose.encode()) ^ (seed >> 32)))


def uniform(seed: int, purpose: str, epoch: int, index: NDArray[np.int64], draw: int = 0) -> NDArray[np.float64]:
    """Four uniform random numbers in [0, 1) for each index: (n,) -> (n, 4)."""
    return random_words(seed, purpose, epoch, index, draw) / 2.0**32


def permutation(seed: int, purpose: str, epoch: int, count: int) -> NDArray[np.int64]:
    """A random permutation of range(count): the indices sorted by their random words."""
    keys = random_words(seed, purpose, epoch, np.arange(count))
    return np.argsort(keys[:, 0] << _WORD_BITS | keys[:, 1], kind="stable")


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for torch.manual_seed, below 2**63, from (seed, purpose, numbers...)."""
    result = 0
    for number in numbers or (0,):
        first, second, *_ = random_words(seed ^ result, purpose, 0, np.array([number]))[0].tolist()
        result = first << 31 | second >> 1
    return result
