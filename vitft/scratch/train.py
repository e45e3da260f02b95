"""Training: batches in random order, one optimizer step each, and the test accuracy after each epoch."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes

from vitft.scratch.augment import Pixels, crop, flip, normalize
from vitft.scratch.heads import cross_entropy, cross_entropy_backward
from vitft.scratch.optim import SGD, Adam, lr_at
from vitft.scratch.tensors import Array
from vitft.scratch.vit import (
    ViT,
    dropout_masks,
    from_named_arrays,
    init_weights,
    map_arrays,
    named_arrays,
    vit,
    vit_backward,
)
from vitft.spec import ViTSpec, stages

Labels = NDArray[np.integer[Any]]
Result = TypeVar("Result")
CACHE_NUMBERS = 2**19  # two megabytes of float32: about the cache that each core has for itself


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The training settings. `decay_*` and `warmup_steps` are those of the learning rate."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: Literal["constant", "step", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_epoch: int = 0
    decay_factor: float = 0.1
    label_smoothing: float = 0.0
    dropout: float = 0.0
    crop_border: int = 0
    flip: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """uint8 pixels (images, C, H, W) and their labels (images)."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class Epoch:
    """Mean training loss and accuracy during an epoch, and the test accuracy after it."""

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float


class Engine(Protocol):
    """Computes training steps: with the NumPy chapters, or with torch."""

    def step(self, images: Array, labels: Labels, lr: float, masks: list[Array] | None) -> tuple[float, int]:
        """Update the weights once; return the batch's mean loss and number of correct predictions before the update."""

    def logits(self, images: Array) -> Array:
        """Logits (B, classes), without dropout."""

    def weights(self) -> ViT:
        """The current weights."""


class NumpyEngine:
    """The NumPy chapters with an optimizer.

    A batch is split into micro-batches, small enough to stay in a core's cache, which two threads work through in
    parallel; NumPy releases Python's global lock while it computes. Micro-batches and threads are the same on every
    machine, because the order of a sum changes its last digits.
    """

    def __init__(self, w: ViT, spec: ViTSpec, plan: Plan) -> None:
        self.w, self.spec, self.plan = map_arrays(w, np.copy), spec, plan
        self.arrays = dict(named_arrays(self.w))
        decay = plan.weight_decay if plan.optimizer == "adamw" else 0.0
        self.optimizer = SGD(plan.momentum) if plan.optimizer == "sgd" else Adam(decay)
        self.threads = ThreadPoolExecutor(2)

    def step(self, images: Array, labels: Labels, lr: float, masks: list[Array] | None) -> tuple[float, int]:
        """Forward, backward, update."""

        def learn(part: slice) -> tuple[float, int, dict[str, Array]]:
            logits, saved = vit(images[part], self.w, self.spec, masks and [mask[part] for mask in masks])
            loss, saved_loss = cross_entropy(logits, labels[part], self.plan.label_smoothing)
            fraction = len(logits) / len(images)  # its weight in the mean over the batch
            _, d_w = vit_backward(fraction * cross_entropy_backward(saved_loss), saved, self.w, self.spec)
            return fraction * loss, int((logits.argmax(axis=1) == labels[part]).sum()), dict(named_arrays(d_w))

        losses, correct, gradients = zip(*self._map_micro_batches(learn, len(images)), strict=True)
        self.optimizer.update(self.arrays, {name: sum(d[name] for d in gradients) for name in self.arrays}, lr)
        return sum(losses), sum(correct)

    def logits(self, images: Array) -> Array:
        """Logits (B, classes), without dropout."""
        return np.concatenate(
            list(self._map_micro_batches(lambda part: vit(images[part], self.w, self.spec)[0], len(images)))
        )

    def _map_micro_batches(self, function: Callable[[slice], Result], images: int) -> Iterable[Result]:
        """`function` of every micro-batch, in order; a single one needs no second thread."""
        parts = micro_batches(images, self.spec)
        return self.threads.map(function, parts) if len(parts) > 1 else map(function, parts)

    def weights(self) -> ViT:
        """The current weights."""
        return self.w


def micro_batches(count: int, spec: ViTSpec) -> list[slice]:
    """Slices that cover `count` images. The largest stage of each has at most CACHE_NUMBERS numbers, or one image."""
    size = max(1, CACHE_NUMBERS // max(prod(stage.output) for stage in stages(spec)))
    return [slice(start, start + size) for start in range(0, count, size)]


def batch(train: Images, step: int, spec: ViTSpec, plan: Plan) -> tuple[Array, Labels, list[Array] | None]:
    """Images, labels and dropout masks of a step: a function of (seed, step), so every engine gets the same.

    Every epoch has its own order; its last batch may be smaller.
    """
    epoch, number = divmod(step, steps_per_epoch(train, plan))
    order = epoch_order(plan.seed, epoch, len(train.labels))
    chosen = order[number * plan.batch_size : (number + 1) * plan.batch_size]
    rng = np.random.default_rng([plan.seed, epoch, number])
    pixels = train.pixels[chosen]
    if plan.crop_border:
        pixels = crop(pixels, plan.crop_border, rng)
    if plan.flip:
        pixels = flip(pixels, rng)
    masks = dropout_masks(spec, len(chosen), plan.dropout, rng, plan.dtype)
    return normalize(pixels, plan.mean, plan.std, plan.dtype), train.labels[chosen], masks


@lru_cache(maxsize=1)  # all steps of an epoch share one order
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the training images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def steps_per_epoch(train: Images, plan: Plan) -> int:
    """Number of batches that cover every training image once."""
    return -(-len(train.labels) // plan.batch_size)


def initial_weights(spec: ViTSpec, plan: Plan) -> ViT:
    """The weights that training starts from, a function of the seed."""
    return init_weights(spec, np.random.default_rng([plan.seed]), plan.dtype)


def fit(
    engine: Engine, train: Images, test: Images, spec: ViTSpec, plan: Plan,
    on_step: Callable[[int, float, float], None] = lambda step, loss, lr: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:  # fmt: skip
    """Train for all epochs of the plan, calling `on_step` with step, loss and learning rate, and `on_epoch`."""
    per_epoch = steps_per_epoch(train, plan)
    total, decay_step = plan.epochs * per_epoch, plan.decay_epoch * per_epoch
    history = []
    for epoch in range(plan.epochs):
        total_loss, total_correct = 0.0, 0
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            images, labels, masks = batch(train, step, spec, plan)
            lr = lr_at(step, plan.lr, total, plan.warmup_steps, plan.schedule, decay_step, plan.decay_factor)
            loss, correct = engine.step(images, labels, lr, masks)
            total_loss += loss * len(labels)
            total_correct += correct
            on_step(step, loss, lr)
        count = len(train.labels)
        history.append(Epoch(epoch + 1, total_loss / count, total_correct / count, accuracy(engine, test, plan)))
        on_epoch(history[-1])
    return history


def accuracy(engine: Engine, images: Images, plan: Plan, batch_size: int = 250) -> float:
    """Fraction of the images whose largest logit is that of their label."""
    correct = 0
    for start in range(0, len(images.labels), batch_size):
        part = slice(start, start + batch_size)
        logits = engine.logits(normalize(images.pixels[part], plan.mean, plan.std, plan.dtype))
        correct += int((logits.argmax(axis=1) == images.labels[part]).sum())
    return correct / len(images.labels)


def save(path: Path, w: ViT) -> None:
    """Write all weights to a safetensors file, by name."""
    path.write_bytes(safetensors_bytes({name: np.ascontiguousarray(array) for name, array in named_arrays(w)}))


def load(path: Path, spec: ViTSpec) -> ViT:
    """Read weights that `save` wrote. Raises ValueError if names or shapes do not fit the spec."""
    return from_named_arrays(load_file(path), spec)
