"""An encoder block: attention and MLP, two sublayers whose outputs are added to their inputs (He et al. 2016).

The residual connections let a gradient pass through many blocks: it reaches x unchanged, as well as through the
sublayer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vitft.scratch.attention import Attention, SavedAttention, attention, attention_backward
from vitft.scratch.mlp import MLP, SavedMLP, mlp, mlp_backward
from vitft.scratch.tensors import Array, Norm, SavedNorm, Watch, dropout, layer_norm, layer_norm_backward, no_watch
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
    x: Array, w: Block, spec: ViTSpec, masks: tuple[Array | None, Array | None] = (None, None), watch: Watch = no_watch
) -> tuple[Array, SavedBlock]:
    """Attention, then the MLP: x and the result are (B, N, D) (Dosovitskiy et al. 2020, eq. 2 and 3).

    `masks` are the dropout masks of the two sublayers' outputs.
    """
    watch_attention, watch_mlp = prefixed(watch, "attention"), prefixed(watch, "mlp")
    x, norm_a, saved_a = add_sublayer(
        x, lambda x: attention(x, w.attention, spec.heads, watch_attention), w.attention_norm, spec, masks[0],
        watch_attention,
    )  # fmt: skip
    x, norm_m, saved_m = add_sublayer(
        x, lambda x: mlp(x, w.mlp, spec.activation, watch_mlp), w.mlp_norm, spec, masks[1], watch_mlp
    )
    return x, SavedBlock(norm_a, saved_a, norm_m, saved_m, masks)


def block_backward(d_y: Array, saved: SavedBlock, w: Block, spec: ViTSpec) -> tuple[Array, Block]:
    """Gradients of x and of the weights."""
    d_y, d_mlp_norm, d_mlp = add_sublayer_backward(
        d_y, lambda d: mlp_backward(d, saved.mlp, w.mlp), saved.mlp_norm, w.mlp_norm, spec, saved.masks[1]
    )
    d_x, d_attention_norm, d_attention = add_sublayer_backward(
        d_y, lambda d: attention_backward(d, saved.attention, w.attention), saved.attention_norm, w.attention_norm,
        spec, saved.masks[0],
    )  # fmt: skip
    return d_x, Block(d_attention_norm, d_attention, d_mlp_norm, d_mlp)


def add_sublayer(
    x: Array, sublayer: Callable[[Array], tuple[Array, Saved]], w: Norm, spec: ViTSpec, mask: Array | None, watch: Watch
) -> tuple[Array, SavedNorm, Saved]:
    """Pre-norm: x + sublayer(norm(x)). Post-norm: norm(x + sublayer(x)), as in Vaswani et al. 2017.

    With pre-norm, a path without any norm leads from the embedding to the last block, so training does not need
    warmup to get started (Xiong et al. 2020).
    """
    if spec.norm == "pre":
        normed, saved_norm = layer_norm(x, w, spec.norm_eps)
        watch("norm", normed)
        y, saved = sublayer(normed)
        y = x + dropout(y, mask)
        watch("residual", y)
    else:
        y, saved = sublayer(x)
        y = x + dropout(y, mask)
        watch("residual", y)
        y, saved_norm = layer_norm(y, w, spec.norm_eps)
        watch("norm", y)
    return y, saved_norm, saved


def add_sublayer_backward(
    d_y: Array, backward: Callable[[Array], tuple[Array, Weights]], saved: SavedNorm, w: Norm, spec: ViTSpec,
    mask: Array | None,
) -> tuple[Array, Norm, Weights]:  # fmt: skip
    """A sum passes its gradient to both terms; x is used in both, so its gradients add up.

    `backward` is the sublayer's own backward pass.
    """
    if spec.norm == "pre":
        d_normed, d_weights = backward(dropout(d_y, mask))
        d_x, d_norm = layer_norm_backward(d_normed, saved, w)
        d_x += d_y
    else:
        d_sum, d_norm = layer_norm_backward(d_y, saved, w)
        d_x, d_weights = backward(dropout(d_sum, mask))
        d_x += d_sum
    return d_x, d_norm, d_weights


def prefixed(watch: Watch, part: str) -> Watch:
    """A Watch that puts "part." before the names of stages."""
    return lambda name, array: watch(f"{part}.{name}", array)
