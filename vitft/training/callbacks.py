"""Who follows a run while it trains: metrics.jsonl, a tracker, and callbacks of your own."""

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
    """Follows a run while it trains. Subclass it, override what you need, and pass it to `train` or `resume`.

    Every method is called on the main process only. An exception that one raises ends the run, which can be resumed
    from its newest checkpoint.
    """

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Before the first step: the run folder, the resolved settings, the steps from the first to the last."""

    def on_step(self, step: int) -> None:
        """After each optimizer step, of which `step` have been taken so far. On a GPU it may still be computing."""

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Every `log_every` steps, with means since the last time.

        `values`: loss (nats), accuracy (fraction), grad_norm, lr, images_per_s, data_wait (fraction of the time).
        """

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> bool | None:
        """After the validation split was scored, and at the end the test split; True stops the run early."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """After a step checkpoint was written, whole, to the folder `checkpoint`."""

    def on_end(self) -> None:
        """After the run ended, however it did."""


class MetricsFile(Callback):
    """Appends what happens to the run's metrics.jsonl."""

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Remember the run."""
        self.run = run

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Write a line of the split train."""
        record(self.run, {"step": step, "epoch": epoch, "split": "train", **values})

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Write a line of the split."""
        record(self.run, {"step": step, "epoch": epoch} | metrics.summary())


class Tracker(Callback):
    """Sends what happens to TensorBoard or Weights & Biases, through accelerate."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Open the tracker, in the run folder, with the settings."""
        accelerator = self.accelerator  # made before the folder was known
        accelerator.project_configuration.set_directories(str(run))
        accelerator.log_with = filter_trackers(config.tracker, accelerator.logging_dir)
        accelerator.init_trackers("vitft", config=config.model_dump(exclude_none=True))

    def on_log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Send the values of the split train."""
        self._send(step, "train", {"epoch": epoch, **values})

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Send the scores of the split."""
        self._send(step, metrics.split, {"epoch": epoch, **metrics.summary()})

    def on_end(self) -> None:
        """Close the tracker."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _send(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        numbers = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=step)


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


def remove_after(run: Path, step: int) -> None:
    """Drop the lines of what will be done again: later steps, and the final score."""
    metrics = run / FILE
    if metrics.exists():
        lines = (json.dumps(line, allow_nan=False) for line in recorded(run) if _stays(line, step))
        write_text(metrics, "".join(line + "\n" for line in lines))


def _stays(line: dict[str, Any], step: int) -> bool:
    return bool(line["step"] <= step and line["split"] != "test")
