"""Write, read and find checkpoints in a run folder. Every file is written atomically; none is a pickle.

config.yaml  environment.json  splits.json  metrics.jsonl
checkpoints/step-000400/   a model folder, state.json, optimizer.safetensors; manifest.json is written last
last/ best/                plain Transformers model folders; last/ also has a state.json, and best/ in the end a
                           novelty.safetensors, which tells how strange an image is to it
base/                      of a run with an adapter: the model that it was added to

With an adapter, every model folder has it merged, and unmerged in its adapter/: merging rounds, so a run resumes from
base/ and the latter.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitft.checkpoints.exported import exported_file
from vitft.checkpoints.metadata import READ_ERRORS, Card, name_of, sha256, sha256_of, verify, write_card
from vitft.config.recipe import read_recipe
from vitft.config.train import TrainConfig, of_any_version
from vitft.data.augment import Preprocess
from vitft.errors import ModelError, UsageError
from vitft.hardware.shards import each_joined, is_sharded, write
from vitft.io.atomic import lock_folder, new_folder, remove_folder, write_json, write_text
from vitft.io.library_logs import quiet_transformers
from vitft.io.paths import numbered
from vitft.models.load import EXPORTED
from vitft.models.lora import has_adapter, write_base, write_weights
from vitft.spec import PRESETS


@dataclass
class State:
    """The progress of a run, apart from weights and optimizer state; stored as `state.json`."""

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None  # by the run's `best_by`; higher is better
    counted_score: float | None = None  # the last score that improved by more than `min_delta`
    evaluations_since_best: int = 0  # since the one with `counted_score`
    stopped_early: bool = False
    total_steps: int | None = None  # planned when this was saved
    validation_due: bool = False  # a signal came before or during the validation of this step
    scaler: dict[str, Any] | None = None
    scores: dict[str, Any] = field(default_factory=dict)  # with `ema`, of the averages, which a step's model is not
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase of the run until this was saved


def create_run(path: Path, *, overwrite: bool) -> None:
    """Create an empty run folder, which the caller has locked. Raises UsageError if the folder is in use."""
    check_replaceable(path, overwrite=overwrite)
    try:
        # The folder itself stays: it is locked, and may be a mount point.
        path.mkdir(parents=True, exist_ok=True)
        if is_run(path):
            _set_aside(path)
        else:
            _empty(path)  # left by a run that was killed before it started
        (path / "checkpoints").mkdir()
    except OSError as error:
        raise UsageError(f"output {path}: cannot be created: {error.strerror or error}; choose another.") from error


# With --overwrite, the old run stays in its folder under `_REPLACED` until the new run has saved a checkpoint, because
# the new run may start from its weights and may be killed. `_MOVING` marks a move to or from there in progress.
_REPLACED, _MOVING = ".vitft-replaced", ".vitft-moving"


def _set_aside(run: Path) -> None:
    """Move an old run to `_REPLACED` in its own folder."""
    _move(run, run / _MOVING)
    (run / _MOVING).rename(run / _REPLACED)


def _move(source: Path, target: Path) -> None:
    """Move the contents of a folder to its child or parent folder, config.yaml last, because it marks a run."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == "config.yaml"):
        if file != target:
            file.rename(target / file.name)


def _empty(folder: Path, keep: str = "") -> None:
    # config.yaml goes last, so that the folder still counts as a run if this is killed.
    for old in sorted(folder.iterdir(), key=lambda file: file.name == "config.yaml"):
        if old.name != keep:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def restore_replaced(path: Path) -> None:
    """Restore the old run if the new run has not saved a checkpoint."""
    if (path / _REPLACED).is_dir() and not step_folders(path):
        _empty(path, keep=_REPLACED)
        (path / _REPLACED).rename(path / _MOVING)
    if (path / _MOVING).is_dir():
        _move(path / _MOVING, path)
        (path / _MOVING).rmdir()


def undo_unfinished_replacement(path: Path) -> None:
    """Restore the old run if a kill interrupted its replacement before the new run had a config.yaml."""
    if not is_run(path) or (path / _MOVING).is_dir():
        restore_replaced(path)


def path_after_replacement(run: Path, path: Path) -> Path:
    """The current location of a file of the old run that `run` replaces; other paths are unchanged."""
    root = run.resolve()
    return root / _REPLACED / path.relative_to(root) if path.is_relative_to(root) else path


def free_name(config: TrainConfig, data: str) -> Path:
    """A new run folder, `runs/<dataset>-<model>-<number>`, with the first free number."""
    stem = f"{data}-{Path(config.model).name or 'model'}{'-scratch' if config.from_scratch else ''}"
    return numbered(Path("runs") / stem)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a run can be written to this folder and no other process trains there."""
    check_replaceable(path, overwrite=overwrite)
    with lock_folder(path) as locked:
        if not locked:
            raise UsageError(f"output {path}: another process is training there; wait for it, or choose another.")


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless the folder is absent, empty, or a run that `overwrite` allows to replace."""
    if path.is_file():
        raise UsageError(f"output {path}: is a file; choose a folder.")
    if not path.exists() or _never_started(path):
        return
    if not overwrite:
        remedy = (
            f"--resume {shlex.quote(str(path))} continues it, --overwrite replaces it"
            if is_run(path)
            else "choose another"
        )
        raise UsageError(f"output {path}: the folder exists and is not empty; {remedy}.")
    if not is_run(path) and not any((path / name).is_dir() for name in (_REPLACED, _MOVING)):
        raise UsageError(f"output {path}: --overwrite replaces only run folders, and this is not one; choose another.")


def _never_started(path: Path) -> bool:
    """Whether a folder is empty, or has only what a run writes before its config.yaml (the run was killed then)."""
    names = {file.name for file in path.iterdir()}
    early = {"checkpoints", "environment.json", ".environment.json.vitft-new", ".config.yaml.vitft-new"}
    return not names or ("checkpoints" in names <= early and not any((path / "checkpoints").glob("*")))


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that contains a checkpoint, or is it."""
    return next((folder for folder in (checkpoint, *checkpoint.parents) if is_run(folder)), None)


def write_config(run: Path, config: TrainConfig) -> None:
    """Write `config.yaml`: every setting as resolved, usable as a recipe, with a checksum line at the end."""
    text = yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)
    write_text(run / "config.yaml", f"{text}{_SUM}{sha256_of(text)}\n")


_SUM = "# sha256 of what stands above: "


def read_config(run: Path) -> TrainConfig:
    """Read the settings of a run. Raises UsageError if `config.yaml` does not match its checksum."""
    file = run / "config.yaml"
    text, mark, checksum = file.read_bytes().decode(errors="replace").partition(_SUM)
    if checksum.removesuffix("\n") != sha256_of(text):
        remedy = "undo the change, or start" if mark else "its last line, the checksum, is missing; start"
        raise UsageError(
            f"{file}: was changed since the run wrote it, so the run cannot be resumed; {remedy} a new run with it: "
            f"vitft train --recipe {shlex.quote(str(file))}"
        )
    return TrainConfig.parse(of_any_version(read_recipe(file)), str(file))


def save_model(
    folder: Path, model: Any, preprocess: Preprocess, card: Card, state: State | None = None,
    *, beside: Iterable[Callable[[Path], None]] = (),
) -> None:  # fmt: skip
    """Atomically write a plain Transformers model folder, replacing `folder`.

    With `state`, the run can be resumed from it, with a new optimizer state. Each of `beside` writes another file into
    the folder that it is given.
    """
    with new_folder(folder) as temporary:
        for add in beside:
            add(temporary)
        _write_model(temporary, model, preprocess, card, state)


def _write_model(folder: Path, model: Any, preprocess: Preprocess, card: Card, state: State | None) -> None:
    with quiet_transformers():
        write_weights(model, folder, name_of(card.config.model))
    write_json(folder / "preprocessor_config.json", preprocess.to_json())
    if state is not None:
        write_json(folder / "state.json", asdict(state))
    write_card(folder, card)


def save_base(run: Path, model: Any, preprocess: Preprocess, card: Card) -> None:
    """Atomically write the model that an adapter was added to; nothing if there is none."""
    if not has_adapter(model):
        return
    with new_folder(run / BASE) as temporary, quiet_transformers():
        write_base(model, temporary)
        write_json(temporary / "preprocessor_config.json", preprocess.to_json())
        write_card(temporary, card)


def base_of(checkpoint: Path) -> Path:
    """The verified model that the adapter of a run's checkpoint was added to. Raises ModelError if it is gone."""
    run = run_of(checkpoint)
    if run is None or not (run / BASE / "vitft.json").is_file():
        raise ModelError(f"{run or checkpoint}: {BASE}/ is gone, without which an adapter cannot be trained further.")
    return verify(run / BASE)


def save_step(
    run: Path, model: Any, moments: dict[str, torch.Tensor], preprocess: Preprocess, card: Card, state: State
) -> Path:
    """Write a full checkpoint to `checkpoints/step-N` and delete the oldest beyond the setting `keep`.

    `moments`: of `optimizer_tensors`. If they are sharded, each is gathered when it is written.
    """
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    with new_folder(folder) as temporary:
        _write_model(temporary, model, preprocess, card, state)
        _save_tensors(moments, temporary / OPTIMIZER)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        with ThreadPoolExecutor() as pool:  # two are large, and hashing releases the GIL
            sums = pool.map(sha256, files)
            manifest = {
                f.relative_to(temporary).as_posix(): {"size": f.stat().st_size, "sha256": checksum}
                for f, checksum in zip(files, sums, strict=True)
            }
        write_json(temporary / "manifest.json", manifest)
    prune(run, state.step, card.config.keep)
    return folder


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write float32 tensors in the safetensors format, whose own library would need all of sharded ones at once."""
    if not any(map(is_sharded, tensors.values())):
        save_file(tensors, file)
        return
    header, end = {}, 0
    for name in sorted(tensors):
        start, end = end, end + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in each_joined(tensors):
            out.write(tensor.float().contiguous().numpy().tobytes())


def prune(run: Path, newest: int, keep: int) -> None:
    """Delete all step checkpoints except the last `keep` up to step `newest`."""
    shutil.rmtree(run / _REPLACED, ignore_errors=True)  # the new run has a checkpoint now
    remove_after(run, newest)  # later ones are corrupt: otherwise the run would have continued from them
    for old in step_folders(run)[keep:]:
        remove_folder(old)


def remove_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps, latest first, so that a kill on the way leaves a valid run."""
    for later in step_folders(run):
        if step_of(later) > step:
            remove_folder(later)


def step_folders(run: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    folders = (path for path in (run / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]+", path.name))
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step number of a step checkpoint."""
    return int(folder.name.removeprefix("step-"))


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint that matches its manifest, and why newer ones were skipped.

    If a finished run kept no step checkpoints, this is `last/`; if the run saved nothing yet, None. Raises ModelError
    if all checkpoints are corrupt.
    """
    skipped: list[str] = []
    for folder in step_folders(run):
        damage = find_damage(folder)
        if damage is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {damage}")
    if skipped:
        raise ModelError(f"{run}: all checkpoints are corrupt ({'; '.join(skipped)}); start a new run.")
    last = run / "last"
    return verify(last) if (last / "state.json").is_file() else None, skipped


BASE = "base"
OPTIMIZER = "optimizer.safetensors"
_NEEDED = {"config.json", "model.safetensors", OPTIMIZER, "preprocessor_config.json", "state.json", "vitft.json"}


def find_damage(folder: Path) -> str | None:
    """Check a step checkpoint against its manifest. The first missing or corrupt file, in words; None if intact."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in manifest.items():
            file = folder / name
            if (size := file.stat().st_size) != wanted["size"]:
                return f"{name} has {size} bytes, not {wanted['size']}"
            if wanted != {"size": size, "sha256": sha256(file)}:
                return f"{name} does not match its checksum"
        if unlisted := _NEEDED - manifest.keys():
            return f"{min(unlisted)} is not in its manifest"
    except READ_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_finite(folder: Path) -> bool:
    """Whether all weights and optimizer moments of a step checkpoint are finite. (Scores always are.)"""
    for name in ("model.safetensors", OPTIMIZER):
        with safe_open(folder / name, "pt") as file:
            if not all(file.get_tensor(key).isfinite().all() for key in file.keys()):  # noqa: SIM118
                return False
    return True


def read_state(folder: Path) -> State:
    """Read a checkpoint's state.json. Raises ModelError."""
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if "best_accuracy" in document:  # written before `best_by` existed
            accuracy, _ = document.pop("best_accuracy"), document.pop("best_loss")
            score = None if document["best_step"] is None else accuracy
            document |= {"best_score": score, "counted_score": score}
        return State(**document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder / 'state.json'}: cannot be read ({error}); is it from another version?") from error


def default_model(run: Path) -> Path | None:
    """The model folder that a run stands for: best, last or the newest step; None if it has saved none."""
    candidates = [run / "best", run / "last", *step_folders(run)]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def find_model(path: Path) -> Path:
    """The verified model folder for a path: the path itself, or a run's best, last or newest step checkpoint.

    An exported file stands for the folder that vitft wrote it into, or for itself if it is elsewhere. Raises ModelError
    if there is none, or if a file does not match its checksum.
    """
    if is_run(path):
        folder = default_model(path)
        if folder is None:
            raise ModelError(f"{path}: this run has no checkpoint yet.")
        return verify(folder)
    if path.suffix in EXPORTED and path.is_file():
        own = (path.parent / "vitft.json").is_file() and not (path.parent / "config.json").exists()
        return verify(path.parent) if own else path
    if path.suffix in EXPORTED and not path.exists():
        other = exported_file(path.parent)
        remedy = f"did you mean {other}?" if other else "`vitft export RUN` makes one."
        raise ModelError(f"{path}: no such file; {remedy}")
    run = run_of(path)
    if run is not None and not path.exists():
        find_model(run)  # raises if the run has no checkpoint at all
        steps = step_folders(run)
        available = [name for name in ("best", "last") if (run / name).is_dir()]
        available += [folder.relative_to(run).as_posix() for folder in steps]
        number = re.search(r"\d+$", path.name)
        matches = [folder for folder in steps if number and step_of(folder) == int(number[0])]
        hint = f"; did you mean {matches[0]}?" if matches else "."
        raise ModelError(f"{path}: no such checkpoint; this run has {', '.join(available)}{hint}")
    may_be_hub_id = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..")
    if not path.exists() and not may_be_hub_id and str(path) not in PRESETS:
        raise ModelError(f"{path}: no such folder; give a run, one of its checkpoints, or a hub id (owner/name).")
    return verify(path)


def optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named `<parameter>|<quantity>`; of a sharded model, as shards."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{quantity}": value.contiguous()
        for parameter, quantities in optimizer.state.items()
        for quantity, value in quantities.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Load a step checkpoint's optimizer state into `optimizer`. Raises ModelError."""
    parameters = dict(model.named_parameters())
    try:
        with safe_open(folder / OPTIMIZER, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                parameter_name, quantity = name.split("|")
                parameter, value = parameters[parameter_name], file.get_tensor(name)
                # Moments must be on the device of their parameter, and sharded as it is.
                if is_sharded(parameter) and value.shape == parameter.shape:
                    moment = torch.empty_like(parameter, requires_grad=False)
                    write(moment, value)
                else:
                    moment = value.to(parameter.device)
                optimizer.state[parameter][quantity] = moment
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {OPTIMIZER} cannot be read: {error}.") from error
