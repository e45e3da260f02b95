"""Where a run is written, and what may differ when it is resumed."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from vitft import checkpoint as ckpt
from vitft.config import TrainConfig
from vitft.data.splits import manifest
from vitft.errors import DataError, ModelError, UsageError, as_flag
from vitft.files import heal, held, write_json
from vitft.hardware import environment
from vitft.paths import expanded
from vitft.preparation import Prepared, Stores, absolute


def folder_of(prepared: Prepared, output: Path | None) -> Path:
    """The folder of a new run: `output`, or the next free number in runs/."""
    return output if output is not None else ckpt.free_name(prepared.config, prepared.source.name)


@contextmanager
def new_run(accelerator: Any, prepared: Prepared, output: Path | None, overwrite: bool) -> Iterator[Path]:
    """Make the run folder, on the main process, which holds it from now on, and write what the run is."""
    with ExitStack() as claims:
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            run = _made(prepared, output)
            claims.enter_context(alone_in(run))
            ckpt.create_run(run, overwrite=overwrite)
            revisions = {"model_revision": prepared.loaded.revision, "dataset_revision": prepared.source.revision}
            processes = {"processes": accelerator.num_processes}
            try:
                write_json(run / "environment.json", environment() | revisions | processes)
                ckpt.write_config(run, prepared.config)  # last: it makes the folder a run
            except OSError as error:
                raise UsageError(
                    f"output {run}: cannot be written: {error.strerror or error}; make room, or choose another."
                ) from error
            chosen = [run]
        yield Path(broadcast_object_list(chosen)[0])


def _made(prepared: Prepared, output: Path | None) -> Path:
    """The folder of a new run, which exists; of two runs that begin at once, each gets a number of its own."""
    while True:
        run = folder_of(prepared, output)
        try:
            run.mkdir(parents=True, exist_ok=output is not None)
        except FileExistsError:
            if output is not None:
                raise UsageError(f"output {run}: a file; choose a folder.") from None
        except OSError as error:
            raise UsageError(f"output {run}: cannot be made: {error.strerror or error}; choose another.") from error
        else:
            return run


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """While a run is trained, no other process may train in its folder. Raises UsageError where one does."""
    if os.environ.get("RANK", "0") != "0":  # its processes are one run: the first holds the folder
        yield
        return
    with held(run) as alone:
        if not alone:
            raise UsageError(f"{run}: another process is training there; wait for it, or choose another.")
        with suppress(OSError):  # where nothing may be written, training will say so
            for folder in (run, run / "checkpoints"):
                heal(folder)
        yield


def introduction(prepared: Prepared, total_steps: int, run: Path) -> str:
    """What a run says of itself when it begins."""
    config, how = prepared.config, prepared.loaded.preprocess
    images = ", ".join(f"{len(split.rows):,} {role}" for role, split in prepared.splits.items())
    return (
        f"{prepared.source.name}: {images} images of {len(prepared.loaded.labels)} classes; "
        f"{Path(config.model).name} at {how.height} px on {config.device}, {config.precision}; "
        f"{total_steps:,} steps of {config.batch_size}; in {run}"
    )


def whereabouts(
    run: Path, config: TrainConfig, state: ckpt.State, total_steps: int, folder: Path | None, *, over: bool
) -> str:  # fmt: skip
    """Where a resumed run stands, and how to train on from one that is finished."""
    place = f"at step {state.step} of {total_steps}"
    if not over:
        return f"resuming {run} {place}, {f'from {folder.name}' if folder else 'for nothing was saved'}"
    early = ", stopped early" if state.stopped_early else ""
    next_run = ["vitft", "train", "--dataset", str(config.dataset), "--model", str(run / "last")]
    return f"{run} is finished, {place}{early}; to train on from it: {shlex.join(next_run)}"


def threads_of(run: Path) -> int:
    """Threads that a run whose settings do not say so began with: with another number, sums are rounded otherwise."""
    file = run / "environment.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not readable ({error}); start anew from the newest checkpoint of {run}.") from error


def changed(run: Path, changes: dict[str, Any]) -> TrainConfig:
    """The run's settings with the changes that may be made to it.

    A data set may have moved: `check_splits` proves later that it is the same one. Raises UsageError
    naming any other change, DataError where the data set is gone.
    """
    before = ckpt.read_config(run)
    after = absolute(TrainConfig.parse(before.model_dump() | changes, "flags"))
    if after.dataset != before.dataset and "dataset_revision" not in changes:
        after = after.model_copy(update={"dataset_revision": None})  # it was the other place's
    for name in changes:
        extra = TrainConfig.model_fields[name].json_schema_extra
        assert isinstance(extra, dict)
        was, now = getattr(before, name), getattr(after, name)
        if was != now and not extra["steers"] and name != "dataset":
            weights = ckpt.find_model(run) if ckpt.step_folders(run) else before.model
            raise UsageError(
                f"{run} began with {name} {was}, got {now}: it would no longer be the same run. "
                f"Leave {as_flag(name)} out, or start anew from its weights: "
                f"vitft train --dataset {after.dataset} --model {weights} {as_flag(name)} {now}"
            )
    place = expanded(after.dataset or "")
    if place.is_absolute() and not place.exists():
        raise DataError(
            f"{after.dataset}, the data set of {run}, is not there; where it has moved, say where to: "
            f"vitft train --resume {shlex.quote(str(run))} --dataset NEW"
        )
    return after


def check_splits(run: Path, prepared: Prepared, stores: Stores, *, begun: bool, write: bool) -> None:
    """Write `splits.json`, or prove by it that a resumed run goes on with the very same images.

    Raises DataError that names the difference.
    """
    document = manifest(prepared.source, prepared.splits)
    now = document["splits"]
    for role, (store, _) in stores.items():
        now[role]["pixels"] = store.digest
    file = run / "splits.json"
    if not file.exists() and not begun:
        if write:
            write_json(file, document)
        return
    try:
        then = dict(json.loads(file.read_text(encoding="utf-8"))["splits"])
        differences = {role: _difference(then.get(role), now.get(role)) for role in then | now}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not readable ({error}); start anew from the newest checkpoint of {run}.") from error
    for role, difference in differences.items():
        if difference:
            weights = ckpt.find_model(run) if ckpt.step_folders(run) else prepared.config.model
            raise DataError(
                f"the {role} split is not the one the run began with ({difference}): the data set has changed; "
                f"start a new run from its weights: vitft train --dataset {prepared.config.dataset} --model {weights}"
            )


def _difference(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """What tells two splits apart, as `splits.json` has them; None if nothing does."""
    if then is None or now is None:
        return "there was none" if then is None else "there is none now"
    if then["count"] != now["count"]:
        return f"{now['count']:,} images now, {then['count']:,} then"
    if then["ids"] != now["ids"]:
        was, new = next((a, b) for a, b in zip(then["ids"], now["ids"], strict=True) if a != b)
        return f"{new} now where {was} was" if isinstance(new, str) else f"row {new} now where row {was} was"
    if then["hash"] != now["hash"]:
        return "the same names, but in other classes"
    return "the same names, but other pixels" if then.get("pixels") != now["pixels"] else None


def keep_dataset(run: Path, config: TrainConfig) -> None:
    """Write down where the run's data set is from now on, if it has moved."""
    before = ckpt.read_config(run)
    if before.dataset != config.dataset:
        place = {name: getattr(config, name) for name in ("dataset", "dataset_revision")}
        ckpt.write_config(run, before.model_copy(update=place))
