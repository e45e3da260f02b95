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
        settle(self.device)
        started = time.perf_counter()
        yield
        settle(self.device)
        self.seconds[name] += time.perf_counter() - started

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Around one part of a step."""
        return self._timed(name)


def settle(device: str) -> None:
    """Wait until the device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
