"""What a run would do and cost, before it starts: `--dry-run`, and the warning of a long run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vitft.config import TrainConfig
from vitft.console import duration, size
from vitft.errors import VitftError
from vitft.evaluation import autocast
from vitft.models import set_training
from vitft.preparation import Prepared, prepare
from vitft.spec import spec_from_config
from vitft.spec import total as stage_total
from vitft.trainer import total_steps

LONG_S = 2 * 3600.0  # a run longer than this says so before it starts


@dataclass(frozen=True)
class Plan:
    """A run's size and cost; time and memory are estimates from a probe of this machine."""

    prepared: Prepared
    steps: int
    trainable: int
    parameters: int
    memory_bytes: int | None  # None where the architecture has no stage table
    train_s: float
    evaluate_s: float

    @property
    def total_s(self) -> float:
        """Training and evaluation together."""
        return self.train_s + self.evaluate_s

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values, in reading order."""
        config = self.prepared.config
        splits = self.prepared.splits
        yield "data set", f"{config.dataset}" + (f" at {self.prepared.source.revision[:12]}" if self.prepared.source.revision else "")  # fmt: skip
        for role, split in splits.items():
            yield role, f"{len(split.rows):,} images of {split.source}"
        labels = self.prepared.source.labels
        yield "classes", f"{len(labels)}: {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"
        yield "model", f"{config.model}{', new weights' if config.from_scratch else ''}, {config.image_size} px, {'new' if self.prepared.loaded.new_head else 'its own'} head"  # fmt: skip
        yield "parameters", f"{self.parameters:,}, of which {self.trainable:,} are trained"
        yield "steps", f"{self.steps:,} of {config.batch_size} images"
        yield "device", f"{config.device}, {config.precision}"
        yield "memory", f"about {size(self.memory_bytes)}" if self.memory_bytes else "not known for this architecture"
        yield "time", f"about {duration(self.train_s)} of training and {duration(self.evaluate_s)} of evaluation"
        for name, value in config.model_dump(exclude_none=True).items():
            if name not in ("dataset", "model", "image_size", "device", "precision"):
                yield name, str(value)


def plan(config: TrainConfig) -> Plan:
    """Prepare a run and probe the machine with its model; nothing is decoded or written."""
    prepared = prepare(config)
    config, model = prepared.config, prepared.loaded.model
    splits = {role: len(split.rows) for role, split in prepared.splits.items()}
    steps_per_epoch = -(-splits["train"] // config.batch_size)
    steps = total_steps(config, steps_per_epoch)
    train_image_s, evaluate_image_s = probe(prepared)
    validations = -(-steps // (config.eval_every or steps_per_epoch))
    evaluated = splits.get("validation", 0) * validations + splits.get("test", 0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Plan(
        prepared, steps, trainable, sum(p.numel() for p in model.parameters()), _memory(prepared, trainable),
        train_image_s * min(steps * config.batch_size, steps / steps_per_epoch * splits["train"]),
        evaluate_image_s * evaluated,
    )  # fmt: skip


def probe(prepared: Prepared) -> tuple[float, float]:
    """Seconds an image takes in training and in evaluation, by doing so for about a second."""
    config, how = prepared.config, prepared.loaded.preprocess
    model = prepared.loaded.model.to(config.device)
    state = torch.get_rng_state()

    def training(count: int) -> float:
        set_training(model, frozen_backbone=config.freeze == "backbone")
        pixels = torch.randn(count, 3, how.height, how.width, device=config.device)
        labels = torch.zeros(count, dtype=torch.long, device=config.device)
        started = time.perf_counter()
        with autocast(config.device, config.precision):
            F.cross_entropy(model(pixel_values=pixels).logits.float(), labels).backward()
        _wait(config.device)
        return (time.perf_counter() - started) / count

    def evaluating(count: int) -> float:
        model.eval()
        pixels = torch.randn(count, 3, how.height, how.width, device=config.device)
        started = time.perf_counter()
        with torch.inference_mode(), autocast(config.device, config.precision):
            model(pixel_values=pixels)
        _wait(config.device)
        return (time.perf_counter() - started) / count

    share = min(config.batch_size, config.micro_batch_size or config.batch_size)
    training(1)  # the first call pays for threads and kernels
    count = max(1, min(share, int(1 / training(1))))
    result = min(training(count) for _ in range(2)), evaluating(count)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    return result


def advice(plan: Plan) -> str:
    """The warning of a long run, naming cheaper ways."""
    config = plan.prepared.config
    ways = ["--max-train-samples 2000"]
    ways += ["--freeze backbone"] if config.freeze == "none" and not config.from_scratch else []
    ways += [f"--image-size {config.image_size // 2}"] if (config.image_size or 0) >= 128 else []
    ways += ["--model vit-micro"] if config.model != "vit-micro" else []
    return f"this run will take about {duration(plan.total_s)} on this {config.device}; cheaper: {', or '.join(ways)}."


def _memory(prepared: Prepared, trainable: int) -> int | None:
    """Weights, gradients, two moments, kept activations and the decoded images, in bytes."""
    config, model = prepared.config, prepared.loaded.model
    try:
        spec = spec_from_config(model.config.to_dict() | {"num_labels": model.config.num_labels})
    except VitftError:
        return None
    micro = min(config.batch_size, config.micro_batch_size or config.batch_size)
    moments = {"adamw": 2, "adam": 2, "sgd": 1}[config.optimizer]
    weights = 4 * sum(p.numel() for p in model.parameters()) + 4 * trainable * (1 + moments)
    side = prepared.loaded.preprocess.height
    images = sum(len(split.rows) for split in prepared.splits.values()) * side * side * 3
    return int(weights + stage_total(spec, micro).activation_bytes + min(images, 2_000_000_000))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def long_run(plan: Plan) -> bool:
    """Whether the run is long enough to say so before it starts."""
    return plan.total_s > LONG_S


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as rows, for tests and programs."""
    return dict(plan.rows())
