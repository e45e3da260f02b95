"""A textbook run: loads a dataset, trains with the chapters, and writes a run folder.

runs/textbook-mnist-patch7-1/
  config.yaml            all settings; also a recipe for `vitft scratch train`
  metrics.jsonl          one line per epoch
  weights.safetensors    after the last complete epoch, with the names of `vitft.scratch.vit.named_arrays`
  summary.json           network, dataset and score; written last
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass, fields
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
from vitft.io.atomic import new_file, write_json, write_text
from vitft.scratch.train import Engine, Epoch, Images, NumpyEngine, Plan, fit, initial_weights, save, steps_per_epoch
from vitft.scratch_runner.config import TextbookConfig
from vitft.scratch_runner.run import METRICS, SUMMARY, WEIGHTS
from vitft.spec import ViTSpec, total

_VAL_FRACTION = 0.1  # of train, for a dataset without test and validation splits


@dataclass(frozen=True)
class Data:
    """Training and test images, with their source."""

    source: Source
    train: Images
    test: Images
    splits: dict[str, Split]  # train, and test or else validation


@dataclass(frozen=True)
class Result:
    """A finished run and its `summary.json`."""

    run: Path
    summary: dict[str, Any]


def train(config: TextbookConfig, *, output: Path | None = None, name: str | None = None) -> Result:
    """Train into `output`, by default the next free runs/textbook-NAME-N, with the dataset's name as NAME.

    Raises UsageError, DataError, or TrainingError for a non-finite loss.
    """
    if config.dataset is None:
        raise UsageError("no dataset; name a recipe (`vitft recipes ls`) or add --dataset; digits needs no network.")
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"output {output}: exists and is not empty; choose another.")
    data = load_data(config)
    spec, plan = make_spec(config, data), make_plan(config, data)
    engine = make_engine(config, spec, plan)
    console.note(
        f"{len(data.train.labels):,} training images of {spec.image_height}x{spec.image_width} in {spec.channels} "
        f"channel{'s' if spec.channels > 1 else ''}, {total(spec).parameters:,} parameters, {config.engine} engine"
    )
    existed = output is not None and output.exists()
    stem = Path("runs") / f"textbook-{name or data.source.name}"
    run = paths.make_output(lambda: output or paths.numbered(stem), named=output is not None)
    dataset = paths.absolute(config.dataset, (*ALIASES, DIGITS))
    settings = config.model_copy(update={"dataset": dataset}).model_dump(exclude_none=True)
    started = time.perf_counter()
    try:
        write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        history = _fit(engine, data, spec, plan, run)
    except BaseException:
        if not (run / WEIGHTS).exists():  # no epoch was completed, so there is nothing to keep
            (run / "config.yaml").unlink(missing_ok=True)
            if not existed:
                run.rmdir()
        raise
    elapsed_s = time.perf_counter() - started
    summary = _summary(config, data, spec, plan, history[-1]) | {"elapsed_s": round(elapsed_s, 2)}
    write_json(run / SUMMARY, summary)
    return Result(run, summary)


def _fit(engine: Engine, data: Data, spec: ViTSpec, plan: Plan, run: Path) -> list[Epoch]:
    """Train; after each epoch, print its results and write its line of metrics and the weights."""
    per_epoch, lines = steps_per_epoch(data.train, plan), []
    started = time.perf_counter()

    def on_step(step: int, loss: float, lr: float) -> None:
        if not isfinite(loss):
            raise TrainingError(f"loss is {loss} at step {step + 1}, lr {lr:.2g}; lower --lr or add --warmup-steps.")
        progress(step + 1, plan.epochs * per_epoch)

    def on_epoch(epoch: Epoch) -> None:
        elapsed_s = time.perf_counter() - started
        lines.append(asdict(epoch) | {"step": epoch.epoch * per_epoch, "elapsed_s": round(elapsed_s, 2)})
        with new_file(run / WEIGHTS) as temporary:
            save(temporary, engine.weights())
        write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        console.note(
            f"epoch {epoch.epoch}/{plan.epochs}  loss {epoch.loss:.4f}  "
            f"accuracy {console.percent(epoch.accuracy, 2)}  test {console.percent(epoch.test_accuracy, 2)}  "
            f"{console.duration(elapsed_s)}"
        )

    with console.working("training") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of overflows, which `on_step` reports
        return fit(engine, data.train, data.test, spec, plan, on_step, on_epoch)


def _summary(config: TextbookConfig, data: Data, spec: ViTSpec, plan: Plan, last: Epoch) -> dict[str, Any]:
    """Everything needed to use the weights, and the score with its split."""
    test_split = next(split for role, split in data.splits.items() if role != "train")
    images = len(data.test.labels)
    interval = wilson_interval(round(last.test_accuracy * images), images)
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
        "score": {
            "split": test_split.name,
            "split_hash": test_split.hash,
            "count": images,
            "accuracy": last.test_accuracy,
            "accuracy_interval": list(interval),
        },
    }


# -- from settings to the chapters' arguments --------------------------------------------------------


def make_spec(config: TextbookConfig, data: Data) -> ViTSpec:
    """The sizes of the network, from the images and the settings. Raises UsageError if they do not fit."""
    channels, height, width = data.train.pixels.shape[1:]
    patch = config.patch_size
    if height % patch or width % patch:
        sizes = [str(side) for side in range(1, min(height, width) + 1) if not (height % side or width % side)]
        raise UsageError(
            f"patch_size {patch} does not divide the {height}x{width} images of {data.source.name}; "
            f"try {', '.join(sizes[:-1])}{' or ' if sizes[:-1] else ''}{sizes[-1]}."
        )
    return ViTSpec(
        image_height=height, image_width=width, patch_height=patch, patch_width=patch, stride_height=patch,
        stride_width=patch, channels=channels, classes=len(data.source.labels), **_settings_of(ViTSpec, config),
    )  # fmt: skip


def make_plan(config: TextbookConfig, data: Data) -> Plan:
    """The training plan, from the settings and the mean and standard deviation of the training images."""
    mean, std = mean_and_std(data.train.pixels)
    border = max(1, min(data.train.pixels.shape[2:]) // 8) if config.augment in ("crop", "both") else 0
    flip = config.augment in ("flip", "both")
    return Plan(**_settings_of(Plan, config), mean=mean, std=std, flip=flip, crop_border=border)


def _settings_of(kind: type[ViTSpec | Plan], config: TextbookConfig) -> dict[str, Any]:
    """The settings that are fields of a dataclass, under the same names."""
    return config.model_dump(include={field.name for field in fields(kind)})


def make_engine(config: TextbookConfig, spec: ViTSpec, plan: Plan) -> Engine:
    """The engine of the settings, with the plan's initial weights, which are the same for both engines."""
    w = initial_weights(spec, plan)
    if config.engine == "numpy":
        return NumpyEngine(w, spec, plan)
    from vitft.scratch_runner.torch_engine import TorchEngine

    return TorchEngine(w, spec, plan)


def mean_and_std(pixels: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel of pixels (images, C, H, W) / 255; the std of a constant channel is 1."""
    values, means, stds = np.arange(256) / 255, [], []
    for channel in pixels.swapaxes(0, 1):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(channel), 1000):  # bincount needs 8 bytes per pixel
            counts += np.bincount(channel[start : start + 1000].reshape(-1), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        stds.append(sqrt(variance) or 1.0)
    return tuple(means), tuple(stds)


# -- data ---------------------------------------------------------------------------------------------


def load_data(config: TextbookConfig) -> Data:
    """Open, split and decode the dataset: uint8 pixels (images, C, H, W), with C = 1 if every image is gray.

    Test images come from the test split, else the validation split, else a tenth of train. Raises DataError for a
    dataset that cannot be read, has no such images, only one class, or images of different sizes.
    """
    assert config.dataset is not None
    source = open_dataset(config.dataset)
    splits = make_splits(
        source, val_fraction=_VAL_FRACTION if find_split_name(source, "test") is None else 0.0, seed=config.seed,
        max_train_samples=config.max_train_samples, max_eval_samples=config.max_test_samples,
    )  # fmt: skip
    test_role = "test" if "test" in splits else "validation"
    for role in ("train", test_role):
        if role not in splits or len(splits[role].rows) == 0:
            raise DataError(f"{config.dataset}: no {role} images; its splits are {', '.join(source.splits)}.")
    if len(source.labels) < 2:
        raise DataError(f"{config.dataset}: there is only one class ({source.labels[0]}); add another.")
    train, test = decode_split(source, splits["train"]), decode_split(source, splits[test_role])
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{config.dataset}: {test_role} and train have images of different sizes; resize them.")
    if all((rgb == rgb[:, :1]).all() for rgb in (train, test)):
        train, test = train[:, :1].copy(), test[:, :1].copy()
    used = {role: splits[role] for role in ("train", test_role)}
    return Data(source, Images(train, used["train"].labels), Images(test, used[test_role].labels), used)


def decode_split(source: Source, split: Split) -> NDArray[np.uint8]:
    """All images of a split: (images, 3, H, W). Raises DataError if one cannot be decoded or has another size."""
    rows = source.splits[split.source].select(split.rows)
    pixels = np.empty(0, np.uint8)
    # Read a hundred at a time. One at a time, reading takes a fifth of the time of decoding.
    cells = (cell for start in range(0, len(rows), 100) for cell in rows[start : start + 100]["image"])
    with console.working(f"decoding {split.name}") as progress:
        for number, cell in enumerate(cells):
            try:
                image = decode(encoded(cell)).transpose(2, 0, 1)
            except BadImage as error:
                raise DataError(f"{sample_id(rows, number)}: {error}; fix or remove it.") from error
            if number == 0:
                pixels = np.empty((len(rows), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                size, first_size = (f"{shape[1]}x{shape[2]}" for shape in (image.shape, pixels.shape[1:]))
                raise DataError(
                    f"{sample_id(rows, number)} is {size}, but the first image is {first_size}; the textbook needs "
                    "images of one size (vitft train resizes them)."
                )
            pixels[number] = image
            progress(number + 1, len(rows))
    return pixels
