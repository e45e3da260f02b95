"""Train a model into a run folder, and resume that: everything up to the first step."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.checkpoint import State
from vitft.config.train import TrainConfig
from vitft.data.sources.source import DatasetLike
from vitft.errors import ModelError, UsageError
from vitft.hardware.device import deterministic, make_accelerator, memory_guard, resolve_auto, threads
from vitft.hardware.processes import Processes
from vitft.hardware.timers import Phases
from vitft.io import console
from vitft.io.paths import expanded
from vitft.models.load import saved
from vitft.training import run_folder
from vitft.training.callbacks import Callback
from vitft.training.cost.autotune import autotuned
from vitft.training.cost.dry_run import warn_if_long
from vitft.training.loop import Result, Run
from vitft.training.recovery import with_recovery
from vitft.training.setup import advise, prepare


def train(
    config: TrainConfig | None = None,
    *,
    dataset: DatasetLike | None = None,
    model: Any = None,
    processor: Any = None,
    callbacks: Sequence[Callback] = (),
    output: Path | str | None = None,
    overwrite: bool = False,
) -> Result:
    """Fine-tune a model into a new run folder.

    Args:
        config: the settings; by default those of `vitft train`.
        dataset: replaces `config.dataset`: a name, a path, a `Dataset` or `DatasetDict` of `datasets`, or what
            `open_dataset` returned. Pass a dataset object to `resume` and `evaluate` again; they recognize its images
            by their content.
        model: replaces `config.model`: a name, a path, or an image classification model of Transformers, which is
            copied. It keeps its head if its labels are those of the dataset.
        processor: the image processor of a `model` object; by default the one stored at `model.name_or_path`, else the
            usual one of its architecture.
        callbacks: follow the run, on the main process.
        output: the run folder; by default the next free one in runs/.
        overwrite: replace an earlier run in `output`.

    Returns:
        The run folder, its best checkpoint and the scores of that.

    Raises:
        VitftError: with one line that says what is wrong; `Stopped` after a signal, once everything is saved.
    """
    config = config or TrainConfig()
    if dataset is not None and isinstance(dataset, str | Path):
        config, dataset = config.model_copy(update={"dataset": str(dataset)}), None
    elif dataset is not None:
        config = config.model_copy(update={"dataset": None, "dataset_revision": None})
    if model is None or isinstance(model, str | Path):
        config = config if model is None else config.model_copy(update={"model": str(model)})
        return _begin(config, dataset, callbacks, output, overwrite)
    with saved(model, processor) as folder:
        name = f"{run_folder.GIVEN}/{Path(folder).name}"
        config = config.model_copy(update={"model": folder, "model_revision": None})
        return _begin(config, dataset, callbacks, output, overwrite, model=name)


def _begin(
    config: TrainConfig, dataset: Any, callbacks: Sequence[Callback], output: Path | str | None, overwrite: bool,
    model: str | None = None,
) -> Result:  # fmt: skip
    """Train; `model` is the name to record for a model that is at `config.model` only temporarily."""
    phases = Phases()
    config = resolve_auto(config)
    accelerator = make_accelerator(config)
    output = None if output is None else expanded(output)
    begun = run_folder.begun_before(output)
    if begun.run is not None:
        if begun.saved:
            return resume(begun.run, dataset=dataset, callbacks=callbacks)
        output, overwrite = begun.run, True
    with phases.phase("opening"), accelerator.main_process_first():
        if output is not None and accelerator.is_main_process:
            run_folder.check_output(output, overwrite=overwrite)
        prepared = prepare(config, dataset=dataset)
    if model is not None:
        prepared = prepared.with_settings(model=model)
    with phases.phase("tuning"), memory_guard(config, accelerator.num_processes):
        advise(prepared)
        warn_if_long(prepared, accelerator.num_processes)
        prepared = autotuned(prepared, accelerator.num_processes)
    with ExitStack() as held:
        held.enter_context(threads(prepared.config.threads))
        held.enter_context(deterministic(config))
        with phases.phase("opening"):
            # Before anything is written or overwritten: an image may be bad.
            decoded = prepared.open_images(_all(accelerator))
        beginning = run_folder.Beginning(decoded, accelerator)
        run = held.enter_context(run_folder.new_run(beginning, output, overwrite, begun.key))
        parts = [(accelerator, decoded)]
        # A rollback loads the model and the images again: the first ones must be gone by then.
        del accelerator, prepared, decoded, beginning
        first = lambda: Run(*parts.pop(), run, phases, callbacks).train(State())  # noqa: E731
        return with_recovery(run, first, again=lambda: _resume(run, {}, dataset, callbacks, rolled_back=True))


def resume(
    run: Path | str, changes: dict[str, Any] | None = None, *, dataset: DatasetLike | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:  # fmt: skip
    """Continue a run from its newest intact checkpoint; it ends with the same bits as an uninterrupted one.

    Args:
        run: the run folder.
        changes: settings that can change on resume because they do not affect the weights (save_every, keep, log_every,
            tracker), and more epochs or max_steps for a finished run.
        dataset: the path the dataset has moved to, or the object that was passed to `train`.
        callbacks: follow the run, on the main process.

    Raises:
        VitftError: with one line that says what is wrong: UsageError for any other change, DataError for other images.
    """
    run = expanded(run)
    with run_folder.locked_for_all(run):
        if not ckpt.is_run(run):
            raise ModelError(f"{run}: no run folder (no config.yaml and checkpoints/ in it); give the folder of a run.")
        changes = dict(changes or {})
        if isinstance(dataset, str | Path):
            changes["dataset"], dataset = str(dataset), None

        def attempt(*, rolled_back: bool = False) -> Result:
            return _resume(run, changes, dataset, callbacks, rolled_back=rolled_back)

        return with_recovery(run, attempt, again=lambda: attempt(rolled_back=True))


def _resume(
    run: Path, changes: dict[str, Any], dataset: Any, callbacks: Sequence[Callback], *, rolled_back: bool = False
) -> Result:  # fmt: skip
    phases = Phases()
    folder, passed = ckpt.newest_intact(run)
    for fault in passed:
        console.warn(f"passed over {fault}")
    if folder is None:
        run_folder.check_unfinished(run)
    state = ckpt.read_state(folder) if folder else State()
    before = ckpt.read_config(run)
    config = resolve_auto(run_folder.changed(run, before, changes, finished=run_folder.is_finished(state)))
    with threads(config.threads or run_folder.threads_of(run)), deterministic(config):
        accelerator = make_accelerator(config)
        with phases.phase("opening"):
            with accelerator.main_process_first():
                prepared = run_folder.prepare_resume(run, config, folder, dataset)
            decoded = prepared.open_images(_all(accelerator), resumes=True)
        resumed = Run(accelerator, decoded, run, phases, callbacks, resumed_from=folder)
        if rolled_back:
            resumed.keep_earlier_best(state)
        if (config.epochs, config.max_steps) != (before.epochs, before.max_steps) and state.step >= resumed.total_steps:
            total = console.counted(resumed.total_steps, "step")
            raise UsageError(
                f"{run} finished at step {state.step}, and a total of {total} is no more; "
                "set more --epochs or --max-steps."
            )
        if state.total_steps is not None and resumed.total_steps > state.total_steps:
            state.stopped_early, state.evaluations_since_best = False, 0
        if accelerator.is_main_process:
            run_folder.save_changes(run, prepared.config)
        over = resumed.is_over(state)
        console.note(run_folder.resume_note(run, resumed.config, state, resumed.steps_per_epoch, folder, over=over))
        return resumed.train(state)


def _all(accelerator: Any) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes)
