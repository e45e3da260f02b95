"""What a run would do and cost, before it starts: `--dry-run`, and the warning about a long run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitft.checkpoints import checkpoint as ckpt
from vitft.config.train import TrainConfig, usual_lr
from vitft.errors import UsageError
from vitft.hardware.device import memory_guard, micro_batch, resolve_auto, threads
from vitft.io import console
from vitft.io.console import duration
from vitft.io.paths import expanded
from vitft.models.head_init import images_for_head, starts_from_features
from vitft.models.load import shape_of
from vitft.training.cost.autotune import autotuned
from vitft.training.cost.cluster import Cluster, ClusterPlan, memory_each, plan_for_cluster
from vitft.training.cost.estimate import Cost, Decoding, cost, decode_image_s, first_image_s, memory_bytes
from vitft.training.linear_probe import features_pay, passes
from vitft.training.optim import total_steps
from vitft.training.run_folder import folder_of
from vitft.training.setup import Prepared, advise, prepare

LONG_S = 2 * 3600.0  # a run that takes longer gets a warning before it starts


@dataclass(frozen=True)
class Size:
    """How large a run is. Seconds are estimated from a trial on this machine."""

    steps: int
    steps_per_epoch: int
    train_s: float
    evaluate_s: float


@dataclass(frozen=True)
class Plan:
    """What a run would do, cost and write. Times and memory are estimated from a trial on this machine."""

    prepared: Prepared
    size: Size
    parameters: int
    trainable: int
    decode_s: float  # of what is decoded before the first step and the evaluations
    memory_bytes: int | None  # None if it cannot be estimated for this architecture
    folder: Path
    replaces: bool  # whether there is a run in the folder, which would be replaced
    chosen: dict[str, object]  # settings that were chosen for this machine and data
    given: dict[str, object]  # settings that differ from the defaults otherwise
    cluster: ClusterPlan | None = None

    @property
    def total_s(self) -> float:
        """Seconds of decoding, training and evaluation."""
        return self.decode_s + self.size.train_s + self.size.evaluate_s


def plan(
    config: TrainConfig, output: Path | None = None, overwrite: bool = False, cluster: Cluster | None = None
) -> Plan:  # fmt: skip
    """Plan a run by preparing it and trying parts of it on this machine, also for a `cluster`. Nothing is written.

    Every image is opened, and none decoded. Raises UsageError if the run may not be written to `output`, and DataError
    for an image that cannot be opened.
    """
    output = None if output is None else expanded(output)
    if output is not None:
        ckpt.check_free(output, overwrite=overwrite)
    prepared = prepare(resolve_auto(config)).check_headers()
    advise(prepared)
    with memory_guard(prepared.config):
        prepared = autotuned(prepared)
        with threads(prepared.config.threads):
            memory = memory_bytes(prepared, micro_batch(prepared.config))  # before the trial, which uses memory, too
            each_memory = None if cluster is None else memory_each(prepared, cluster)
            decoding = _decoding(prepared)
            each = cost(prepared)
            size = size_of(prepared, each, decoding.image_s)
            many = None
            images = len(prepared.splits["train"].rows)
            if cluster is not None and features_pay(prepared.config, prepared.loaded.model, size.steps, images):
                raise UsageError(
                    "--devices plans steps, and a linear probe spends its time on reading each image once, which "
                    "devices share evenly; leave it out."
                )
            if cluster is not None:
                many = plan_for_cluster(
                    prepared,
                    cluster,
                    each,
                    steps=size.steps,
                    decoding=decoding,
                    evaluate_s=size.evaluate_s,
                    memory=each_memory,
                )
    folder = folder_of(prepared.config, prepared.source.name, output)
    weights = [(parameter.numel(), parameter.requires_grad) for parameter in prepared.loaded.model.parameters()]
    changed = {
        name: value
        for name, field in TrainConfig.model_fields.items()
        if (value := getattr(prepared.config, name)) != field.default
    }
    chosen = {name for name in changed if getattr(config, name) == TrainConfig.model_fields[name].default}
    usual = usual_lr(prepared.config, prepared.weights)  # the default depends on other settings, and on the model
    chosen |= {"lr"} if prepared.config.lr == usual else set()
    return Plan(
        prepared, size, sum(count for count, _ in weights), sum(count for count, trained in weights if trained),
        decoding.before_s, memory, folder, ckpt.is_run(folder),
        chosen={name: value for name, value in changed.items() if name in chosen},
        given={name: value for name, value in changed.items() if name not in chosen}, cluster=many,
    )  # fmt: skip


def warn_if_long(prepared: Prepared, processes: int = 1) -> None:
    """Warn if a run will take hours, and name cheaper ways."""
    # A model that several processes share may be too large to try on one.
    if prepared.config.parallel == "fsdp" and processes > 1:
        return
    image_s = first_image_s(prepared)
    # An image takes longer alone than in a batch, and the first one longest: this clears most runs.
    quick = size_of(prepared, Cost(image_s, 0.0, image_s))
    if (quick.train_s + quick.evaluate_s) / processes <= LONG_S:
        return
    size = size_of(prepared, cost(prepared, processes))
    took_s = (size.train_s + size.evaluate_s) / processes
    if took_s > LONG_S:
        console.warn(
            f"this run will take about {duration(took_s)} on this {prepared.config.device}; "
            f"cheaper: {', or '.join(_cheaper(prepared, size.steps))}."
        )


def _decoding(prepared: Prepared) -> Decoding:
    """What decoding takes: an upper bound, for cached pixels are read faster."""
    image_s, later = decode_image_s(prepared), prepared.decodes_later
    before = sum(len(prepared.splits[role].rows) for role in prepared.used if role != "train" or not later)
    return Decoding(image_s * before, image_s if later else 0.0)


def size_of(prepared: Prepared, each: Cost, decode_image_s: float = 0.0) -> Size:
    """The steps and seconds of a run, by what an image and a step take, and to decode an image in the first epoch."""
    config, model = prepared.config, prepared.loaded.model
    splits = {role: len(prepared.splits[role].rows) for role in prepared.used}
    steps_per_epoch = -(-splits["train"] // config.batch_size)
    steps = total_steps(config, steps_per_epoch)
    validations = -(-steps // (config.eval_every or steps_per_epoch))
    evaluated = splits.get("validation", 0) * validations + splits.get("test", 0)
    images = steps / steps_per_epoch * splits["train"]
    device_s, host_s = each.image_s * images + each.step_s * steps, each.host_image_s * images
    first = min(1.0, steps_per_epoch / steps)  # the part of the run in which images are decoded
    decode_s = decode_image_s * min(images, splits["train"])
    if config.device == "cpu":
        train_s = each.start_s + device_s + decode_s
    else:  # the host decodes and augments while the device computes
        train_s = each.start_s + max(first * device_s, first * host_s + decode_s) + (1 - first) * max(device_s, host_s)
    if features_pay(config, model, steps, splits["train"]):  # the head itself costs almost nothing
        evaluated = splits.get("validation", 0) + splits.get("test", 0)
        train_s = (each.evaluate_image_s * passes(config) + decode_image_s) * splits["train"]
    elif starts_from_features(config, model, new_head=prepared.loaded.new_head):
        seen = steps * config.batch_size
        train_s += each.evaluate_image_s * images_for_head(splits["train"], len(prepared.loaded.labels), seen)
    return Size(steps, steps_per_epoch, train_s, each.evaluate_image_s * evaluated)


def _cheaper(prepared: Prepared, steps: int) -> list[str]:
    config, images = prepared.config, len(prepared.splits["train"].rows)
    probe = features_pay(config, prepared.loaded.model, steps, images)  # its epochs cost almost nothing
    ways = ["--max-train-samples 2000"] if images > 2000 else ["--epochs 1"] if config.epochs > 1 and not probe else []
    ways += ["--augment none"] if probe and config.augment == "flip" else []
    ways += ["--freeze backbone"] if config.freeze == "none" and _allows(config, freeze="backbone") else []
    if (spec := shape_of(prepared.loaded.model)) is not None and spec.image_height >= 128:
        ways += [f"--image-size {spec.image_height // 2 // spec.patch_height * spec.patch_height}"]
    return ways + (["--model vit-micro"] if config.model != "vit-micro" else [])


def _allows(config: TrainConfig, **changes: Any) -> bool:
    """Whether the other settings allow these."""
    try:
        TrainConfig(**config.model_dump() | changes)
    except UsageError:
        return False
    return True
