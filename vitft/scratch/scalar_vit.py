"""A whole Vision Transformer of 780 Scalars, which learns its task in two seconds of plain Python.

There are no arrays: every weight is a Scalar, so is every number computed from it, and calling `backward` on the
loss gives all gradients. The architecture follows Dosovitskiy et al. 2020, eq. 1-4, and computes exactly what
Transformers' ViT does: pre-norm blocks and the exact GELU.

The task: which half of a noisy 6x6 image is bright, the top, bottom, left or right one? A patch is a quarter of the
image, and it is bright in two of the four patterns. Only several patches together with their positions can tell.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import sqrt
from random import Random
from typing import Any, TypeAlias

from vitft.scratch.scalar import Scalar, dot, total
from vitft.spec import ViTSpec

Vector: TypeAlias = Sequence[Scalar]
Matrix: TypeAlias = list[Vector]
Image: TypeAlias = list[list[list[float]]]
"""Pixels (C, H, W), from -1 to 1."""
Parameters: TypeAlias = dict[str, Any]
"""Nested lists of Scalars, by the names of `vit.named_arrays` and in their shapes; the patch kernel is (D, C·P·P)."""

TINY = ViTSpec.square(image_size=6, patch_size=3, width=8, layers=1, heads=2, mlp=16, classes=4, channels=1)
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "top": lambda row, column: row < 3,
    "bottom": lambda row, column: row >= 3,
    "left": lambda row, column: column < 3,
    "right": lambda row, column: column >= 3,
}
"""The classes, and whether the pixel at (row, column) is bright in each."""


def four_patterns(count: int = 300, seed: int = 42) -> list[tuple[Image, int]]:
    """Noisy images (1, 6, 6) that cycle through PATTERNS, each with its label: the index of its pattern.

    Pixels are drawn row by row, image after image, from uniform distributions: bright ones from -0.2 to 1, dark
    ones from -1 to 0.2. One in three falls where the ranges overlap, and could be either.
    """
    rng = Random(seed)
    samples = []
    for i in range(count):
        label = i % len(PATTERNS)
        is_bright = list(PATTERNS.values())[label]
        lowest = [[-0.2 if is_bright(row, column) else -1.0 for column in range(6)] for row in range(6)]
        samples.append(([[[low + 1.2 * rng.random() for low in row] for row in lowest]], label))
    return samples


def init_parameters(spec: ViTSpec, seed: int) -> Parameters:
    """Initial parameters: weights are normal with variance 1 / fan_in, biases and shifts 0, scales 1.

    Class token and positions are normal with variance 1, as large as the patch tokens, because only its position
    makes a bright patch the upper or the left one. Large models start them small and have the time to grow them.

    Raises ValueError if the spec changes more than sizes, for example the pooling.
    """
    changed = {f.name for f in fields(spec) if f.default not in (MISSING, getattr(spec, f.name))}
    if extra := sorted(changed - {"channels", "norm_eps"}):
        raise ValueError(f"this chapter's ViT cannot change {', '.join(extra)}; try a spec of ViTSpec.square.")
    rng = Random(seed)
    d = spec.width
    p: Parameters = {}

    def normal(rows: int, columns: int, variance: float) -> Matrix:
        return [[Scalar(rng.gauss(0.0, sqrt(variance))) for _ in range(columns)] for _ in range(rows)]

    def add_linear(name: str, fan_in: int, fan_out: int) -> None:
        p[f"{name}.weight"] = normal(fan_out, fan_in, 1 / fan_in)
        p[f"{name}.bias"] = [Scalar(0.0) for _ in range(fan_out)]

    def add_norm(name: str) -> None:
        p[f"{name}.scale"] = [Scalar(1.0) for _ in range(d)]
        p[f"{name}.shift"] = [Scalar(0.0) for _ in range(d)]

    add_linear("embedding.projection", spec.channels * spec.patch_height * spec.patch_width, d)
    p["embedding.class_token"] = normal(1, d, 1)
    p["embedding.positions"] = normal(spec.tokens, d, 1)
    for i in range(spec.layers):
        add_norm(f"blocks.{i}.attention_norm")
        add_linear(f"blocks.{i}.attention.qkv", d, 3 * d)
        add_linear(f"blocks.{i}.attention.output", d, d)
        add_norm(f"blocks.{i}.mlp_norm")
        add_linear(f"blocks.{i}.mlp.inner", d, spec.mlp)
        add_linear(f"blocks.{i}.mlp.outer", spec.mlp, d)
    add_norm("norm")
    add_linear("head.logits", d, spec.classes)
    return p


def scalars(nested: Any) -> Iterator[Scalar]:
    """All Scalars of Parameters or of a nested list, in order."""
    if isinstance(nested, Scalar):
        yield nested
    else:
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from scalars(item)


# -- the forward pass of one image ----------------------------------------------------------------


def forward(p: Parameters, spec: ViTSpec, image: Image) -> tuple[Vector, list[list[Matrix]]]:
    """Logits (classes,) of an image (C, H, W), and the attention weights of every block, (A, N, N).

    Each block computes x + attention(norm(x)), then x + mlp(norm(x)) (Dosovitskiy et al. 2020, eq. 2 and 3). The head
    reads the class token only (eq. 4), so in the last block only that token makes queries; the attention weights
    there are (A, 1, N).
    """
    tokens, attention_weights = embed(p, spec, image), []
    for i in range(spec.layers):
        queries = spec.tokens if i < spec.layers - 1 else 1
        normed = [layer_norm(p, f"blocks.{i}.attention_norm", x, spec.norm_eps) for x in tokens]
        mixed, weights = attention(p, f"blocks.{i}.attention", normed, queries, spec.heads)
        tokens = [add(x, y) for x, y in zip(tokens[:queries], mixed, strict=True)]
        normed = [layer_norm(p, f"blocks.{i}.mlp_norm", x, spec.norm_eps) for x in tokens]
        tokens = [add(x, mlp(p, f"blocks.{i}.mlp", y)) for x, y in zip(tokens, normed, strict=True)]
        attention_weights.append(weights)
    return linear(p, "head.logits", layer_norm(p, "norm", tokens[0], spec.norm_eps)), attention_weights


def embed(p: Parameters, spec: ViTSpec, image: Image) -> Matrix:
    """The class token and the projected patches, plus their positions (eq. 1): (C, H, W) -> (N, D).

    Patches are read row by row. Within a patch, numbers are in the order of torch's kernels: channel, row, column.
    """
    rows, columns = spec.grid
    tokens = list(p["embedding.class_token"])
    for top in range(0, rows * spec.stride_height, spec.stride_height):
        for left in range(0, columns * spec.stride_width, spec.stride_width):
            strips = [row[left:][: spec.patch_width] for plane in image for row in plane[top:][: spec.patch_height]]
            tokens.append(linear(p, "embedding.projection", [Scalar(pixel) for strip in strips for pixel in strip]))
    return [add(token, position) for token, position in zip(tokens, p["embedding.positions"], strict=True)]


def attention(p: Parameters, name: str, tokens: Matrix, queries: int, heads: int) -> tuple[Matrix, list[Matrix]]:
    """softmax(q kᵀ / sqrt(K)) v in each head; the heads are concatenated and projected (Vaswani et al. 2017, eq. 1).

    Only the first `queries` tokens attend: (N, D) -> (queries, D). Also returns the attention weights (A, queries, N).
    """
    d = len(tokens[0])
    width = d // heads
    qkv = [linear(p, f"{name}.qkv", x) for x in tokens]
    mixed: list[list[Scalar]] = [[] for _ in range(queries)]
    weights: list[Matrix] = []
    for head in range(heads):
        q, k, v = ([x[start:][:width] for x in qkv] for start in range(head * width, 3 * d, d))
        columns = list(zip(*v, strict=True))  # (N, K) -> (K, N)
        weights.append([softmax([dot(query, key) / sqrt(width) for key in k]) for query in q[:queries]])
        for mix, row in zip(mixed, weights[-1], strict=True):
            mix += [dot(row, column) for column in columns]
    return [linear(p, f"{name}.output", x) for x in mixed], weights


def mlp(p: Parameters, name: str, x: Vector) -> Vector:
    """outer(gelu(inner(x))): (D,) -> (D,)."""
    return linear(p, f"{name}.outer", [a.gelu() for a in linear(p, f"{name}.inner", x)])


def linear(p: Parameters, name: str, x: Vector) -> Vector:
    """W x + b: (fan_in,) -> (fan_out,)."""
    return [dot(row, x, b) for row, b in zip(p[f"{name}.weight"], p[f"{name}.bias"], strict=True)]


def add(x: Vector, y: Vector) -> Vector:
    """x + y, elementwise."""
    return [a + b for a, b in zip(x, y, strict=True)]


def layer_norm(p: Parameters, name: str, x: Vector, eps: float) -> Vector:
    """(x - mean) / sqrt(variance + eps) · scale + shift: (D,) -> (D,) (Ba et al. 2016, eq. 3 and 4).

    Mean and variance are taken over the token's own D numbers; the variance divides by D, not by D - 1.
    """
    mean = total(x) / len(x)
    centered = [a - mean for a in x]
    inverse_std = (dot(centered, centered) / len(x) + eps) ** -0.5
    scales, shifts = p[f"{name}.scale"], p[f"{name}.shift"]
    return [a * inverse_std * scale + shift for a, scale, shift in zip(centered, scales, shifts, strict=True)]


def softmax(x: Vector) -> Vector:
    """exp(x_i) / Σ_j exp(x_j). Subtracting the maximum leaves the result unchanged and keeps exp from overflowing."""
    largest = max(a.value for a in x)
    powers = [(a - largest).exp() for a in x]
    scale = 1.0 / total(powers)
    return [power * scale for power in powers]


def cross_entropy(logits: Vector, label: int) -> Scalar:
    """-log softmax(logits)_label, in nats: log Σ_j exp(logit_j) - logit_label."""
    largest = max(a.value for a in logits)
    return total([(a - largest).exp() for a in logits]).log() + largest - logits[label]


# -- learning ---------------------------------------------------------------------------------------


class Adam:
    """Divides a running mean of the gradient by the root of a running mean of its square (Kingma & Ba 2015, alg. 1)."""

    def __init__(self, parameters: Vector, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.parameters, self.beta1, self.beta2, self.eps = parameters, beta1, beta2, eps
        self.means = [0.0] * len(parameters)
        self.squares = [0.0] * len(parameters)
        self.steps = 0

    def step(self, lr: float) -> None:
        """Move each parameter against its gradient, by about `lr`, and reset the gradient to 0."""
        self.steps += 1
        # Both means start at 0, so at first they are too small: divide by the total weight of what they have averaged.
        mean_weight, square_weight = 1.0 - self.beta1**self.steps, 1.0 - self.beta2**self.steps
        for i, parameter in enumerate(self.parameters):
            grad = parameter.grad
            self.means[i] = mean = self.beta1 * self.means[i] + (1.0 - self.beta1) * grad
            self.squares[i] = square = self.beta2 * self.squares[i] + (1.0 - self.beta2) * grad * grad
            parameter.value -= lr * (mean / mean_weight) / (sqrt(square / square_weight) + self.eps)
            parameter.grad = 0.0


@dataclass(frozen=True)
class Prediction:
    """The predicted pattern of an image, with its probability.

    `attention` (A, N) holds the class token's attention weights in the last block: on itself and on each patch.
    """

    image: Image
    label: str
    predicted: str
    confidence: float
    attention: list[list[float]]


@dataclass(frozen=True)
class Report:
    """The result of a training run: each step's mean loss in nats, and the predictions for the test images."""

    losses: list[float]
    predictions: list[Prediction]
    elapsed_s: float = field(compare=False)

    @property
    def correct(self) -> int:
        """Number of test images classified correctly."""
        return sum(sample.label == sample.predicted for sample in self.predictions)

    @property
    def accuracy(self) -> float:
        """Fraction of test images classified correctly."""
        return self.correct / len(self.predictions)

    @property
    def confusion(self) -> list[list[int]]:
        """Confusion matrix: true patterns in rows, predicted ones in columns, in the order of PATTERNS."""
        counts = Counter((sample.label, sample.predicted) for sample in self.predictions)
        return [[counts[label, predicted] for predicted in PATTERNS] for label in PATTERNS]

    @property
    def class_accuracy(self) -> dict[str, float]:
        """Fraction of each pattern's test images classified correctly."""
        return {name: row[i] / sum(row) for i, (name, row) in enumerate(zip(PATTERNS, self.confusion, strict=True))}

    def attention(self, pattern: str) -> list[list[float]]:
        """`Prediction.attention` (A, N) averaged over a pattern's test images; the last row averages the heads."""
        maps = [sample.attention for sample in self.predictions if sample.label == pattern]
        heads = [[sum(column) / len(maps) for column in zip(*head, strict=True)] for head in zip(*maps, strict=True)]
        return [*heads, [sum(column) / len(heads) for column in zip(*heads, strict=True)]]


def train(seed: int = 42, steps: int = 200, batch_size: int = 4, lr: float = 0.015) -> Report:
    """Train a new ViT on 240 of the `four_patterns`, and test it on the other 60, 15 of each pattern.

    `seed` is for the initial parameters. Batches are taken in order, so a batch of 4 holds each pattern once. The
    learning rate falls linearly from `lr` to 0 after the last step.
    """
    started = time.perf_counter()
    samples, p = four_patterns(), init_parameters(TINY, seed)
    training, test = samples[:240], samples[240:]
    adam = Adam(list(scalars(p)))
    losses = []
    for step in range(steps):
        losses.append(0.0)
        for i in range(step * batch_size, (step + 1) * batch_size):
            image, label = training[i % len(training)]
            logits, _ = forward(p, TINY, image)
            loss = cross_entropy(logits, label) / batch_size
            loss.backward()  # gradients accumulate over the batch; each image's graph is freed before the next
            losses[-1] += loss.value
        adam.step(lr * (1.0 - step / steps))
    predictions = [predict(p, image, label) for image, label in test]
    return Report(losses, predictions, time.perf_counter() - started)


def predict(p: Parameters, image: Image, label: int) -> Prediction:
    """The prediction of the TINY ViT with these parameters for an image with this label."""
    names = list(PATTERNS)
    logits, weights = forward(p, TINY, image)
    confidence, best = max((probability.value, i) for i, probability in enumerate(softmax(logits)))
    maps = [[weight.value for weight in head[0]] for head in weights[-1]]
    return Prediction(image, names[label], names[best], confidence, maps)
