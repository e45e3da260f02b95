"""The runs in a folder: what each is, how far it came, and how good it is."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.checkpoint import is_run
from vitft.checkpoints.metadata import name_of, read_card
from vitft.config.recipe import read_recipe
from vitft.errors import UsageError, VitftError, first_line
from vitft.evaluation.metrics import Score
from vitft.evaluation.results import FILE
from vitft.io.atomic import lock_folder
from vitft.io.paths import expanded

RUNS = Path("runs")
"""Where runs are, unless told otherwise."""


@dataclass(frozen=True)
class RunInfo:
    """A run: its folder, dataset and model, the scores of its best checkpoint by split, and how far it is.

    `state` is finished, training, interrupted, not started or damaged; then `problem` says why. `changed` is in seconds
    since 1970, `bytes` what the folder takes.
    """

    run: Path
    dataset: str
    model: str
    state: str
    step: int
    total_steps: int | None
    scores: dict[str, Score]
    bytes: int
    changed: float
    problem: str = ""

    @property
    def score(self) -> Score | None:
        """The score to show: that of the test split, else of validation."""
        return self.scores.get("test") or self.scores.get("validation")

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON values."""
        scores = {split: score.summary() for split, score in self.scores.items()}
        return asdict(self) | {"run": str(self.run), "scores": scores}


def list_runs(folder: Path | str = RUNS) -> list[RunInfo]:
    """The runs in a folder, newest first. Raises UsageError if there is no such folder, unless it is runs/."""
    folder = expanded(folder)
    if folder == RUNS and not folder.exists():  # the first run will make it
        return []
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; runs are in {RUNS}/ unless --output says otherwise.")
    runs = [_describe(path) for path in folder.iterdir() if is_run(path)]
    return sorted(runs, key=lambda one: one.changed, reverse=True)


def newest_run(folder: Path | str = RUNS) -> Path:
    """The run in a folder that was written to last and has a model. Raises UsageError if there is none."""
    folder = expanded(folder)
    found = [path for path in folder.iterdir() if is_run(path)] if folder.is_dir() else []
    for run in sorted(found, key=_changed, reverse=True):
        if ckpt.default_model(run) is not None:
            return run
    raise UsageError(f"no checkpoint given, and {folder}/ has no run with a model; give the folder of one.")


def _describe(run: Path) -> RunInfo:
    with lock_folder(run) as free:
        pass  # at once: it only asks
    inside = (Path(folder) / name for folder, _, names in os.walk(run) for name in names)  # a folder may be gone by now
    size, changed = sum(map(_bytes, inside)), _changed(run)
    try:
        settings = read_recipe(run / "config.yaml")
        dataset, model = str(settings.get("dataset", "given in Python")), str(settings.get("model", ""))
        steps = ckpt.step_folders(run)
        newest = steps[0] if steps else run / "last"
        state = ckpt.read_state(newest) if (newest / "state.json").is_file() else ckpt.State()
        chosen = ckpt.default_model(run)
        card = None if chosen is None else read_card(chosen)
        scores = {} if card is None else {split: Score.from_summary(one) for split, one in card.scores.items()}
    except (VitftError, OSError, KeyError, TypeError) as error:
        # A run in progress replaces its checkpoints.
        how, why = ("damaged", first_line(error)) if free else ("training", "")
        return RunInfo(run, "", "", how, 0, None, {}, size, changed, why)
    # Test images are scored last; earlier versions left no results.
    finished = (run / FILE).is_file() or "test" in scores
    how = "finished" if finished else "interrupted" if chosen else "not started"
    return RunInfo(
        run, name_of(dataset), name_of(model), how if free else "training", state.step, state.total_steps, scores, size,
        changed,
    )  # fmt: skip


def _bytes(file: Path) -> int:
    """The size of a file; 0 if it was removed meanwhile."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def _modified(file: Path) -> float:
    """When a file was written to; 0 if there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _changed(run: Path) -> float:
    """When a run was last written to. Its scores and checkpoints are; later readers write into no folder of them."""
    return max(_modified(run / name) for name in ("metrics.jsonl", "config.yaml", FILE))
