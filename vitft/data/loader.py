"""Turn a step's number into its batch: epoch order, this process's shard, augmentation, transfer to the device.

A batch is a function of (seed, step) alone, so a resumed run, or a run on more processes, sees the same samples with
the same augmentations.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Thread
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.data.augment import Images, Preprocess, augment, augment_pixels, flip_images, normalize, resize_and_crop
from vitft.data.augmentation.erasing import erase
from vitft.data.augmentation.mixing import draw_mixes, mix, mix_labels
from vitft.data.augmentation.settings import Augmentation
from vitft.data.resample import RADIUS
from vitft.data.sampling import balanced_order, images_in_use, positions, streamed_order, uniform_order
from vitft.data.stores.lazy_store import LazyStore
from vitft.data.stores.store import Part, Store, move_to_device
from vitft.hardware.device import many_launches_cost, to_device
from vitft.hardware.pools import map_in_processes, processes
from vitft.hardware.timers import Clock
from vitft.randomness import permutation


@dataclass(frozen=True)
class Batch:
    """Model input (B, C, H, W), labels (B,) and positions in the split (B,).

    The next batch of the same loader overwrites the pixels. Of a mixed image, `labels` has the class with the larger
    share, and `probabilities` (B, classes) all.
    """

    pixels: Tensor
    labels: Tensor
    index: NDArray[np.int64]
    probabilities: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What the loss compares with: class indices (B,), or the probabilities of mixed images."""
        return self.labels if self.probabilities is None else self.probabilities


class TrainLoader:
    """The training batches of one process, by step.

    If a GPU trains and the images stay in host memory, host threads crop and resize the next batches while the GPU
    computes. Images that are small enough to stay on the GPU are cropped and resized there, unless their filter is one
    of Pillow's alone.
    """

    def __init__(
        self, store: Store | LazyStore, labels: NDArray[np.int64], preprocess: Preprocess, *,
        augmentation: Augmentation, classes: int, batch_size: int, device: torch.device, sampling: str = "uniform",
        rank: int = 0, world: int = 1, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        """`classes`: of the model."""
        self.clock = clock or Clock()
        if device.type == "cuda" and isinstance(store, Store) and preprocess.resample in RADIUS:
            store = move_to_device(store, device, torch.cuda.mem_get_info(device)[0])
        self.store, self.preprocess, self.augmentation, self.classes = store, preprocess, augmentation, classes
        self.seed = seed = augmentation.seed
        self.labels = torch.from_numpy(labels.copy())
        self.batch_size, self.rank, self.world, self.device = batch_size, rank, world, device
        self._buffer = InputBuffer(preprocess, device)
        self._mixed = InputBuffer(preprocess, device)
        draw = balanced_order if sampling == "balanced" else uniform_order
        self._blocks = blocks = store.blocks if isinstance(store, LazyStore) else None
        self._order = lru_cache(maxsize=2)(
            lambda epoch: (
                draw(labels, seed, epoch) if blocks is None else streamed_order(blocks, seed, epoch, batch_size)
            )
        )
        self._next_order: Thread | None = None
        # Steps: two thirds of what is in use, so that both together are less than a process has open.
        self._ahead = 0 if blocks is None else max(1, images_in_use(blocks) * 2 // 3 // batch_size)
        self._fetched = -1  # the step before which nothing more is to be fetched
        self.end = sys.maxsize
        """The number of steps of the run: what others would need is not fetched."""
        self._prefetch = self._prefetcher() if store.device.type != device.type else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the last batch may be smaller."""
        return -(-len(self.store) // self.batch_size)

    def samples(self, step: int) -> NDArray[np.int64]:
        """Positions of all images of a step, over all processes."""
        return positions(self._draws(step))

    def draws(self, step: int) -> NDArray[np.int64]:
        """This process's images of a step, as numbers that key their augmentation: see `sampling.balanced_order`.

        They are contiguous, so the shards concatenate to the whole batch. Without repeats, they are positions.
        """
        return np.array_split(self._draws(step), self.world)[self.rank]

    def shard(self, step: int) -> NDArray[np.int64]:
        """Positions of this process's images of a step."""
        return positions(self.draws(step))

    def _draws(self, step: int) -> NDArray[np.int64]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order: NDArray[np.int64] = self._order(epoch)
        if place == self.steps_per_epoch // 2 and len(order) >= _MANY_TO_ORDER:
            self._prepare_order(epoch + 1)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _prepare_order(self, epoch: int) -> None:
        """Draw the order of an epoch in a thread, unless one has begun to: the step that needs it would wait."""
        name = f"vitft-order-{epoch}"
        drawn = self._next_order is not None and self._next_order.name == name
        if not drawn and epoch * self.steps_per_epoch < self.end:
            self._next_order = Thread(target=self._order, args=(epoch,), name=name, daemon=True)
            self._next_order.start()

    def unaugmented(self, chunks: Sequence[NDArray[np.int64]], *, mirror: bool) -> Iterator[Tensor]:
        """Model input for the positions of each chunk, either all mirrored or none: (B, C, H, W), B those of a chunk.

        Prepared ahead of a GPU, and fetched further ahead if images have to be fetched.
        """
        every = max(1, _FETCHED // max(map(len, chunks), default=1))

        def load(number: int) -> Tensor:
            if number % every == 0:
                self.fetch_ahead(np.concatenate(chunks[number : number + 3 * every]))
            images = flip_images(self._gather(chunks[number]), np.full(len(chunks[number]), mirror))
            return resize_and_crop(images, self.preprocess, exact=False)

        ahead = load if self._prefetch is None else Prefetcher(self._pinned(load), len(chunks))
        for images in map(ahead, range(len(chunks))):
            self._attend()
            yield normalize(to_device(images, self.device), self.preprocess)

    def batch(self, step: int) -> Batch:
        """This process's shard of a step."""
        index, shown, preprocess = self.shard(step), self._shown(step), self.preprocess
        if not len(index):
            pixels = torch.empty((0, preprocess.channels, preprocess.height, preprocess.width), device=self.device)
            return Batch(pixels, torch.empty(0, dtype=torch.long, device=self.device), index)
        with self.clock.part("wait"):
            self._fetch_ahead(step)
            images = self._gather(positions(shown)) if self._prefetch is None else self._prefetch(step)
            self._attend()
        with self.clock.part("transfer"):
            labels = to_device(self.labels[positions(shown)], self.device)
            if isinstance(images, Tensor):
                images = to_device(images, self.device)
        with self.clock.part("augment"):
            how, epoch = self.augmentation, step // self.steps_per_epoch
            buffer = self._buffer.rows(len(shown))
            if self._prefetch is None:
                pixels = augment(images, preprocess, how, epoch, shown, buffer)
            else:
                assert isinstance(images, Tensor)
                pixels = normalize(images, preprocess, buffer)
            if how.erase:
                erase(pixels, how.erase, how.seed, epoch, shown)
            if not how.mixes:
                return Batch(pixels, labels, index)
            mixes = draw_mixes(how, preprocess.height, preprocess.width, epoch, self.draws(step))
            labels, probabilities = mix_labels(labels, mixes, self.classes)
            out = self._mixed.rows(len(index))[: len(index)].permute(0, 3, 1, 2)
            return Batch(mix(pixels, mixes, out), labels, index, probabilities)

    def _shown(self, step: int) -> NDArray[np.int64]:
        """The draws that a shard shows: its own and, where images are mixed with the next, the one that follows."""
        mine = self.draws(step)
        if not len(mine) or not self.augmentation.mixes:
            return mine
        whole = self._draws(step)
        end = 1 + np.array_split(np.arange(len(whole)), self.world)[self.rank][-1]
        return np.append(mine, whole[end % len(whole)])

    def close(self) -> None:
        """End the processes that prepare batches, if there are any, and finish what is being cached.

        To leave that to garbage collection takes seconds for each: it closes their queues before they are told to end.
        """
        if isinstance(self._prefetch, ForkedPrefetcher):
            self._prefetch.close()
        if isinstance(self.store, LazyStore):
            self.store.close()

    def sample(self, purpose: str, count: int) -> NDArray[np.int64]:
        """Positions of at most `count` images, in random order.

        They are chosen at random or, if images have to be fetched, are those that the first epoch has first.
        """
        among = np.arange(len(self.store)) if self._blocks is None else self._order(0)[:count]
        return among[permutation(self.seed, purpose, 0, len(among))][:count]

    def fetch_ahead(self, index: NDArray[np.int64]) -> None:
        """Begin to fetch the images at these positions, if they have to be fetched. Returns at once."""
        if isinstance(self.store, LazyStore):
            self.store.fetch_ahead(index)

    def _fetch_ahead(self, step: int) -> None:
        """Begin to fetch what the next steps need."""
        if not self._ahead or step < self._fetched <= step + self._ahead:
            return
        self._fetched = step + 1 + self._ahead // 4
        coming = range(step, max(step + 1, min(self._fetched + self._ahead, self.end)))
        self.fetch_ahead(np.concatenate([self.shard(number) for number in coming]))

    def _attend(self) -> None:
        if isinstance(self.store, LazyStore):
            self.store.attend()

    def _gather(self, index: NDArray[np.int64]) -> Images:
        # Images that the host crops stay views; on a device, a batch is one tensor.
        crops = self.augmentation.kind == "crop"
        return self.store.gather(index, stacked=not crops or many_launches_cost(self.store.device))

    def _prefetcher(self) -> Callable[[int], Tensor]:
        how = self.preprocess
        # Many small operations are mostly Python code: threads would keep the GIL from the one that trains.
        many = self.augmentation.kind == "crop" or self.augmentation.operates
        count = processes(_bytes(-(-self.batch_size // self.world) + 1, how)) if many else 0
        if count:
            return ForkedPrefetcher(self._augment_on_host, count, pin=self.device.type == "cuda")
        return Prefetcher(self._pinned(self._augment_on_host))

    def _pinned(self, work: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """The work, whose results a GPU can copy while it computes."""
        return (lambda number: work(number).pin_memory()) if self.device.type == "cuda" else work

    def _augment_on_host(self, step: int) -> Tensor:
        shown, epoch = self._shown(step), step // self.steps_per_epoch
        return augment_pixels(self._gather(positions(shown)), self.preprocess, self.augmentation, epoch, shown)


_FETCHED = 2000  # images that are fetched at a time, for one pass
_MANY_TO_ORDER = 100_000  # images, whose order takes some hundredths of a second


class Prefetcher:
    """Calls `work` with a number, and already starts the next two in a thread, up to `end`."""

    def __init__(self, work: Callable[[int], Tensor], end: int | None = None) -> None:
        self._work, self._end = work, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vitft-prefetch")
        self._pending: dict[int, Future[Tensor]] = {}

    def __call__(self, number: int) -> Tensor:
        """`work(number)`; raises what that raises."""
        self._pending = {
            ahead: self._pending.get(ahead) or self._thread.submit(self._work, ahead)
            for ahead in (number, number + 1, number + 2)
            if self._end is None or ahead < self._end
        }
        return self._pending[number].result()


class ForkedPrefetcher:
    """Like a `Prefetcher` with no end, in processes: starts them again if a number does not follow the last one."""

    def __init__(self, work: Callable[[int], Tensor], count: int, *, pin: bool) -> None:
        self._work, self._count, self._pin = work, count, pin
        self._results: Generator[Tensor, None, None] | None = None
        self._next = -1

    def __call__(self, number: int) -> Tensor:
        """`work(number)`; raises what that raises."""
        if self._results is None or number != self._next:
            self.close()
            self._results = map_in_processes(self._work, range(number, sys.maxsize), self._count, pin=self._pin)
        self._next = number + 1
        return next(self._results)

    def close(self) -> None:
        """End the processes."""
        if self._results is not None:
            self._results.close()


class Batches(Protocol):
    """What evaluation reads: a known number of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class EvalLoader:
    """The evaluation batches of one process; over all processes, each image of the split occurs exactly once."""

    def __init__(
        self, store: Store | Part, labels: NDArray[np.int64], preprocess: Preprocess, *, batch_size: int,
        device: torch.device, rank: int = 0, world: int = 1, only: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        """`only`: the positions to read, instead of all. A process with a part of the images reads these."""
        self.store, self.labels, self.preprocess = store, torch.from_numpy(labels.copy()), preprocess
        self.device = device
        chosen = np.arange(len(store)) if only is None else np.sort(only)
        shard = store.among(chosen) if isinstance(store, Part) else np.array_split(chosen, world)[rank]
        self._batches = [shard[i : i + batch_size] for i in range(0, len(shard), batch_size)]
        self._buffer = InputBuffer(preprocess, device)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(len(self))
        for index, images in zip(self._batches, self._ahead(numbers), strict=True):
            pixels = normalize(to_device(images, self.device), self.preprocess, self._buffer.rows(len(index)))
            yield Batch(pixels, to_device(self.labels[index], self.device), index)

    def _ahead(self, numbers: range) -> Iterator[Tensor]:
        """The images of each batch, resized ahead of a GPU; on a CPU this would compete with the model's threads."""
        if self.device.type == "cpu":
            return map(self._load, numbers)
        how, largest = self.preprocess, max(map(len, self._batches), default=0)
        # Pillow's exact resize of a small image is mostly Python code, so many of them are worth processes.
        many = (self.store.shapes != (how.height, how.width)).any(axis=1).sum() >= _MANY
        if many and (count := processes(_bytes(largest, how))):
            return map_in_processes(self._load, numbers, count, pin=self.device.type == "cuda")
        return map(Prefetcher(self._load, len(self)), numbers)

    def _load(self, number: int) -> Tensor:
        return resize_and_crop(self.store.gather(self._batches[number]), self.preprocess)


_MANY = 2000  # images whose resize takes longer than processes take to start


def _bytes(images: int, preprocess: Preprocess) -> int:
    """What so many resized images take."""
    return images * preprocess.height * preprocess.width * 3


class InputBuffer:
    """A float32 buffer for one batch of model input, reused for each batch and grown when needed."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self._floats = torch.empty((0, preprocess.height, preprocess.width, preprocess.channels), device=device)

    def rows(self, count: int) -> Tensor:
        """Room for at least `count` images: (>= count, height, width, channels)."""
        if len(self._floats) < count:
            self._floats = torch.empty((count, *self._floats.shape[1:]), device=self._floats.device)
        return self._floats
