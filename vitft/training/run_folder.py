"""The run folder: where it is, who may write to it, and which settings can change on resume."""

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from vitft.checkpoints import checkpoint as ckpt
from vitft.config.train import TrainConfig, not_default, train_command
from vitft.data.sources.identity import content_hashes
from vitft.data.split_record import FILE
from vitft.data.splits import contents_of, manifest
from vitft.data.stores.lazy_store import LazyStore
from vitft.data.stores.store import Skipped, Store
from vitft.errors import DataError, ModelError, UsageError, as_flag
from vitft.evaluation.results import has_results
from vitft.hardware.device import environment
from vitft.hardware.processes import after_first, remember, remembered
from vitft.io.atomic import clean_up, lock_folder, write_json
from vitft.io.console import counted
from vitft.io.paths import composed, expanded, make_output
from vitft.training.optim import total_steps
from vitft.training.setup import Decoded, Prepared, absolute, prepare

GIVEN = "given-in-python"
"""The prefix in a run's settings of the name of a model that was passed as an object."""


def folder_of(config: TrainConfig, data: str, output: Path | None) -> Path:
    """The folder of a new run: `output`, or the next free number in runs/."""
    return output if output is not None else ckpt.free_name(config, data)


class Beginning:
    """What a new run records in its folder; it does not keep the model and the data in memory."""

    def __init__(self, prepared: Prepared, accelerator: Any) -> None:
        self.config, self.data = prepared.config, prepared.source.name
        self.main: bool = accelerator.is_main_process
        self.facts = {
            "model_revision": prepared.loaded.revision,
            "dataset_revision": prepared.source.revision,
            "processes": accelerator.num_processes,
        }


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a run may be written to `output`.

    If an earlier `--overwrite` was interrupted before its first checkpoint, the run it would have replaced is restored.
    """
    if overwrite and output.is_dir():
        with locked(output):
            ckpt.restore_replaced(output)
    ckpt.check_free(output, overwrite=overwrite)


@dataclass(frozen=True)
class Begun:
    """What this `train` began before torchrun started its command again; `run` is None if nothing.

    `key` is what the run is remembered by, and `saved` whether it has a checkpoint.
    """

    key: str
    run: Path | None = None
    saved: bool = False


def begun_before(output: Path | None) -> Begun:
    """Find what the same call of `train` began, in `output` if that is given.

    Of a sweep, which leaves out the trials that are done, the same call may be of another one. All processes have to
    call it; what the first one finds counts.
    """
    found: list[Any] = [Begun(f"run-{next(_trainings)}")]
    if os.environ.get("RANK", "0") == "0" and (name := remembered(found[0].key)) is not None:
        run = Path(name)
        if output in (None, run) and ckpt.is_run(run):
            found = [Begun(found[0].key, run, ckpt.newest_intact(run)[0] is not None)]
    chosen: Begun = broadcast_object_list(found)[0]
    return chosen


_trainings = itertools.count()  # in this process: a script may train several times


@contextmanager
def new_run(beginning: Beginning, output: Path | None, overwrite: bool, key: str) -> Iterator[Path]:
    """Create and lock the run folder, on the main process, and write the settings and the environment.

    `key` is what it is remembered by: see `Begun`.
    """
    with ExitStack() as claims:
        chosen: list[Any] = [None]
        if beginning.main:
            run = make_output(lambda: folder_of(beginning.config, beginning.data, output), named=output is not None)
            claims.enter_context(locked(run))
            ckpt.create_run(run, overwrite=overwrite)
            try:
                write_json(run / "environment.json", environment() | beginning.facts)
                remember(key, str(run))
                ckpt.write_config(run, beginning.config)  # last: this file makes the folder a run
            except OSError as error:
                raise UsageError(
                    f"output {run}: cannot be written: {error.strerror or error}; free some space, or choose another."
                ) from error
            chosen = [run]
        yield Path(broadcast_object_list(chosen)[0])


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run folder and clear away what a kill left there. Raises UsageError if another process trains in it."""
    with lock_folder(run) as alone:
        if not alone:
            raise UsageError(f"{run}: another process is training there; wait for it, or choose another.")
        with suppress(OSError):  # training will report a folder that is not writable
            for folder in (run, run / "checkpoints"):
                clean_up(folder)
            ckpt.undo_unfinished_replacement(run)
        yield


@contextmanager
def locked_for_all(run: Path) -> Iterator[None]:
    """`locked` by the first of several processes, all of which have to call it; the others enter when it has."""
    with ExitStack() as lock:
        with after_first():
            if os.environ.get("RANK", "0") == "0":
                lock.enter_context(locked(run))
        yield


def start_note(prepared: Prepared, steps: int, run: Path) -> str:
    """The note at the start of a run."""
    config, how = prepared.config, prepared.loaded.preprocess
    images = ", ".join(f"{len(prepared.splits[role].rows):,} {role}" for role in prepared.used)
    return (
        f"{prepared.source.name}: {images} images of {counted(len(prepared.loaded.labels), 'class')}; "
        f"{Path(config.model).name} at {how.size_text} px on {config.device}, {config.precision}; "
        f"{counted(steps, 'step')} of {config.batch_size}; in {run}"
    )


def resume_note(
    run: Path, config: TrainConfig, state: ckpt.State, steps_per_epoch: int, folder: Path | None, *, over: bool
) -> str:  # fmt: skip
    """The note at the start of a resumed run: its step, or how to continue if it is finished."""
    place = f"at step {state.step} of {total_steps(config, steps_per_epoch)}"
    if not over:
        return f"resuming {run} {place}, {f'from {folder.name}' if folder else 'as nothing was saved'}"
    early = ", stopped early" if state.stopped_early else ""
    more = [word for name, value in _longer(config, steps_per_epoch).items() for word in (as_flag(name), f"{value:g}")]
    longer = ["vitft", "train", "--resume", str(run), *more]
    return (
        f"{run} is finished, {place}{early}; to train longer: {shlex.join(longer)}; "
        f"or start a new run from its weights: {_new_run(config, run / 'last')}"
    )


def check_unfinished(run: Path) -> None:
    """Raise ModelError for a finished run without the weights to continue from: it would begin again, over the rest."""
    if not has_results(run):
        return
    best, rest = run / "best", "start a new run."
    if best.is_dir():
        rest = f"to train its best weights: {_new_run(ckpt.read_config(run), best)}"
    raise ModelError(f"{run} is finished, but last/, from which it would continue, is gone; {rest}")


def _new_run(config: TrainConfig, weights: Path | str, **changes: Any) -> str:
    """The command, or the call, that starts a new run on the data of `config` from such weights."""
    if config.dataset is None:  # it was passed as an object
        more = "".join(f"{name}={value!r}, " for name, value in changes.items())
        return f"train(TrainConfig({more}...), dataset=..., model={str(weights)!r})"
    return train_command({"dataset": config.dataset, "model": weights} | not_default(config) | changes)


def _longer(config: TrainConfig, steps_per_epoch: int) -> dict[str, float]:
    """What ended a run, `epochs` or `max_steps` or both, with twice its value, or more if that is no further step."""
    steps, longer = total_steps(config, steps_per_epoch), config.model_copy(update={"max_steps": None})
    while total_steps(longer, steps_per_epoch) <= steps:
        longer = longer.model_copy(update={"epochs": 2 * longer.epochs})
    epochs = {"epochs": longer.epochs} if longer.epochs > config.epochs else {}
    return epochs | ({"max_steps": 2 * steps} if config.max_steps == steps else {})


def is_finished(state: ckpt.State) -> bool:
    """Whether the run had no steps left when this state was saved."""
    return state.total_steps is not None and (state.stopped_early or state.step >= state.total_steps)


def prepare_resume(run: Path, config: TrainConfig, checkpoint: Path | None, dataset: Any = None) -> Prepared:
    """Prepare a run to continue from a checkpoint, or from its initial model if it has none yet.

    Raises ModelError if the initial model is gone, and UsageError if the dataset was an object and is not passed again.
    """
    if config.dataset is None and dataset is None:
        raise UsageError(f"{run} was trained on a dataset loaded in Python; pass it again: resume(run, dataset=...).")
    if config.model.startswith(f"{GIVEN}/") and checkpoint is None:
        raise ModelError(f"{run} began from a model loaded in Python, and had saved nothing; start it again.")
    origin = expanded(config.model)
    if checkpoint is not None or not origin.is_absolute() or origin.exists():
        return prepare(config, checkpoint, run, dataset)
    kept = ckpt.path_after_replacement(run, origin)
    if not kept.exists():
        raise ModelError(
            f"{config.model}, which {run} began from, is gone, and the run had saved nothing; start a new run."
        )
    prepared = prepare(config.model_copy(update={"model": str(kept)}), run=run, dataset=dataset)
    return prepared.with_settings(model=config.model)


def threads_of(run: Path) -> int:
    """The thread count of a run whose settings lack it. Another count would round sums differently."""
    file = run / "environment.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not readable ({error}); start a new run from its newest checkpoint.") from error


_WITH = {"dataset_revision": "dataset", "image_folder": "dataset", "exclude": "dataset", "precision": "device"}
"""The settings that can change on resume together with another one: where its data is, what its device can do."""

LONGER = ("epochs", "max_steps")
"""The settings that can be increased for a finished run."""


def changed(run: Path, before: TrainConfig, changes: dict[str, Any], *, finished: bool) -> TrainConfig:
    """The run's settings with the allowed changes applied.

    A dataset may have moved: `check_splits` verifies later that it is the same. A finished run may be longer. Raises
    UsageError for any other change, and DataError if the dataset is gone.
    """
    after = absolute(TrainConfig.parse(before.model_dump() | changes, "flags"))
    for name in ("compile", "micro_batch_size"):  # what auto means was settled when the run began
        if getattr(after, name) == "auto":
            after = after.model_copy(update={name: getattr(before, name)})
    moved = {name for name in set(_WITH.values()) if getattr(after, name) != getattr(before, name)}
    if "dataset" in moved and "dataset_revision" not in changes:
        after = after.model_copy(update={"dataset_revision": None})  # that was of the old location
    for name in changes:
        extra = TrainConfig.model_fields[name].json_schema_extra
        assert isinstance(extra, dict)
        was, now = getattr(before, name), getattr(after, name)
        longer = finished and name in LONGER and was is not None and now > was
        allowed = extra["changeable"] or name == "dataset" or _WITH.get(name) in moved or longer
        if was != now and not allowed:
            start = _new_run(after, ckpt.default_model(run) or before.model, **{name: now})
            raise UsageError(
                f"{run} began with {name} {was}, got {now}: it would not be the same run any more. "
                f"Leave out {as_flag(name)}, or start a new run from its weights: {start}"
            )
    place = expanded(after.dataset or "")
    if place.is_absolute() and not place.exists():
        raise DataError(
            f"{after.dataset}, the dataset of {run}, does not exist; if it has moved: "
            f"vitft train --resume {shlex.quote(str(run))} --dataset NEW"
        )
    return after


def check_splits(run: Path, decoded: Decoded, *, begun: bool, write: bool) -> None:
    """Write `splits.json`, or on resume verify that the images are the same. Raises DataError with the difference."""
    file = run / FILE
    if not file.exists() and not begun:
        if write:
            lazy = isinstance(decoded.stores["train"][0], LazyStore)
            document = manifest(decoded.source, decoded.splits, contents=not lazy)
            for role, (store, _) in decoded.stores.made.items():
                document["splits"][role][_digest_name(store)] = store.digest
            _list_skipped(document, decoded.skipped)
            write_json(file, document)
        return
    try:
        then = dict(json.loads(file.read_text(encoding="utf-8"))["splits"])
        repaired = _repaired(run) or set()
        differences = {role: _difference(then.get(role), decoded, role, repaired) for role in then | decoded.splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not readable ({error}); start a new run from its newest checkpoint.") from error
    for role, difference in differences.items():
        if difference:
            weights = ckpt.default_model(run) or decoded.config.model
            raise DataError(
                f"the {role} split differs from the one the run began with: {difference}; "
                f"start a new run from its weights: {_new_run(decoded.config, weights)}"
            )


class ContentHashes:
    """Content hashes of a large dataset, for `splits.json`: computed while the run takes its first steps."""

    def __init__(self, run: Path, decoded: Decoded) -> None:
        self._file, self._of = run / FILE, partial(contents_of, decoded.source, decoded.splits)
        self._hashes: dict[str, list[str]] = {}
        entries = json.loads(self._file.read_text(encoding="utf-8"))["splits"].values()
        self._missing = any(entry.get("by") == "path" and "contents" not in entry for entry in entries)
        self._thread = Thread(target=self._compute, daemon=True)  # a run that is stopped does not wait for it
        if self._missing:
            self._thread.start()

    def _compute(self) -> None:
        self._hashes = self._of()

    def record(self, *, wait: bool = False) -> None:
        """Add them, if they are there by now; with `wait`, as soon as they are."""
        if not self._missing or (self._thread.is_alive() and not wait):
            return
        self._thread.join()
        document = json.loads(self._file.read_text(encoding="utf-8"))
        for role, hashes in self._hashes.items():
            document["splits"][role]["contents"] = hashes
        write_json(self._file, document)
        self._missing = False


def _digest_name(store: Any) -> str:
    """A lazy store knows the pixels of a sample; the others of the split are identified by their content hashes."""
    return "sample" if isinstance(store, LazyStore) else "pixels"


def add_skipped(run: Path, skipped: Mapping[str, Sequence[Skipped]]) -> None:
    """Add images that could not be read to those that `splits.json` lists."""
    document = json.loads((run / FILE).read_text(encoding="utf-8"))
    if _list_skipped(document, skipped):
        write_json(run / FILE, document)


UNREADABLE = "unreadable.jsonl"
"""Names of images that stopped the run, one a line: they may change before it is resumed."""


def add_unreadable(run: Path, names: Sequence[str]) -> None:
    """Let the run go on once these images are repaired. Several processes may call it at once."""
    with (run / UNREADABLE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(composed(name)) + "\n" for name in names))


def settle_repaired(run: Path, decoded: Decoded) -> None:
    """From now on, repaired images may not change either. For the main process, once all have begun."""
    if (repaired := _repaired(run)) is None:
        return
    document = json.loads((run / FILE).read_text(encoding="utf-8"))
    for role, split in decoded.splits.items():
        places = np.array([place for place, name in enumerate(split.ids) if name in repaired], np.int64)
        if "contents" in document["splits"][role]:
            hashes = content_hashes(decoded.source.splits[split.source], split.rows[places])
            for place, now in zip(places.tolist(), hashes, strict=True):
                document["splits"][role]["contents"][place] = now
    write_json(run / FILE, document)
    (run / UNREADABLE).unlink()


def _repaired(run: Path) -> set[str] | None:
    """The images that stopped the run; None if none did."""
    if not (run / UNREADABLE).exists():
        return None
    names = set()
    for line in (run / UNREADABLE).read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a killed process may have written half of it
            names.add(str(json.loads(line)))
    return names


def _list_skipped(document: dict[str, Any], skipped: Mapping[str, Sequence[Skipped]]) -> bool:
    """List, by split, images that could not be read; whether any are new."""
    new = False
    for role, images in skipped.items():
        known = {name for name, _ in document["splits"][role].get("skipped", [])}
        added = sorted([image.name, image.reason] for image in images if image.name not in known)
        if added:
            document["splits"][role].setdefault("skipped", []).extend(added)
            new = True
    return new


def _difference(then: dict[str, Any] | None, decoded: Decoded, role: str, repaired: set[str]) -> str | None:
    """How a split differs from what `splits.json` recorded, but for `repaired` images; None if it does not."""
    if then is None:
        return "there was none"
    split = decoded.splits.get(role)
    wanted = [composed(one) if isinstance(one, str) else one for one in then["ids"]]
    here = list(split.ids) if split else []
    left = set(here)
    if gone := [one for one in wanted if one not in left]:
        first = f"row {gone[0]}" if isinstance(gone[0], int) else gone[0]
        return f"{len(gone):,} of its {len(wanted):,} images are gone, the first is {first}"
    if split is None or here != wanted:
        return f"{counted(len(here), 'image')} now, {len(wanted):,} then"
    if then["hash"] != split.hash:
        return "the same names, but in other classes"
    store = decoded.stores.made[role][0] if role in decoded.stores.made else None
    if isinstance(store, Store):
        return None if store.digest == then.get("pixels") else _OTHER_PIXELS
    same = True
    if role in decoded.stores and "contents" in then:
        contents = zip(content_hashes(decoded.source.splits[split.source], split.rows), then["contents"], strict=True)
        changed = {name for name, (now, before) in zip(here, contents, strict=True) if now != before}
        same = changed <= repaired  # the run has never seen those
    sampled = store is None or then.get("sample", store.digest) == store.digest
    return None if same and sampled else _OTHER_PIXELS


_OTHER_PIXELS = "the same names, but other pixels (the images changed, or this version decodes them differently)"


def save_changes(run: Path, config: TrainConfig) -> None:
    """Record permanent changes: a dataset that has moved, and a longer run."""
    before = ckpt.read_config(run)
    kept = ("dataset", *(["dataset_revision"] if before.dataset != config.dataset else []), *LONGER)
    after = before.model_copy(update={name: getattr(config, name) for name in kept})
    if after != before:
        ckpt.write_config(run, after)
