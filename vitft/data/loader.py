"""From a step's number to its batch: epoch order, this process's share, augmentation, transfer.

A batch is a function of (seed, step) alone, so a resumed run and a run on more processes see the
same samples with the same augmentations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.clock import Clock
from vitft.data.augment import Images, Preprocess, augment, crops, normalize, preprocess
from vitft.data.store import Store, resident
from vitft.randomness import order


@dataclass(frozen=True)
class Batch:
    """Model input (B, C, H, W), labels (B,) and positions in the split (B,).

    The pixels are overwritten by the next batch of the same loader.
    """

    pixels: Tensor
    labels: Tensor
    index: NDArray[np.int64]


class TrainLoader:
    """The training batches of one process, by step."""

    def __init__(
        self, store: Store, labels: NDArray[np.int64], how: Preprocess, *, kind: str, seed: int,
        batch_size: int, device: torch.device, rank: int = 0, world: int = 1, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.clock = clock or Clock()
        if device.type == "cuda":
            store = resident(store, device, torch.cuda.mem_get_info(device)[0])
        self.store, self.how, self.kind, self.seed = store, how, kind, seed
        self.labels = torch.from_numpy(labels.copy())
        self.batch_size, self.rank, self.world, self.device = batch_size, rank, world, device
        self._memory = Memory(how, device)
        self._epoch_order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass, the last one possibly smaller."""
        return -(-len(self.store) // self.batch_size)

    def samples(self, step: int) -> NDArray[np.int64]:
        """Positions of all the images of a step, over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, order(self.seed, "order", epoch, len(self.store))
        return self._epoch_order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def share(self, step: int) -> NDArray[np.int64]:
        """Positions of this process's images of a step: contiguous, so that shares join to the whole batch."""
        return np.array_split(self.samples(step), self.world)[self.rank]

    def images(self, index: NDArray[np.int64]) -> Images:
        """The stored images of these positions: on the device, or those that are to be cropped where the store is."""
        cropped = self.kind == "crop"
        with self.clock.part("wait"):
            images = self.store.gather(index, stacked=not cropped)
        with self.clock.part("transfer"):
            if cropped:  # a crop is smaller than what it is cut from
                return images
            if isinstance(images, Tensor):
                return _sent(images, self.device)
            return [_sent(image, self.device) for image in images]

    def batch(self, step: int) -> Batch:
        """This process's share of a step."""
        mine = self.share(step)
        epoch = step // self.steps_per_epoch
        pixels = torch.empty((0, self.how.channels, self.how.height, self.how.width), device=self.device)
        if len(mine):
            images = self.images(mine)
            with self.clock.part("augment"):
                memory = self._memory.rows(len(mine))
                if self.kind == "crop":
                    cut = _sent(crops(images, self.how, self.seed, epoch, mine), self.device)
                    pixels = normalize(cut, self.how, memory)
                else:
                    pixels = augment(images, self.how, self.kind, self.seed, epoch, mine, memory)
        return Batch(pixels, _sent(self.labels[mine], self.device), mine)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From pinned memory a GPU fetches it by itself, while it computes the step before."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Batches(Protocol):
    """What evaluation reads: batches, and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class EvalLoader:
    """The evaluation batches of one process: each image of the split on exactly one process, once."""

    def __init__(
        self, store: Store, labels: NDArray[np.int64], how: Preprocess, *, batch_size: int,
        device: torch.device, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.store, self.labels, self.how = store, torch.from_numpy(labels.copy()), how
        self.device = device
        mine = np.array_split(np.arange(len(store)), world)[rank]
        self._parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self._memory = Memory(how, device)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts:
            images = self.store.gather(part)
            images = images.to(self.device) if isinstance(images, Tensor) else [i.to(self.device) for i in images]
            pixels = preprocess(images, self.how, self._memory.rows(len(part)))
            yield Batch(pixels, self.labels[part].to(self.device), part)


class Memory:
    """Float32 memory for one batch of inputs that is used again for each, growing as needed."""

    def __init__(self, how: Preprocess, device: torch.device) -> None:
        self._floats = torch.empty((0, how.height, how.width, how.channels), device=device)

    def rows(self, count: int) -> Tensor:
        """At least `count` images (height, width, channels)."""
        if len(self._floats) < count:
            self._floats = torch.empty((count, *self._floats.shape[1:]), device=self._floats.device)
        return self._floats
