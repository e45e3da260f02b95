"""The training loop, in reading order: steps, evaluations, checkpoints, the end.

A step is a function of (seed, step): its batch, learning rate and dropout. So a run that is resumed ends with the same
bits as an uninterrupted one.
"""

import copy
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.checkpoint import State
from vitft.checkpoints.metadata import Card, read_card
from vitft.config.train import TrainConfig
from vitft.data.loader import EvalLoader
from vitft.data.stores.lazy_store import LazyStore
from vitft.data.stores.store import Skipped, UnreadableError
from vitft.errors import DataError, ModelError, Stopped, TrainingError
from vitft.evaluation import evaluation
from vitft.evaluation.calibration import fit_temperature
from vitft.evaluation.metrics import Metrics, Score
from vitft.evaluation.novelty import Novelty
from vitft.evaluation.results import Results, read_results, remove_results, write_results
from vitft.hardware.device import is_out_of_memory, memory_guard, out_of_memory
from vitft.hardware.shards import each_joined
from vitft.hardware.timers import Phases
from vitft.io import console
from vitft.io.signals import Interrupted, StopSignals
from vitft.models.load import restore_weights
from vitft.training import run_folder
from vitft.training.callbacks import Callback, MetricsFile, Tracker, remove_after
from vitft.training.cost.throughput import Speed, Window, measure_speed
from vitft.training.diagnosis import PaceWatch, learned_nothing
from vitft.training.novelty import run_novelty
from vitft.training.recovery import REMEDY, Diverged
from vitft.training.setup import Decoded
from vitft.training.step import Learner


@dataclass(frozen=True)
class Result:
    """A finished run.

    `run` is its folder, `checkpoint` its best checkpoint, of step `step`, and `scores` has the scores of that by split.
    `skipped` has the splits that `skip_test` left alone. `speed` is None if the run had already finished before.
    `seconds` has those of each phase of the run, also before it was resumed; together they are all that it took.
    """

    run: Path
    checkpoint: Path
    step: int
    scores: dict[str, Score] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    speed: Speed | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        scores = {split: score.summary() for split, score in self.scores.items()}
        return asdict(self) | {"run": str(self.run), "checkpoint": str(self.checkpoint), "scores": scores}


class Run:
    """A run in progress, on one process."""

    def __init__(
        self, accelerator: Any, decoded: Decoded, run: Path, phases: Phases, callbacks: Sequence[Callback] = (),
        resumed_from: Path | None = None,
    ) -> None:  # fmt: skip
        self.accelerator, self.decoded, self.run = accelerator, decoded, run
        self.phases, self.waited_s = phases, 0.0  # seconds for data that phases already count
        self.labels, self.how = decoded.loaded.labels, decoded.loaded.preprocess
        self.callbacks, self.resumed_from = callbacks, resumed_from
        self.followers: list[Callback] = []  # empty except on the main process
        run_folder.check_splits(run, decoded, begun=resumed_from is not None, write=accelerator.is_main_process)
        self.contents = run_folder.ContentHashes(run, decoded) if accelerator.is_main_process else None
        self.learner = Learner(accelerator, decoded)
        self.unwrapped, self.probe = self.learner.unwrapped, self.learner.probe
        self.steps_per_epoch, self.total_steps = self.learner.steps_per_epoch, self.learner.total_steps
        self.pending: tuple[Card, dict[str, torch.Tensor]] | None = None  # a best/ that is still to be written
        self.signals, self.window, self.pace = StopSignals(accelerator), Window(accelerator), PaceWatch()
        self.eval_batch = evaluation.BATCH
        self.measured: Metrics | None = None  # the latest evaluation
        self.of_best: tuple[int, Metrics] | None = None  # the step of the best validation of this process, and that
        self.temperature: float | None = None  # of the chosen checkpoint, in the end
        self.learner.breakable, self.signals.keep_up = self.signals.interruptible, self.learner.keep_up
        self.begun = self.saved = self.written_last = -1  # steps
        self.listed = 0  # images that could not be read
        card = read_card(resumed_from) if resumed_from else None
        self.scores: dict[str, dict[str, Any]] = card.scores if card else {}
        if resumed_from is None:
            with self.learner.whole() as model:
                if model is not None:
                    ckpt.save_base(run, model, self.how, self._card(State()))

    @property
    def config(self) -> TrainConfig:
        """The settings; the micro-batch may have been halved since the start."""
        return self.learner.config

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Notify metrics.jsonl, the tracker and the user's callbacks while the run is in progress."""
        if self.accelerator.is_main_process:
            tracked = [Tracker(self.accelerator)] if self.config.tracker != "none" else []
            self.followers = [MetricsFile(), *tracked, *self.callbacks]
        with ExitStack() as ending:
            for follower in self.followers:
                follower.on_start(self.run, self.config, self.total_steps)
                ending.callback(follower.on_end)
            yield

    # -- the loop ---------------------------------------------------------------------------------

    def train(self, state: State) -> Result:
        """Take the remaining steps, then score the chosen checkpoint on the test split."""
        config = self.config
        self.begun, state.total_steps = state.step, self.total_steps
        self.scores = state.scores or self.scores
        written = self._written() if self.is_over(state) else None
        self.phases.include(state.seconds if written is None else written.seconds)
        if self.resumed_from is not None:
            self._load_optimizer(self.resumed_from, state)
        if self.accelerator.is_main_process:
            remove_after(self.run, state.step)
            if not self.is_over(state):
                remove_results(self.run)
        window = self.window
        with (
            self.signals,
            closing(self.learner),
            self._followed(),
            console.TrainingProgress(state.step, self.total_steps, self.steps_per_epoch) as bar,
            memory_guard(config, self.accelerator.num_processes),
        ):
            try:
                if not self.is_over(state):
                    console.note(run_folder.start_note(self.decoded, self.total_steps, self.run))
                    with self.phases.phase("head"):
                        self.learner.get_ready(self.signals.watched, start_head=state.step == 0)
                window.restart(self.learner.data_wait_s)
                while not self.is_over(state):
                    with self.phases.phase("steps"):
                        saves = self._advance(state, bar)
                    if state.validation_due:
                        with self.phases.phase("validation"), self.learner.averaged():
                            self._validate(state, bar)
                        saves = saves or state.stopped_early
                        window.restart(self.learner.data_wait_s)
                    if saves:
                        self._save(state)
                        window.restart(self.learner.data_wait_s)
                with self.phases.phase("scoring"), self.learner.averaged():
                    result = self._finish(state, bar)
            except Interrupted as stop:
                raise self._stopped(state, stop.number, bar) from None
            except UnreadableError as error:
                raise self._cannot_read(state, error, bar) from error
            except RuntimeError as error:
                if not (is_out_of_memory(error) and (state.validation_due or self.is_over(state))):
                    raise
                world = self.accelerator.num_processes
                if state.validation_due and world == 1:  # else others may be in the middle of their evaluation
                    self._save_now(state, bar)
                raise out_of_memory(self.config, world, in_pass=False) from error
        trained = window.pace.images > 0  # else it had finished before, and has already said so
        if trained and self.measured:
            weights = self.decoded.weights
            if nothing := learned_nothing(self.measured, self.config, self.total_steps, weights):
                console.warn(nothing)
        world, probe = self.accelerator.num_processes, self.probe is not None
        return replace(result, speed=measure_speed(window.pace, self.unwrapped, self.config, world, probe=probe))

    def _advance(self, state: State, bar: "console.TrainingProgress") -> bool:
        """Take a step, unless an interrupted validation is still due; return whether to save. Raises Interrupted."""
        if state.validation_due:
            return True
        config, window = self.config, self.window
        window.add(*self._step(state.step), count=self.learner.images(state.step))
        state.step += 1
        bar.advance(state.step)
        for follower in self.followers:
            follower.on_step(state.step)
        last = state.step == self.total_steps
        self.scores = {}  # those were of the previous step
        eval_every = config.eval_every or self.steps_per_epoch
        save_every = config.save_every or (self.steps_per_epoch if self.probe is None else self.total_steps)
        state.validation_due = "validation" in self.decoded.stores and (state.step % eval_every == 0 or last)
        saves = state.step % save_every == 0 or last
        if number := self.signals.received():
            raise Interrupted(number)
        if state.step % config.log_every == 0 or state.validation_due or saves:
            self._log(state, bar)
        return saves

    def _log(self, state: State, bar: "console.TrainingProgress") -> None:
        """Report the steps since the last report. Raises TrainingError for a non-finite loss or gradient."""
        window = self.window
        try:
            means = window.close(self.learner.data_wait_s)
        except FloatingPointError as error:
            step, value = state.step - len(window) + error.args[0] + 1, error.args[1]
            raise self._diverged(f"the loss or its gradient is {value}", step) from error
        epoch, values = self._epoch(state.step), means | {"lr": self.learner.lr(state.step - 1)}
        bar.update({"step": state.step, "epoch": epoch} | values)
        for follower in self.followers:
            follower.on_log(state.step, epoch, values)
        if slowed := self.pace.slowed(means["images_per_s"]):
            console.warn(slowed)

    def _load_optimizer(self, folder: Path, state: State) -> None:
        if not (folder / ckpt.OPTIMIZER).exists():
            if not self.is_over(state):
                console.note(f"{folder} has weights only: the optimizer starts with new moments")
            return
        ckpt.load_optimizer(folder, self.unwrapped, self.learner.optimizer.optimizer)
        if state.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)

    def keep_earlier_best(self, state: State) -> None:
        """Keep best/ after a rollback, even if its step was discarded: later checkpoints have to beat its score."""
        card = read_card(self.run / "best")
        if card is not None and card.step > state.step:
            score = Score.from_summary(card.scores["validation"]).by(self.config.best_by)
            state.best_step, state.evaluations_since_best = card.step, 0
            state.best_score = state.counted_score = score

    def _step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take a step; if its gradients need too much memory, halve the micro-batch for the rest of the run.

        The batch stays the same.
        """
        while True:
            try:
                return self.learner.step(step)
            except RuntimeError as error:
                # Several processes would have to agree on it in the middle of an all-reduce.
                processes, before = self.accelerator.num_processes, self.learner.micro_batch
                if not is_out_of_memory(error):
                    raise
                if self.learner.updating or before == 1 or processes > 1:
                    raise out_of_memory(self.config, processes, in_pass=not self.learner.updating) from error
                self.learner.halve()
            ckpt.write_config(self.run, self.config)
            console.warn(
                f"out of memory at step {step + 1}: {before} images at a time do not fit; from now on "
                f"{self.learner.micro_batch}. The batch stays {self.config.batch_size}."
            )
            if self.config.device == "cuda":
                torch.cuda.empty_cache()

    def is_over(self, state: State) -> bool:
        """Whether no steps and no validation are left."""
        return (state.step >= self.total_steps or state.stopped_early) and not state.validation_due

    def _validate(self, state: State, bar: "console.TrainingProgress") -> None:
        try:
            metrics = self._measure("validation", bar)
        except ModelError as error:
            raise self._diverged(str(error), state.step) from error
        state.validation_due = False
        self.scores = {"validation": metrics.summary()}
        stop = self._tell_evaluation(state.step, metrics)
        score = metrics.by(self.config.best_by)
        better = state.best_score is None or score > state.best_score
        bar.evaluated(metrics, better)
        if state.counted_score is None or score > state.counted_score + self.config.min_delta:
            state.counted_score, state.evaluations_since_best = score, 0
        else:
            state.evaluations_since_best += 1
            patience = self.config.early_stopping
            state.stopped_early = patience is not None and state.evaluations_since_best >= patience
        state.stopped_early |= stop
        if better:
            state.best_step, state.best_score = state.step, score
            self.of_best = state.step, metrics
            self._keep_best(state)

    def _tell_evaluation(self, step: int, metrics: Metrics) -> bool:
        """Notify callbacks of an evaluation; return, on all processes, whether one asks to stop."""
        asked = [follower.on_evaluation(step, self._epoch(step), metrics) is True for follower in self.followers]
        return bool(broadcast_object_list([any(asked)])[0])  # the other processes may have none to ask

    def _measure(self, role: str, bar: "console.TrainingProgress") -> Metrics:
        """Score a split. If that needs too much memory, halve its batches for the rest of the run."""
        while True:
            try:
                return self._scored(role, bar)
            except RuntimeError as error:
                # Several processes would have to agree on it.
                alone = self.accelerator.num_processes == 1
                if not is_out_of_memory(error) or self.eval_batch == 1 or not alone:
                    raise
            self.eval_batch //= 2
            console.warn(f"out of memory: evaluating {console.counted(self.eval_batch, 'image')} at a time from now on")
            if self.config.device == "cuda":
                torch.cuda.empty_cache()

    def _scored(self, role: str, bar: "console.TrainingProgress") -> Metrics:
        accelerator = self.accelerator
        self.learner.share_running_means()
        images, labels = self._images(role)
        loader = EvalLoader(
            images, labels, self.how, batch_size=self.eval_batch, device=accelerator.device,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        with self.signals.interruptible(), bar.evaluating(role) as shown:
            progress, gather = self.signals.watched(shown, gather_object)
            batches = loader if self.probe is None else self.probe.scoring(role, loader, progress)
            # Not the DDP wrapper, which would wait for other processes that may have fewer batches.
            self.measured = evaluation.measure(
                self.learner.module, batches, self.labels, self.decoded.scored(role),
                others=self.decoded.lacking(role), gather=gather, progress=progress,
            )  # fmt: skip
            return self.measured

    def _images(self, role: str) -> Any:
        """A split's images and labels; of a large dataset, each process decodes its part of them now."""
        with self.signals.interruptible():
            return self.decoded.stores[role]

    # -- what is written --------------------------------------------------------------------------

    def _epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def _card(self, state: State, *, scores: dict[str, dict[str, Any]] | None = None) -> Card:
        """The metadata of a model with these `scores`; by default those of the latest evaluation."""
        splits = {
            role: {"source": split.source, "count": len(split.rows), "hash": split.hash}
            for role, split in self.decoded.splits.items()
        }
        epoch, temperature = self._epoch(state.step), self.temperature
        scores = self.scores if scores is None else scores
        return Card(self.config, self.labels, state.step, epoch, splits, scores, temperature=temperature)

    def _keep_best(self, state: State) -> None:
        """Write best/. A linear probe's epoch is faster than that: its best weights are copied, and written later."""
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

    def _seconds(self) -> dict[str, float]:
        """The seconds of each phase of the run until now; of the steps, those that waited for data are apart."""
        waited_s = self.learner.data_wait_s
        self.phases.move("steps", "data_wait", waited_s - self.waited_s)
        self.waited_s = waited_s
        return self.phases.seconds()

    def _save(self, state: State) -> None:
        with self.phases.phase("saving"):
            self._save_step(state)

    def _save_step(self, state: State) -> None:
        if not self.learner.is_finite():
            raise self._diverged("weights are not finite", state.step)
        self._flush_best()
        scaler = self.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler else None
        state.seconds = self._seconds()
        # The averages were scored, and these are the weights themselves.
        of_model, state.scores = ({}, self.scores) if self.config.ema else (self.scores, {})
        moments = ckpt.optimizer_tensors(self.unwrapped, self.learner.optimizer.optimizer)
        with self.learner.whole() as model:
            if model is not None:
                folder = ckpt.save_step(self.run, model, moments, self.how, self._card(state, scores=of_model), state)
                for follower in self.followers:
                    follower.on_save(state.step, folder)
            else:
                deque(each_joined(moments), 0)  # what the main process is writing
        self.saved = state.step
        self._record_images()
        self.accelerator.wait_for_everyone()

    def _record_images(self, *, wait: bool = False) -> None:
        """Record what is known of the images by now: their content hashes, and which could not be read."""
        if self.contents is not None:
            self.contents.record(wait=wait)
            run_folder.settle_repaired(self.run, self.decoded)
        if self.config.on_bad_image == "skip":
            everywhere = gather_object([self.decoded.skipped])
            if (count := sum(len(bad) for skipped in everywhere for bad in skipped.values())) == self.listed:
                return
            self.listed = count
            if self.accelerator.is_main_process:
                for skipped in everywhere:
                    run_folder.add_skipped(self.run, skipped)
                self._tell_skipped_elsewhere([bad for skipped in everywhere for bad in skipped["train"]])

    def _tell_skipped_elsewhere(self, skipped: Sequence[Skipped]) -> None:
        """Tell of training images that only another machine has met: its processes do not speak."""
        store, own = self.learner.images_loader.store, {bad.name for bad in self.decoded.skipped["train"]}
        for bad in skipped:
            if isinstance(store, LazyStore) and bad.name not in own:
                store.tell(bad)

    def _write_model(
        self, name: str, card: Card, state: State | None = None, *, novelty: Novelty | None = None
    ) -> None:  # fmt: skip
        with self.phases.phase("saving"):
            with self.learner.whole() as model:
                if model is not None:
                    beside = [] if novelty is None else [novelty.write]
                    ckpt.save_model(self.run / name, model, self.how, card, state, beside=beside)
            if self.contents is not None:  # what a model was trained on is known wherever it is
                self.contents.record()
            self.accelerator.wait_for_everyone()

    def _write_last(self, state: State) -> None:
        state.seconds = self._seconds()
        self._write_model("last", self._card(state), replace(state, scores={}))
        self.written_last = state.step

    # -- the end ----------------------------------------------------------------------------------

    def _save_now(self, state: State, bar: "console.TrainingProgress") -> None:
        """Save what is not saved yet, between two steps."""
        try:
            if len(self.window):
                self._log(state, bar)
            if state.step > max(self.saved, self.begun):
                self._save(state)
        except Diverged as fault:  # someone who stops a run does not want a rollback
            raise TrainingError(str(fault)) from fault
        if self.saved == state.step != self.written_last:
            with self.learner.averaged():
                self._write_last(state)

    def _cannot_read(self, state: State, error: UnreadableError, bar: "console.TrainingProgress") -> DataError:
        """Save, unless other processes are in the middle of a step; the returned error says how to resume."""
        if error.by_all or self.accelerator.num_processes == 1:
            self._save_now(state, bar)
        if error.names:
            run_folder.add_unreadable(self.run, error.names)
        step = max(self.saved, self.begun)
        return DataError(f"{error} To go on from step {step}: vitft train --resume {shlex.quote(str(self.run))}")

    def _stopped(self, state: State, number: int, bar: "console.TrainingProgress") -> Stopped:
        """Save what is not saved yet; the returned error says how to resume."""
        self._save_now(state, bar)
        name = "Ctrl-C" if number == 2 else "SIGTERM"
        kept = "everything is saved" if state.step else "there is nothing to save yet"
        return Stopped(
            f"stopped by {name} at step {state.step} of {self.total_steps}; {kept}. "
            f"Resume with: vitft train --resume {shlex.quote(str(self.run))}",
            number,
        )

    def _diverged(self, what: str, step: int) -> TrainingError:
        if self.config.on_nan == "rollback":
            return Diverged(what, step)
        good = next((folder for folder in ckpt.step_folders(self.run) if ckpt.find_damage(folder) is None), None)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before it"
        return TrainingError(f"{what} at step {step}; {kept}. {REMEDY}")

    def _finish(self, state: State, bar: "console.TrainingProgress") -> Result:
        """Score the best checkpoint, or the last one if there is no validation split, on the test split."""
        if self.accelerator.is_main_process:
            ckpt.prune(self.run, state.step, self.config.keep)  # a kill may have prevented it before
        chosen, scored = ("last" if state.best_step is None else "best"), state
        best = self._best() if chosen == "best" else None
        if best is not None and not (best.step == state.step and _alike(best.scores, self.scores)):
            self._write_last(state)
            restore_weights(self.unwrapped, self.run / "best")
            scored, self.scores = State(step=best.step), best.scores
        details = self._validation_details(scored.step, bar) if best is not None else {}
        if "test" in self.decoded.stores:
            details["test"] = metrics = self._measure("test", bar)
            self.scores = self.scores | {"test": metrics.summary()}
            self._tell_evaluation(scored.step, metrics)
        self._record_images(wait=True)
        self.temperature = _temperature(details.get("validation"))
        if scored is state:
            self._write_last(state)
        if chosen == "best":
            with self.signals.interruptible():
                novelty = run_novelty(self.learner, self.decoded, self.signals.watched)
            self._write_model("best", self._card(scored), novelty=novelty)
        seconds = self._seconds()
        if self.accelerator.is_main_process:
            write_results(self.run, chosen, scored.step, details, self.temperature, seconds)
            ckpt.prune(self.run, state.step, self.config.keep_finished)
        scores = {role: Score.from_summary(summary) for role, summary in self.scores.items()}
        skipped = tuple(role for role in self.decoded.splits if role not in self.decoded.stores)
        return Result(self.run, self.run / chosen, scored.step, scores, skipped, seconds=seconds)

    def _validation_details(self, step: int, bar: "console.TrainingProgress") -> dict[str, Any]:
        """The best checkpoint's scores in full: in memory, written before, or, after a resume, measured again."""
        if self.of_best is not None and self.of_best[0] == step:
            return {"validation": self.of_best[1]}
        written = self._written()
        if written is not None and written.step == step and "validation" in written.splits:
            return {"validation": written.splits["validation"]}
        return {"validation": self._measure("validation", bar)}

    def _written(self) -> Results | None:
        """What the run wrote when it ended before; None if that is damaged, for it is written again."""
        try:
            return read_results(self.run)
        except ModelError:
            return None

    def _best(self) -> Card:
        """The metadata of best/. Raises ModelError."""
        card = read_card(ckpt.find_model(self.run / "best"))
        if card is None:
            raise ModelError(f"{self.run / 'best'}: is no longer what the run wrote, for vitft.json is gone.")
        return card


def _temperature(validation: Metrics | dict[str, Any] | None) -> float | None:
    """The temperature that calibrates the probabilities on the validation images; None without them."""
    if isinstance(validation, dict):  # it was written before
        found: float | None = validation.get("calibration", {}).get("temperature")
        return found
    said = None if validation is None else validation.predictions
    return None if said is None else fit_temperature(said)


def _alike(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> bool:
    """Whether these are the scores of the same evaluation; images_per_s differs from process to process."""
    summaries = [dict(scores.get("validation", {})) for scores in (one, other)]
    for summary in summaries:
        summary.pop("images_per_s", None)
    return summaries[0] == summaries[1]
