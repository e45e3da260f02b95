"""One stage opened: its formula, where its code stands, and its first number worked out with real ones."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf, pi, sqrt, tanh
from pathlib import Path

import numpy as np
from rich.text import Text

from vitft.errors import UsageError, nearest
from vitft.explain.trace import Trace
from vitft.scratch import attention, embedding, encoder, heads, mlp, patchify, tensors
from vitft.scratch.tensors import Array, Linear, Norm
from vitft.spec import ViTSpec

_SHOWN = 4  # numbers of a long sum that are written out


@dataclass(frozen=True)
class Lesson:
    """What a stage does: in words, as a formula, in code, and its first number worked out."""

    stage: str
    shape: tuple[int, ...]
    words: str
    formula: str
    file: str
    line: int
    function: str
    worked: str
    result: float
    chapter: float  # the same number as the chapter computed it

    @property
    def gap(self) -> str:
        """How far the two are apart."""
        gap = abs(self.result - self.chapter)
        return f"{gap:.0e} away" if gap else "the same"


def lesson(found: Trace, stage: str) -> Lesson:
    """The lesson of one stage, by its whole name."""
    step = stage.split(".")[-1]
    words, formula, chapter, worked = _LESSONS[_kind(found.spec, step)]
    array = found.by_numpy[stage]
    file = Path(inspect.getsourcefile(chapter) or "")
    sum_, result = worked(found, stage)
    sum_ = re.sub(r"(?<![e\d])-(?=\d)", "−", sum_)
    return Lesson(
        stage, array.shape, words, formula, f"vitft/scratch/{file.name}", inspect.getsourcelines(chapter)[1],
        chapter.__name__, sum_, result, float(array.flat[0]),
    )  # fmt: skip


def opened(found: Trace, name: str) -> list[Lesson]:
    """The lessons of the stages that `name` means: a whole name, or a part of one (of block 1, where none is named).

    Raises UsageError for a name that no stage has.
    """
    every = list(found.by_numpy)
    chosen = [stage for stage in every if stage == name or stage.startswith(f"{name}.")]
    if not chosen:
        near = [stage for stage in every if not stage.startswith("block.") or stage.startswith("block.1.")]
        chosen = [stage for stage in near if name in stage.split(".") or stage.endswith(f".{name}")]
    if not chosen:
        parts = dict.fromkeys(part for stage in every for part in (stage, *stage.split(".")) if not part.isdigit())
        remedy = nearest(name, parts) or f"; try one of {', '.join(every[:5])}"
        raise UsageError(f"--stage {name}: no such stage{remedy}")
    return [lesson(found, stage) for stage in chosen]


def lesson_text(lessons: Sequence[Lesson]) -> Text:
    """Lessons for a terminal."""
    lines = Text()
    for one in lessons:
        lines.append(one.stage, "bold cyan").append(f"  {'×'.join(map(str, one.shape))}\n")
        lines.append(f"  {one.words}\n  {one.formula}\n")
        lines.append(f"  {one.file}:{one.line} {one.function}\n", "dim")
        lines.append(f"  first number: {one.worked} = {one.result:.4g}\n")
        lines.append(f"  the chapter has {one.chapter:.4g}, {one.gap}\n\n", "dim")
    return lines


def _kind(spec: ViTSpec, step: str) -> str:
    """The key of a step's lesson: of some steps the spec has more than one kind."""
    return {"activation": spec.activation, "pool": f"pool_{spec.pooling}"}.get(step, step)


def _input(found: Trace, stage: str) -> Array:
    """What the stage read: the output of the stage before it."""
    every = list(found.by_numpy)
    return found.by_numpy[every[every.index(stage) - 1]].astype(np.float64)


def _products(xs: Array, ys: Array, extra: tuple[str, float] | None = None) -> tuple[str, float]:
    """Σ x·y as it is written: the first products, how many more, and what is added."""
    shown = [f"{x:.3g}·{y:.3g}" for x, y in zip(xs[:_SHOWN], ys[:_SHOWN], strict=True)]
    rest = len(xs) - _SHOWN
    parts = [*shown, *([f"({rest} more)"] if rest > 0 else []), *([f"{extra[0]} {extra[1]:.3g}"] if extra else [])]
    return " + ".join(parts), float(xs.astype(np.float64) @ ys.astype(np.float64)) + (extra[1] if extra else 0.0)


def _linear(x: Array, w: Linear) -> tuple[str, float]:
    bias = ("bias", float(w.bias[0])) if w.bias is not None else None
    return _products(x, w.weight.reshape(len(w.weight), -1)[0], bias)


def _norm(x: Array, w: Norm, eps: float) -> tuple[str, float]:
    mean, std = float(x.mean()), float(np.sqrt(x.var() + eps))
    written = f"({x[0]:.3g} − {mean:.3g}) / {std:.3g} · {w.scale[0]:.3g} + {w.shift[0]:.3g}"
    return written, (float(x[0]) - mean) / std * float(w.scale[0]) + float(w.shift[0])


def _block(found: Trace, stage: str) -> int:
    return int(stage.split(".")[1]) - 1


def _block_norm(found: Trace, stage: str) -> tuple[str, float]:
    if not stage.startswith("block."):
        assert found.weights.norm is not None, "the spec has a final norm"
        return _norm(_input(found, stage)[0, 0], found.weights.norm, found.spec.norm_eps)
    block = found.weights.blocks[_block(found, stage)]
    w = block.attention_norm if ".attention." in stage else block.mlp_norm
    return _norm(_input(found, stage)[0, 0], w, found.spec.norm_eps)


def _projection(found: Trace, stage: str) -> tuple[str, float]:
    patches = patchify.windows(_input(found, stage), found.spec)
    return _linear(patches[0, 0], found.weights.embedding.projection)


def _of_block(part: str, weights: str) -> Callable[[Trace, str], tuple[str, float]]:
    def worked(found: Trace, stage: str) -> tuple[str, float]:
        block = getattr(found.weights.blocks[_block(found, stage)], part)
        return _linear(_input(found, stage)[0, 0], getattr(block, weights))

    return worked


def _scores(found: Trace, stage: str) -> tuple[str, float]:
    q, k = _input(found, stage)[0, 0, 0, 0], _input(found, stage)[0, 1, 0, 0]
    written, value = _products(q, k)
    width = found.spec.head_width
    return f"({written}) / √{width}", value / width**0.5


def _softmax(found: Trace, stage: str) -> tuple[str, float]:
    row = _input(found, stage)[0, 0, 0]
    powers = np.exp(row - row.max())
    written = f"exp({row[0]:.3g} − {row.max():.3g}) / {powers.sum():.4g}, the sum over {len(row)} tokens"
    return written, float(powers[0] / powers.sum())


def _mix(found: Trace, stage: str) -> tuple[str, float]:
    values = found.by_numpy[stage.replace(".mix", ".qkv")][0, 2, 0, :, 0]
    return _products(_input(found, stage)[0, 0, 0], values)


def _residual(found: Trace, stage: str) -> tuple[str, float]:
    every = list(found.by_numpy)
    part = stage.removesuffix("residual")
    before = (
        next(i for i, name in enumerate(every) if name.startswith(part)) - 1
    )  # the part's first stage is its norm's
    read, added = float(found.by_numpy[every[before]].flat[0]), float(_input(found, stage).flat[0])
    return f"{read:.4g} + {added:.4g}", read + added


def _gelu(found: Trace, stage: str) -> tuple[str, float]:
    x = float(_input(found, stage).flat[0])
    share = (1 + erf(x / sqrt(2))) / 2
    return f"{x:.4g} · {share:.4g}", x * share


def _gelu_tanh(found: Trace, stage: str) -> tuple[str, float]:
    x = float(_input(found, stage).flat[0])
    share = (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2
    return f"{x:.4g} · {share:.4g}", x * share


def _relu(found: Trace, stage: str) -> tuple[str, float]:
    x = float(_input(found, stage).flat[0])
    return f"max({x:.4g}, 0)", max(x, 0.0)


def _positions(found: Trace, stage: str) -> tuple[str, float]:
    table = found.weights.embedding.positions
    if table is None:
        table = embedding.fixed_positions(found.spec)
    before, position = float(_input(found, stage).flat[0]), float(table.flat[0])
    return f"{before:.4g} + {position:.4g}", before + position


def _image(found: Trace, stage: str) -> tuple[str, float]:
    mean, std = found.normal
    value = float(found.by_numpy[stage].flat[0])
    pixel = round(255 * (value * std + mean))  # of one channel, where that is all the network has
    return f"({pixel} / 255 − {mean:.4g}) / {std:.4g}", (pixel / 255 - mean) / std


def _first(found: Trace, stage: str) -> tuple[str, float]:
    """The first number of the stage before: what only changes place."""
    value = float(_input(found, stage).flat[0])
    return f"{value:.4g}, taken as it is", value


def _class_token(found: Trace, stage: str) -> tuple[str, float]:
    token = found.weights.embedding.class_token
    assert token is not None, "the stage is there because the token is"
    return f"{token.flat[0]:.4g}, the token's own", float(token.flat[0])


def _mean(found: Trace, stage: str) -> tuple[str, float]:
    values = _input(found, stage)[0, found.spec.prefix_tokens :, 0]
    shown = " + ".join(f"{value:.3g}" for value in values[:_SHOWN])
    more = f" + ({len(values) - _SHOWN} more)" if len(values) > _SHOWN else ""
    return f"({shown}{more}) / {len(values)}", float(values.mean())


def _pre_logits(found: Trace, stage: str) -> tuple[str, float]:
    layer = found.weights.head.pre_logits
    assert layer is not None, "the stage is there because the layer is"
    written, value = _linear(_input(found, stage)[0], layer)
    return f"tanh({written})", tanh(value)


def _head(found: Trace, stage: str) -> tuple[str, float]:
    return _linear(_input(found, stage)[0], found.weights.head.logits)


_qkv = _of_block("attention", "qkv")
_output = _of_block("attention", "output")
_in = _of_block("mlp", "inner")
_out = _of_block("mlp", "outer")

# Of each kind of step: words, formula, the function of the chapter, and what works its first number out.
_LESSONS: dict[str, tuple[str, str, Callable[..., object], Callable[[Trace, str], tuple[str, float]]]] = {
    "image": (
        "The picture as numbers about 0: brightness, of each pixel in each colour.",
        "x = (pixel / 255 − mean) / std", embedding.embedding, _image),
    "projection": (
        "Every patch is multiplied by one learned matrix, the same for all: what is in this square?",
        "z = E · patch + b", patchify.patch_embedding, _projection),
    "patches": (
        "The grid of patches is read row by row: from here on a picture is a sequence of tokens.",
        "token n is the patch in row n // columns, column n % columns", patchify.windows, _first),
    "class_token": (
        "A learned token, the same for every picture, goes first. It will gather what the others know.",
        "z = [class token; z]", embedding.embedding, _class_token),
    "positions": (
        "Each place has numbers of its own, which are added: attention alone does not know where a token is.",
        "z = z + position", embedding.embedding, _positions),
    "norm": (
        "Each token is brought to one scale, whatever has been added to it so far.",
        "(x − mean) / √(variance + eps) · scale + shift", tensors.layer_norm, _block_norm),
    "qkv": (
        "Each token makes a query (what I look for), a key (what I have) and a value (what I tell) for every head.",
        "[q, k, v] = W x + b, cut into heads", attention.attention, _qkv),
    "scores": (
        "Every query meets every key: the better they match, the higher the score.",
        "s = q · k / √K", attention.attention, _scores),
    "softmax": (
        "The scores of a token become shares that sum to 1: how much it takes from each of the others.",
        "a_i = exp(s_i) / Σ_j exp(s_j)", tensors.softmax, _softmax),
    "mix": (
        "Each head sums the values, each by its share; then the heads' results stand side by side.",
        "Σ_i a_i v_i", attention.attention, _mix),
    "output": (
        "One matrix joins what the heads found.",
        "W x + b", attention.attention, _output),
    "residual": (
        "What the part found is added to what it read: nothing is lost on the way.",
        "y = x + part(x)", encoder.add_sublayer, _residual),
    "in": (
        "Each token by itself is widened: many questions about what it now holds.",
        "W x + b", mlp.mlp, _in),
    "gelu": (
        "Each number is bent: high ones pass, low ones are held back. Without a bend all layers would be one.",
        "x · Φ(x), Φ the share of a normal distribution below x", tensors.gelu, _gelu),
    "gelu_tanh": (
        "Each number is bent: high ones pass, low ones are held back. Without a bend all layers would be one.",
        "x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2", tensors.gelu_tanh, _gelu_tanh),
    "relu": (
        "Each number is bent: what is below 0 becomes 0. Without a bend all layers would be one.",
        "max(x, 0)", tensors.relu, _relu),
    "out": (
        "The answers are summed up to a token's own width again.",
        "W x + b", mlp.mlp, _out),
    "pool_cls": (
        "Only the class token goes on: it stands for the whole picture.",
        "y = z of token 0", heads.pool, _first),
    "pool_mean": (
        "The mean of all patch tokens stands for the whole picture.",
        "y = Σ_n z_n / patches", heads.pool, _mean),
    "pre_logits": (
        "One more layer, bent so that every number lies between −1 and 1.",
        "tanh(W x + b)", heads.head, _pre_logits),
    "head": (
        "One number a class; the largest is the answer. exp, divided by the sum, makes them probabilities.",
        "logits = W x + b", heads.head, _head),
}  # fmt: skip
