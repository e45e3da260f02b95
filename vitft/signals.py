"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch


class StopSignals:
    """While entered, remembers a signal instead of dying of it."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._number = 0
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

    def received(self) -> int:
        """The signal that any process received, or 0: all processes hear of it at the same step."""
        if self._accelerator.num_processes == 1:
            return self._number
        mine = torch.tensor([self._number], device=self._accelerator.device)
        return int(self._accelerator.gather(mine).max())
