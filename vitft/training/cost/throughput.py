"""How fast a run is, how close that is to this machine's peak, and what would help."""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from vitft.config.train import TrainConfig
from vitft.hardware.device import find_precision, micro_batch, peak_flops
from vitft.io.console import counted
from vitft.models.load import shape_of
from vitft.spec import training_flops

_MUCH_WAIT, _SMALL_SHARE = 0.15, 0.25


@dataclass
class Pace:
    """The images and seconds of training, without evaluation and saving."""

    images: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        """Images per second, over all processes."""
        return self.images / self.elapsed_s

    @property
    def data_wait(self) -> float:
        """The fraction of the time spent waiting for input."""
        return self.waited_s / self.elapsed_s


class Window:
    """The steps since the last line of metrics. Their numbers are read from the device once per window."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.pace = accelerator, Pace()
        self.restart()

    def restart(self, data_wait_s: float = 0.0) -> None:
        """Start a new window now; `data_wait_s` is how long the run has waited for data so far."""
        self.started, self.waited_s = time.perf_counter(), data_wait_s
        self.steps: list[torch.Tensor] = []
        self.images = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, loss: torch.Tensor, correct: torch.Tensor, norm: torch.Tensor, *, count: int) -> None:
        """Add a step: this process's part of the mean loss and the correct answers, and the gradient norm."""
        self.steps.append(torch.stack([loss, correct, norm.detach() / self.accelerator.num_processes]))
        self.images += count

    def close(self, data_wait_s: float) -> dict[str, float]:
        """Return means over the window and all processes, and start the next window.

        Raises FloatingPointError(place in the window, value) for the first loss or norm that is not finite.
        """
        table = self.accelerator.reduce(torch.stack(self.steps), "sum").cpu().double()  # Apple's GPUs have no float64
        # In fp16, gradients may overflow: the scaler then skips the step and halves its scale.
        checked = table[:, :1] if self.accelerator.scaler else table[:, ::2]
        bad = (~checked.isfinite()).nonzero()
        if len(bad):
            place, column = bad[0].tolist()
            raise FloatingPointError(place, checked[place, column].item())
        elapsed, waited = time.perf_counter() - self.started, data_wait_s - self.waited_s
        self.pace.images += self.images
        self.pace.elapsed_s += elapsed
        self.pace.waited_s += waited
        line = {
            "loss": table[:, 0].mean().item(),
            "accuracy": table[:, 1].sum().item() / self.images,
            "grad_norm": table[table[:, 2].isfinite(), 2].sum().item() / max(1, int(table[:, 2].isfinite().sum())),
            "images_per_s": self.images / elapsed,
            "data_wait": waited / elapsed,
        }
        self.restart(data_wait_s)
        return line


@dataclass(frozen=True)
class Speed:
    """The speed of a run; `mfu` is the fraction of the machine's matrix peak, None if unknown."""

    images_per_s: float
    data_wait: float
    mfu: float | None
    precision: str
    remedy: str | None


def measure_speed(
    pace: Pace, model: Any, config: TrainConfig, processes: int = 1, *, probe: bool = False
) -> Speed | None:  # fmt: skip
    """Compare a run's pace with the machine's peak, which takes a third of a second to measure.

    None where it did not train, and of a `probe`, whose pace is the head's alone.
    """
    if not pace.elapsed_s or probe:
        return None
    spec = shape_of(model)
    mfu = None
    # With frozen weights, a step is not a multiple of the forward pass; processes may share one machine's peak.
    full = config.freeze == "none" and config.lora_rank is None
    if spec is not None and full and processes == 1 and _is_fast(config):
        with suppress(RuntimeError):  # no memory for the matrices beside the model
            fraction = training_flops(spec) * pace.images_per_s / peak_flops(config.device, config.precision, 0.3)
            mfu = fraction if fraction <= 1 else None  # else the peak was measured while other programs were running
    return Speed(pace.images_per_s, pace.data_wait, mfu, config.precision, _remedy(pace, mfu, config))


def _is_fast(config: TrainConfig) -> bool:
    """Whether a large matrix product is quick to measure: an emulated precision may be 300 times slower."""
    return config.precision in ("fp32", find_precision("auto", config.device))


def _remedy(pace: Pace, mfu: float | None, config: TrainConfig) -> str | None:
    """The setting that would help most; None if nothing stands out."""
    if pace.data_wait > _MUCH_WAIT and config.augment not in ("none", "flip"):
        return f"--augment {config.augment} takes much of the time: flip is cheaper"
    best = find_precision("auto", config.device)
    if config.precision == "fp32" and best != "fp32":
        return f"this hardware is faster at {best}: --precision auto"
    part = micro_batch(config)
    if config.device == "cuda" and mfu is not None and mfu < _SMALL_SHARE and part < 64:
        option = "--batch-size" if part == config.batch_size else "--micro-batch-size"
        return f"micro-batches of {counted(part, 'image')} leave the GPU idle: a larger {option} fills it"
    return None
