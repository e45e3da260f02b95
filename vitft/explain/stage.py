"""Lessons: what a stage does, its formula, its code, and its first number worked out with real numbers."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import erf, pi, sqrt, tanh
from pathlib import Path

import numpy as np
from rich.text import Text

from vitft.errors import UsageError, nearest
from vitft.explain.trace import Trace
from vitft.scratch import attention, embedding, encoder, heads, mlp, patchify, tensors
from vitft.scratch.tensors import Array, Linear

_SHOWN = 4  # terms of a long sum that are written out

Worked = tuple[str, float]
"""A calculation in writing, and its result."""


@dataclass(frozen=True)
class Lesson:
    """A stage in words, as a formula and in code, with the calculation of its first number.

    `result` is the result of the calculation, `chapter` the number that the chapter's code computed.
    """

    stage: str
    shape: tuple[int, ...]
    words: str
    formula: str
    file: str
    line: int
    function: str
    worked: str
    result: float
    chapter: float

    @property
    def difference(self) -> str:
        """The difference between the two results, in words."""
        difference = abs(self.result - self.chapter)
        return f"{difference:.0e}" if difference else "none"


def lesson(trace: Trace, stage: str) -> Lesson:
    """The lesson of a stage, by its full name."""
    step = stage.split(".")[-1]
    kind = {"activation": trace.spec.activation, "pool": f"pool_{trace.spec.pooling}"}.get(step, step)
    words, formula, function, work_out = _LESSONS[kind]
    array = trace.by_numpy[stage]
    file = Path(inspect.getsourcefile(function) or "")
    text, result = work_out(trace, stage, _input(trace, stage))
    text = re.sub(r"(?<![e\d])-(?=\d)", "−", text)
    return Lesson(
        stage, array.shape, words, formula, f"vitft/scratch/{file.name}", inspect.getsourcelines(function)[1],
        function.__name__, text, result, float(array.flat[0]),
    )  # fmt: skip


def _input(trace: Trace, stage: str) -> Array:
    """The input of a stage, which is the output of the stage before it; of the image, the image."""
    names = list(trace.by_numpy)
    return trace.by_numpy[names[max(0, names.index(stage) - 1)]].astype(np.float64)


def find_lessons(trace: Trace, name: str) -> list[Lesson]:
    """The lessons of all stages that match: "block.2.mlp.in", "block.2.mlp", or, for those of block 1, "mlp" or "in".

    Raises UsageError if no stage matches.
    """
    names = list(trace.by_numpy)
    matches = [stage for stage in names if stage == name or stage.startswith(f"{name}.")]
    if not matches:
        candidates = [stage for stage in names if not stage.startswith("block.") or stage.startswith("block.1.")]
        matches = [stage for stage in candidates if name in stage.split(".") or stage.endswith(f".{name}")]
    if not matches:
        parts = dict.fromkeys(part for stage in names for part in (stage, *stage.split(".")) if not part.isdigit())
        remedy = nearest(name, parts) or f"; try one of {', '.join(names[:5])}"
        raise UsageError(f"--stage {name}: no such stage{remedy}")
    return [lesson(trace, stage) for stage in matches]


def lesson_text(lessons: Sequence[Lesson]) -> Text:
    """Lessons for a terminal."""
    text = Text()
    for item in lessons:
        text.append(item.stage, "bold cyan").append(f"  {'×'.join(map(str, item.shape))}\n")
        text.append(f"  {item.words}\n  {item.formula}\n")
        text.append(f"  {item.file}:{item.line} {item.function}\n", "dim")
        text.append(f"  first number: {item.worked} = {item.result:.4g}\n")
        text.append(f"  computed by this code: {item.chapter:.4g}, difference: {item.difference}\n\n", "dim")
    return text


# -- working out the first number of a stage: x is its input, in float64 ----------------------------


def _sum(x: float, y: float) -> Worked:
    return f"{x:.4g} + {y:.4g}", x + y


def _terms(written: Iterable[str], count: int) -> str:
    """The first terms of a long sum, and how many more there are."""
    more = [f"({count - _SHOWN} more)"] if count > _SHOWN else []
    return " + ".join([*islice(written, _SHOWN), *more])


def _dot(xs: Array, ys: Array) -> Worked:
    written = (f"{x:.3g}·{y:.3g}" for x, y in zip(xs, ys, strict=True))
    return _terms(written, len(xs)), float(xs.astype(np.float64) @ ys.astype(np.float64))


def _linear(x: Array, w: Linear) -> Worked:
    text, value = _dot(x, w.weight.reshape(len(w.weight), -1)[0])
    return (text, value) if w.bias is None else (f"{text} + bias {w.bias[0]:.3g}", value + float(w.bias[0]))


def _image(trace: Trace, stage: str, x: Array) -> Worked:
    mean, std, most = trace.mean, trace.std, 1 / trace.rescale
    pixel = round(most * (float(trace.by_numpy[stage].flat[0]) * std + mean))
    return f"({pixel} / {most:.4g} − {mean:.4g}) / {std:.4g}", (pixel / most - mean) / std


def _projection(trace: Trace, stage: str, x: Array) -> Worked:
    return _linear(patchify.windows(x, trace.spec)[0, 0], trace.weights.embedding.projection)


def _unchanged(trace: Trace, stage: str, x: Array) -> Worked:
    """For a stage that only moves numbers."""
    return f"{x.flat[0]:.4g}, unchanged", float(x.flat[0])


def _class_token(trace: Trace, stage: str, x: Array) -> Worked:
    token = trace.weights.embedding.class_token
    assert token is not None, "without the token there is no such stage"
    return f"{token.flat[0]:.4g}, from the class token", float(token.flat[0])


def _positions(trace: Trace, stage: str, x: Array) -> Worked:
    learned = trace.weights.embedding.positions
    positions = embedding.fixed_positions(trace.spec) if learned is None else learned
    return _sum(float(x.flat[0]), float(positions.flat[0]))


def _norm(trace: Trace, stage: str, x: Array) -> Worked:
    w = trace.weights.norm
    if stage.startswith("block."):
        _, number, sublayer, _ = stage.split(".")
        w = getattr(trace.weights.blocks[int(number) - 1], f"{sublayer}_norm")
    assert w is not None, "without the norm there is no such stage"
    token = x[0, 0]
    mean, std = float(token.mean()), float(np.sqrt(token.var() + trace.spec.norm_eps))
    scale, shift = float(w.scale[0]), float(w.shift[0])
    text = f"({token[0]:.3g} − {mean:.3g}) / {std:.3g} · {scale:.3g} + {shift:.3g}"
    return text, (float(token[0]) - mean) / std * scale + shift


def _block_linear(trace: Trace, stage: str, x: Array) -> Worked:
    _, number, sublayer, step = stage.split(".")
    weights = getattr(trace.weights.blocks[int(number) - 1], sublayer)
    return _linear(x[0, 0], getattr(weights, {"in": "inner", "out": "outer"}.get(step, step)))


def _scores(trace: Trace, stage: str, x: Array) -> Worked:
    width = trace.spec.head_width
    text, value = _dot(x[0, 0, 0, 0], x[0, 1, 0, 0])
    return f"({text}) / √{width}", value / width**0.5


def _softmax(trace: Trace, stage: str, x: Array) -> Worked:
    row = x[0, 0, 0]
    powers = np.exp(row - row.max())
    text = f"exp({row[0]:.3g} − {row.max():.3g}) / {powers.sum():.4g}, the sum over {len(row)} tokens"
    return text, float(powers[0] / powers.sum())


def _mix(trace: Trace, stage: str, x: Array) -> Worked:
    return _dot(x[0, 0, 0], trace.by_numpy[stage.replace(".mix", ".qkv")][0, 2, 0, :, 0])


def _residual(trace: Trace, stage: str, x: Array) -> Worked:
    first = next(name for name in trace.by_numpy if name.startswith(stage.removesuffix("residual")))
    return _sum(float(_input(trace, first).flat[0]), float(x.flat[0]))


def _activation(trace: Trace, stage: str, x: Array) -> Worked:
    n = float(x.flat[0])
    if trace.spec.activation == "relu":
        return f"max({n:.4g}, 0)", max(n, 0.0)
    exact = trace.spec.activation == "gelu"
    factor = (1 + (erf(n / sqrt(2)) if exact else tanh(sqrt(2 / pi) * (n + 0.044715 * n**3)))) / 2
    return f"{n:.4g} · {factor:.4g}", n * factor


def _mean(trace: Trace, stage: str, x: Array) -> Worked:
    values = x[0, trace.spec.prefix_tokens :, 0]
    written = _terms((f"{value:.3g}" for value in values), len(values))
    return f"({written}) / {len(values)}", float(values.mean())


def _pre_logits(trace: Trace, stage: str, x: Array) -> Worked:
    layer = trace.weights.head.pre_logits
    assert layer is not None, "without the layer there is no such stage"
    text, value = _linear(x[0], layer)
    return f"tanh({text})", tanh(value)


def _head(trace: Trace, stage: str, x: Array) -> Worked:
    return _linear(x[0], trace.weights.head.logits)


_NON_LINEAR = "A non-linear function of each number: {}. Without it, the two linear layers would be one."
_GELU = _NON_LINEAR.format("high ones pass, low ones are held back")

# For each kind of stage: explanation, formula, the chapter's function, and the function that works out a number.
_LESSONS: dict[str, tuple[str, str, Callable[..., object], Callable[[Trace, str, Array], Worked]]] = {
    "image": (
        "The image as numbers around 0, one for each pixel and color channel.",
        "x = (pixel / 255 − mean) / std", embedding.embedding, _image),
    "projection": (
        "Every patch is multiplied by the same learned matrix, which describes what is in this square.",
        "z = W · patch + b", patchify.patch_embedding, _projection),
    "patches": (
        "The grid of patches is read row by row. From here on, the image is a sequence of tokens.",
        "token n is the patch in row n // columns, column n % columns", patchify.windows, _unchanged),
    "class_token": (
        "A learned token, the same for every image, is put in front. It will collect what the answer needs.",
        "z = [class token; z]", embedding.embedding, _class_token),
    "positions": (
        "The numbers of each position are added to its token, because attention ignores the order of tokens.",
        "z = z + position", embedding.embedding, _positions),
    "norm": (
        "Each token is normalized to mean 0 and variance 1, then scaled and shifted by learned numbers.",
        "(x − mean) / √(variance + eps) · scale + shift", tensors.layer_norm, _norm),
    "qkv": (
        "Each token computes a query (what do I seek?), a key (what do I have?) and a value (what do I pass on?).",
        "[q, k, v] = W x + b, split into heads", attention.attention, _block_linear),
    "scores": (
        "Every query is compared with every key: the better they match, the higher the score.",
        "s = q · k / √K", attention.attention, _scores),
    "softmax": (
        "Each token's scores become attention weights that sum to 1: how much it takes from every token.",
        "a_i = exp(s_i) / Σ_j exp(s_j)", tensors.softmax, _softmax),
    "mix": (
        "Each head takes the mean of all values, with these weights; then the heads are concatenated.",
        "Σ_i a_i v_i", attention.attention, _mix),
    "output": (
        "One matrix combines the results of all heads.",
        "W x + b", attention.attention, _block_linear),
    "residual": (
        "The residual connection adds the result to the input, so nothing is lost on the way.",
        "y = x + f(x)", encoder.add_sublayer, _residual),
    "in": (
        "A linear layer maps each token to more numbers: which patterns does it contain?",
        "W x + b", mlp.mlp, _block_linear),
    "gelu": (_GELU, "x · Φ(x), Φ the normal distribution function", tensors.gelu, _activation),
    "gelu_tanh": (_GELU, "x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2", tensors.gelu_tanh, _activation),
    "relu": (_NON_LINEAR.format("negative ones become 0"), "max(x, 0)", tensors.relu, _activation),
    "out": (
        "A second linear layer maps back to the width of a token.",
        "W x + b", mlp.mlp, _block_linear),
    "pool_cls": (
        "Only the class token goes on. It stands for the whole image.",
        "y = z of token 0", heads.pool, _unchanged),
    "pool_mean": (
        "The mean of all patch tokens stands for the whole image.",
        "y = Σ_n z_n / patches", heads.pool, _mean),
    "pre_logits": (
        "One more linear layer; tanh brings every number between −1 and 1.",
        "tanh(W x + b)", heads.head, _pre_logits),
    "head": (
        "One logit per class; the largest is the answer. Softmax turns the logits into probabilities.",
        "logits = W x + b", heads.head, _head),
}  # fmt: skip
