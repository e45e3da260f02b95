"""The run folder: write, read, newest. Everything in it is whole or absent, and nothing is a pickle.

config.yaml  environment.json  splits.json  metrics.jsonl
checkpoints/step-000400/   a model folder, optimizer.safetensors, state.json; manifest.json last
last/ best/                plain Transformers model folders
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitft.card import UNREADABLE, Card, prove, sha256, sha256_of, write_card
from vitft.config import TrainConfig
from vitft.data.augment import Preprocess
from vitft.errors import ModelError, UsageError
from vitft.files import held, new_folder, remove_folder, write_json, write_text
from vitft.recipe import read_recipe
from vitft.spec import PRESETS


@dataclass
class State:
    """Where a run stands, beside weights and optimizer; stored as `state.json`."""

    step: int = 0
    best_step: int | None = None
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    evaluations_since_best: int = 0
    stopped_early: bool = False
    scaler: dict[str, Any] | None = None


def create_run(path: Path, *, overwrite: bool) -> None:
    """Make an empty run folder, which this process holds. Raises UsageError if something stands there."""
    check_kind(path, overwrite=overwrite)
    try:
        # The folder itself stays: it is held, and may be where a disk is mounted. The settings, which make it
        # a run, go last: what a kill leaves can be overwritten.
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        every = [file for file in (*path.iterdir(), *(path / "checkpoints").iterdir()) if file.name != "checkpoints"]
        for old in sorted(every, key=lambda file: file.name == "config.yaml"):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    except OSError as error:
        raise UsageError(f"output {path}: cannot be made: {error.strerror or error}; choose another.") from error


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
        remedy = f"--resume {path} goes on with it, --overwrite replaces it" if is_run(path) else "choose another"
        raise UsageError(f"output {path}: the folder exists and is not empty; {remedy}.")
    if not is_run(path):
        raise UsageError(f"output {path}: --overwrite replaces run folders only, and this is none; choose another.")


def _never_begun(path: Path) -> bool:
    """Whether a folder is empty, or has what a run writes before its settings make it one: a kill fell between."""
    names = {file.name for file in path.iterdir()}
    first = {"checkpoints", "environment.json", ".environment.json.new", ".config.yaml.new"}
    return not names or ("checkpoints" in names <= first and not any((path / "checkpoints").glob("*")))


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


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
            f"with it: vitft train --recipe {file}"
        )
    return TrainConfig.parse(read_recipe(file), str(file))


def save_model(folder: Path, model: Any, how: Preprocess, card: Card) -> None:
    """Write a plain Transformers model folder in place of `folder`, whole."""
    with new_folder(folder) as fresh:
        _fill(fresh, model, how, card)


def _fill(folder: Path, model: Any, how: Preprocess, card: Card) -> None:
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", how.to_json())
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner may read
    write_card(folder, card)


def save_step(
    run: Path, model: Any, optimizer: torch.optim.Optimizer, how: Preprocess, card: Card, state: State
) -> Path:
    """Write all that resume needs as `checkpoints/step-N`, and drop the oldest over `keep`."""
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    with new_folder(folder) as fresh:
        _fill(fresh, model, how, card)
        save_file(optimizer_tensors(model, optimizer), fresh / "optimizer.safetensors")
        write_json(fresh / "state.json", asdict(state))
        manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(fresh.iterdir())}
        write_json(fresh / "manifest.json", manifest)
    prune(run, state.step, card.config.keep)
    return folder


def prune(run: Path, newest: int, keep: int) -> None:
    """Remove all step checkpoints but the last so many up to the step that is the newest."""
    # Newer ones than that were torn, or the run would have gone on from them.
    torn = [old for old in step_folders(run) if _step_of(old) > newest]
    for old in torn + [kept for kept in step_folders(run) if kept not in torn][keep:]:
        remove_folder(old)


def step_folders(run: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    found = (folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdigit())
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint that matches its manifest, and why newer ones were passed over.

    None if the run had saved nothing yet. Raises ModelError if all that it saved is torn.
    """
    passed: list[str] = []
    for folder in step_folders(run):
        fault = fault_of(folder)
        if fault is None:
            return folder, passed
        passed.append(f"{folder.name}: {fault}")
    if passed:
        raise ModelError(f"{run}: no whole checkpoint to resume from ({'; '.join(passed)}); start anew elsewhere.")
    return None, passed


_NEEDED = {"config.json", "model.safetensors", "optimizer.safetensors", "preprocessor_config.json", "state.json",
           "vitft.json"}  # fmt: skip


def fault_of(folder: Path) -> str | None:
    """What is wrong with a step checkpoint's files, by size and SHA-256; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
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


def read_state(folder: Path) -> State:
    """Where the run of a step checkpoint stood. Raises ModelError."""
    try:
        return State(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder / 'state.json'}: not readable ({error}); is it of another version?") from error


def find_model(path: Path) -> Path:
    """The model folder behind a path: itself, or a run's best, last or newest step checkpoint; proved whole."""
    if is_run(path):
        candidates = [path / "best", path / "last", *step_folders(path)]
        found = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
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
        same = [folder for folder in steps if number and _step_of(folder) == int(number[0])]
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
        stored = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: optimizer.safetensors cannot be read: {error}.") from error
    parameters = dict(model.named_parameters())
    for name, value in stored.items():
        parameter_name, quantity = name.split("|")
        parameter = parameters[parameter_name]
        # Adam's step counters stay where they were; moments live beside their parameter.
        optimizer.state[parameter][quantity] = value.to(parameter.device)
