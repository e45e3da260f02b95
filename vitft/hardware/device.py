"""Device, precision and threads of a run, chosen once at its start."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from vitft import __version__
from vitft.config.train import TrainConfig, device_name
from vitft.errors import TrainingError, UsageError, nearest, require_extra
from vitft.hardware.processes import PATIENCE, meet
from vitft.hardware.timers import synchronize
from vitft.io.paths import shown


def resolve_auto(config: TrainConfig) -> TrainConfig:
    """Replace `auto` in device and precision by what this machine has. Raises UsageError."""
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    if config.parallel == "fsdp" and precision == "fp16":
        raise UsageError("parallel fsdp: trains in bf16 or fp32, not in fp16; set precision, or use ddp.")
    return config.model_copy(update={"device": device, "precision": precision})


def find_device(wanted: str) -> str:
    """cuda, mps or cpu; `auto` takes the first of these that is available. Raises UsageError."""
    wanted = device_name(wanted)
    if wanted.startswith("cuda:"):
        raise UsageError(f"device {wanted}: use cuda, and choose the GPU with CUDA_VISIBLE_DEVICES.")
    _check_choice("device", wanted)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, is_available in available.items() if is_available)
    if not available[wanted]:
        raise UsageError(f"device {wanted}: not available to torch {torch.__version__}; use --device auto.")
    return wanted


@cache
def cpus() -> int:
    """CPUs that this process may use, by its affinity and its container's limits."""
    import joblib

    return int(joblib.cpu_count())


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Run torch with `count` CPU threads; None keeps torch's own number, up to the available CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(config: TrainConfig) -> Iterator[None]:
    """Allow only deterministic kernels on a GPU, if `config` asks for it; on other devices all kernels are."""
    if not (config.deterministic and config.device == "cuda"):
        yield
        return
    module: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), module.fill_uninitialized_memory
    module.fill_uninitialized_memory = False  # for debugging only, and slow
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        module.fill_uninitialized_memory = before[1]


def find_precision(wanted: str, device: str) -> str:
    """fp32, bf16 or fp16; `auto` takes bf16 if its matrix products are faster, which is measured on a CPU.

    A CPU without bf16 emulates it, with products up to 300 times as slow; on a CPU with bf16 they took between half
    and twice as long as in float32. Several processes would disturb one another's measurement, so they take fp32.
    Raises UsageError.
    """
    _check_choice("precision", wanted)
    if wanted == "auto":
        if device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return "bf16" if device == "cpu" and alone and _cpu_has_bf16() and _bf16_is_faster() else "fp32"
    if wanted == "fp16" and device != "cuda":
        raise UsageError(f"precision fp16 needs a CUDA device, got {device}; use fp32 or auto.")
    return wanted


def autocast(device: str, precision: str) -> Any:
    """A context in which matrix products have this precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


def _check_choice(name: str, wanted: str) -> None:
    """Raise UsageError for a value that the setting does not allow: library calls are not checked by the CLI."""
    choices = get_args(TrainConfig.model_fields[name].annotation)
    if wanted not in choices:
        hint = nearest(wanted, choices) or "; choose one of these"
        raise UsageError(f"{name} {wanted}: not one of {', '.join(choices)}{hint}.")


@cache
def _bf16_is_faster() -> bool:
    return peak_flops("cpu", "bf16", 0.1) > 1.2 * peak_flops("cpu", "fp32", 0.1)


def find_attention(wanted: str, device: str, tokens: int | None) -> str | None:
    """eager or sdpa; `auto` takes the faster one by docs/benchmarks.md, or None, the model's own, if tokens is None."""
    if wanted != "auto":
        return wanted
    if tokens is None:
        return None
    return "eager" if device == "cpu" and tokens <= _FEW_TOKENS else "sdpa"


_FEW_TOKENS = 128  # up to here, plain matrix products beat the fused kernel on a CPU, forward and backward together


def make_accelerator(config: TrainConfig) -> Any:
    """The Accelerator for the processes and the precision of a run, from settings without `auto`. Raises UsageError."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if config.tracker != "none":
        require_extra(config.tracker, f"tracker {config.tracker}", config.tracker)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UsageError(
            "accelerate is configured to use FSDP itself; take that out of its configuration, and use --parallel fsdp."
        )
    if config.parallel == "fsdp" and config.device == "cpu":
        _return_freed_memory()
    if config.deterministic:  # torch looks at it once, at the first matrix product of the process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = "no" if config.precision == "fp32" else config.precision
    if "WORLD_SIZE" not in os.environ:  # an earlier run in this process may have used another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    meet(config.device)
    waits = InitProcessGroupKwargs(timeout=PATIENCE)
    in_place = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients are not copied to be sent
    return Accelerator(cpu=config.device == "cpu", mixed_precision=precision, kwargs_handlers=[waits, in_place])


def _return_freed_memory() -> None:
    """Have glibc return every block of a megabyte and more to the system as soon as it is freed.

    It would keep those of up to 32 MB, for others that fit between what is in use. Where weights are gathered block by
    block, few do. Other C libraries are left alone.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to the device; to a GPU asynchronously, from pinned memory, while it computes the previous step."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_host(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors in host memory, sixteen of them joined along their first dimension.

    A GPU is waited for only so often: meanwhile the host prepares what comes next, but no more than it has room for.
    """
    block: list[torch.Tensor] = []
    for tensor in tensors:
        block.append(tensor)
        if len(block) == 16:
            yield torch.cat(block).cpu()
            block.clear()
    if block:
        yield torch.cat(block).cpu()


def many_launches_cost(device: torch.device) -> bool:
    """Whether it is better to work on a whole batch at once than only where there is something to do.

    On a GPU the host launches each operation, which takes as long as much arithmetic does. A CPU only has to calculate.
    """
    return device.type != "cpu"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means out of memory; on a CPU it has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_guard(config: TrainConfig, processes: int = 1) -> Iterator[None]:
    """Turn out-of-memory errors into a TrainingError with a remedy."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, processes) from error


def out_of_memory(config: TrainConfig, processes: int = 1, *, in_pass: bool = True) -> TrainingError:
    """The error for a run that does not fit; `in_pass` unless it is the optimizer or an evaluation that failed."""
    micro = micro_batch(config, processes)
    ways = [f"--micro-batch-size {micro // 2} (same batch size for the optimizer)"] if in_pass and micro > 1 else []
    ways += [] if config.grad_checkpointing or not in_pass else ["--grad-checkpointing"]
    return TrainingError(
        f"out of memory on {config.device}; try {', '.join([*ways, 'a smaller model or --image-size'])}."
    )


def micro_batch(config: TrainConfig, processes: int = 1) -> int:
    """Images of one forward pass on one process: the micro-batch size, or this process's whole shard of a batch."""
    shard = -(-config.batch_size // processes)
    return min(config.micro_batch_size, shard) if isinstance(config.micro_batch_size, int) else shard


def peak_flops(device: str, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product, measured: an upper bound for any training step on this device."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    repeats = 20 if device == "cuda" else 1
    a @ b
    best, begun = 0.0, time.perf_counter()
    while not best or time.perf_counter() - begun < seconds:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, repeats * 2 * side**3 / (time.perf_counter() - started))
    return best


def _cpu_has_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: they may be renamed
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def environment() -> dict[str, Any]:
    """Versions, hardware, git commit and command line, for `environment.json`."""
    packages = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "pillow")
    return {
        "command": command(),
        "versions": {"python": platform.python_version(), "vitft": __version__} | {p: version(p) for p in packages},
        "hardware": {
            "system": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def command() -> list[str]:
    """The command line, without the names of home folders."""
    return ["=".join(shown(Path(part)) if os.sep in part else part for part in arg.split("=")) for arg in sys.argv]


def _git_commit() -> str | None:
    try:
        return subprocess.check_output(
            ["git", "rev-parse", "HEAD"], text=True, timeout=5, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
