"""Dynamic batching: the images of several requests in one forward pass.

Images are decoded in threads, of which there are few, because a large photo takes half a gigabyte while it is decoded.
One thread runs the model. It takes what is decoded, up to `max_batch` images, and waits for more, up to `max_wait_s`,
only while some are on their way.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from vitft.errors import DataError

Pixels = TypeVar("Pixels")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
_RECENT = 0.1  # weight of the last batch in the mean of seconds per image


class Busy(Exception):  # noqa: N818  (an answer to the client, not a fault)
    """Too many images are in line. In `retry_after` seconds there should be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Observer(Protocol):
    """Is told what happens."""

    def decoded(self, seconds: float, readable: bool) -> None:
        """An image was decoded, or could not be."""

    def ran(self, images: int, seconds: float) -> None:
        """A forward pass ended."""

    def waited(self, seconds: float) -> None:
        """An image begins its forward pass after so much time in which nothing was done with it."""


class Read(NamedTuple, Generic[Pixels]):
    """A decoded image, and how long it has waited for its turn to be decoded."""

    pixels: Pixels
    waited: float


class _Waiting(NamedTuple, Generic[Pixels, Answer]):
    image: Read[Pixels]
    since: float
    answer: "asyncio.Future[Answer]"


class Batcher(Generic[Pixels, Answer]):
    """Decodes images and runs a model on them; `start` it in an event loop, which its other methods need, too."""

    def __init__(
        self, decode: Callable[[bytes], Pixels], classify: Callable[[Sequence[Pixels]], Sequence[Answer]],
        observer: Observer, *, threads: int, max_batch: int, max_wait_s: float, max_queue: int,
    ) -> None:  # fmt: skip
        """`decode` raises DataError for what is no image; `classify` gives an answer for each of its images."""
        self._decode, self._classify, self._observer = decode, classify, observer
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="vitft-decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="vitft-model")
        self._arriving = self._decoding = self._running = self._alone = 0
        self._ready: deque[_Waiting[Pixels, Answer]] = deque()
        self._per_image_s = 0.0
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None]

    def start(self) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop().create_task(self._batches())

    async def stop(self) -> None:
        """End, without waiting for what is not answered."""
        self._loop.cancel()
        await asyncio.wait([self._loop])
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(wait=False, cancel_futures=True)

    @property
    def queued(self) -> int:
        """Images that are not answered: a request that is still arriving counts as one, and so does work `alone`."""
        return self._arriving + self._decoding + len(self._ready) + self._running + self._alone

    def _require_room(self, images: int) -> None:
        """Raise Busy if so many more images are too many."""
        if self.queued + images > self._max_queue:
            raise Busy(min(60, max(1, math.ceil(self.queued * self._per_image_s))))

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """While a request arrives. Raises Busy."""
        self._require_room(1)
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            self._changed.set()

    async def decode(self, images: Sequence[bytes]) -> "list[Read[Pixels] | DataError]":
        """Decode images of a request that is `arriving`; what is no image becomes its error. Raises Busy."""
        further = len(images) - 1  # beside the one that the request counts as
        self._require_room(further)
        loop, given = asyncio.get_running_loop(), time.perf_counter()
        self._decoding += further
        try:
            return await asyncio.gather(
                *(loop.run_in_executor(self._decoders, self._timed, image, given) for image in images)
            )
        finally:
            self._decoding -= further
            self._changed.set()

    def _timed(self, image: bytes, given: float) -> "Read[Pixels] | DataError":
        started = time.perf_counter()
        try:
            result: Read[Pixels] | DataError = Read(self._decode(image), started - given)
        except DataError as error:
            result = error
        self._observer.decoded(time.perf_counter() - started, isinstance(result, Read))
        return result

    async def classify(self, images: Sequence[Read[Pixels]]) -> list[Answer]:
        """The model's answers. Raises what the model raises."""
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        answers: list[asyncio.Future[Answer]] = [loop.create_future() for _ in images]
        self._ready.extend(_Waiting(image, now, answer) for image, answer in zip(images, answers, strict=True))
        self._changed.set()
        return await asyncio.gather(*answers)

    async def run(self, images: Sequence[Pixels]) -> Sequence[Answer]:
        """A forward pass of these images alone, in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._model, self._classify, images)

    async def alone(self, work: Callable[..., Result], *given: Any) -> Result:
        """The work on an image in the model's thread, between two batches."""
        self._alone += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._model, work, *given)
        finally:
            self._alone -= 1

    async def _batches(self) -> None:
        while True:
            await self._wait_for_a_batch()
            batch = [self._ready.popleft() for _ in range(min(len(self._ready), self._max_batch))]
            started = time.perf_counter()
            for one in batch:
                self._observer.waited(one.image.waited + started - one.since)
            self._running = len(batch)
            try:
                answers = await self.run([one.image.pixels for one in batch])
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            finally:
                self._running = 0
            taken = time.perf_counter() - started
            self._observer.ran(len(batch), taken)
            self._per_image_s += (_RECENT if self._per_image_s else 1.0) * (taken / len(batch) - self._per_image_s)
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def _wait_for_a_batch(self) -> None:
        """Until a batch is full, or nothing more is on its way, or the first image has waited for long enough."""
        while not self._ready or (len(self._ready) < self._max_batch and (self._arriving or self._decoding)):
            left = self._ready[0].since + self._max_wait_s - time.perf_counter() if self._ready else None
            if left is not None and left <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                return
