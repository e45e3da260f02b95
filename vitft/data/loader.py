"""From a step's number to its batch: epoch order, this process's share, augmentation, transfer.

A batch is a function of (seed, step) alone, so a resumed run and a run on more processes see the
same samples with the same augmentations.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augment import Images, Preprocess, augment, augmented, fitted, mirrored, normalize
from vitft.data.store import Store, resident
from vitft.hardware.device import sent
from vitft.hardware.timers import Clock
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
    """The training batches of one process, by step.

    Where a GPU trains and the images stay in the host's memory, the host crops and resizes the next batches in threads
    while the GPU computes; images that are small enough to stay on the GPU are cropped and resized there.
    """

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
        self._order = lru_cache(maxsize=2)(lambda epoch: order(seed, "order", epoch, len(store)))
        self._cut_ahead = Ahead(self._cut) if store.pixels.device.type != device.type else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass, the last one possibly smaller."""
        return -(-len(self.store) // self.batch_size)

    def samples(self, step: int) -> NDArray[np.int64]:
        """Positions of all the images of a step, over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        positions: NDArray[np.int64] = self._order(epoch)
        return positions[place * self.batch_size : (place + 1) * self.batch_size]

    def share(self, step: int) -> NDArray[np.int64]:
        """Positions of this process's images of a step: contiguous, so that shares join to the whole batch."""
        return np.array_split(self.samples(step), self.world)[self.rank]

    def unaugmented(self, index: NDArray[np.int64], *, mirror: bool) -> Tensor:
        """The model's input of these positions, all of them mirrored or none: (B, C, H, W)."""
        images = mirrored(self._stored(index), np.full(len(index), mirror))
        return normalize(sent(fitted(images, self.how, exact=False), self.device), self.how)

    def batch(self, step: int) -> Batch:
        """This process's share of a step."""
        mine = self.share(step)
        pixels = torch.empty((0, self.how.channels, self.how.height, self.how.width), device=self.device)
        if not len(mine):
            return Batch(pixels, torch.empty(0, dtype=torch.long, device=self.device), mine)
        with self.clock.part("wait"):
            images = self._stored(mine) if self._cut_ahead is None else self._cut_ahead(step)
        with self.clock.part("transfer"):
            labels = sent(self.labels[mine], self.device)
            if isinstance(images, Tensor):
                images = sent(images, self.device)
        with self.clock.part("augment"):
            memory = self._memory.rows(len(mine))
            if self._cut_ahead is None:
                epoch = step // self.steps_per_epoch
                pixels = augment(images, self.how, self.kind, self.seed, epoch, mine, memory)
            else:
                assert isinstance(images, Tensor)
                pixels = normalize(images, self.how, memory)
        return Batch(pixels, labels, mine)

    def _stored(self, index: NDArray[np.int64]) -> Images:
        # Those that are cropped on the host stay views; on a device a batch is one array.
        return self.store.gather(index, stacked=self.kind != "crop" or self.store.pixels.device.type != "cpu")

    def _cut(self, step: int) -> Tensor:
        mine = self.share(step)
        cut = augmented(self._stored(mine), self.how, self.kind, self.seed, step // self.steps_per_epoch, mine)
        return cut.pin_memory() if self.device.type == "cuda" else cut


class Ahead:
    """Work by number, of which the next two are begun in a thread while the last result is made use of."""

    def __init__(self, work: Callable[[int], Tensor], end: int | None = None) -> None:
        self._work, self._end = work, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vitft-ahead")
        self._begun: dict[int, Future[Tensor]] = {}

    def __call__(self, number: int) -> Tensor:
        """The result of a number; raises what its work raises."""
        wanted = (number, number + 1, number + 2)
        self._begun = {
            one: self._begun.get(one) or self._thread.submit(self._work, one)
            for one in wanted
            if self._end is None or one < self._end
        }
        return self._begun[number].result()


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
        # A CPU has nothing else to do meanwhile: threads of their own would only wait for one another.
        cut = self._cut if self.device.type == "cpu" else Ahead(self._cut, len(self._parts))
        for number, part in enumerate(self._parts):
            pixels = normalize(sent(cut(number), self.device), self.how, self._memory.rows(len(part)))
            yield Batch(pixels, sent(self.labels[part], self.device), part)

    def _cut(self, number: int) -> Tensor:
        return fitted(self.store.gather(self._parts[number]), self.how)


class Memory:
    """Float32 memory for one batch of inputs that is used again for each, growing as needed."""

    def __init__(self, how: Preprocess, device: torch.device) -> None:
        self._floats = torch.empty((0, how.height, how.width, how.channels), device=device)

    def rows(self, count: int) -> Tensor:
        """At least `count` images (height, width, channels)."""
        if len(self._floats) < count:
            self._floats = torch.empty((count, *self._floats.shape[1:]), device=self._floats.device)
        return self._floats
