"""Timers for the parts of a step and the phases of a run.

Within a step, training uses the `Clock` that measures nothing; `bench` uses a `Stopwatch`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Part = Literal["wait", "transfer", "augment", "forward", "backward", "optimizer"]
"""wait: for stored images (in evaluation, for model input); augment: from stored images to model input."""


class Clock:
    """Measures nothing, costs nothing and never synchronizes."""

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Wrap one part of a step."""
        return nullcontext()


class Stopwatch(Clock):
    """Adds up the seconds of each part, and synchronizes the device at both ends so that no part counts another's."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Time one part of a step."""
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started


Phase = Literal["opening", "tuning", "head", "steps", "data_wait", "validation", "saving", "scoring", "other"]


class Phases:
    """Where the time of a run goes: at any moment in one phase, so that the seconds of all are those of the run."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._phase, self._since = now, "other", now()
        self._seconds = dict.fromkeys(get_args(Phase), 0.0)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Within, time counts for this phase, and not for the one around it."""
        outer = self._turn(name)
        try:
            yield
        finally:
            self._turn(outer)

    def _turn(self, phase: str) -> str:
        """Go to another phase; return the one that ends."""
        ended, moment = self._phase, self._now()
        self._seconds[ended] += moment - self._since
        self._phase, self._since = phase, moment
        return ended

    def move(self, source: Phase, target: Phase, seconds: float) -> None:
        """Count seconds of one phase for another, at most what it has."""
        moved = max(0.0, min(seconds, self._seconds[source]))
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def include(self, earlier: Mapping[str, float]) -> None:
        """Add the seconds of an earlier process."""
        for name, seconds in earlier.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase until now, to the millisecond."""
        self._turn(self._phase)
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}


Timestamp = float | torch.cuda.Event
"""Seconds of the host's clock, or an event that a GPU records when all work before it is done."""


def timestamp(device: str) -> Timestamp:
    """Now; on a GPU, when it will have finished the work queued so far. Does not synchronize."""
    if device != "cuda":
        return time.perf_counter()
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(start: Timestamp, end: Timestamp) -> float:
    """Seconds from one timestamp to a later one of the same device. Waits for a GPU to reach the later one."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end - start)  # type: ignore[operator]  # both are
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class DataWait:
    """Context manager around the loading of each step's input: how long steps had to wait for it.

    On a GPU this is the time from the end of the previous step until the input is there.
    """

    def __init__(self, device: str) -> None:
        self._device, self._seconds = device, 0.0
        self._pending: list[tuple[Timestamp, Timestamp]] = []  # reading a timestamp would wait for it

    def __enter__(self) -> None:
        self._start = timestamp(self._device)

    def __exit__(self, *error: object) -> None:
        self._pending.append((self._start, timestamp(self._device)))

    @property
    def seconds(self) -> float:
        """Total of all steps so far. On a GPU, waits for the last input."""
        self._seconds += sum(seconds_between(*pair) for pair in self._pending)
        self._pending.clear()
        return self._seconds


def synchronize(device: str) -> None:
    """Wait until the device has finished all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
