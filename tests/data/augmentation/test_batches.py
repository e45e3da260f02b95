"""A batch with every augmentation is a function of its step, on any number of processes."""

import threading

import numpy as np
import pytest
import torch

from vitft.data import loader as loaders
from vitft.data.augment import Preprocess, augment
from vitft.data.augmentation.erasing import erase
from vitft.data.augmentation.mixing import draw_mixes, mix, mix_labels
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import Batch, TrainLoader
from vitft.data.sampling import uniform_order
from vitft.data.sources.source import open_dataset
from vitft.data.stores.store import decode_all

PREPROCESS = Preprocess(12, 12)
ROWS = open_dataset("digits").splits["train"].select(range(53))
STORE, _ = decode_all(ROWS, PREPROCESS, crops=False, max_pixels=10**6, skip_bad=False)
LABELS = np.array(ROWS["label"])
EVERYTHING = Augmentation("trivial", seed=3, color_jitter=0.2, erase=0.5, mixup=0.4, cutmix=1.0)


def loader(rank: int = 0, world: int = 1, how: Augmentation = EVERYTHING) -> TrainLoader:
    return TrainLoader(
        STORE, LABELS, PREPROCESS, augmentation=how, classes=10, batch_size=9, device=torch.device("cpu"),
        rank=rank, world=world,
    )  # fmt: skip


def soft(batch: Batch) -> torch.Tensor:
    assert batch.probabilities is not None
    return batch.probabilities


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_batch_that_one_would_have(world: int) -> None:
    """To the bit: uneven shards of 9 images, and in the tail of 8 images."""
    alone, shared = loader(), [loader(rank, world) for rank in range(world)]
    for step in (0, 1, 5, 6):  # the last of the first epoch is 5
        whole, shards = alone.batch(step), [one.batch(step) for one in shared]
        assert torch.equal(torch.cat([shard.pixels for shard in shards]), whole.pixels)
        assert torch.equal(torch.cat([soft(shard) for shard in shards]), soft(whole))
        assert torch.equal(torch.cat([shard.labels for shard in shards]), whole.labels)


def test_a_process_without_images_has_no_targets_either() -> None:
    shares = [loader(rank, 12).batch(0) for rank in range(12)]
    assert [len(share.targets) for share in shares] == [1] * 9 + [0] * 3
    assert [len(share.pixels) for share in shares] == [1] * 9 + [0] * 3


def test_a_batch_is_erased_and_then_mixed_with_the_next_image() -> None:
    """By the functions that have tests of their own."""
    batches, step = loader(), 7
    actual, epoch = batches.batch(step), 1
    ring = np.append(batches.samples(step), batches.samples(step)[0])
    images = STORE.gather(ring)
    pixels = augment(images, PREPROCESS, EVERYTHING, epoch, ring)
    erase(pixels, EVERYTHING.erase, EVERYTHING.seed, epoch, ring)
    mixes = draw_mixes(EVERYTHING, 12, 12, epoch, ring[:-1])
    assert mixes.cut.any()
    assert not mixes.cut.all()
    assert torch.equal(actual.pixels, mix(pixels, mixes))
    labels, probabilities = mix_labels(torch.from_numpy(LABELS[ring]), mixes, 10)
    assert torch.equal(actual.targets, probabilities)
    assert torch.equal(actual.labels, labels)
    assert soft(actual).sum(dim=1).numpy() == pytest.approx(1.0)


def test_epochs_differ_and_repeat() -> None:
    batches = loader()
    by_sample = []
    for epoch in (0, 1, 0):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        read = [batches.batch(step) for step in steps]
        order = np.argsort(np.concatenate([batch.index for batch in read]))
        by_sample.append(torch.cat([soft(batch) for batch in read])[order])
    assert torch.equal(by_sample[0], by_sample[2])
    assert not torch.equal(by_sample[0], by_sample[1])


def test_without_mixing_targets_are_class_indices() -> None:
    batch = loader(how=Augmentation("trivial", erase=0.5)).batch(0)
    assert batch.probabilities is None
    assert torch.equal(batch.targets, torch.from_numpy(LABELS[batch.index]))


def test_the_order_of_an_epoch_is_drawn_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not after the last."""
    drawn: list[tuple[int, bool]] = []

    def draw(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        drawn.append((epoch, threading.current_thread() is threading.main_thread()))
        return uniform_order(labels, seed, epoch)

    monkeypatch.setattr(loaders, "uniform_order", draw)
    monkeypatch.setattr(loaders, "_MANY_TO_ORDER", len(STORE))
    ahead, plain = loader(), loader()
    ahead.end = 2 * ahead.steps_per_epoch
    for step in range(ahead.end):
        ahead.samples(step)
        ahead.samples(step)
        for thread in threading.enumerate():
            if thread.name.startswith("vitft-order"):
                thread.join()
    assert drawn == [(0, True), (1, False)]
    monkeypatch.undo()
    assert all(np.array_equal(ahead.samples(step), plain.samples(step)) for step in range(ahead.end))
