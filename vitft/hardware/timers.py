"""Where the time of a step goes: a clock that the step's parts report to. In training it does not run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Part = Literal["wait", "transfer", "augment", "forward", "backward", "optimizer"]
"""wait: for stored images (in evaluation, for the model's input); augment: from those to the model's input."""


class Clock:
    """The clock of a run that is not measured: it costs nothing, and waits for no device."""

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Around one part of a step."""
        return nullcontext()


class Stopwatch(Clock):
    """Adds up the seconds of each part; waits for the device at both ends, so that each part pays for its own."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def _timed(self, name: Part) -> Iterator[None]:
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Around one part of a step."""
        return self._timed(name)


Timestamp = float | torch.cuda.Event
"""By the clock of what computes: seconds of the host's, or an event that a GPU comes to when all before it is done."""


def timestamp(device: str) -> Timestamp:
    """Now; where a GPU computes, when it will have done what it was asked for so far: nothing waits for it here."""
    if device != "cuda":
        return time.perf_counter()
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(begun: Timestamp, ended: Timestamp) -> float:
    """From one moment to a later one of the same device; of a GPU's it waits for the later one."""
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended - begun)  # type: ignore[operator]  # both are
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


class DataWait:
    """Around what makes a step's input: how long steps had to wait for it.

    On a GPU that is from the end of the step before until the input lies there: it is idle then, or makes the input.
    """

    def __init__(self, device: str) -> None:
        self._device, self._seconds = device, 0.0
        self._moments: list[tuple[Timestamp, Timestamp]] = []  # not read yet: to read one waits for it

    def __enter__(self) -> None:
        self._begun = timestamp(self._device)

    def __exit__(self, *error: object) -> None:
        self._moments.append((self._begun, timestamp(self._device)))

    @property
    def seconds(self) -> float:
        """Of all steps so far; on a GPU, this waits for the last input."""
        self._seconds += sum(seconds_between(*pair) for pair in self._moments)
        self._moments.clear()
        return self._seconds


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
