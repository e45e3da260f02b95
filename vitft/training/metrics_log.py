"""What a run tells of itself while it trains: metrics.jsonl, and a tracker."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import filter_trackers

from vitft.config.train import TrainConfig
from vitft.io.atomic import write_text

FILE = "metrics.jsonl"
Track = Callable[[dict[str, Any]], None]
"""Sends one line of metrics to the tracker."""


def record(run: Path, line: dict[str, Any]) -> None:
    """Append one line to the run's metrics."""
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def recorded(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics that were written whole."""
    metrics = run / FILE
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    return [found for line in lines if (found := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # a kill or a full disk fell into it
        return None
    return found if isinstance(found, dict) and {"step", "split"} <= found.keys() else None


def forget_after(run: Path, step: int) -> None:
    """Drop the lines of what will be done again: later steps, and the final score."""
    metrics = run / FILE
    if metrics.exists():
        lines = (json.dumps(line, allow_nan=False) for line in recorded(run) if _stays(line, step))
        write_text(metrics, "".join(line + "\n" for line in lines))


def _stays(line: dict[str, Any], step: int) -> bool:
    return bool(line["step"] <= step and line["split"] != "test")


@dataclass
class Pace:
    """How fast a run went while it trained; evaluation and saving do not count."""

    images: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        """Images a second, over all processes."""
        return self.images / self.elapsed_s

    @property
    def data_wait(self) -> float:
        """Share of the time before the model had its input."""
        return self.waited_s / self.elapsed_s


class Window:
    """What happened since the last line of metrics; the device is asked for numbers once a window."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.pace = accelerator, Pace()
        self.restart()

    def restart(self, data_wait_s: float = 0.0) -> None:
        """Begin anew, from now; `data_wait_s` is what the run has waited for data so far."""
        self.started, self.waited_s = time.perf_counter(), data_wait_s
        self.steps: list[torch.Tensor] = []
        self.images = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, loss: torch.Tensor, correct: torch.Tensor, norm: torch.Tensor, *, count: int) -> None:
        """Keep one step: this process's shares of loss and correct answers, and the gradient's norm."""
        self.steps.append(torch.stack([loss, correct, norm.detach() / self.accelerator.num_processes]))
        self.images += count

    def close(self, data_wait_s: float) -> dict[str, float]:
        """Means over the window, over all processes; then begin the next one.

        Raises FloatingPointError(place in the window, value) for the first loss or norm that is not finite.
        """
        table = self.accelerator.reduce(torch.stack(self.steps), "sum").double().cpu()
        # Under fp16 an overflowing gradient is ordinary: the scaler skips that step and halves its scale.
        checked = table[:, :1] if self.accelerator.scaler else table[:, ::2]
        bad = (~checked.isfinite()).nonzero()
        if len(bad):
            place, column = bad[0].tolist()
            raise FloatingPointError(place, checked[place, column].item())
        elapsed, waited = time.perf_counter() - self.started, data_wait_s - self.waited_s
        self.pace.images += self.images
        self.pace.elapsed_s += elapsed
        self.pace.waited_s += waited
        line = {
            "loss": table[:, 0].mean().item(),
            "accuracy": table[:, 1].sum().item() / self.images,
            "grad_norm": table[table[:, 2].isfinite(), 2].sum().item() / max(1, int(table[:, 2].isfinite().sum())),
            "images_per_s": self.images / elapsed,
            "data_wait": waited / elapsed,
        }
        self.restart(data_wait_s)
        return line


@contextmanager
def tracker(config: TrainConfig, run: Path, accelerator: Any) -> Iterator[Track]:
    """A function that sends a line of metrics to the run's tracker."""
    if config.tracker == "none":
        yield lambda line: None
        return
    # The folder was not known when the accelerator was made.
    accelerator.project_configuration.set_directories(str(run))
    accelerator.log_with = filter_trackers(config.tracker, accelerator.logging_dir)
    accelerator.init_trackers("vitft", config=config.model_dump(exclude_none=True))

    def track(line: dict[str, Any]) -> None:
        values = {f"{line['split']}/{key}": value for key, value in line.items() if isinstance(value, float)}
        accelerator.log(values, step=line["step"])

    try:
        yield track
    finally:
        accelerator.end_training()
