"""train(config): set-up, loop, save, in reading order.

A step is a function of its number: its batch, its learning rate and its dropout follow from (seed,
step). So a run that is resumed from step N ends bit for bit where an undisturbed one does.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from vitft import checkpoint as ckpt
from vitft import console, evaluation, runs
from vitft.card import Card, read_card
from vitft.checkpoint import State
from vitft.config import TrainConfig
from vitft.data.loader import EvalLoader
from vitft.errors import ModelError, Stopped, TrainingError
from vitft.evaluation import measure
from vitft.faults import Rollback, persisting
from vitft.hardware import accelerator_of, is_out_of_memory, memory_guard, threads
from vitft.history import Track, Window, forget_after, record, tracker
from vitft.learner import Learner
from vitft.metrics import Metrics
from vitft.models import load_trained
from vitft.paths import expanded
from vitft.plan import warn_if_long
from vitft.preparation import Prepared, Stores, prepare
from vitft.signals import StopSignals
from vitft.speed import Speed, speed_of
from vitft.tuning import tuned


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its best checkpoint, the score of that by split, and how fast it was trained."""

    run: Path
    checkpoint: Path
    step: int
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: Speed | None = None  # of a run that was finished before: none


def train(config: TrainConfig, *, output: Path | str | None = None, overwrite: bool = False) -> Result:
    """Fine-tune a model as `config` says, into a new run folder.

    Raises VitftError; Stopped after a signal, when everything is saved.
    """
    accelerator = accelerator_of(config)
    output = None if output is None else expanded(output)
    if output is not None:
        ckpt.check_free(output, overwrite=overwrite)
    with accelerator.main_process_first():
        prepared = prepare(config)
    with memory_guard(prepared.config, accelerator.num_processes):
        warn_if_long(prepared, accelerator.num_processes)
        prepared.config = tuned(prepared, accelerator.num_processes)
    with ExitStack() as held:
        held.enter_context(threads(prepared.config.threads))
        stores = prepared.decode()  # a bad image is found before anything is written, or overwritten
        run = held.enter_context(runs.new_run(accelerator, prepared, output, overwrite))
        first = lambda: _Run(accelerator, prepared, stores, run).train(State())  # noqa: E731
        return persisting(run, first, again=lambda: _resume(run, {}))


def resume(run: Path | str, changes: dict[str, Any] | None = None) -> Result:
    """Go on with a run from its newest whole checkpoint; it ends where an undisturbed one would.

    `changes` may hold settings that steer a run without changing its weights (save_every, keep,
    log_every, tracker), and where its data set has moved to. Raises UsageError naming any other.
    """
    run = expanded(run)
    if not ckpt.is_run(run):
        raise ModelError(f"{run}: no run folder (no config.yaml and checkpoints/ in it); give the folder of a run.")
    with runs.alone_in(run):
        attempt = lambda: _resume(run, changes)  # noqa: E731
        return persisting(run, attempt, again=attempt)


def _resume(run: Path, changes: dict[str, Any] | None) -> Result:
    config = runs.changed(run, changes or {})
    with threads(config.threads or runs.threads_of(run)):
        return _resumed(run, config)


def _resumed(run: Path, config: TrainConfig) -> Result:
    folder, passed = ckpt.newest_whole(run)
    for fault in passed:
        console.warn(f"passed over {fault}")
    accelerator = accelerator_of(config)
    with accelerator.main_process_first():
        prepared = prepare(config, folder)
    state = ckpt.read_state(folder) if folder else State()
    resumed = _Run(accelerator, prepared, prepared.decode(), run, resumed_from=folder)
    if accelerator.is_main_process:
        runs.keep_dataset(run, prepared.config)
    over = resumed.is_over(state)
    console.note(runs.whereabouts(run, resumed.config, state, resumed.total_steps, folder, over=over))
    return resumed.train(state)


class _Run:
    """One run while it trains: what every part of the loop needs."""

    def __init__(
        self, accelerator: Any, prepared: Prepared, stores: Stores, run: Path, resumed_from: Path | None = None
    ) -> None:
        self.accelerator, self.prepared, self.run = accelerator, prepared, run
        self.config, self.how = prepared.config, prepared.loaded.preprocess
        self.labels, self.resumed_from = prepared.loaded.labels, resumed_from
        self.stores = stores
        runs.check_splits(run, prepared, stores, begun=resumed_from is not None, write=accelerator.is_main_process)
        self.learner = Learner(accelerator, prepared, stores)
        self.bare, self.probe = self.learner.bare, self.learner.probe
        self.steps_per_epoch, self.total_steps = self.learner.steps_per_epoch, self.learner.total_steps
        self.pending: tuple[Card, dict[str, torch.Tensor]] | None = None  # a best/ that is not written yet
        card = read_card(resumed_from) if resumed_from else None
        self.scores: dict[str, dict[str, Any]] = card.scores if card else {}

    # -- the loop ---------------------------------------------------------------------------------

    def train(self, state: State) -> Result:
        """Run the steps that are left, then score the chosen checkpoint."""
        config = self.config
        if self.resumed_from is not None:
            ckpt.load_optimizer(self.resumed_from, self.bare, self.learner.optimizer.optimizer)
            if state.scaler and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
        if self.accelerator.is_main_process:
            forget_after(self.run, state.step)
        if not self.is_over(state):
            console.note(runs.introduction(self.prepared, self.total_steps, self.run))
            self.learner.get_ready()
        eval_every = config.eval_every or self.steps_per_epoch
        save_every = config.save_every or (self.steps_per_epoch if self.probe is None else self.total_steps)
        window = Window(self.accelerator)
        with (
            StopSignals(self.accelerator) as signals,
            tracker(config, self.run, self.accelerator) as track,
            console.TrainingProgress(state.step, self.total_steps, self.steps_per_epoch) as bar,
            memory_guard(config, self.accelerator.num_processes),
        ):
            while not self.is_over(state):
                lr = self.learner.lr(state.step)
                window.add(*self._step(state.step), count=self.learner.images(state.step))
                state.step += 1
                last = state.step == self.total_steps
                self.scores = {}  # they were the last step's
                stopping = signals.received()
                evaluates = "validation" in self.stores and (state.step % eval_every == 0 or last)
                saves = state.step % save_every == 0 or last or stopping
                if state.step % config.log_every == 0 or evaluates or saves:
                    try:
                        means = window.close(self.learner.data_wait_s)
                    except FloatingPointError as error:
                        raise self._diverged(state.step - len(window) + error.args[0] + 1, error.args[1]) from error
                    line: dict[str, Any] = {"step": state.step, "epoch": self._epoch(state.step), "split": "train"}
                    line |= means | {"lr": lr}
                    bar.update(line)
                    track(line)
                    self._record(line)
                if evaluates:
                    self._validate(state, bar, track)
                    saves = saves or state.stopped_early
                if saves:
                    self._save(state)
                if evaluates or saves:
                    window.restart(self.learner.data_wait_s)
                if stopping:
                    raise self._stopped(state, stopping)
            result = self._finish(state, bar, track)
        world, probe = self.accelerator.num_processes, self.probe is not None
        return replace(result, speed=speed_of(window.pace, self.bare, config, world, probe=probe))

    def _step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take a step; where memory runs out, again in smaller parts, from now on. The batch stays what it is."""
        while True:
            try:
                return self.learner.step(step)
            except RuntimeError as error:
                # Several processes would have to agree on it, in the middle of an exchange.
                alone = self.accelerator.num_processes == 1
                if not is_out_of_memory(error) or self.learner.part == 1 or not alone:
                    raise
                before, now = self.learner.part, self.learner.halve()
            self.config = self.config.model_copy(update={"micro_batch_size": now})
            ckpt.write_config(self.run, self.config)
            console.warn(
                f"out of memory at step {step + 1}: {before} images at a time do not fit; from here on {now}. "
                f"The batch stays {self.config.batch_size}."
            )
            if self.config.device == "cuda":
                torch.cuda.empty_cache()

    def is_over(self, state: State) -> bool:
        """Whether there are no steps left to do."""
        return state.step >= self.total_steps or state.stopped_early

    def _validate(self, state: State, bar: "console.TrainingProgress", track: Track) -> None:
        metrics = self._measure("validation", bar)
        self.scores = {"validation": metrics.summary()}
        line = {"step": state.step, "epoch": self._epoch(state.step)} | metrics.summary()
        self._record(line)
        track(line)
        better = (metrics.accuracy, -metrics.loss) > (state.best_accuracy, -state.best_loss)
        bar.evaluated(metrics, better)
        if better:
            state.best_step, state.evaluations_since_best = state.step, 0
            state.best_accuracy, state.best_loss = metrics.accuracy, metrics.loss
            self._keep_best(state)
        else:
            state.evaluations_since_best += 1
            patience = self.config.early_stopping
            state.stopped_early = patience is not None and state.evaluations_since_best >= patience

    def _measure(self, role: str, bar: "console.TrainingProgress") -> Metrics:
        accelerator = self.accelerator
        loader = EvalLoader(
            *self.stores[role], self.how, batch_size=evaluation.BATCH, device=accelerator.device,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        with bar.evaluating(role) as progress:
            batches = loader if self.probe is None else self.probe.scoring(role, loader, progress)
            # The bare model: processes may have different numbers of batches, and must not wait for each other.
            return measure(self.learner.module, batches, self.labels, self.prepared.splits[role],
                           gather=gather_object, progress=progress)  # fmt: skip

    # -- what is written --------------------------------------------------------------------------

    def _epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def _card(self, state: State) -> Card:
        splits = {
            role: {"source": split.source, "count": len(split.rows), "hash": split.hash}
            for role, split in self.prepared.splits.items()
        }
        return Card(self.config, self.labels, state.step, self._epoch(state.step), splits, self.scores)

    def _keep_best(self, state: State) -> None:
        """Write best/; of a probe, whose epochs take less time than that, when something else is written."""
        if self.probe is None:
            self._write_model("best", self._card(state))
        else:
            self.pending = self._card(state), copy.deepcopy(self.learner.module.state_dict())

    def _flush_best(self) -> None:
        if self.pending is None:
            return
        (card, best), now = self.pending, copy.deepcopy(self.learner.module.state_dict())
        self.pending = None
        self.learner.module.load_state_dict(best)
        self._write_model("best", card)
        self.learner.module.load_state_dict(now)

    def _save(self, state: State) -> None:
        self._flush_best()
        scaler = self.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler else None
        if self.accelerator.is_main_process:
            ckpt.save_step(self.run, self.bare, self.learner.optimizer.optimizer, self.how, self._card(state), state)
        self.accelerator.wait_for_everyone()

    def _write_model(self, name: str, card: Card) -> None:
        if self.accelerator.is_main_process:
            ckpt.save_model(self.run / name, self.bare, self.how, card)
        self.accelerator.wait_for_everyone()

    def _record(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            record(self.run, line)

    # -- the end ----------------------------------------------------------------------------------

    def _stopped(self, state: State, signal_number: int) -> Stopped:
        self._write_model("last", self._card(state))
        name = "Ctrl-C" if signal_number == 2 else "SIGTERM"
        return Stopped(
            f"stopped by {name} at step {state.step} of {self.total_steps}; everything is saved. "
            f"Go on with: vitft train --resume {self.run}",
            signal_number,
        )

    def _diverged(self, step: int, value: float) -> TrainingError:
        folders = ckpt.step_folders(self.run)
        if folders and self.config.on_nan == "rollback":
            return Rollback(
                f"the loss or its gradient is {value} at step {step}; the last good step is {folders[0].name}"
            )
        good = f"the last good checkpoint is {folders[0]}" if folders else "no checkpoint was saved before it"
        return TrainingError(
            f"the loss or its gradient is {value} at step {step}; {good}. Try a lower --lr or more --warmup."
        )

    def _finish(self, state: State, bar: "console.TrainingProgress", track: Track) -> Result:
        """Score the best checkpoint, or the last where there was nothing to choose by, on the test split."""
        if self.accelerator.is_main_process:
            ckpt.prune(self.run, state.step, self.config.keep)  # a kill may have come before it
        chosen = "last" if state.best_step is None else "best"
        if chosen == "best" and state.best_step != state.step:
            self._write_model("last", self._card(state))
            card = read_card(self.run / "best")
            assert card is not None, "best/ is written by vitft"
            self.bare.load_state_dict(load_trained(self.run / "best").model.state_dict())
            state, self.scores = State(step=card.step), card.scores
            names = ["best"]
        else:
            names = list({"last", chosen})
        if "test" in self.stores:
            metrics = self._measure("test", bar)
            self.scores = self.scores | {"test": metrics.summary()}
            line = {"step": state.step, "epoch": self._epoch(state.step)} | metrics.summary()
            self._record(line)
            track(line)
        for name in names:
            self._write_model(name, self._card(state))
        return Result(self.run, self.run / chosen, state.step, self.scores)
