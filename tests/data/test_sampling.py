"""The order of streamed images: each once, few blocks at a time, different ones for each process, well mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitft.data.sampling import images_in_use, streamed_order


def blocks_of(count: int, size: int) -> np.ndarray:
    return np.arange(count * size) // size


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    batch=st.integers(1, 100),
)
def test_every_image_once(sizes: list[int], seed: int, epoch: int, batch: int) -> None:
    blocks = np.repeat(np.arange(len(sizes)), sizes) * 3 + 5
    order = streamed_order(blocks, seed, epoch, batch)
    assert sorted(order.tolist()) == list(range(len(blocks)))
    assert (order == streamed_order(blocks, seed, epoch, batch)).all()


def test_another_epoch_and_seed_have_another_order() -> None:
    blocks = blocks_of(100, 20)
    orders = [streamed_order(blocks, seed, epoch, 32) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).mean() < 0.01


def test_no_image_there_is_no_order() -> None:
    assert streamed_order(np.zeros(0, np.int64), 0, 0, 32).tolist() == []


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_process_needs_its_part_of_the_blocks(world: int) -> None:
    """However many share a batch, a block is fetched by one of them, or two where their shares meet."""
    count, size, batch = 480, 25, 64
    blocks = blocks_of(count, size)
    order = streamed_order(blocks, 3, 1, batch)
    wanted = [set[int]() for _ in range(world)]
    for start in range(0, len(order), batch):
        for rank, part in enumerate(np.array_split(order[start : start + batch], world)):
            wanted[rank] |= {*blocks[part].tolist()}
    assert sum(map(len, wanted)) < count + 16 + world * 4
    assert max(map(len, wanted)) < 1.1 * count / world + 4


def test_few_blocks_are_in_use_at_a_time() -> None:
    count, size = 800, 25
    blocks = blocks_of(count, size)
    of_order = blocks[streamed_order(blocks, 0, 0, 32)]
    first, last = np.full(count, len(blocks)), np.zeros(count, np.int64)
    np.minimum.at(first, of_order, np.arange(len(blocks)))
    np.maximum.at(last, of_order, np.arange(len(blocks)))
    in_use = [((first <= place) & (place <= last)).sum() for place in range(0, len(blocks), 100)]
    assert max(in_use) * size < 1.5 * images_in_use(blocks)
    assert images_in_use(blocks) == 16 * 3 * size


def test_images_that_are_fetched_together_are_shown_far_apart() -> None:
    """The distances between neighbors in a block, in the order, are spread over what three blocks of all lanes hold."""
    count, size = 800, 25
    blocks = blocks_of(count, size)
    place = np.empty(len(blocks), np.int64)
    place[streamed_order(blocks, 0, 0, 32)] = np.arange(len(blocks))
    neighbors = np.abs(np.diff(place))[blocks[:-1] == blocks[1:]]
    # Of two uniform numbers in [0, 2 * 16 * 25), the difference has a mean of a third.
    assert 0.9 < neighbors.mean() / (2 * 16 * size / 3) < 1.15
    assert (neighbors < 16).mean() < 0.06  # 0.04 for uniform ones
    batches = blocks[streamed_order(blocks, 0, 0, 32)].reshape(-1, 32)
    different = np.mean([len(np.unique(batch)) for batch in batches])
    assert different > 25  # of 32
