"""Settings that are chosen by trial before a run starts: threads, micro-batch, compilation. Resume uses them again."""

import os
import statistics
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list

from vitft.config.train import TrainConfig
from vitft.errors import first_line
from vitft.hardware.device import cpus, micro_batch, threads
from vitft.io import console
from vitft.models.load import compiled, shape_of
from vitft.spec import training_flops
from vitft.training.cost.estimate import cost, first_image_s, memory_bytes, pass_s, stored_image, untouched
from vitft.training.optim import total_steps
from vitft.training.setup import Prepared

# Compiling is tried if a run's images take at least so many seconds. On an H200, it took 8 s and saved a fifth of the
# time. On a CPU, it brought almost nothing (docs/benchmarks.md).
_COMPILING_PAYS_S = {"cuda": 50.0, "cpu": 900.0}
_MEMORY_FRACTION = 0.8  # of the free memory that training may use
_LARGE_FLOPS = 2e10  # per pass, about half a second on one core: from there on, all threads have enough to do
_THREADS_PAY = 0.9  # twice the threads have to take less than this fraction of the time


def autotuned(prepared: Prepared, processes: int = 1) -> Prepared:
    """The same run with threads, micro-batch and compilation chosen, by one process for all."""
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
    return replace(prepared, config=broadcast_object_list(chosen)[0])


def _fitting(prepared: Prepared, processes: int) -> int | None:
    """Halve a process's shard of the batch until it fits in memory; None if all of it fits."""
    shard = micro = micro_batch(prepared.config.model_copy(update={"micro_batch_size": None}), processes)
    fits = _fits_on_gpu if prepared.config.device == "cuda" else _fits_in_memory
    while micro > 1 and not fits(prepared, micro):
        micro = -(-micro // 2)
    return None if micro == shard else micro


def _fits_in_memory(prepared: Prepared, micro: int) -> bool:
    needed = memory_bytes(prepared, micro)
    taken = psutil.Process().memory_info().rss
    return needed is None or needed - taken <= _MEMORY_FRACTION * psutil.virtual_memory().available


def _fits_on_gpu(prepared: Prepared, micro: int) -> bool:
    """Try a pass, leaving memory for what else a run holds."""
    spare = torch.empty(0)
    try:
        with untouched(prepared):
            free, _ = torch.cuda.mem_get_info()
            spare = torch.empty(int((1 - _MEMORY_FRACTION) * free), dtype=torch.uint8, device="cuda")
            pass_s(prepared, stored_image(prepared)[None].expand(micro, -1, -1, -1))
    except torch.OutOfMemoryError:
        return False
    finally:
        del spare
        torch.cuda.empty_cache()
    return True


def _fastest_threads(prepared: Prepared, processes: int) -> int:
    """CPU threads: all that the process may use; for a small model, doubled from 1 while that is faster.

    The operations of a small model take microseconds, so threads mostly wait for one another, the longer if others
    use the same CPUs. OMP_NUM_THREADS is respected.
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
            return statistics.median(
                [pass_s(prepared, images) for _ in range(4)][1:]
            )  # the first pass starts the threads

    with untouched(prepared):
        count, took_s = 1, median_s(1)
        while count < most:
            more = min(2 * count, most)
            if (now_s := median_s(more)) > _THREADS_PAY * took_s:
                break
            count, took_s = more, now_s
    return count


def _pass_flops(prepared: Prepared) -> float:
    """FLOPs of an image's forward and backward pass, estimated if the architecture has no stage table."""
    if (spec := shape_of(prepared.loaded.model)) is not None:
        return training_flops(spec)
    how = prepared.loaded.preprocess
    weights: int = sum(p.numel() for p in prepared.loaded.model.parameters())
    return 6.0 * weights * (how.height / 16) * (how.width / 16)


def _compiling_pays(prepared: Prepared, config: TrainConfig, processes: int) -> bool:
    """Whether a compiled step is faster, by trial if the run is long enough to be worth it.

    What one of several processes computes is tried by one, while the others wait.
    """
    if config.parallel == "fsdp" or config.freeze == "backbone" or config.grad_checkpointing:
        return False
    worth = _COMPILING_PAYS_S.get(config.device, _COMPILING_PAYS_S["cpu"])
    images = len(prepared.splits["train"].rows)
    steps_per_epoch = -(-images // config.batch_size)
    run_images = total_steps(config, steps_per_epoch) / steps_per_epoch * images / processes
    # A single first image takes longest: most runs are too short even by that.
    if first_image_s(prepared) * run_images < worth:
        return False
    if cost(replace(prepared, config=config), processes).image_s * run_images < worth:
        return False
    stored = stored_image(prepared)[None].expand(micro_batch(config, processes), -1, -1, -1)
    with console.working("trying torch.compile"), untouched(prepared) as model:
        try:
            fast = compiled(model)
            pass_s(prepared, stored, fast)
            was, now = (min(pass_s(prepared, stored, module) for _ in range(2)) for module in (model, fast))
        except Exception as error:  # compilers are missing or fail in many ways
            console.note(f"torch.compile does not work here, so the run continues without it: {first_line(error)}")
            return False
    return now < 0.97 * was
