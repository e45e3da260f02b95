"""What runs where: device, precision and threads, chosen once at the start of a run."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch

from vitft import __version__
from vitft.config.train import TrainConfig
from vitft.errors import TrainingError, UsageError, nearest
from vitft.hardware.timers import synchronize
from vitft.io.paths import shown


def resolve_auto(config: TrainConfig) -> TrainConfig:
    """The settings with `auto` replaced by what this machine has. Raises UsageError."""
    device = find_device(config.device)
    return config.model_copy(update={"device": device, "precision": find_precision(config.precision, device)})


def find_device(wanted: str) -> str:
    """cuda, mps or cpu; `auto` takes the first of these that is there. Raises UsageError."""
    if wanted.startswith("cuda:"):
        raise UsageError(f"device {wanted}: it is cuda, and CUDA_VISIBLE_DEVICES chooses which GPU that is.")
    _known("device", wanted)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise UsageError(f"device {wanted}: torch {torch.__version__} sees none here; use --device auto.")
    return wanted


@cache
def cpus() -> int:
    """CPUs that this process may use: those of its affinity, and no more than its container is granted."""
    import joblib

    return int(joblib.cpu_count())


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Run torch with `count` CPU threads, or with its own number of them where that is no more than it may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(config: TrainConfig) -> Iterator[None]:
    """On a GPU, allow only kernels that give the same bits every time, if `config` says so; elsewhere all do."""
    if not (config.deterministic and config.device == "cuda"):
        yield
        return
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    fills.fill_uninitialized_memory = False  # a help in finding faults that takes time
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fills.fill_uninitialized_memory = before[1]


def find_precision(wanted: str, device: str) -> str:
    """fp32, bf16 or fp16; `auto` takes bf16 where matrix products of it are faster, which on a CPU is measured.

    A CPU without it emulates it: a product was seen to take 300 times as long; one with it, half as long as in
    float32, or twice. Several processes on a CPU would measure one another, and take fp32. Raises UsageError.
    """
    _known("precision", wanted)
    if wanted == "auto":
        if device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return "bf16" if device == "cpu" and alone and _cpu_has_bf16() and _bf16_is_faster() else "fp32"
    if wanted == "fp16" and device != "cuda":
        raise UsageError(f"precision fp16 needs a CUDA device, got {device}; use fp32 or auto.")
    return wanted


def _known(name: str, wanted: str) -> None:
    """Raise UsageError for a value that its setting does not have: a library call passes any."""
    choices = get_args(TrainConfig.model_fields[name].annotation)
    if wanted not in choices:
        hint = nearest(wanted, choices) or "; choose one of these"
        raise UsageError(f"{name} {wanted}: not one of {', '.join(choices)}{hint}.")


@cache
def _bf16_is_faster() -> bool:
    return peak_flops("cpu", "bf16", 0.1) > 1.2 * peak_flops("cpu", "fp32", 0.1)


def find_attention(wanted: str, device: str, tokens: int | None) -> str | None:
    """eager or sdpa; `auto` takes what was measured to be faster (docs/benchmarks.md); None: the model's own."""
    if wanted != "auto":
        return wanted
    if tokens is None:
        return None
    return "eager" if device == "cpu" and tokens <= _FEW_TOKENS else "sdpa"


_FEW_TOKENS = 128  # on a CPU, up to which plain products are faster than the fused kernel with its backward


def make_accelerator(config: TrainConfig) -> Any:
    """accelerate's view of the processes and the precision of a run. Raises UsageError."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise UsageError(f"tracker {config.tracker}: not installed; pip install 'vitft[{config.tracker}]'.")
    known = resolve_auto(config)
    precision = "no" if known.precision == "fp32" else known.precision
    if "WORLD_SIZE" not in os.environ:  # an earlier run in this program may have had another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=known.device == "cpu", mixed_precision=precision)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. From pinned memory a GPU fetches it by itself, while it computes the step before."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what an error of torch says; the CPU's has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_guard(config: TrainConfig, processes: int = 1) -> Iterator[None]:
    """Say in one line what to do when memory runs out. Raises TrainingError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        micro = max(1, micro_batch(config, processes) // 2)
        raise TrainingError(
            f"out of memory on {config.device}; the same batch in smaller parts may fit: --micro-batch-size {micro}, "
            "or --grad-checkpointing, a smaller model or --image-size."
        ) from error


def micro_batch(config: TrainConfig, processes: int = 1) -> int:
    """Images of one forward pass on one process, of a whole batch."""
    share = -(-config.batch_size // processes)
    return min(config.micro_batch_size, share) if isinstance(config.micro_batch_size, int) else share


def peak_flops(device: str, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product in a precision: the most that any step could reach here."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    repeats = 20 if device == "cuda" else 1
    a @ b
    best, started = 0.0, time.perf_counter()
    while not best or time.perf_counter() - started < seconds:
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, repeats * 2 * side**3 / (time.perf_counter() - begun))
    return best


def _cpu_has_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, and they may move
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def environment() -> dict[str, Any]:
    """Versions, hardware, git commit and command line, for `environment.json`."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "pillow")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [
            "=".join(shown(Path(part)) if os.sep in part else part for part in word.split("=")) for word in sys.argv
        ],
        "versions": {
            "python": platform.python_version(),
            "vitft": __version__,
            **{name: version(name) for name in packages},
        },
        "hardware": {
            "system": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": gpus,
        },
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
