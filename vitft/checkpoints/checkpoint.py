"""The run folder: write, read, newest. Everything in it is whole or absent, and nothing is a pickle.

config.yaml  environment.json  splits.json  metrics.jsonl
checkpoints/step-000400/   a model folder, state.json, optimizer.safetensors; manifest.json last
last/ best/                plain Transformers model folders; in last/ a state.json too
"""

import json
import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vitft.checkpoints.metadata import UNREADABLE, Card, prove, sha256, sha256_of, write_card
from vitft.config.recipe import read_recipe
from vitft.config.train import TrainConfig
from vitft.data.augment import Preprocess
from vitft.errors import ModelError, UsageError
from vitft.io.atomic import held, new_folder, remove_folder, write_json, write_text
from vitft.spec import PRESETS


@dataclass
class State:
    """Where a run stands, beside weights and optimizer; stored as `state.json`."""

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None  # by the run's `best_by`, where more is better
    counted_score: float | None = None  # the last that was better by more than `min_delta`
    evaluations_since_best: int = 0  # or rather since that one
    stopped_early: bool = False
    total_steps: int | None = None  # of the run as it was when this was saved
    validation_due: bool = False  # a signal came before it, or in the middle of it
    scaler: dict[str, Any] | None = None


def create_run(path: Path, *, overwrite: bool) -> None:
    """Make an empty run folder, which this process holds. Raises UsageError if something stands there."""
    check_kind(path, overwrite=overwrite)
    try:
        # The folder itself stays: it is held, and may be where a disk is mounted.
        path.mkdir(parents=True, exist_ok=True)
        if is_run(path):
            _set_aside(path)
        else:
            _empty(path)  # what a kill left of a run that never began
        (path / "checkpoints").mkdir()
    except OSError as error:
        raise UsageError(f"output {path}: cannot be made: {error.strerror or error}; choose another.") from error


# A run that gives way to another stands in its folder under this name until the other has saved a whole checkpoint:
# the other may have begun from it, and may be killed. While it is moved there or back, it is under the second name.
_REPLACED, _MOVING = ".vitft-replaced", ".vitft-moving"


def _set_aside(run: Path) -> None:
    _move(run, run / _MOVING)
    (run / _MOVING).rename(run / _REPLACED)


def _move(source: Path, target: Path) -> None:
    """Move all that is in a folder to one in it or around it; last the settings, which make it a run."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == "config.yaml"):
        if file != target:
            file.rename(target / file.name)


def _empty(folder: Path, keep: str = "") -> None:
    # The settings go last: what a kill leaves can be overwritten.
    for old in sorted(folder.iterdir(), key=lambda file: file.name == "config.yaml"):
        if old.name != keep:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def give_back(path: Path) -> None:
    """Put the run that was to be replaced back in its place, where its successor has saved nothing."""
    if (path / _REPLACED).is_dir() and not step_folders(path):
        _empty(path, keep=_REPLACED)
        (path / _REPLACED).rename(path / _MOVING)
    if (path / _MOVING).is_dir():
        _move(path / _MOVING, path)
        (path / _MOVING).rmdir()


def settle(path: Path) -> None:
    """Undo a replacement that a kill broke off before the successor had its settings."""
    if not is_run(path) or (path / _MOVING).is_dir():
        give_back(path)


def set_aside_at(run: Path, path: Path) -> Path:
    """Where a file of the run that `run` is to replace is now; the path itself if it is not one of those."""
    here = run.resolve()
    return here / _REPLACED / path.relative_to(here) if path.is_relative_to(here) else path


def free_name(config: TrainConfig, data: str) -> Path:
    """runs/<dataset>-<model>-<number>, with the first number that is free."""
    stem = f"{data}-{Path(config.model).name or 'model'}{'-scratch' if config.from_scratch else ''}"
    names = (f"{stem}-{number}" for number in count(1))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a run may be written to this folder, and nobody trains there."""
    check_kind(path, overwrite=overwrite)
    with held(path) as alone:
        if not alone:
            raise UsageError(f"output {path}: another process is training there; wait for it, or choose another.")


def check_kind(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless what stands there, if anything, may give way to a new run."""
    if path.is_file():
        raise UsageError(f"output {path}: a file; choose a folder.")
    if not path.exists() or _never_begun(path):
        return
    if not overwrite:
        remedy = (
            f"--resume {shlex.quote(str(path))} goes on with it, --overwrite replaces it"
            if is_run(path)
            else "choose another"
        )
        raise UsageError(f"output {path}: the folder exists and is not empty; {remedy}.")
    if not is_run(path) and not any((path / name).is_dir() for name in (_REPLACED, _MOVING)):
        raise UsageError(f"output {path}: --overwrite replaces run folders only, and this is none; choose another.")


def _never_begun(path: Path) -> bool:
    """Whether a folder is empty, or has what a run writes before its settings make it one: a kill fell between."""
    names = {file.name for file in path.iterdir()}
    first = {"checkpoints", "environment.json", ".environment.json.vitft-new", ".config.yaml.vitft-new"}
    return not names or ("checkpoints" in names <= first and not any((path / "checkpoints").glob("*")))


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint's folder lies in, or is."""
    return next((folder for folder in (checkpoint, *checkpoint.parents) if is_run(folder)), None)


def write_config(run: Path, config: TrainConfig) -> None:
    """Write `config.yaml`, a recipe of every setting as resolved."""
    text = yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)
    write_text(run / "config.yaml", f"{text}{_SUM}{sha256_of(text)}\n")


_SUM = "# sha256 of what stands above: "


def read_config(run: Path) -> TrainConfig:
    """The settings that a run was written with. Raises UsageError if they are not what was written."""
    file = run / "config.yaml"
    text, mark, sum_ = file.read_bytes().decode(errors="replace").partition(_SUM)
    if sum_.strip() != sha256_of(text):
        remedy = "undo the change, or start" if mark else "its last line, the sum, is gone; start"
        raise UsageError(
            f"{file}: was changed since the run wrote it, and a resumed run goes on as it was; {remedy} a new run "
            f"with it: vitft train --recipe {shlex.quote(str(file))}"
        )
    return TrainConfig.parse(read_recipe(file), str(file))


def save_model(folder: Path, model: Any, how: Preprocess, card: Card, state: State | None = None) -> None:
    """Write a plain Transformers model folder in place of `folder`, whole.

    With the run's `state` in it, the run can be gone on with from there, though its optimizer begins anew.
    """
    with new_folder(folder) as fresh:
        _fill(fresh, model, how, card, state)


def _fill(folder: Path, model: Any, how: Preprocess, card: Card, state: State | None) -> None:
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", how.to_json())
    if state is not None:
        write_json(folder / "state.json", asdict(state))
    write_card(folder, card)


def save_step(
    run: Path, model: Any, optimizer: torch.optim.Optimizer, how: Preprocess, card: Card, state: State
) -> Path:
    """Write all that resume needs as `checkpoints/step-N`, and drop the oldest over `keep`."""
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    with new_folder(folder) as fresh:
        _fill(fresh, model, how, card, state)
        save_file(optimizer_tensors(model, optimizer), fresh / OPTIMIZER)
        manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(fresh.iterdir())}
        write_json(fresh / "manifest.json", manifest)
    prune(run, state.step, card.config.keep)
    return folder


def prune(run: Path, newest: int, keep: int) -> None:
    """Remove all step checkpoints but the last so many up to the step that is the newest."""
    # Newer ones than that were torn, or the run would have gone on from them.
    shutil.rmtree(run / _REPLACED, ignore_errors=True)  # its successor is whole
    forget_after(run, newest)
    for old in step_folders(run)[keep:]:
        remove_folder(old)


def forget_after(run: Path, step: int) -> None:
    """Remove the step checkpoints of later steps, the last first: what is left of a run that is killed here is one."""
    for later in step_folders(run):
        if step_of(later) > step:
            remove_folder(later)


def step_folders(run: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    found = (folder for folder in (run / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]+", folder.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step of its checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint that matches its manifest, and why newer ones were passed over.

    Of a finished run that kept none it is `last/`. None if the run had saved nothing yet. Raises ModelError if all
    that it saved is torn.
    """
    passed: list[str] = []
    for folder in step_folders(run):
        fault = fault_of(folder)
        if fault is None:
            return folder, passed
        passed.append(f"{folder.name}: {fault}")
    if passed:
        raise ModelError(f"{run}: no whole checkpoint to resume from ({'; '.join(passed)}); start anew elsewhere.")
    last = run / "last"
    return prove(last) if (last / "state.json").is_file() else None, passed


OPTIMIZER = "optimizer.safetensors"
_NEEDED = {"config.json", "model.safetensors", OPTIMIZER, "preprocessor_config.json", "state.json", "vitft.json"}


def fault_of(folder: Path) -> str | None:
    """What is wrong with a step checkpoint's files, by size and SHA-256; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in manifest.items():
            file = folder / name
            if (size := file.stat().st_size) != wanted["size"]:
                return f"{name} has {size} bytes, not {wanted['size']}"
            if wanted != {"size": size, "sha256": sha256(file)}:
                return f"{name} is not what was written"
        if unlisted := _NEEDED - manifest.keys():
            return f"{min(unlisted)} is not in its manifest"
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_finite(folder: Path) -> bool:
    """Whether the weights and moments of a step checkpoint are numbers; its scores are, or they were not written."""
    for name in ("model.safetensors", OPTIMIZER):
        with safe_open(folder / name, "pt") as stored:
            if not all(stored.get_tensor(key).isfinite().all() for key in stored.keys()):  # noqa: SIM118
                return False
    return True


def read_state(folder: Path) -> State:
    """Where the run of a checkpoint stood. Raises ModelError."""
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if "best_accuracy" in document:  # written before there was `best_by`
            accuracy, _ = document.pop("best_accuracy"), document.pop("best_loss")
            score = None if document["best_step"] is None else accuracy
            document |= {"best_score": score, "counted_score": score}
        return State(**document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder / 'state.json'}: not readable ({error}); is it of another version?") from error


def weights_in(run: Path) -> Path | None:
    """The model folder of a run that its users want, best, last or the newest step's; None if it has saved none."""
    candidates = [run / "best", run / "last", *step_folders(run)]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def find_model(path: Path) -> Path:
    """The model folder behind a path: itself, or a run's best, last or newest step checkpoint; proved whole."""
    if is_run(path):
        found = weights_in(path)
        if found is None:
            raise ModelError(f"{path}: this run has no checkpoint yet.")
        return prove(found)
    run = next((folder for folder in path.parents if is_run(folder)), None)
    if run is not None and not path.exists():
        find_model(run)  # a run with no checkpoint at all says so
        steps = step_folders(run)
        there = [name for name in ("best", "last") if (run / name).is_dir()]
        there += [folder.relative_to(run).as_posix() for folder in steps]
        number = re.search(r"\d+$", path.name)
        same = [folder for folder in steps if number and step_of(folder) == int(number[0])]
        hint = f"; did you mean {same[0]}?" if same else "."
        raise ModelError(f"{path}: no such checkpoint; this run has {', '.join(there)}{hint}")
    may_be_hub_id = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..")
    if not path.exists() and not may_be_hub_id and str(path) not in PRESETS:
        raise ModelError(f"{path}: no such folder; give a run, one of its checkpoints, or a hub id (owner/name).")
    return prove(path)


def optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named `<parameter>|<quantity>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{quantity}": value.contiguous()
        for parameter, quantities in optimizer.state.items()
        for quantity, value in quantities.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put a step checkpoint's optimizer state back. Raises ModelError."""
    try:
        stored = load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {OPTIMIZER} cannot be read: {error}.") from error
    parameters = dict(model.named_parameters())
    for name, value in stored.items():
        parameter_name, quantity = name.split("|")
        parameter = parameters[parameter_name]
        # Adam's step counters stay where they were; moments live beside their parameter.
        optimizer.state[parameter][quantity] = value.to(parameter.device)
