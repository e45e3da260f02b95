"""What a run would take on many devices like this one: from a step measured here, and the arithmetic of a ring."""

import time
from dataclasses import dataclass

import numpy as np

from vitft.data.augment import augment_pixels
from vitft.data.augmentation.settings import Augmentation
from vitft.hardware.device import micro_batch
from vitft.training.cost.estimate import Cost, cost, memory_bytes, stored_image
from vitft.training.setup import Prepared

_LATENCY_S = 20e-6  # of a message between two devices
_BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once; those of the first layers come last
_BACKWARD = 2 / 3  # of the arithmetic of a training pass


@dataclass(frozen=True)
class Cluster:
    """Devices like the one here, how fast each sends, in gigabits a second, and what one costs by the hour."""

    devices: int
    link_gbps: float = 100.0
    hourly_price: float | None = None


@dataclass(frozen=True)
class ClusterStep:
    """An optimizer step of one device, in seconds; `hidden_s` of its communication happens during the backward pass."""

    images: int
    compute_s: float
    communicate_s: float
    hidden_s: float
    optimizer_s: float
    input_s: float  # to prepare its images on the host, which happens during the step before
    idle: int = 0  # devices for which the batch has no image

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return max(self.compute_s + self.communicate_s - self.hidden_s + self.optimizer_s, self.input_s)

    @property
    def bottleneck(self) -> str:
        """What takes longest."""
        if self.idle:
            return f"too few images: {self.idle:,} devices have none; raise --batch-size"
        if self.input_s > self.compute_s + self.communicate_s - self.hidden_s + self.optimizer_s:
            return "images: the host cannot prepare them as fast"
        parts = {
            "computation": self.compute_s,
            "communication: a larger --batch-size, or a faster link, would help": self.communicate_s - self.hidden_s,
            "the optimizer": self.optimizer_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class ClusterPlan:
    """A run on a cluster: `efficiency` is the speed of a step, divided by devices times that of one device."""

    cluster: Cluster
    step: ClusterStep
    total_s: float
    efficiency: float
    memory_bytes: int | None  # of each device
    gradient_bytes: int

    @property
    def price(self) -> float | None:
        """Of all devices until the end of the run."""
        each = self.cluster.hourly_price
        return None if each is None else each * self.cluster.devices * self.total_s / 3600


def plan_for_cluster(
    prepared: Prepared, cluster: Cluster, alone: Cost, *, steps: int, decode_s: float, evaluate_s: float
) -> ClusterPlan:  # fmt: skip
    """Plan a run of so many `steps` that takes `decode_s` and `evaluate_s` on one device, whose cost is `alone`.

    The share of a device is measured here, as one device. Every process decodes all images.
    """
    config = prepared.config
    shared = prepared.with_settings(batch_size=-(-config.batch_size // cluster.devices))
    micro, share = micro_batch(shared.config), shared.config.batch_size
    each = alone if cluster.devices == 1 else cost(shared)
    trainable = sum(4 * weights.numel() for weights in prepared.loaded.model.parameters() if weights.requires_grad)
    compute_s, communicate_s = each.image_s * share, all_reduce_s(trainable, cluster)
    hidden_s = 0.0
    if config.device != "cpu":  # there, sending would take time from the cores that compute
        rest_s = communicate_s * min(1.0, _BUCKET / trainable)
        hidden_s = min(_BACKWARD * each.image_s * min(micro, share), communicate_s - rest_s)
    step = ClusterStep(share, compute_s, communicate_s, hidden_s, each.step_s, _input_s(shared),
                       idle=max(0, cluster.devices - config.batch_size))  # fmt: skip
    single_s = alone.image_s * config.batch_size + alone.step_s
    return ClusterPlan(
        cluster, step, decode_s + each.start_s + steps * step.seconds + evaluate_s / cluster.devices,
        single_s / (cluster.devices * step.seconds), memory_bytes(shared, micro), trainable,
    )  # fmt: skip


def all_reduce_s(size: int, cluster: Cluster) -> float:
    """Seconds to add up `size` bytes over all devices in a ring, each of which sends 2 (D - 1) / D of them.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
    """
    others = cluster.devices - 1
    return 2 * others / cluster.devices * 8 * size / (cluster.link_gbps * 1e9) + 2 * others * _LATENCY_S


def _input_s(prepared: Prepared) -> float:
    """Measure the seconds to augment a device's images on the host; 0 if the device does it, or is the host."""
    config, how = prepared.config, Augmentation.of(prepared.config)
    if config.device == "cpu" or not (how.kind == "crop" or how.operates):
        return 0.0
    count = min(config.batch_size, 64)
    images = stored_image(prepared)[None].expand(count, -1, -1, -1)
    started = time.perf_counter()
    augment_pixels(images, prepared.loaded.preprocess, how, 0, np.arange(count))
    return (time.perf_counter() - started) / count * config.batch_size
