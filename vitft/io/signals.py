"""Ctrl-C and SIGTERM: the first signal asks the run to save and stop, the second kills it."""

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
    """A signal interrupted work that is discarded: the gradients of a step, or a validation."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """While entered, the first signal is recorded instead of ending the process; it interrupts `interruptible` work."""

    def __init__(self, accelerator: Any = None) -> None:
        """With an accelerator, all its processes stop together; without one, this process stands alone."""
        self._accelerator = accelerator
        self._single = accelerator is None or accelerator.num_processes == 1
        self._number = 0
        self._can_interrupt = False
        self.keep_up: Callable[[], None] | None = None
        """For a model that all processes have to run equally often: run it once, for nothing."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._number = number
        if self._can_interrupt:
            raise Interrupted(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context for work that can be discarded: a signal interrupts it at once. Raises Interrupted.

        With several processes, the work continues until they next synchronize, so that all stop at the same point.
        """
        self._can_interrupt = self._single
        try:
            if self._can_interrupt and self._number:
                raise Interrupted(self._number)
            yield
        finally:
            self._can_interrupt = False

    def received(self) -> int:
        """The signal that any process received, or 0. All processes get the same answer."""
        return self._max_over_processes(0)[0]

    def watched(self, progress: Progress, gather: Gather) -> tuple[Progress, Gather]:
        """Wrap `progress` and `gather` of work in batches: after each batch, all processes check for signals.

        Processes can have different numbers of batches. One that is done keeps checking until all are, and then calls
        `gather`. Both functions raise Interrupted in all processes at once. With `keep_up`, every one has as many
        batches as the busiest, some of them for nothing.
        """
        others_busy = True  # before its first batch, no process knows

        def checked_progress(done: int, count: int) -> None:
            nonlocal others_busy
            progress(done, count)
            others_busy = self._check(busy=self.keep_up is None or done < count)

        def checked_gather(results: list[Any]) -> list[Any]:
            nonlocal others_busy
            if self.keep_up is None:
                while self._check(busy=False):
                    pass
                return gather(results)
            while others_busy:
                self.keep_up()
                others_busy = self._check(busy=False)
            others_busy = True
            return gather(results)

        return checked_progress, checked_gather

    def _check(self, *, busy: bool) -> bool:
        """Whether any process is busy (False for a single process). Raises Interrupted if any received a signal."""
        number, any_busy = self._max_over_processes(int(busy))
        if number:
            raise Interrupted(number)
        return bool(any_busy) and not self._single

    def _max_over_processes(self, busy: int) -> tuple[int, int]:
        """The largest signal number and the largest `busy` over all processes."""
        if self._single:
            return self._number, busy
        local = torch.tensor([[self._number, busy]], device=self._accelerator.device)
        number, any_busy = self._accelerator.gather(local).amax(dim=0).tolist()
        return number, any_busy
