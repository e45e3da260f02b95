"""What a run would do and cost, before it starts: `--dry-run`, and the warning of a long run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vitft.checkpoints import checkpoint as ckpt
from vitft.config.train import TrainConfig
from vitft.hardware.device import memory_guard, micro_batch, threads
from vitft.io import console
from vitft.io.console import duration, size
from vitft.io.paths import expanded
from vitft.training.autotune import tuned
from vitft.training.estimate import Cost, cost, decode_image_s, first_image_s, memory_bytes
from vitft.training.linear_probe import features_pay, passes
from vitft.training.optim import total_steps
from vitft.training.run_folder import folder_of
from vitft.training.setup import Prepared, prepare

LONG_S = 2 * 3600.0  # a run longer than this says so before it starts
Group = tuple[str, list[tuple[str, str]]]
"""A title, and names with their values."""


@dataclass(frozen=True)
class Plan:
    """A run's size and cost; time and memory are estimates from a probe of this machine."""

    prepared: Prepared
    steps: int
    steps_per_epoch: int
    trainable: int
    parameters: int
    train_s: float
    evaluate_s: float
    decode_s: float = 0.0
    memory_bytes: int | None = None  # of training; None where it cannot be said

    @property
    def total_s(self) -> float:
        """Decoding, training and evaluation together."""
        return self.decode_s + self.train_s + self.evaluate_s

    def groups(self) -> Iterator[Group]:
        """Titled groups of names and values, in reading order."""
        config, source, splits = self.prepared.config, self.prepared.source, self.prepared.splits
        labels = self.prepared.loaded.labels
        revision = f" at {source.revision[:12]}" if source.revision else ""
        yield (
            "Data",
            [
                ("data set", f"{config.dataset}{revision}"),
                ("classes", f"{len(labels)}: {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"),
                *((role, f"{len(split.rows):,} images of {split.source}") for role, split in splits.items()),
            ],
        )
        head = "new head" if self.prepared.loaded.new_head else "its own head"
        start = "new weights" if config.from_scratch else head
        memory = f"about {size(self.memory_bytes)}" if self.memory_bytes else "unknown for this architecture"
        parts = {"decoding": self.decode_s, "training": self.train_s, "evaluation": self.evaluate_s}
        listed = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items())
        yield (
            "Model",
            [
                ("model", f"{config.model}, {self.prepared.loaded.preprocess.size_text} px, {start}"),
                ("parameters", f"{self.parameters:,}, of which {self.trainable:,} are trained"),
            ],
        )
        yield (
            "Cost",
            [
                ("steps", f"{self.steps:,} of {config.batch_size} images, {self.steps_per_epoch:,} an epoch"),
                ("device", f"{config.device}, {config.precision}"),
                ("memory", memory),
                ("time", f"about {duration(self.total_s)}: {listed}"),
            ],
        )


def plan(config: TrainConfig, output: Path | None = None, overwrite: bool = False) -> list[Group]:
    """What a run would do, cost and write, by preparing it and probing the machine; nothing is written.

    Every image is opened, and none decoded. Raises UsageError where the run may not be written to `output`, DataError
    for an image that cannot be opened.
    """
    output = None if output is None else expanded(output)
    if output is not None:
        ckpt.check_free(output, overwrite=overwrite)
    prepared = prepare(config)
    prepared.check_headers()
    with memory_guard(config):
        prepared.config = tuned(prepared)
        with threads(prepared.config.threads):
            memory = memory_bytes(prepared, micro_batch(prepared.config))  # before the trial, which takes some itself
            images = sum(len(split.rows) for split in prepared.splits.values())
            decode_s = decode_image_s(prepared) * images  # at most: what is kept from an earlier run is read faster
            found = replace(_plan(prepared, cost(prepared)), decode_s=decode_s, memory_bytes=memory)
    folder = folder_of(prepared.config, prepared.source.name, output)
    place = f"{folder}, in place of the run there" if ckpt.is_run(folder) else str(folder)
    return [*found.groups(), ("Run", [("folder", place)]), ("Settings", _settings(prepared.config, config))]


def _settings(config: TrainConfig, given: TrainConfig) -> list[tuple[str, str]]:
    """The settings that are not the defaults: those given, and those chosen for this machine and data."""
    typed: list[str] = []
    chosen: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        if (value := getattr(config, name)) != field.default:
            (chosen if getattr(given, name) == field.default else typed).append(f"{name}: {value}")
    rest = "the defaults, as vitft train --help lists them; config.yaml in the run's folder will have all"
    listed = [("given", "\n".join(typed)), ("chosen", "\n".join(chosen)), ("others", rest)]
    return [(name, value) for name, value in listed if value]


def warn_if_long(prepared: Prepared, processes: int = 1) -> None:
    """Say that a run will take hours, before it does, and what would be cheaper."""
    image_s = first_image_s(prepared)
    # Alone an image takes longer than in a batch, and longest the first: most runs are cleared by this one.
    if _plan(prepared, Cost(image_s, 0.0, image_s)).total_s / processes <= LONG_S:
        return
    found = _plan(prepared, cost(prepared))
    if found.total_s / processes > LONG_S:
        console.warn(advice(found, processes))


def _plan(prepared: Prepared, each: Cost) -> Plan:
    config, model = prepared.config, prepared.loaded.model
    splits = {role: len(split.rows) for role, split in prepared.splits.items()}
    steps_per_epoch = -(-splits["train"] // config.batch_size)
    steps = total_steps(config, steps_per_epoch)
    validations = -(-steps // (config.eval_every or steps_per_epoch))
    evaluated = splits.get("validation", 0) * validations + splits.get("test", 0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train_s = each.start_s + each.image_s * steps / steps_per_epoch * splits["train"] + each.step_s * steps
    if features_pay(config, model, steps, splits["train"]):  # then the head costs next to nothing
        evaluated = splits.get("validation", 0) + splits.get("test", 0)
        train_s = each.evaluate_image_s * splits["train"] * passes(config)
    return Plan(
        prepared, steps, steps_per_epoch, trainable, sum(p.numel() for p in model.parameters()),
        train_s=train_s,
        evaluate_s=each.evaluate_image_s * evaluated,
    )  # fmt: skip


def advice(plan: Plan, processes: int = 1) -> str:
    """The warning of a long run, naming cheaper ways."""
    config, images = plan.prepared.config, len(plan.prepared.splits["train"].rows)
    probe = features_pay(config, plan.prepared.loaded.model, plan.steps, images)  # its epochs cost nothing
    ways = ["--max-train-samples 2000"] if images > 2000 else ["--epochs 1"] if config.epochs > 1 and not probe else []
    ways += ["--augment none"] if probe and config.augment == "flip" else []
    ways += ["--freeze backbone"] if config.freeze == "none" and not config.from_scratch else []
    side = config.image_size or 0
    ways += [f"--image-size {side // 2}"] if side >= 128 else []
    ways += ["--model vit-micro"] if config.model != "vit-micro" else []
    took = duration(plan.total_s / processes)
    return f"this run will take about {took} on this {config.device}; cheaper: {', or '.join(ways)}."
