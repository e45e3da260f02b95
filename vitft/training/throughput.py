"""How fast a run went, how far that is from this machine's limit, and what would help."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vitft.config.train import TrainConfig
from vitft.hardware.device import find_precision, micro_batch, peak_flops
from vitft.models.load import shape_of
from vitft.spec import training_flops
from vitft.training.metrics_log import Pace

_MUCH_WAIT, _SMALL_SHARE = 0.15, 0.25


@dataclass(frozen=True)
class Speed:
    """images_per_s and data_wait are a `Pace`'s; mfu is the share of the machine's matrix peak, if it can be said."""

    images_per_s: float
    data_wait: float
    mfu: float | None
    precision: str
    remedy: str | None


def speed_of(
    pace: Pace, model: Any, config: TrainConfig, processes: int = 1, *, probe: bool = False
) -> Speed | None:  # fmt: skip
    """What a run's pace means; measures the peak for a third of a second.

    None where it did not train, and of a `probe`, whose pace is the head's alone.
    """
    if not pace.elapsed_s or probe:
        return None
    spec = shape_of(model)
    mfu = None
    # With a frozen backbone a step is no multiple of the forward pass; processes may share one machine's peak.
    if spec is not None and config.freeze == "none" and processes == 1 and _is_fast(config):
        with suppress(RuntimeError):  # no room for the matrices beside the model: then it is not said
            share = training_flops(spec) * pace.images_per_s / peak_flops(config.device, config.precision, 0.3)
            mfu = share if share <= 1 else None  # above it, the peak was measured beside other work and says nothing
    return Speed(pace.images_per_s, pace.data_wait, mfu, config.precision, _remedy(pace, mfu, config))


def _is_fast(config: TrainConfig) -> bool:
    """Whether a large product takes no time to speak of: an emulated precision may be 300 times slower."""
    return config.precision in ("fp32", find_precision("auto", config.device))


def _remedy(pace: Pace, mfu: float | None, config: TrainConfig) -> str | None:
    """The setting that would help most; None where nothing stands out."""
    if pace.data_wait > _MUCH_WAIT and config.augment == "crop":
        return "random crops take much of the time: --augment flip is cheaper"
    best = find_precision("auto", config.device)
    if config.precision == "fp32" and best != "fp32":
        return f"this hardware is faster at {best}: --precision auto"
    part = micro_batch(config)
    if config.device == "cuda" and mfu is not None and mfu < _SMALL_SHARE and part < 64:
        option = "--batch-size" if part == config.batch_size else "--micro-batch-size"
        return f"parts of {part} images leave the GPU idle: a larger {option} fills it"
    return None
