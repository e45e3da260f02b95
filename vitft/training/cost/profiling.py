"""Where the time of a training step goes, by PyTorch's profiler: kernels or operators, and the gaps between them."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from vitft.hardware.timers import synchronize
from vitft.io import console
from vitft.io.atomic import new_file

STEPS = 4
_LONGEST = 12


def profiled(step: Callable[[], Any], device: str, trace: Path, steps: int = STEPS) -> dict[str, Any]:
    """Take some steps in a row under the profiler, and write a Chrome trace of them.

    On a GPU, what is counted are kernels, and copies from and to its memory; elsewhere PyTorch's operators, each
    without those that it calls. The profiler itself takes time, on the CPU much: shares say more than milliseconds.

    Args:
        step: takes a step, of a run that is warmed up.
        device: "cuda", or another, of which the host's side is seen.
        trace: the file, for chrome://tracing or ui.perfetto.dev; replaced if there is one.
        steps: how many.

    Returns:
        For JSON: `trace`, None if it could not be written, of which a warning tells. Of a step on average: how many
        were launched and how often the host waited for the GPU; milliseconds in all; `idle`, the fraction of those in
        which nothing ran; and the longest by name, with their share of the time in which something did.
    """
    # Kineto, which is the profiler, writes on stderr when it starts and stops, at a level ("USDT", 5) above its errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    synchronize(device)
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        for _ in range(steps):
            step()
    written: str | None = str(trace)
    try:
        with new_file(trace) as temporary:
            seen.export_chrome_trace(str(temporary))
            if not temporary.exists():  # the profiler raises no error, and leaves its own temporary file
                Path(f"{temporary}.tmp").unlink(missing_ok=True)
                raise OSError(errno.EIO, "could not be written; free some space, or choose another")
    except OSError as error:
        written = None
        console.warn(f"no trace: {trace}: {error.strerror or error}")
    return {"trace": written, "steps": steps, **_summary(seen.events(), steps, on_gpu=on_gpu)}


def _summary(events: Iterable[Any], steps: int, *, on_gpu: bool) -> dict[str, Any]:
    events = [*events]
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # On a GPU, names with # are marks around kernels. On the CPU, they have a time of their own.
    ran = [event for event in events if event.device_type == wanted and not (on_gpu and "#" in event.name)]
    took, launches = Counter[str](), Counter[str]()
    for event in ran:
        took[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        launches[event.name] += 1
    busy_us, whole_us = _covered((event.time_range.start, event.time_range.end) for event in ran)
    waits = sum(event.device_type == DeviceType.CPU and "Synchronize" in event.name for event in events)
    return {
        "of": "kernels" if on_gpu else "operators",
        "launches": len(ran) / steps,
        "waits": max(0, waits - 1) / steps if on_gpu else None,  # the profiler itself waits, at its end
        "ms": whole_us / steps / 1e3,
        "idle": 1 - busy_us / whole_us if whole_us else 0.0,
        "longest": [
            {
                "name": name, "ms": microseconds / steps / 1e3, "share": microseconds / max(1e-9, took.total()),
                "launches": launches[name] / steps,
            }
            for name, microseconds in took.most_common(_LONGEST)
        ],
    }  # fmt: skip


def _covered(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How long at least one of the spans lasts, and how long it is from the first start to the last end."""
    covered, first, last = 0.0, None, float("-inf")
    for start, end in sorted(spans):
        first = start if first is None else first
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered, 0.0 if first is None else last - first
