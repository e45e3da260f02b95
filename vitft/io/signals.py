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
        self._rounds = None if accelerator is None or accelerator.num_processes == 1 else _Rounds()
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
        self._can_interrupt = self._rounds is None
        try:
            if self._can_interrupt and self._number:
                raise Interrupted(self._number)
            yield
        finally:
            self._can_interrupt = False

    def received(self) -> int:
        """The signal that any process had received when all of them last called this, or 0: the same for all.

        One that stands alone learns at once of its own.
        """
        if self._rounds is None:
            return self._number
        if not (number := self._rounds.heard()[0]):
            self._rounds.tell(self._number, 1)
        return number

    def watched(self, progress: Progress, gather: Gather) -> tuple[Progress, Gather]:
        """Wrap `progress` and `gather` of work in batches: after each batch, all processes tell of signals.

        Processes can have different numbers of batches. One that is done goes on telling until all are, and then calls
        `gather`. Both functions raise Interrupted in all processes after the same batch. With `keep_up`, every one has
        as many batches as the busiest, some of them for nothing.
        """
        self._stop_if_told()

        def checked_progress(done: int, count: int) -> None:
            progress(done, count)
            self._stop_if_told()
            self._tell(busy=self.keep_up is None or done < count)

        def checked_gather(results: list[Any]) -> list[Any]:
            while self._rounds is not None and self._rounds.latest()[1]:
                if self.keep_up is not None:
                    self.keep_up()
                self._stop_if_told()
                self._tell(busy=False)
            self._stop_if_told()
            return gather(results)

        return checked_progress, checked_gather

    def _tell(self, *, busy: bool) -> None:
        if self._rounds is not None:
            self._rounds.tell(self._number, int(busy))

    def _stop_if_told(self) -> None:
        """Raise Interrupted if any process had received a signal in the last round; alone, if this one has."""
        if number := self._number if self._rounds is None else self._rounds.heard()[0]:
            raise Interrupted(number)


class _Rounds:
    """What the processes tell one another in rounds: the signal, and whether any is busy; the largest over all.

    The answer is taken a round later, and comes over the network of the CPUs: nobody waits for a GPU, nor for the
    work that another process is at.
    """

    def __init__(self) -> None:
        """All processes have to call this, and then `tell` equally often."""
        import torch.distributed as distributed

        self._group: Any = distributed.new_group(backend="gloo")
        self._told: tuple[torch.Tensor, Any] | None = None

    def tell(self, number: int, busy: int) -> None:
        """Begin a round. Does not wait."""
        import torch.distributed as distributed

        told = torch.tensor([number, busy])
        largest = distributed.ReduceOp.MAX
        work = distributed.all_reduce(told, largest, self._group, async_op=True)
        self._told = told, work

    def latest(self) -> tuple[int, int]:
        """The last round, once all have told; where none has begun, that others may be busy."""
        if self._told is None:
            return 0, 1
        told, work = self._told
        work.wait()
        number, busy = told.tolist()
        return number, busy

    def heard(self) -> tuple[int, int]:
        """`latest`, for the last time: the next round is still to begin."""
        latest, self._told = self.latest(), None
        return latest
