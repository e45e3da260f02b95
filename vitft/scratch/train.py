"""Training: batches in random order, a step for each, a score after each epoch."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vitft.scratch.augment import Pixels, crop, flip, normalise
from vitft.scratch.heads import cross_entropy, cross_entropy_backward
from vitft.scratch.optim import SGD, Adam, lr_at
from vitft.scratch.tensors import Array
from vitft.scratch.vit import ViT, dropout_masks, filled, mapped, named, new_weights, vit, vit_backward
from vitft.spec import ViTSpec, stages

Labels = NDArray[np.integer[Any]]
Found = TypeVar("Found")
PIECE = 2**19  # numbers: two megabytes of float32, about the cache that a core has to itself


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a network is trained. Decay and warm-up are of the learning rate."""

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
    """What an epoch came to: mean training loss and accuracy while it ran, accuracy on the test images after."""

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float


class Engine(Protocol):
    """What trains: the NumPy chapters, or the torch one."""

    def step(self, images: Array, labels: Labels, lr: float, masks: list[Array] | None) -> tuple[float, int]:
        """Change the weights by one step; the batch's mean loss and correct answers before it."""

    def logits(self, images: Array) -> Array:
        """(B, classes), without dropout."""

    def weights(self) -> ViT:
        """The weights as they are now."""


class NumpyEngine:
    """The chapters, and an optimizer.

    A batch is computed piece by piece, each small enough to stay in a core's cache, by two threads in turn:
    NumPy computes outside of Python's lock. Pieces and threads are the same on every machine, for the order
    of a sum changes its last digits.
    """

    def __init__(self, w: ViT, spec: ViTSpec, plan: Plan) -> None:
        self.w, self.spec, self.plan = mapped(w, np.copy), spec, plan
        self.named = dict(named(self.w))
        decay = plan.weight_decay if plan.optimizer == "adamw" else 0.0
        self.optimizer = SGD(plan.momentum) if plan.optimizer == "sgd" else Adam(decay)
        self.threads = ThreadPoolExecutor(2)

    def step(self, images: Array, labels: Labels, lr: float, masks: list[Array] | None) -> tuple[float, int]:
        """Forward, backward, update."""

        def learn(piece: slice) -> tuple[float, int, dict[str, Array]]:
            logits, saved = vit(images[piece], self.w, self.spec, masks and [mask[piece] for mask in masks])
            loss, saved_loss = cross_entropy(logits, labels[piece], self.plan.label_smoothing)
            share = len(logits) / len(images)  # of the piece in the mean of the batch
            _, d_w = vit_backward(share * cross_entropy_backward(saved_loss), saved, self.w, self.spec)
            return share * loss, int((logits.argmax(axis=1) == labels[piece]).sum()), dict(named(d_w))

        losses, correct, gradients = zip(*self._each(learn, len(images)), strict=True)
        self.optimizer.update(self.named, {name: sum(d[name] for d in gradients) for name in self.named}, lr)
        return sum(losses), sum(correct)

    def logits(self, images: Array) -> Array:
        """(B, classes), without dropout."""
        return np.concatenate(list(self._each(lambda piece: vit(images[piece], self.w, self.spec)[0], len(images))))

    def _each(self, function: Callable[[slice], Found], images: int) -> Iterable[Found]:
        """`function` of every piece, in order; a single piece needs no second thread."""
        every = pieces(images, self.spec)
        return self.threads.map(function, every) if len(every) > 1 else map(function, every)

    def weights(self) -> ViT:
        """The weights as they are now."""
        return self.w


def pieces(count: int, spec: ViTSpec) -> list[slice]:
    """Slices that hold each of `count` images once, their largest stage at most PIECE numbers (or one image's)."""
    size = max(1, PIECE // max(prod(stage.output) for stage in stages(spec)))
    return [slice(start, start + size) for start in range(0, count, size)]


def batch(train: Images, step: int, spec: ViTSpec, plan: Plan) -> tuple[Array, Labels, list[Array] | None]:
    """Images, labels and dropout masks of a step: a function of (seed, step), so any engine sees the same.

    Every epoch has an order of its own; its last batch may be smaller.
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
    return normalise(pixels, plan.mean, plan.std, plan.dtype), train.labels[chosen], masks


@lru_cache(maxsize=1)  # a step's answer serves the whole epoch
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order in which an epoch sees the training images."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def steps_per_epoch(train: Images, plan: Plan) -> int:
    """Batches that hold every training image once."""
    return -(-len(train.labels) // plan.batch_size)


def new_engine_weights(spec: ViTSpec, plan: Plan) -> ViT:
    """The weights that a plan begins with."""
    return new_weights(spec, np.random.default_rng([plan.seed]), plan.dtype)


def fit(
    engine: Engine, train: Images, test: Images, spec: ViTSpec, plan: Plan,
    seen: Callable[[int, float, float], None] = lambda step, loss, lr: None,
    done: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:  # fmt: skip
    """All epochs of a plan. `seen` is called with step, loss and rate after each step, `done` after each epoch."""
    per_epoch = steps_per_epoch(train, plan)
    total, decay_step = plan.epochs * per_epoch, plan.decay_epoch * per_epoch
    history = []
    for epoch in range(plan.epochs):
        losses, correct = 0.0, 0
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            images, labels, masks = batch(train, step, spec, plan)
            lr = lr_at(step, plan.lr, total, plan.warmup_steps, plan.schedule, decay_step, plan.decay_factor)
            loss, right = engine.step(images, labels, lr, masks)
            losses += loss * len(labels)
            correct += right
            seen(step, loss, lr)
        count = len(train.labels)
        history.append(Epoch(epoch + 1, losses / count, correct / count, accuracy(engine, test, plan)))
        done(history[-1])
    return history


def accuracy(engine: Engine, images: Images, plan: Plan, batch_size: int = 250) -> float:
    """Share of the images whose largest logit is that of their label."""
    correct = 0
    for start in range(0, len(images.labels), batch_size):
        part = slice(start, start + batch_size)
        logits = engine.logits(normalise(images.pixels[part], plan.mean, plan.std, plan.dtype))
        correct += int((logits.argmax(axis=1) == images.labels[part]).sum())
    return correct / len(images.labels)


def save(path: Path, w: ViT) -> None:
    """Write all weights to a safetensors file, under their paths."""
    save_file({name: np.ascontiguousarray(array) for name, array in named(w)}, path)


def load(path: Path, spec: ViTSpec) -> ViT:
    """Read what `save` wrote. Raises ValueError where names or shapes are not those of the spec."""
    return filled(load_file(path), spec)
