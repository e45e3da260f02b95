"""`vitft sweep`: train with other settings, and compare the runs on validation images alone."""

import gc
import os
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml

from vitft.checkpoints.checkpoint import BASE, is_run
from vitft.checkpoints.metadata import name_of
from vitft.config.recipe import read_recipe
from vitft.config.train import PATHS, TrainConfig, require_dataset
from vitft.data.split_record import read_record
from vitft.errors import DataError, ModelError, Stopped, TrainingError, UsageError, first_line, require_extra
from vitft.evaluation.metrics import Metrics, wilson_interval
from vitft.io import console
from vitft.io.atomic import remove_folder, write_text
from vitft.io.paths import expanded, numbered
from vitft.sweeping.space import Choices, Space, Values, combinations, point_of, read_space
from vitft.training.callbacks import Callback
from vitft.training.setup import absolute
from vitft.training.trainer import resume, train

if TYPE_CHECKING:
    from vitft.sweeping.study import Handle, Study, Trial

SETTINGS, BEST = "sweep.yaml", "best.yaml"
TRIALS = 20
"""The default number of trials, if a setting has a range."""


@dataclass(frozen=True)
class Plan:
    """What a sweep tries. `sweep.yaml` has it, so that any process can go on with the sweep."""

    settings: dict[str, Any]  # of all trials
    vary: dict[str, str]  # as typed
    trials: int
    seeds: int

    @property
    def base(self) -> TrainConfig:
        """The settings of all trials, before what is varied."""
        return self.config({}, None)

    @property
    def space(self) -> Space:
        """What is varied."""
        return read_space(self.vary, self.settings)

    def config(self, values: Values, seed: int | None) -> TrainConfig:
        """The settings of one run. Raises UsageError if they contradict each other."""
        own = {} if seed is None else {"seed": seed}
        return TrainConfig.parse(self.settings | values | own | {"skip_test": True}, "flags")

    def write(self, folder: Path) -> None:
        """Write `sweep.yaml`."""
        document = {"set": self.vary, "trials": self.trials, "seeds": self.seeds, "settings": self.settings}
        write_text(folder / SETTINGS, yaml.safe_dump(document, sort_keys=False))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `sweep.yaml`. Raises ModelError if the folder has none, or another one."""
        if not (folder / SETTINGS).is_file():
            raise ModelError(f"{folder}: no folder of a sweep (no {SETTINGS} in it); give the folder of one.")
        try:
            found = read_recipe(folder / SETTINGS)
            return cls(dict(found["settings"]), dict(found["set"]), int(found["trials"]), int(found["seeds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / SETTINGS}: is no longer what the sweep wrote ({error!r}).") from error


@dataclass(frozen=True)
class SweepResult:
    """What came of the trials so far, in the order in which they began.

    `by` is the metric that compares them, `base` the number of the trial with the settings as they were given, and
    `recipe` a file with those of the best trial.
    """

    folder: Path
    by: str
    trials: tuple["Trial", ...]
    best: "Trial"
    base: int | None
    planned: int
    recipe: Path

    @property
    def undecided(self) -> bool:
        """Whether the settings as they were given are within the best trial's interval: it may have been luck."""
        base = next((one for one in self.trials if one.number == self.base), None)
        if base is None or base.state != "complete" or base.number == self.best.number:
            return False
        return mean(base, "accuracy") >= interval(self.best)[0]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        trials = [
            asdict(one)
            | {"scores": [score.summary() for score in one.scores]}
            | ({"mean": mean(one, self.by), "spread": spread(one, self.by)} if one.scores else {})
            for one in self.trials
        ]
        return {
            "folder": str(self.folder), "by": self.by, "planned": self.planned, "base": self.base,
            "best": self.best.number, "recipe": str(self.recipe), "trials": trials,
        }  # fmt: skip


def mean(trial: "Trial", name: str) -> float:
    """The mean of a metric over the trial's seeds."""
    return statistics.fmean(_values(trial, name))


def spread(trial: "Trial", name: str) -> float | None:
    """The standard deviation of a metric over the trial's seeds; None for one seed."""
    return statistics.stdev(_values(trial, name)) if len(trial.scores) > 1 else None


def best_of(trials: Sequence["Trial"], by: str) -> "Trial | None":
    """The completed trial with the highest mean score; the first of equals."""
    done = [one for one in trials if one.state == "complete"]
    return max(done, key=lambda one: sum(score.by(by) for score in one.scores), default=None)


def interval(trial: "Trial") -> tuple[float, float]:
    """The 95 % interval of the mean accuracy, by the number of validation images."""
    images = trial.scores[0].count
    return wilson_interval(round(mean(trial, "accuracy") * images), images)


def _values(trial: "Trial", name: str) -> list[float]:
    return [float(getattr(score, name.replace("-", "_"))) for score in trial.scores]


def sweep(
    config: TrainConfig | None = None,
    vary: Mapping[str, str | Sequence[Any]] | None = None,
    *,
    trials: int | None = None,
    seeds: int = 1,
    output: Path | str | None = None,
) -> SweepResult:
    """Train with several settings, and compare the runs on validation images; test images are not read.

    The first trial has the settings as they are, if what is varied includes them. Lists are tried in all combinations;
    if a setting has a range, later trials are chosen near the best (tree-structured Parzen estimator, Bergstra et al.
    2011). A run whose best score so far is lower than the median of the others at the same point is stopped.

    Args:
        config: the settings of all trials.
        vary: settings with what to try: `"1e-5..1e-3"`, `"0.6,0.75,1"`, or a list of values.
        trials: how many; by default all combinations, or 20 if a setting has a range.
        seeds: runs of each trial, which differ in their seed; their mean is compared.
        output: a new folder for the sweep; by default the next free one in sweeps/.

    Returns:
        The trials, and a recipe of the best.

    Raises:
        VitftError: with one line that says what is wrong; `Stopped` after a signal: `resume_sweep` goes on.
    """
    config = config or TrainConfig()
    plan = _planned(config, vary or {}, trials, seeds)
    folder = _free_folder(config) if output is None else expanded(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(
                f"output {folder}: is not empty; choose another"
                + (f", or go on with it: vitft sweep --resume {shlex.quote(str(folder))}" * _is_sweep(folder))
            )
        plan.write(folder)
    except OSError as error:
        raise UsageError(f"output {folder}: cannot be written: {error.strerror}; choose another.") from error
    return _run(folder, plan)


def resume_sweep(folder: Path | str, *, trials: int | None = None) -> SweepResult:
    """Go on with a sweep: after an interruption, or beside another process that works on it, such as on another GPU.

    Args:
        folder: of the sweep.
        trials: a new number of trials, if it should become longer.

    Raises:
        VitftError: with one line that says what is wrong.
    """
    folder = expanded(folder)
    plan = Plan.read(folder)
    if trials is not None and trials < plan.trials:
        raise UsageError(f"trials {trials}: {folder} has {plan.trials}; give at least as many.")
    if trials is not None and trials > plan.trials:
        plan = Plan(plan.settings, plan.vary, trials, plan.seeds)
        plan.write(folder)
    return _run(folder, plan)


def _planned(config: TrainConfig, vary: Mapping[str, Any], trials: int | None, seeds: int) -> Plan:
    """What to try. Raises UsageError before anything heavy is done."""
    _require()
    require_dataset(config)
    resolved = absolute(config)
    settings = {name: getattr(resolved, name) for name in TrainConfig.model_fields if name in config.model_fields_set}
    texts = {name: _text(values) for name, values in vary.items()}
    space = read_space(texts, settings)
    for name, one in space.items():
        if name in PATHS and isinstance(one, Choices):  # a sweep goes on from any folder
            given = [TrainConfig.parse({**settings, name: value}) for value in one.values]
            texts[name] = _text([getattr(absolute(config), name) for config in given])
    space = read_space(texts, settings)
    if not space and seeds == 1:
        raise UsageError("nothing to try: add --set, as in --set lr=1e-5..1e-3, or --seeds 3 to repeat a run.")
    every = combinations(space)
    return Plan(settings, texts, trials or (TRIALS if every is None else len(every)), seeds)


def _require() -> None:
    require_extra("sweep", "sweep", "optuna")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "sweep: each trial trains in one process; start `vitft sweep`, and beside it `vitft sweep --resume` "
            "with its folder for each further GPU."
        )


def _text(values: Any) -> str:
    """A list of values as the command line has it."""
    if isinstance(values, str):
        return values
    texts = [
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value) for value in values
    ]
    return (";" if any("," in text for text in texts) else ",").join(texts)


def _free_folder(config: TrainConfig) -> Path:
    stem = f"{Path(name_of(str(config.dataset))).name}-{Path(config.model).name}"
    return numbered(Path("sweeps") / stem)


def _is_sweep(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


# -- the trials -----------------------------------------------------------------------------------


class _Reporter(Callback):
    """Reports validations of a trial's first seed, and stops a run that is worse than most."""

    def __init__(self, trial: "Handle", by: str, *, prunes: bool) -> None:
        self.trial, self.by, self.prunes = trial, by, prunes

    def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        """Remember the length. Raises UsageError if there are no validation images."""
        self.total = total_steps
        record = read_record(run)
        if record is not None and "validation" not in record.splits:
            raise UsageError("no validation images to compare trials by; set --val-fraction, such as 0.2.")

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> bool:
        """Report; returns whether to stop."""
        return self.prunes and step < self.total and self.trial.report(metrics.by(self.by), step / self.total)


def _run(folder: Path, plan: Plan) -> SweepResult:
    """Work on the sweep until no trial is left, or until others have the rest."""
    _require()
    from vitft.sweeping.study import Study

    study = Study(folder, plan.space, plan.base, plan.trials)
    try:
        with console.warnings_once():
            while _try_one(study, plan, folder):
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    except Stopped as stop:
        raise Stopped(
            f"stopped; finished trials and the last checkpoint are saved. Resume with: "
            f"vitft sweep --resume {shlex.quote(str(folder))}",
            stop.exit_code - 128,
        ) from stop
    return _result(study, plan, folder)


def _try_one(study: "Study", plan: Plan, folder: Path) -> bool:
    """Train one trial; returns whether there was one."""
    with study.claimed() as trial:
        if trial is None:
            return False
        values = ", ".join(f"{name} {console.brief(value)}" for name, value in trial.settings.items())
        console.note(f"trial {trial.number} of {study.total}: {values or 'the settings as given'}")
        try:
            _train(trial, plan)
        except TrainingError as error:  # it diverged, or memory ran out
            trial.fail(first_line(error))
        except (UsageError, DataError, ModelError) as error:
            trial.fail(first_line(error))  # in any case: else each process that goes on would begin with it
            if _is_of_all(study, plan, trial.number):
                raise
    trials = _keep_best(study, plan.base.best_by)
    best, done = best_of(trials, plan.base.best_by), next(one for one in trials if one.number == trial.number)
    if done.state == "complete":
        mark = "  (best so far)" if best is not None and best.number == done.number else ""
        console.note(f"trial {done.number}: {shown(plan.base.best_by, mean(done, plan.base.best_by))}{mark}")
    else:
        console.note(f"trial {done.number}: {done.state}, {done.reason}")
    return True


def _is_of_all(study: "Study", plan: Plan, number: int) -> bool:
    """Whether no trial can succeed where this one has failed, as far as one can tell.

    None has, and these are the settings as they were given, or a trial with other values throughout failed likewise.
    """
    trials = study.trials()
    this = next(one for one in trials if one.number == number)
    likewise = [one for one in trials if one.number != number and one.reason == this.reason]
    return best_of(trials, plan.base.best_by) is None and (
        this.settings == point_of(plan.base, plan.space)
        or any(not one.settings.items() & this.settings.items() for one in likewise)
    )


def _train(trial: "Handle", plan: Plan) -> None:
    """The runs of a trial, each from where it was interrupted, if it was."""
    by, first = plan.base.best_by, plan.base.seed
    for seed in range(first, first + plan.seeds):
        if seed not in trial.scores:
            started, run = time.monotonic(), trial.folder / f"seed-{seed}"
            reporter = _Reporter(trial, by, prunes=seed == first)
            try:
                if is_run(run):
                    result = resume(run, callbacks=[reporter])
                else:
                    result = train(plan.config(trial.settings, seed), output=run, callbacks=[reporter])
            except (UsageError, DataError, ModelError, TrainingError):
                trial.took(time.monotonic() - started)
                raise
            trial.record(seed, result.scores["validation"], sum(result.seconds.values()))
        if trial.pruned:  # also one that was killed right here
            return trial.prune()
    return trial.complete(statistics.fmean(score.by(by) for score in trial.scores.values()))


def _keep_best(study: "Study", by: str) -> list["Trial"]:
    """Keep the weights of the best trial alone: of the others, settings and metrics tell all. Returns the trials.

    Other processes do so too, and what they complete meanwhile may be better.
    """
    with study.alone():
        trials = study.trials()
        best = best_of(trials, by)
        for one in trials:
            if one.state != "unfinished" and (best is None or one.number != best.number):
                for run in study.folder_of(one.number).glob("seed-*"):
                    for name in ("checkpoints", "best", "last", BASE):
                        if (run / name).is_dir():
                            remove_folder(run / name)
        return trials


def _result(study: "Study", plan: Plan, folder: Path) -> SweepResult:
    """The table, and `best.yaml`. Raises TrainingError if no trial was completed."""
    by, trials = plan.base.best_by, tuple(study.trials())
    best = best_of(trials, by)
    if best is None:
        failed = [one for one in trials if one.state == "failed"]
        if not failed:
            raise UsageError(f"{folder}: no trial is finished yet; other processes work on them.")
        raise TrainingError(
            f"{folder}: all {console.counted(len(failed), 'trial')} failed; the first: {failed[0].reason}"
        )
    given = point_of(plan.base, plan.space)
    result = SweepResult(
        folder, by, trials, best, 1 if given is not None else None, study.total, folder / BEST
    )  # fmt: skip
    write_text(result.recipe, _recipe(result, plan))
    return result


def _recipe(result: SweepResult, plan: Plan) -> str:
    """The settings of the best trial, with what it reached."""
    best, by = result.best, result.by
    score = best.scores[0]
    low, high = interval(best)
    reached = f"{by} {shown(by, mean(best, by))}"
    reached += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})" if by == "accuracy" else ""
    lines = [
        f"Trial {best.number}, the best of {len(result.trials)}.",
        "",
        f"  vitft train --recipe {shlex.quote(str(result.recipe))}",
        "",
        f"{reached} on {console.counted(score.count, 'validation image')} [{score.split_hash[:8]}], which chose it",
        f"among the trials, so a little too high. Mean of {console.counted(len(best.scores), 'seed')}.",
        f"Tried: {'; '.join(f'{name}={text}' for name, text in plan.vary.items()) or 'the same settings'}.",
    ]
    chosen = plan.settings | best.settings
    settings = {name: chosen[name] for name in TrainConfig.model_fields if name in chosen and name != "skip_test"}
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + yaml.safe_dump(settings, sort_keys=False)


def shown(by: str, value: float) -> str:
    """A metric as text."""
    return f"{value:.4f}" if by == "loss" else console.percent(value, 2)
