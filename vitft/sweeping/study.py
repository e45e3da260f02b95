"""The trials of a sweep, in a SQLite file of Optuna (Akiba et al. 2019) that several processes share.

A process that takes a trial locks the folder of its runs. So a trial whose process was killed is recognized: it is
unfinished and not locked, and whoever finds it goes on with it.
"""

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL

from vitft.config.train import TrainConfig
from vitft.evaluation.metrics import Score
from vitft.io.atomic import lock_folder
from vitft.sweeping.space import Range, Space, Values, combinations, point_of

FILE, RUNS = "study.db", "trials"
PERMILLE = 1000  # evaluations are compared at the same fraction of a run, whatever its number of steps
_SCORES, _SECONDS, _PRUNED, _REASON = "scores", "seconds", "pruned_at", "reason"


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and what came of them.

    `scores` has the validation score of each seed. `seconds` is the time of its runs, interruptions left out; `reason`
    says why a trial failed or was pruned.
    """

    number: int
    settings: Values
    scores: tuple[Score, ...]
    state: Literal["complete", "pruned", "failed", "unfinished"]
    seconds: float
    reason: str = ""


class Handle:
    """A trial that this process works on."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, settings: Values, folder: Path) -> None:
        self._study, self._trial = study, trial
        self.settings, self.folder, self.number = settings, folder, trial.number + 1

    @property
    def scores(self) -> dict[int, Score]:
        """The validation scores so far, by seed."""
        found = self._trial.user_attrs.get(_SCORES, {})
        return {int(seed): Score.from_summary(score) for seed, score in found.items()}

    @property
    def pruned(self) -> bool:
        """Whether the trial was found to be worse than most."""
        return _PRUNED in self._trial.user_attrs

    def report(self, value: float, fraction: float) -> bool:
        """Report a score at a fraction of the run; returns whether to stop, because most were better there."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed run repeats evaluations that were reported
            self._trial.report(value, round(PERMILLE * fraction))
        if not self.pruned and self._trial.should_prune():
            self._trial.set_user_attr(_PRUNED, fraction)
        return self.pruned

    def record(self, seed: int, score: Score, seconds: float) -> None:
        """Record the validation score of a seed, and what its run has taken."""
        scores = {**self._trial.user_attrs.get(_SCORES, {}), str(seed): score.summary()}
        self.took(seconds)
        self._trial.set_user_attr(_SCORES, scores)

    def took(self, seconds: float) -> None:
        """Record what a run has taken."""
        self._trial.set_user_attr(_SECONDS, self._trial.user_attrs.get(_SECONDS, 0.0) + seconds)

    def complete(self, value: float) -> None:
        """End the trial with its value; higher is better."""
        self._study.tell(self._trial, value)

    def prune(self) -> None:
        """End a trial that was stopped early."""
        self._study.tell(self._trial, state=TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        """End a trial that could not be trained."""
        self._trial.set_user_attr(_REASON, reason)
        self._study.tell(self._trial, state=TrialState.FAIL)


class Study:
    """All trials of a sweep.

    Args:
        folder: of the sweep.
        space: what is varied.
        base: the settings of all trials otherwise; the first trial has them alone, if the space includes that.
        total: the number of trials; if all settings have lists, at most that of their combinations.
    """

    def __init__(self, folder: Path, space: Space, base: TrainConfig, total: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder, self._space, self._seed = folder, space, base.seed
        self._fixed = _in_order(space, base)
        # A few random trials, then those near the best (Bergstra et al. 2011).
        self._random_trials = max(4, total // 4)
        self.total = total if combinations(space) is None else min(total, len(self._fixed))
        place = URL.create(
            "sqlite", database=str((folder / FILE).absolute())
        )  # from sqlalchemy 2.1 on, it escapes ? and %
        self._study = optuna.create_study(
            storage=place.render_as_string(), study_name="vitft", load_if_exists=True, direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )  # fmt: skip

    @contextmanager
    def claimed(self) -> Iterator[Handle | None]:
        """Yield a trial for this process alone: one that was interrupted, else a new one; None if none is left."""
        with ExitStack() as held:
            with self.alone():
                trial = self._interrupted(held) or self._new(held)
            yield trial

    def trials(self) -> list[Trial]:
        """All trials that have begun."""
        return [_finished(one) for one in self._study.get_trials(deepcopy=False) if one.state != TrialState.WAITING]

    def folder_of(self, number: int) -> Path:
        """The folder with a trial's runs, one for each seed. Trials are counted from 1, unlike in Optuna."""
        return self._folder / RUNS / str(number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process takes a trial, or removes weights."""
        with ExitStack() as held:
            while not held.enter_context(lock_folder(self._folder)):
                held.close()
                time.sleep(0.05)
            yield

    def _interrupted(self, held: ExitStack) -> Handle | None:
        for one in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with ExitStack() as attempt:
                if attempt.enter_context(lock_folder(self._made(one.number + 1))):
                    held.enter_context(attempt.pop_all())
                    return self._handle(optuna.Trial(self._study, one._trial_id))
        return None

    def _new(self, held: ExitStack) -> Handle | None:
        begun = self._study.get_trials(deepcopy=False)
        waiting = any(one.state == TrialState.WAITING for one in begun)  # its process was killed right here
        number = len(begun) - waiting
        if number >= self.total:
            return None
        if number < len(self._fixed) and not waiting:
            self._study.enqueue_trial(self._fixed[number])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=(self._seed + number) % 2**32, n_startup_trials=self._random_trials, constant_liar=True
            )
        trial = self._study.ask()
        held.enter_context(lock_folder(self._made(trial.number + 1)))
        return self._handle(trial)

    def _made(self, number: int) -> Path:
        folder = self.folder_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _handle(self, trial: optuna.Trial) -> Handle:
        settings = {name: _suggested(trial, name, one) for name, one in self._space.items()}
        return Handle(self._study, trial, settings, self.folder_of(trial.number + 1))


def _in_order(space: Space, base: TrainConfig) -> list[Values]:
    """The trials that are known in advance: that of the base, and then, if all have lists, all others, shuffled."""
    first = point_of(base, space)
    others = [point for point in combinations(space) or [] if point != first]
    random.Random(base.seed).shuffle(others)
    return [*([] if first is None else [first]), *others]


def _suggested(trial: optuna.Trial, name: str, one: Any) -> Any:
    if not isinstance(one, Range):
        return trial.suggest_categorical(name, one.values)
    suggest: Any = trial.suggest_int if one.whole else trial.suggest_float
    return suggest(name, one.low, one.high, log=one.logarithmic)


_STATES: dict[TrialState, Literal["complete", "pruned", "failed", "unfinished"]] = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
}  # fmt: skip


def _finished(one: FrozenTrial) -> Trial:
    attributes = one.user_attrs
    scores = tuple(Score.from_summary(score) for score in attributes.get(_SCORES, {}).values())
    pruned = attributes.get(_PRUNED)
    reason = attributes.get(_REASON, "" if pruned is None else f"below the median after {pruned:.0%} of the steps")
    state = _STATES.get(one.state, "unfinished")
    return Trial(one.number + 1, dict(one.params), scores, state, attributes.get(_SECONDS, 0.0), reason)
