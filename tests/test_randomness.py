"""Philox against its published test vectors, and the properties that the package relies on."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vitft.randomness import derive_seed, permutation, philox, random_words, uniform

SEEDS = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ONES] * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            hexadecimal("243f6a88 85a308d3 13198a2e 03707344"),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_it_is_philox_4x32_10(counter: list[int], key: tuple[int, int], expected: str) -> None:
    """The known-answer tests of Random123 (Salmon et al. 2011)."""
    assert philox(np.array([counter], np.uint64), key)[0].tolist() == hexadecimal(expected)


@given(seed=SEEDS, epoch=st.integers(0, 1000), count=st.integers(0, 500))
def test_an_order_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    assert sorted(permutation(seed, "order", epoch, count).tolist()) == list(range(count))


def test_an_order_depends_only_on_seed_purpose_and_epoch() -> None:
    orders = [
        permutation(0, "order", 0, 100),
        permutation(1, "order", 0, 100),
        permutation(0, "other", 0, 100),
        permutation(0, "order", 1, 100),
    ]

    assert len({tuple(permutation.tolist()) for permutation in orders}) == 4
    assert permutation(0, "order", 0, 100).tolist() == orders[0].tolist()


@given(seed=SEEDS, index=st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_random_numbers_of_a_sample_do_not_depend_on_its_batch(seed: int, index: list[int]) -> None:
    together = random_words(seed, "crop", 3, np.array(index))
    alone = np.concatenate([random_words(seed, "crop", 3, np.array([i])) for i in index])

    assert together.tolist() == alone.tolist()


def test_other_draws_give_other_numbers() -> None:
    index = np.arange(100)

    assert not (random_words(0, "crop", 0, index, draw=0) == random_words(0, "crop", 0, index, draw=1)).any()


@pytest.mark.parametrize("column", range(4))
def test_uniforms_are_uniform(column: int) -> None:
    numbers = uniform(7, "crop", 2, np.arange(20_000))[:, column]

    assert numbers.min() >= 0
    assert numbers.max() < 1
    # The seed is fixed, so this cannot fail by chance; for visible unevenness p would be far below 0.001.
    assert stats.chisquare(np.histogram(numbers, bins=100, range=(0, 1))[0]).pvalue > 0.001


@pytest.mark.parametrize("lag", [1, 2, 32])
def test_neighboring_indices_are_not_correlated(lag: int) -> None:
    numbers = uniform(7, "crop", 2, np.arange(20_000))[:, 0]

    # 4 standard errors of the correlation of 20,000 independent pairs
    assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 4 / np.sqrt(20_000)


def test_neighboring_epochs_and_seeds_are_not_correlated() -> None:
    index = np.arange(20_000)
    numbers = [uniform(seed, "crop", epoch, index)[:, 0] for seed, epoch in [(0, 0), (0, 1), (1, 0)]]

    off_diagonal = np.corrcoef(numbers)[np.triu_indices(3, 1)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(20_000)


def test_torch_seeds_depend_on_every_number_and_its_position() -> None:
    seeds = {
        derive_seed(seed, purpose, *numbers)
        for seed in (0, 1)
        for purpose in ("dropout", "head")
        for numbers in [(0, 1), (1, 0), (0, 0), (1, 1), (0, 1, 0)]
    }

    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)  # the range of torch.manual_seed


def test_random_numbers_stay_the_same_across_versions() -> None:
    """A run may resume with a later version of this code, so counters and keys of samples must never change."""
    seed = 2**40 + 7
    key = (7, zlib.crc32(b"crop") ^ 2**8)
    counters = np.array([[0, 2, 5, 1], [9, 0, 5, 1]], np.uint64)  # index in two words, epoch, draw
    numbers = random_words(seed, "crop", 5, np.array([2**33, 9]), draw=1)
    assert numbers.tolist() == philox(counters, key).tolist()
    assert uniform(seed, "crop", 5, np.array([2**33, 9]), draw=1).tolist() == (numbers / 2**32).tolist()
    first = random_words(seed, "order", 2, np.arange(50)).tolist()
    assert permutation(seed, "order", 2, 50).tolist() == sorted(
        range(50), key=lambda i: first[i][0] * 2**32 + first[i][1]
    )
    assert derive_seed(1, "dropout", 2, 3, 4) == 3731270403847504835
