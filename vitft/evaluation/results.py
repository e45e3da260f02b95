"""What a finished run leaves for people and programs: `results.json`, and the predictions of every scored image."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitft import __version__
from vitft.errors import ModelError
from vitft.evaluation.metrics import Metrics
from vitft.evaluation.split_predictions import Predictions
from vitft.io.atomic import write_json

FILE = "results.json"


@dataclass(frozen=True)
class Results:
    """The scores of a run's chosen checkpoint: `splits` has of each split what `Metrics.to_dict` gives.

    `seconds` has those of each phase of the run; it is empty in runs of early versions.
    """

    run: Path
    checkpoint: str  # best or last
    step: int
    splits: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    def predictions(self, split: str) -> Predictions | None:
        """What the checkpoint said about the images of a split; None if they were too many. Raises ModelError."""
        file = predictions_file(self.run, split)
        return Predictions.read(file) if file.is_file() else None


def predictions_file(run: Path, split: str) -> Path:
    """The file with the predictions of a split."""
    return run / f"predictions-{split}.parquet"


def write_results(
    run: Path, checkpoint: str, step: int, measured: Mapping[str, Metrics | dict[str, Any]], temperature: float | None,
    seconds: Mapping[str, float],
) -> None:  # fmt: skip
    """Write `results.json` and the predictions. A split that is given as a dictionary was written before."""
    for split, metrics in measured.items():
        if isinstance(metrics, Metrics) and metrics.predictions is not None:
            metrics.predictions.write(predictions_file(run, split))
    splits = {
        split: replace(one, temperature=temperature).to_dict() if isinstance(one, Metrics) else one
        for split, one in measured.items()
    }
    facts = {"vitft": __version__, "checkpoint": checkpoint, "step": step, "seconds": dict(seconds)}
    write_json(run / FILE, facts | {"splits": splits})


def read_results(run: Path) -> Results | None:
    """The results of a run; None if it is not finished, or of an earlier version. Raises ModelError."""
    if not has_results(run):
        return None
    file = run / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        seconds = {name: float(value) for name, value in found.get("seconds", {}).items()}
        return Results(run, str(found["checkpoint"]), int(found["step"]), dict(found["splits"]), seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); resume the run, and it is written again.") from error


def has_results(run: Path) -> bool:
    """Whether a run has results, readable or not."""
    return (run / FILE).is_file()


def remove_results(run: Path) -> None:
    """Remove the results of a run that goes on."""
    for file in (run / FILE, *run.glob("predictions-*.parquet")):
        with suppress(FileNotFoundError):
            file.unlink()
