"""What is chosen by trying, once, before a run begins; it is written down, and used again on resume."""

import os
import statistics
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list

from vitft.config.train import TrainConfig
from vitft.hardware.device import cpus, micro_batch, threads
from vitft.io import console
from vitft.models.load import compiled, shape_of
from vitft.spec import training_flops
from vitft.training.estimate import cost, first_image_s, memory_bytes, pass_s, stored_image, untouched
from vitft.training.optim import total_steps
from vitft.training.setup import Prepared

# Seconds that a run's images must at least take for compiling to be tried: on an H200 it took 8 s and saved a fifth of
# them. On a CPU, where a minute and a half and a tenth were assumed, it brought next to nothing (docs/benchmarks.md).
_COMPILING_PAYS_S = {"cuda": 50.0, "cpu": 900.0}
_ROOM = 0.8  # share of the free memory that is taken
_LARGE_FLOPS = 2e10  # of a pass, from which on all threads have enough to do: about half a second on one core
_THREADS_PAY = 0.9  # share of the time that twice the threads may take at most


def tuned(prepared: Prepared, processes: int = 1) -> TrainConfig:
    """The settings with threads, micro-batch and compilation chosen: one process chooses for all."""
    chosen: list[Any] = [None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        config = prepared.config
        if config.threads is None:
            config = config.model_copy(update={"threads": _fastest_threads(prepared, processes)})
        with threads(config.threads):
            if config.micro_batch_size == "auto":
                config = config.model_copy(update={"micro_batch_size": _fitting(prepared, processes)})
            if config.compile == "auto":
                compiles = _compiling_pays(prepared, config, processes)
                config = config.model_copy(update={"compile": "on" if compiles else "off"})
        chosen = [config]
    found: TrainConfig = broadcast_object_list(chosen)[0]
    return found


def _fitting(prepared: Prepared, processes: int) -> int | None:
    """The largest part of a process's share that fits in memory, of the share's halves; None: all of it."""
    share = micro = micro_batch(prepared.config.model_copy(update={"micro_batch_size": None}), processes)
    fits = _fits_on_gpu if prepared.config.device == "cuda" else _fits_in_memory
    while micro > 1 and not fits(prepared, micro):
        micro = -(-micro // 2)
    return None if micro == share else micro


def _fits_in_memory(prepared: Prepared, micro: int) -> bool:
    needed = memory_bytes(prepared, micro)
    taken = psutil.Process().memory_info().rss
    return needed is None or needed - taken <= _ROOM * psutil.virtual_memory().available


def _fits_on_gpu(prepared: Prepared, micro: int) -> bool:
    """Take a step, with room left for what else a run holds."""
    spare = torch.empty(0)
    try:
        with untouched(prepared):
            free, _ = torch.cuda.mem_get_info()
            spare = torch.empty(int((1 - _ROOM) * free), dtype=torch.uint8, device="cuda")
            pass_s(prepared, stored_image(prepared)[None].expand(micro, -1, -1, -1))
    except torch.OutOfMemoryError:
        return False
    finally:
        del spare
        torch.cuda.empty_cache()
    return True


def _fastest_threads(prepared: Prepared, processes: int) -> int:
    """CPU threads: all that the process may use, or of a small model as many as are still faster than half of them.

    The parts of a small model's step take microseconds: there threads wait for one another, and for a long time where
    other programs take turns on the same CPUs. What the environment sets (OMP_NUM_THREADS, as launchers do) stands.
    """
    most = min(torch.get_num_threads(), cpus())
    share = micro_batch(prepared.config, processes)
    if prepared.config.device != "cpu" or processes > 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    if _pass_flops(prepared) * share > _LARGE_FLOPS:
        return most
    images = stored_image(prepared)[None].expand(share, -1, -1, -1)

    def median_s(count: int) -> float:
        with threads(count):
            return statistics.median([pass_s(prepared, images) for _ in range(4)][1:])  # the first makes the threads

    with untouched(prepared):
        count, took_s = 1, median_s(1)
        while count < most:
            more = min(2 * count, most)
            if (now_s := median_s(more)) > _THREADS_PAY * took_s:
                break
            count, took_s = more, now_s
    return count


def _pass_flops(prepared: Prepared) -> float:
    """FLOPs of an image's forward and backward pass; an estimate where the architecture has no stage table."""
    if (spec := shape_of(prepared.loaded.model)) is not None:
        return training_flops(spec)
    how = prepared.loaded.preprocess
    weights: int = sum(p.numel() for p in prepared.loaded.model.parameters())
    return 6.0 * weights * (how.height / 16) * (how.width / 16)


def _compiling_pays(prepared: Prepared, config: TrainConfig, processes: int) -> bool:
    """Whether a compiled step is faster, by trying it where the run is long enough to earn the trial back."""
    if processes > 1 or config.freeze == "backbone" or config.grad_checkpointing:
        return False
    worth = _COMPILING_PAYS_S.get(config.device, _COMPILING_PAYS_S["cpu"])
    images = len(prepared.splits["train"].rows)
    steps_per_epoch = -(-images // config.batch_size)
    run_images = total_steps(config, steps_per_epoch) / steps_per_epoch * images
    # Alone, and the first, an image takes longest: most runs are too short even so.
    if first_image_s(prepared) * run_images < worth or cost(prepared).image_s * run_images < worth:
        return False
    stored = stored_image(prepared)[None].expand(micro_batch(config), -1, -1, -1)
    with console.working("trying torch.compile"), untouched(prepared) as model:
        try:
            fast = compiled(model)
            pass_s(prepared, stored, fast)
            was, now = (min(pass_s(prepared, stored, module) for _ in range(2)) for module in (model, fast))
        except Exception as error:  # a compiler that is missing or fails, in any of the ways they have
            console.note(
                f"torch.compile does not work here, so the run goes on without it: {str(error).strip().splitlines()[0]}"
            )
            return False
    return now < 0.97 * was
