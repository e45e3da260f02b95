"""One stage opened: its formula, where its code stands, and its first number worked out with real ones."""

import inspect
from collections.abc import Callable
from math import erf, pi, sqrt, tanh
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.text import Text

from vitft.errors import UsageError, nearest
from vitft.explain.trace import Trace
from vitft.scratch import attention, embedding, encoder, heads, mlp, patchify, tensors
from vitft.scratch.tensors import Array, Linear, Norm

_SHOWN = 4  # numbers of a long sum that are written out


def opened(found: Trace, name: str) -> Group:
    """The stages that `name` means: a whole name, or a part of one (of block 1, where no block is named).

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
    lines = Text()
    for stage in chosen:
        step = stage.split(".")[-1]
        formula, chapter, worked = _LESSONS[found.spec.activation if step == "activation" else step]
        array = found.by_numpy[stage]
        file = Path(inspect.getsourcefile(chapter) or "")
        line = inspect.getsourcelines(chapter)[1]
        lines.append(f"{stage}", "bold cyan").append(f"  {'×'.join(map(str, array.shape))}\n")
        lines.append(f"  {formula}\n").append(f"  vitft/scratch/{file.name}:{line} {chapter.__name__}\n", "dim")
        sum_, result = worked(found, stage)
        lines.append(f"  first number: {sum_} = {result:.4g}\n")
        gap = abs(result - float(array.flat[0]))
        lines.append(f"  the chapter has {float(array.flat[0]):.4g}", "dim")
        lines.append(f", {gap:.0e} away\n\n" if gap else ", the same\n\n", "dim")
    return Group(lines)


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
    norm = next(i for i in range(every.index(stage), -1, -1) if every[i].endswith(".norm"))
    read, added = float(found.by_numpy[every[norm - 1]].flat[0]), float(_input(found, stage).flat[0])
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
    assert table is not None, "Transformers' positions are learned"
    before, position = float(_input(found, stage).flat[0]), float(table.flat[0])
    return f"{before:.4g} + {position:.4g}", before + position


def _first(found: Trace, stage: str) -> tuple[str, float]:
    """The first number of the stage before, or of the image: what only changes place."""
    value = float(_input(found, stage).flat[0] if stage != "image" else found.by_numpy[stage].flat[0])
    return f"{value:.4g}, taken as it is", value


def _class_token(found: Trace, stage: str) -> tuple[str, float]:
    token = found.weights.embedding.class_token
    assert token is not None, "Transformers' ViT has a class token"
    return f"{token.flat[0]:.4g}, the token's own", float(token.flat[0])


def _head(found: Trace, stage: str) -> tuple[str, float]:
    return _linear(_input(found, stage)[0], found.weights.head.logits)


_LESSONS: dict[str, tuple[str, Callable[..., object], Callable[[Trace, str], tuple[str, float]]]] = {
    "image": ("x = (pixel / 255 − mean) / std", embedding.embedding, _first),
    "projection": ("z = E · patch + b, the same E for every patch", patchify.patch_embedding, _projection),
    "patches": ("the grid of patches, row by row, is a sequence", patchify.windows, _first),
    "class_token": ("a learned token, the same for every image, goes first", embedding.embedding, _class_token),
    "positions": ("z = z + position, one of each place", embedding.embedding, _positions),
    "norm": ("(x − mean) / √(variance + eps) · scale + shift, each token by itself", tensors.layer_norm, _block_norm),
    "qkv": ("[q, k, v] = W x + b, cut into heads", attention.attention, _of_block("attention", "qkv")),
    "scores": ("s = q · k / √K, of every token with every other", attention.attention, _scores),
    "softmax": ("a_i = exp(s_i) / Σ_j exp(s_j)", tensors.softmax, _softmax),
    "mix": ("Σ_i a_i v_i: the answers, each by its share; then the heads side by side", attention.attention, _mix),
    "output": ("W x + b: what the heads found, joined", attention.attention, _of_block("attention", "output")),
    "residual": ("what was read + what the part made of it", encoder.add_part, _residual),
    "in": ("W x + b, wider", mlp.mlp, _of_block("mlp", "inner")),
    "gelu": ("x · Φ(x), Φ the share of a normal distribution below x", tensors.gelu, _gelu),
    "gelu_tanh": ("x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2", tensors.gelu_tanh, _gelu_tanh),
    "relu": ("max(x, 0)", tensors.relu, _relu),
    "out": ("W x + b, narrow again", mlp.mlp, _of_block("mlp", "outer")),
    "pool": ("the class token alone", heads.pool, _first),
    "head": ("logits = W x + b, one a class", heads.head, _head),
}
