"""An encoder block: attention, then the MLP, each added to what it read (He et al. 2016).

The sum is what lets a gradient pass through many blocks: it reaches x as it is, and through the part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vitft.scratch.attention import Attention, SavedAttention, attention, attention_backward
from vitft.scratch.mlp import MLP, SavedMLP, mlp, mlp_backward
from vitft.scratch.tensors import Array, Norm, SavedNorm, Watch, dropout, layer_norm, layer_norm_backward, unwatched
from vitft.spec import ViTSpec

Saved = TypeVar("Saved")
Weights = TypeVar("Weights")


@dataclass
class Block:
    """Weights of one encoder block."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP


@dataclass
class SavedBlock:
    """What `block_backward` needs."""

    attention_norm: SavedNorm
    attention: SavedAttention
    mlp_norm: SavedNorm
    mlp: SavedMLP
    masks: tuple[Array | None, Array | None]


def block(
    x: Array, w: Block, spec: ViTSpec, masks: tuple[Array | None, Array | None] = (None, None), watch: Watch = unwatched
) -> tuple[Array, SavedBlock]:
    """x and the result are (B, N, D) (Dosovitskiy et al. 2020, eq. 2 and 3); `masks` drop of what each part adds."""

    def within(part: str) -> Watch:
        return lambda name, array: watch(f"{part}.{name}", array)

    attend = within("attention")
    think = within("mlp")
    x, norm_a, saved_a = add_part(
        x, lambda x: attention(x, w.attention, spec.heads, attend), w.attention_norm, spec, masks[0], attend
    )
    x, norm_m, saved_m = add_part(x, lambda x: mlp(x, w.mlp, spec.activation, think), w.mlp_norm, spec, masks[1], think)
    return x, SavedBlock(norm_a, saved_a, norm_m, saved_m, masks)


def block_backward(d_y: Array, saved: SavedBlock, w: Block, spec: ViTSpec) -> tuple[Array, Block]:
    """The gradient of x, and those of the weights."""
    d_y, d_mlp_norm, d_mlp = add_part_backward(
        d_y, lambda d: mlp_backward(d, saved.mlp, w.mlp), saved.mlp_norm, w.mlp_norm, spec, saved.masks[1]
    )
    d_x, d_attention_norm, d_attention = add_part_backward(
        d_y,
        lambda d: attention_backward(d, saved.attention, w.attention),
        saved.attention_norm, w.attention_norm, spec, saved.masks[0],
    )  # fmt: skip
    return d_x, Block(d_attention_norm, d_attention, d_mlp_norm, d_mlp)


def add_part(
    x: Array, part: Callable[[Array], tuple[Array, Saved]], w: Norm, spec: ViTSpec, mask: Array | None, watch: Watch
) -> tuple[Array, SavedNorm, Saved]:
    """Pre-norm: x + part(norm(x)). Post-norm: norm(x + part(x)), as Vaswani et al. 2017 had it.

    With pre-norm a path without any norm leads from the embedding to the last block, and so training
    needs no warm-up to start (Xiong et al. 2020).
    """
    if spec.norm == "pre":
        normed, saved_norm = layer_norm(x, w, spec.norm_eps)
        watch("norm", normed)
        y, saved = part(normed)
        y = x + dropout(y, mask)
        watch("residual", y)
    else:
        y, saved = part(x)
        y = x + dropout(y, mask)
        watch("residual", y)
        y, saved_norm = layer_norm(y, w, spec.norm_eps)
        watch("norm", y)
    return y, saved_norm, saved


def add_part_backward(
    d_y: Array, part_backward: Callable[[Array], tuple[Array, Weights]], saved: SavedNorm, w: Norm, spec: ViTSpec,
    mask: Array | None,
) -> tuple[Array, Norm, Weights]:  # fmt: skip
    """A sum hands its gradient to both sides, and what both paths bring back to x is added."""
    if spec.norm == "pre":
        d_normed, d_part = part_backward(dropout(d_y, mask))
        d_x, d_norm = layer_norm_backward(d_normed, saved, w)
        d_x += d_y
    else:
        d_sum, d_norm = layer_norm_backward(d_y, saved, w)
        d_x, d_part = part_backward(dropout(d_sum, mask))
        d_x += d_sum
    assert d_norm is not None, "a block's norms have weights"
    return d_x, d_norm, d_part
