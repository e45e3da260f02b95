"""Batches of images of several requests, with a model and a decoder that tests hold up."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from vitft.errors import DataError
from vitft.serving.batching import Batcher, Busy, Read

HOUR = 3600.0


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.unreadable = 0

    def decoded(self, seconds: float, readable: bool) -> None:
        self.unreadable += not readable

    def ran(self, images: int, seconds: float) -> None:
        self.batches.append(images)

    def waited(self, seconds: float) -> None:
        assert seconds >= 0


class Held:
    """A batcher whose decoder gives a number, and whose model squares it; both can be held up."""

    def __init__(self, **settings: Any) -> None:
        self.seen, self.decoder_may, self.model_may = Seen(), threading.Event(), threading.Event()
        self.decoder_may.set()
        self.model_may.set()
        given = {"threads": 4, "max_batch": 8, "max_wait_s": 0.0, "max_queue": 100} | settings
        self.batcher: Batcher[int, int] = Batcher(self._decode, self._classify, self.seen, **given)

    def _decode(self, image: bytes) -> int:
        if image == b"held":
            self.decoder_may.wait()
            return 7
        if not image.isdigit():
            raise DataError("is no number")
        return int(image)

    def _classify(self, images: Sequence[int]) -> list[int]:
        self.model_may.wait()
        if 0 in images:
            raise ZeroDivisionError("a zero")
        return [image * image for image in images]

    async def answers(self, *images: bytes) -> list[Any]:
        with self.batcher.arriving():
            read = await self.batcher.decode(images)
        answers = iter(await self.batcher.classify([one for one in read if isinstance(one, Read)]))
        return [next(answers) if isinstance(one, Read) else str(one) for one in read]


def run(held: Held, work: Callable[[], Awaitable[Any]]) -> Any:
    async def started() -> Any:
        held.batcher.start()
        try:
            return await work()
        finally:
            held.decoder_may.set()
            held.model_may.set()
            await held.batcher.stop()

    return asyncio.run(started())


async def until(reached: Callable[[], bool]) -> None:
    while not reached():
        await asyncio.sleep(0.001)


def test_answers_come_in_order_and_what_is_no_image_has_its_error() -> None:
    held = Held()
    assert run(held, lambda: held.answers(b"3", b"x", b"5")) == [9, "is no number", 25]
    assert held.seen.unreadable == 1


def test_what_waits_goes_through_the_model_together_up_to_the_largest_batch() -> None:
    held = Held(max_batch=4)

    async def work() -> list[Any]:
        held.model_may.clear()
        first = asyncio.create_task(held.answers(b"1"))
        await until(lambda: held.batcher._running == 1)
        others = [asyncio.create_task(held.answers(b"%d" % number)) for number in range(2, 8)]
        await until(lambda: len(held.batcher._ready) == 6)
        held.model_may.set()
        return await asyncio.gather(first, *others)

    assert run(held, work) == [[number * number] for number in range(1, 8)]
    assert held.seen.batches == [1, 4, 2]


def test_an_image_waits_for_one_that_is_on_its_way_but_for_no_longer_than_allowed() -> None:
    async def work(held: Held) -> list[Any]:
        held.decoder_may.clear()
        slow = asyncio.create_task(held.answers(b"held"))
        await until(lambda: held.batcher.queued == 1)
        quick = asyncio.create_task(held.answers(b"2"))
        if held.batcher._max_wait_s == HOUR:
            await until(lambda: len(held.batcher._ready) == 1)
            assert held.seen.batches == []
        else:
            await quick  # although the other is not decoded
        held.decoder_may.set()
        return await asyncio.gather(quick, slow)

    patient, hasty = Held(max_wait_s=HOUR), Held(max_wait_s=0.01)
    assert run(patient, lambda: work(patient)) == [[4], [49]]
    assert patient.seen.batches == [2]
    assert run(hasty, lambda: work(hasty)) == [[4], [49]]
    assert hasty.seen.batches == [1, 1]


def test_an_image_alone_does_not_wait() -> None:
    held = Held(max_wait_s=HOUR)
    assert run(held, lambda: held.answers(b"2")) == [4]  # in an hour, if it did


def test_more_than_the_queue_holds_is_refused_until_there_is_room() -> None:
    held = Held(max_queue=3)

    async def work() -> None:
        held.model_may.clear()
        waiting = asyncio.create_task(held.answers(b"1", b"2"))
        await until(lambda: held.batcher.queued == 2)
        with pytest.raises(Busy) as busy:
            await held.answers(b"3", b"4")
        assert busy.value.retry_after >= 1
        with held.batcher.arriving(), pytest.raises(Busy), held.batcher.arriving():
            pass
        held.model_may.set()
        assert await waiting == [1, 4]
        assert held.batcher.queued == 0
        assert await held.answers(b"3", b"4", b"5") == [9, 16, 25]

    run(held, work)


def test_what_is_done_alone_is_in_the_queue_too() -> None:
    held = Held(max_queue=2)

    async def work() -> None:
        held.model_may.clear()
        drawing = [asyncio.create_task(held.batcher.alone(held.model_may.wait)) for _ in range(2)]
        await until(lambda: held.batcher.queued == 2)
        with pytest.raises(Busy):
            await held.answers(b"3")
        held.model_may.set()
        await asyncio.gather(*drawing)
        assert await held.answers(b"3") == [9]

    run(held, work)


def test_an_error_of_the_model_is_that_of_its_batch_alone() -> None:
    held = Held()

    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            await held.answers(b"0")
        assert held.batcher.queued == 0
        assert await held.answers(b"4") == [16]

    run(held, work)
