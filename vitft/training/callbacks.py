"""Callbacks that follow a run: metrics.jsonl, trackers, and your own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import filter_trackers

from vitft.config.train import TrainConfig
from vitft.evaluation.metrics import Metrics
from vitft.io.atomic import write_text

FILE = "metrics.jsonl"


class Callback:
    """Follows a run. Subclass it, override what you need, and pass an instance to `train` or `resume`.

    Methods are called on the main process only. An exception ends the run, which can be resumed from its newest
    checkpoint.
    """

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Called before the first step, with the run folder, the resolved settings and the number of steps."""

    def on_step(self, step: int) -> None:
        """Called after each optimizer step; `step` is the number taken so far. A GPU may still be computing it."""

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Called every `log_every` steps, with means over these.

        `values`: loss (nats), accuracy (fraction), grad_norm, lr, images_per_s, data_wait (fraction of the time).
        """

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> bool | None:
        """Called after the validation split is scored, and finally the test split. Return True to stop early."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """Called after a step checkpoint is written to the folder `checkpoint`."""

    def on_end(self) -> None:
        """Called when the run ends, also by an error."""


class MetricsFile(Callback):
    """Appends metrics to the run's metrics.jsonl."""

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Remember the run folder."""
        self.run = run

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Write the training metrics."""
        record(self.run, {"step": step, "epoch": epoch, "split": "train", **values})

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Write the scores of a split."""
        record(self.run, {"step": step, "epoch": epoch} | metrics.summary())


class Tracker(Callback):
    """Sends metrics to TensorBoard or Weights & Biases, through accelerate."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Open the tracker, in the run folder, with the settings."""
        accelerator = self.accelerator  # created before the folder was known
        accelerator.project_configuration.set_directories(str(run))
        accelerator.log_with = filter_trackers(config.tracker, accelerator.logging_dir)
        accelerator.init_trackers("vitft", config=config.model_dump(exclude_none=True))

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Send the training metrics."""
        self._send(step, "train", {"epoch": epoch, **values})

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Send the scores of a split."""
        self._send(step, metrics.split, {"epoch": epoch, **metrics.summary()})

    def on_end(self) -> None:
        """Close the tracker."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _send(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        numbers = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=step)


def record(run: Path, line: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl."""
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def recorded(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    metrics = run / FILE
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    return [found for line in lines if (found := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # truncated by a kill or a full disk
        return None
    return found if isinstance(found, dict) and {"step", "split"} <= found.keys() else None


def remove_after(run: Path, step: int) -> None:
    """Remove the lines after a step, and the final test score: they will be written again."""
    metrics = run / FILE
    if metrics.exists():
        lines = (json.dumps(line, allow_nan=False) for line in recorded(run) if _stays(line, step))
        write_text(metrics, "".join(line + "\n" for line in lines))


def _stays(line: dict[str, Any], step: int) -> bool:
    return bool(line["step"] <= step and line["split"] != "test")
