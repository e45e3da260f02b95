"""What a run would take on many devices like this one: from a step measured here, and the arithmetic of a ring."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitft.hardware.device import micro_batch
from vitft.io.console import counted
from vitft.training.cost.estimate import Cost, Decoding, cost, memory_bytes
from vitft.training.setup import Prepared
from vitft.training.sharding import part_bytes

_LATENCY_S = 20e-6  # of a message between two devices
_BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once; those of the first layers come last
_PER_MACHINE = 8  # devices, whose processes share what they decode
_BACKWARD = 2 / 3  # of the arithmetic of a training pass


@dataclass(frozen=True)
class Cluster:
    """Devices like the one here, how fast each sends, in gigabits a second, and what one costs by the hour."""

    devices: int
    link_gbps: float = 100.0
    hourly_price: float | None = None


@dataclass(frozen=True)
class ClusterStep:
    """An optimizer step of one device, in seconds; `hidden_s` of its communication happens during the backward pass.

    A GPU's host augments the next images while the GPU computes, and decodes them if that was not done before. A CPU
    does all that itself, and augmenting is in `compute_s`.
    """

    images: int
    compute_s: float
    communicate_s: float
    hidden_s: float
    optimizer_s: float
    input_s: float = 0.0  # to augment its images, beside the device
    decode_s: float = 0.0  # to decode its images, if all are new
    beside: bool = True  # whether the host works beside the device
    idle: int = 0  # devices for which the batch has no image

    @property
    def device_s(self) -> float:
        """How long it takes if the images are there."""
        return self.compute_s + self.communicate_s - self.hidden_s + self.optimizer_s

    def seconds_with(self, new: float) -> float:
        """How long it takes if this part of its images has not been decoded before, 0 to 1."""
        host_s = self.input_s + new * self.decode_s
        return max(self.device_s, host_s) if self.beside else self.device_s + host_s

    @property
    def seconds(self) -> float:
        """How long it takes once all images are decoded."""
        return self.seconds_with(0.0)

    @property
    def bottleneck(self) -> str:
        """What takes longest."""
        if self.idle:
            return f"too few images: none for {counted(self.idle, 'device')}; raise --batch-size"
        if self.input_s > self.device_s:
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
    exchanged_bytes: int  # gradients or, with `fsdp`, weights
    shards: bool = False  # whether with `fsdp`

    @property
    def price(self) -> float | None:
        """Of all devices until the end of the run."""
        each = self.cluster.hourly_price
        return None if each is None else each * self.cluster.devices * self.total_s / 3600


def memory_each(prepared: Prepared, cluster: Cluster) -> int | None:
    """Estimate the peak memory of each device, or None: see `memory_bytes`. A trial would leave some in use."""
    shared = _share(prepared, cluster)
    return memory_bytes(shared, micro_batch(shared.config), cluster.devices)


def _share(prepared: Prepared, cluster: Cluster) -> Prepared:
    """What one of the devices does."""
    return prepared.with_settings(batch_size=-(-prepared.config.batch_size // cluster.devices))


def plan_for_cluster(
    prepared: Prepared, cluster: Cluster, alone: Cost, *, steps: int, decoding: Decoding, evaluate_s: float,
    memory: int | None,
) -> ClusterPlan:  # fmt: skip
    """Plan a run of so many `steps`, whose evaluations take one device `evaluate_s`, and which costs it `alone`.

    The share of a device is measured here, as one device; `memory` is what `memory_each` said before any trial.
    """
    config, model = prepared.config, prepared.loaded.model
    devices, shards = cluster.devices, config.parallel == "fsdp" and cluster.devices > 1
    shared = _share(prepared, cluster)
    micro, share = micro_batch(shared.config), shared.config.batch_size
    each = alone if devices == 1 else cost(shared)
    parts = part_bytes(model, config.precision)
    trainable = sum(trained for _, trained in parts)
    compute_s = each.image_s * share
    if shards:
        communicate_s, last_s = sharded_s(parts, -(-share // micro), cluster), sharded_s([max(parts)], 1, cluster)
        overlaps_s = compute_s
    else:
        communicate_s = all_reduce_s(trainable, cluster)
        last_s = communicate_s * min(1.0, _BUCKET / trainable)
        overlaps_s = _BACKWARD * each.image_s * min(micro, share)
    beside = config.device != "cpu"
    # On a CPU, sending would take time from the cores that compute.
    hidden_s = min(overlaps_s, max(0.0, communicate_s - last_s)) if beside else 0.0
    step = ClusterStep(
        share, compute_s, communicate_s, hidden_s, each.step_s / (devices if shards else 1),
        each.host_image_s * share, decoding.image_s * share, beside, idle=max(0, devices - config.batch_size),
    )  # fmt: skip
    per_epoch = -(-len(prepared.splits["train"].rows) // config.batch_size)
    train_s = each.start_s + steps_s(step, steps, per_epoch, -(-devices // _PER_MACHINE))
    single = ClusterStep(
        config.batch_size, alone.image_s * config.batch_size, 0.0, 0.0, alone.step_s,
        alone.host_image_s * config.batch_size, beside=beside,
    )  # fmt: skip
    return ClusterPlan(
        cluster, step, decoding.before_s + train_s + evaluate_s / devices,
        single.seconds / (devices * step.seconds), memory,
        sum(weights for weights, _ in parts) if shards else trainable, shards,
    )  # fmt: skip


def steps_s(step: ClusterStep, steps: int, per_epoch: int, machines: int) -> float:
    """Seconds of so many steps. Of M, each decodes what it has not seen: (1 - 1/M)^e of its images in epoch e."""
    if not step.decode_s:
        return steps * step.seconds
    epochs = range(-(-steps // per_epoch))
    counts = (min(per_epoch, steps - epoch * per_epoch) for epoch in epochs)
    return sum(n * step.seconds_with((1 - 1 / machines) ** epoch) for epoch, n in zip(epochs, counts, strict=True))


def sharded_s(parts: Sequence[tuple[int, int]], passes: int, cluster: Cluster) -> float:
    """Seconds to gather the weights of each part twice and to add up its gradients once, in so many passes of FSDP.

    `parts` has bytes of weights, and of those that are trained. Each of the three is half an `all_reduce_s`
    (Rajbhandari et al. 2020, "ZeRO", section 7).
    """
    return passes * sum(all_reduce_s(all_, cluster) + all_reduce_s(trained, cluster) / 2 for all_, trained in parts)


def all_reduce_s(size: int, cluster: Cluster) -> float:
    """Seconds to add up `size` bytes over all devices in a ring, each of which sends 2 (D - 1) / D of them.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
    """
    others = cluster.devices - 1
    return 2 * others / cluster.devices * 8 * size / (cluster.link_gbps * 1e9) + 2 * others * _LATENCY_S
