"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

Progress = Callable[[int, int], None]
Gather = Callable[[list[Any]], list[Any]]


class Interrupted(KeyboardInterrupt):
    """A signal came in the middle of work of which nothing is kept: a step's gradients, a validation."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """While entered, remembers a signal instead of dying of it; `breakable` work is broken off."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._alone = accelerator.num_processes == 1
        self._number = 0
        self._breakable = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._number = number
        if self._breakable:
            raise Interrupted(number)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Around work of which nothing is kept: a signal ends it at once. Raises Interrupted.

        On several processes, which must agree on where they stop, it goes on until they next ask one another.
        """
        self._breakable = self._alone
        try:
            if self._breakable and self._number:
                raise Interrupted(self._number)
            yield
        finally:
            self._breakable = False

    def received(self) -> int:
        """The signal that any process received, or 0: all processes hear of it at the same step."""
        return self._most(0)[0]

    def watched(self, progress: Progress, gather: Gather) -> tuple[Progress, Gather]:
        """`progress` and `gather` of work in parts: after each part all processes ask whether to stop.

        Processes may have different numbers of parts: who is done asks on until all are, before `gather` joins
        what they have. Both raise Interrupted, on all processes at once.
        """

        def after_a_part(done: int, count: int) -> None:
            progress(done, count)
            self._ask(busy=True)

        def joined(parts: list[Any]) -> list[Any]:
            while self._ask(busy=False):
                pass
            return gather(parts)

        return after_a_part, joined

    def _ask(self, *, busy: bool) -> bool:
        """Whether any process is busy. Raises Interrupted where any received a signal."""
        number, others = self._most(int(busy))
        if number:
            raise Interrupted(number)
        return bool(others) and not self._alone

    def _most(self, busy: int) -> tuple[int, int]:
        """The greatest signal and the greatest `busy` of all processes."""
        if self._alone:
            return self._number, busy
        mine = torch.tensor([[self._number, busy]], device=self._accelerator.device)
        number, others = self._accelerator.gather(mine).amax(dim=0).tolist()
        return number, others
