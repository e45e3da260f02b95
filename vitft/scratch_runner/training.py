"""A textbook run: images by the data rooms, training by the chapters, results in a run folder.

runs/textbook-mnist-patch7-1/
  config.yaml            every setting; is itself a recipe of `vitft scratch train`
  metrics.jsonl          a line an epoch
  weights.safetensors    after the last whole epoch, under the names of `vitft.scratch.vit.named`
  summary.json           what the run was and came to, written last
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import count
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from vitft import __version__
from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources.identity import sample_id
from vitft.data.sources.source import ALIASES, DIGITS, Source, open_dataset
from vitft.data.splits import Split, find_split_name, make_splits
from vitft.errors import DataError, TrainingError, UsageError
from vitft.evaluation.metrics import wilson_interval
from vitft.io import console, paths
from vitft.io.atomic import write_json, write_text
from vitft.scratch.train import Engine, Epoch, Images, NumpyEngine, Plan, fit, initial_weights, save, steps_per_epoch
from vitft.scratch_runner.config import TextbookConfig
from vitft.scratch_runner.run import METRICS, SUMMARY, WEIGHTS
from vitft.spec import ViTSpec, total

_VAL_FRACTION = 0.1  # of train, where the data set has nothing else to test on


@dataclass(frozen=True)
class Data:
    """What a run learns from and is tested on."""

    source: Source
    train: Images
    test: Images
    splits: dict[str, Split]  # train, and what it is tested on: test, else validation


@dataclass(frozen=True)
class Result:
    """A finished run, and its `summary.json`."""

    run: Path
    summary: dict[str, Any]


def train(config: TextbookConfig, *, output: Path | None = None, name: str | None = None) -> Result:
    """Train as the settings say, into `output` or the next free runs/textbook-NAME-N; NAME is the data's by default.

    Raises VitftError.
    """
    if config.dataset is None:
        raise UsageError("no data set; name a recipe (`vitft recipes ls`), or add --dataset: digits needs no network.")
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"output {output}: exists and is not empty; choose another.")
    data = load(config)
    spec = spec_of(config, data)
    plan = plan_of(config, data)
    run = output if output is not None else _free(name or data.source.name)
    engine = engine_of(config, spec, plan)
    console.note(
        f"{len(data.train.labels):,} training images of {spec.image_height}x{spec.image_width} in {spec.channels} "
        f"channel{'s' if spec.channels > 1 else ''}, {total(spec).parameters:,} parameters, {config.engine} engine"
    )
    existed = run.exists()
    _make(run)
    place = paths.absolute(config.dataset, (*ALIASES, DIGITS))
    settings = config.model_copy(update={"dataset": place}).model_dump(exclude_none=True)
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    started = time.perf_counter()
    try:
        history = _fit(engine, data, spec, plan, run)
    except BaseException:
        if not (run / METRICS).exists():  # not one epoch was finished: there is nothing to keep
            (run / "config.yaml").unlink()
            if not existed:
                run.rmdir()
        raise
    elapsed_s = time.perf_counter() - started
    summary = _summary(config, data, spec, plan, history[-1]) | {"elapsed_s": round(elapsed_s, 2)}
    write_json(run / SUMMARY, summary)
    return Result(run, summary)


def _fit(engine: Engine, data: Data, spec: ViTSpec, plan: Plan, run: Path) -> list[Epoch]:
    """Train; after each epoch say what it came to, and write its line of metrics and the weights."""
    per_epoch, lines = steps_per_epoch(data.train, plan), []
    started = time.perf_counter()

    def seen(step: int, loss: float, lr: float) -> None:
        if not isfinite(loss):
            raise TrainingError(f"loss is {loss} at step {step + 1}, lr {lr:.2g}; lower --lr or add --warmup-steps.")
        progress(step + 1, plan.epochs * per_epoch)

    def done(epoch: Epoch) -> None:
        elapsed_s = time.perf_counter() - started
        lines.append(asdict(epoch) | {"step": epoch.epoch * per_epoch, "elapsed_s": round(elapsed_s, 2)})
        write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        fresh = run / f".{WEIGHTS}"
        save(fresh, engine.weights())
        fresh.chmod(0o644)  # safetensors makes files that only their owner may read
        fresh.replace(run / WEIGHTS)
        console.note(
            f"epoch {epoch.epoch}/{plan.epochs}  loss {epoch.loss:.4f}  "
            f"accuracy {console.percent(epoch.accuracy, 2)}  test {console.percent(epoch.test_accuracy, 2)}  "
            f"{console.duration(elapsed_s)}"
        )

    with console.working("training") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an overflow, which `seen` tells in words
        return fit(engine, data.train, data.test, spec, plan, seen, done)


def _summary(config: TextbookConfig, data: Data, spec: ViTSpec, plan: Plan, last: Epoch) -> dict[str, Any]:
    """All that the weights need to be used again, and the score with its split."""
    tested = next(split for role, split in data.splits.items() if role != "train")
    images = len(data.test.labels)
    score = {
        "split": tested.name,
        "split_hash": tested.hash,
        "count": images,
        "accuracy": last.test_accuracy,
        "accuracy_interval": list(wilson_interval(round(last.test_accuracy * images), images)),
    }
    return {
        "vitft": __version__,
        "dataset": data.source.name,
        "dataset_revision": data.source.revision,
        "labels": list(data.source.labels),
        "splits": {role: {"source": s.source, "count": len(s.rows), "hash": s.hash} for role, s in data.splits.items()},
        "engine": config.engine,
        "parameters": total(spec).parameters,
        "spec": asdict(spec),
        "mean": list(plan.mean),
        "std": list(plan.std),
        "train": {"epochs": last.epoch, "loss": last.loss, "accuracy": last.accuracy},
        "score": score,
    }


# -- from settings to what the chapters take ----------------------------------------------------------


def spec_of(config: TextbookConfig, data: Data) -> ViTSpec:
    """The network's sizes: the data set's, and the settings'. Raises UsageError where they do not fit."""
    channels, height, width = data.train.pixels.shape[1:]
    patch = config.patch_size
    if height % patch or width % patch:
        fits = [str(side) for side in range(1, min(height, width) + 1) if not (height % side or width % side)]
        raise UsageError(
            f"patch_size {patch} does not divide the {height}x{width} images of {data.source.name}; "
            f"try {', '.join(fits[:-1])}{' or ' if fits[:-1] else ''}{fits[-1]}."
        )
    shared = ("width", "heads", "layers", "mlp", "pre_logits", "pooling", "positions", "norm", "final_norm")
    return ViTSpec(
        image_height=height, image_width=width, patch_height=patch, patch_width=patch, stride_height=patch,
        stride_width=patch, channels=channels, classes=len(data.source.labels), activation=config.activation,
        **{name: getattr(config, name) for name in shared},
    )  # fmt: skip


def plan_of(config: TextbookConfig, data: Data) -> Plan:
    """How it is trained: the settings, and the training images' mean and standard deviation."""
    mean, std = mean_and_std(data.train.pixels)
    shared = (
        "epochs", "batch_size", "lr", "optimizer", "weight_decay", "momentum", "schedule", "warmup_steps",
        "decay_epoch", "decay_factor", "label_smoothing", "dropout", "dtype", "seed",
    )  # fmt: skip
    return Plan(
        **{name: getattr(config, name) for name in shared}, mean=mean, std=std,
        flip=config.augment in ("flip", "both"),
        crop_border=max(1, min(data.train.pixels.shape[2:]) // 8) if config.augment in ("crop", "both") else 0,
    )  # fmt: skip


def engine_of(config: TextbookConfig, spec: ViTSpec, plan: Plan) -> Engine:
    """The engine that was asked for, with the weights that the plan begins with: the same in both."""
    w = initial_weights(spec, plan)
    if config.engine == "numpy":
        return NumpyEngine(w, spec, plan)
    from vitft.scratch_runner.torch_engine import TorchEngine

    return TorchEngine(w, spec, plan)


def mean_and_std(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel of pixels (images, C, H, W), as shares of 255; of one that never changes, std is 1."""
    values, means, stds = np.arange(256) / 255, [], []
    for channel in pixels.swapaxes(0, 1):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(channel), 1000):  # bincount needs 8 bytes a pixel
            counts += np.bincount(channel[start : start + 1000].reshape(-1), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        stds.append(sqrt(variance) or 1.0)
    return tuple(means), tuple(stds)


# -- data ---------------------------------------------------------------------------------------------


def load(config: TextbookConfig) -> Data:
    """Open, split and decode the data set: uint8 pixels (images, C, H, W), C = 1 where every image is grey.

    The test images are those of its test split, else of its validation split, else a share of train.
    Raises DataError, also for images of several sizes.
    """
    assert config.dataset is not None
    source = open_dataset(config.dataset)
    splits = make_splits(
        source,
        val_fraction=_VAL_FRACTION if find_split_name(source, "test") is None else 0.0,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_test_samples,
        seed=config.seed,
    )
    tested = "test" if "test" in splits else "validation"
    for role in ("train", tested):
        if role not in splits or len(splits[role].rows) == 0:
            raise DataError(f"{config.dataset}: no {role} images; its splits are {', '.join(source.splits)}.")
    if len(source.labels) < 2:
        raise DataError(f"{config.dataset}: one class ({source.labels[0]}) leaves nothing to tell apart; add another.")
    train, test = decoded(source, splits["train"]), decoded(source, splits[tested])
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{config.dataset}: {tested} has images of another size than train; make them equal.")
    if all((rgb == rgb[:, :1]).all() for rgb in (train, test)):
        train, test = train[:, :1].copy(), test[:, :1].copy()
    kept = {role: splits[role] for role in ("train", tested)}
    return Data(source, Images(train, kept["train"].labels), Images(test, kept[tested].labels), kept)


def decoded(source: Source, split: Split) -> NDArray[np.uint8]:
    """All images of a split: (images, 3, H, W). Raises DataError for one that is bad or of another size."""
    rows = source.splits[split.source].select(split.rows)
    pixels = np.empty(0, np.uint8)
    # Read by the hundred: one by one, reading costs a fifth of what decoding does.
    cells = (cell for start in range(0, len(rows), 100) for cell in rows[start : start + 100]["image"])
    with console.working(f"decoding {split.name}") as progress:
        for number, cell in enumerate(cells):
            try:
                image = decode(encoded(cell)).transpose(2, 0, 1)
            except BadImage as error:
                raise DataError(f"{sample_id(rows, number)}: {error}; mend or remove it.") from error
            if number == 0:
                pixels = np.empty((len(rows), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                got, wanted = (f"{shape[1]}x{shape[2]}" for shape in (image.shape, pixels.shape[1:]))
                raise DataError(
                    f"{sample_id(rows, number)}: {got}, and the first image is {wanted}; the textbook takes images "
                    "of one size (vitft train resizes them)."
                )
            pixels[number] = image
            progress(number + 1, len(rows))
    return pixels


# -- the run folder -------------------------------------------------------------------------------------


def _free(name: str) -> Path:
    """runs/textbook-<name>-<number>, with the first number that is free."""
    names = (Path("runs") / f"textbook-{name}-{number}" for number in count(1))
    return next(path for path in names if not path.exists())


def _make(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output {run}: cannot be made: {error.strerror or error}; choose another.") from error
