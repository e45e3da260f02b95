"""Benchmarks of a run's parts on this machine: input, training steps, evaluation, beside the machine's peak."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vitft.config.train import TrainConfig
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import EvalLoader, TrainLoader
from vitft.data.stores.lazy_store import LazyStore
from vitft.errors import UsageError
from vitft.hardware.device import (
    autocast,
    deterministic,
    environment,
    make_accelerator,
    memory_guard,
    peak_flops,
    resolve_auto,
    threads,
)
from vitft.hardware.timers import Stopwatch, seconds_between, synchronize, timestamp
from vitft.io import console
from vitft.models.load import BUNDLED, shape_of
from vitft.spec import PRESETS, total, training_flops
from vitft.training.cost.autotune import autotuned
from vitft.training.cost.profiling import profiled
from vitft.training.setup import Decoded, Prepared, prepare
from vitft.training.step import Learner

What = Literal["data", "train", "eval"]
WARM_UP = 3  # steps not counted: they start threads, and allocate memory


def bench(what: What, settings: dict[str, Any], steps: int, profile: Path | None = None) -> dict[str, Any]:
    """Measure, and return figures for JSON. Times are in seconds unless the name says ms.

    data: images from the store to the model's input, once all are decoded. train: whole optimizer steps, and then as
    many more with a clock around each part; with a `profile`, also some under PyTorch's profiler, whose Chrome trace is
    written there. eval: forward passes with their data. Raises VitftError.
    """
    if profile is not None:
        _check_profile(what, profile)
    new = settings.get("model") in PRESETS and settings.get("model") != BUNDLED
    fixed = {"from_scratch": new, "val_fraction": 0.0, "epochs": 1e5, "schedule": "constant"}
    if new and settings.get("freeze", "none") != "none":
        raise UsageError(
            f"--freeze {settings['freeze']}: {settings['model']} is a shape with random weights; use a trained model."
        )
    default = {"dataset": "digits", "model": BUNDLED, "compile": "off"}  # auto would always try it, with so many epochs
    config = resolve_auto(TrainConfig.parse(default | settings | fixed, "flags"))
    accelerator = make_accelerator(config)
    prepared = prepare(config)
    with memory_guard(config):
        prepared = autotuned(prepared)
    config = prepared.config
    if len(prepared.splits["train"].rows) < config.batch_size:
        few = console.counted(len(prepared.splits["train"].rows), "training image")
        raise UsageError(f"--batch-size {config.batch_size}: {config.dataset} has {few}; take fewer.")
    started = time.perf_counter()
    alone = replace(prepared, splits={"train": prepared.splits["train"]})
    decoded = alone.decode() if what == "eval" else alone.open_images(resumes=True)  # without reading headers first
    if isinstance(store := decoded.stores["train"][0], LazyStore):
        _decode(store)
    images = len(decoded.splits["train"].rows)
    document: dict[str, Any] = {
        "what": what,
        "settings": {name: getattr(config, name) for name in _NAMED},
        "steps": steps,
        "decode_images_per_s": images / (time.perf_counter() - started),
    }
    with memory_guard(config), threads(config.threads), deterministic(config), ExitStack() as ending:
        measure = _MEASURES[what] if profile is None else partial(_train, profile=profile)
        measured = measure(accelerator, decoded, steps, ending)
    device = torch.cuda.max_memory_allocated() if config.device == "cuda" else None
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss in bytes
    memory = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "device": device}
    return document | measured | {"peak_memory_bytes": memory, "environment": environment()}


def _decode(store: LazyStore) -> None:
    """Decode all images, as the first epoch would: what is measured then is every later one."""
    with console.working("decoding train") as progress:
        for places in np.array_split(np.arange(len(store)), -(-len(store) // _CHUNK)):
            store.fetch_ahead(places)
            store.gather(places, stacked=False)
            progress(int(places[-1]) + 1, len(store))
    store.attend()
    store.close()  # what is being cached would take time from the steps


_CHUNK = 256  # images
_NAMED = (
    "dataset", "model", "image_size", "batch_size", "augment", "color_jitter", "erase", "mixup", "cutmix", "freeze",
    "device", "precision", "attention", "compile", "deterministic", "micro_batch_size", "threads",
)  # fmt: skip


def _check_profile(what: What, profile: Path) -> None:
    """Check a trace's path before the work. Raises UsageError."""
    if what != "train":
        raise UsageError("--profile works only with `vitft bench train`.")
    if profile.suffix.lower() != ".json" or not profile.parent.is_dir() or profile.is_dir():
        raise UsageError(f"--profile {profile}: give a .json file in a folder that exists.")


def _data(accelerator: Any, decoded: Decoded, steps: int, ending: ExitStack) -> dict[str, Any]:
    config = decoded.config
    clock = Stopwatch(config.device)
    loader = TrainLoader(
        *decoded.stores["train"], decoded.loaded.preprocess, augmentation=Augmentation.of(config),
        classes=len(decoded.loaded.labels), batch_size=config.batch_size, device=accelerator.device, clock=clock,
    )  # fmt: skip
    ending.callback(loader.close)
    places = _whole_batches(loader)
    times, parts = _timed(lambda: loader.batch(next(places)), steps, config.device, clock)
    return {"images_per_s": _rates(times, config.batch_size), "ms_per_step": parts}


def _train(
    accelerator: Any, decoded: Decoded, steps: int, ending: ExitStack, profile: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    config = decoded.config
    learner = Learner(accelerator, decoded)
    ending.callback(learner.close)
    learner.get_ready()
    places = _whole_batches(learner.loader)

    def step() -> None:
        learner.step(next(places))

    for _ in range(WARM_UP):
        step()
    waited_s = learner.data_wait_s
    times = _in_a_row(step, steps, config.device)
    wait = (learner.data_wait_s - waited_s) / sum(times)
    seen = {} if profile is None else {"profile": profiled(step, config.device, profile)}
    clock = Stopwatch(config.device)
    learner.clock = learner.loader.clock = clock
    _, parts = _timed(step, steps, config.device, clock, warm_up=0)
    flops = _flops(decoded, training_flops)
    return {
        "images_per_s": _rates(times, config.batch_size), "ms_per_step": parts, "data_wait": wait, **seen,
        **_share(config, flops if config.freeze == "none" and config.lora_rank is None else None, times),
    }  # fmt: skip


def _eval(accelerator: Any, decoded: Decoded, steps: int, ending: ExitStack) -> dict[str, Any]:
    config, model = decoded.config, decoded.loaded.model.to(accelerator.device).eval()
    loader = EvalLoader(
        *decoded.stores["train"], decoded.loaded.preprocess, batch_size=config.batch_size, device=accelerator.device
    )
    batches = (batch for _ in count() for batch in loader if len(batch.labels) == config.batch_size)
    clock = Stopwatch(config.device)

    def step() -> None:
        with clock.part("wait"):
            batch = next(batches)
        with clock.part("forward"):
            model(pixel_values=batch.pixels)

    with torch.no_grad(), autocast(config.device, config.precision):
        times, parts = _timed(step, steps, config.device, clock)
    flops = _flops(decoded, lambda spec, batch: total(spec, batch).flops)
    wait = parts["wait"]["median"] / sum(part["median"] for part in parts.values())
    return {
        "images_per_s": _rates(times, config.batch_size), "ms_per_step": parts, "data_wait": wait,
        **_share(config, flops, times),
    }  # fmt: skip


_MEASURES: dict[What, Callable[..., dict[str, Any]]] = {"data": _data, "train": _train, "eval": _eval}


def _whole_batches(loader: Any) -> Iterator[int]:
    """An endless sequence of steps with full batches."""
    return (step for step in count() if len(loader.samples(step)) == loader.batch_size)


def _timed(
    step: Callable[[], Any], steps: int, device: str, clock: Stopwatch | None = None, warm_up: int = WARM_UP
) -> tuple[list[float], dict[str, dict[str, float]]]:
    """Seconds of each step, and statistics of each part in milliseconds."""
    times: list[float] = []
    parts: list[dict[str, float]] = []
    for number in range(warm_up + steps):
        if clock is not None:
            clock.seconds.clear()
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if number >= warm_up:
            times.append(time.perf_counter() - started)
            parts.append(dict(clock.seconds) if clock is not None else {})
    return times, {name: _spread([1e3 * part[name] for part in parts]) for name in parts[0]}


def _in_a_row(step: Callable[[], Any], steps: int, device: str) -> list[float]:
    """Seconds of each step in sequence, without waiting for a GPU in between."""
    synchronize(device)
    moments = [timestamp(device)]
    for _ in range(steps):
        step()
        moments.append(timestamp(device))
    synchronize(device)
    return [seconds_between(*pair) for pair in pairwise(moments)]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _rates(times: list[float], images: int) -> dict[str, float]:
    return _spread([images / seconds for seconds in times])


def _flops(prepared: Prepared, count_flops: Callable[[Any, int], int]) -> int | None:
    """FLOPs of a step; None if the architecture has no stage table."""
    spec = shape_of(prepared.loaded.model)
    return None if spec is None else count_flops(spec, prepared.config.batch_size)


def _share(config: TrainConfig, flops: int | None, times: list[float]) -> dict[str, Any]:
    """FLOP/s, those of a large matrix product in the same dtype, measured now, and their ratio (mfu)."""
    peak = peak_flops(config.device, config.precision)
    rate = None if flops is None else flops / statistics.median(times)
    # A ratio above 1 means nothing: the peak was measured while other programs were running.
    mfu = rate / peak if rate is not None and rate <= peak else None
    return {"flops_per_s": rate, "peak_flops_per_s": peak, "mfu": mfu}
