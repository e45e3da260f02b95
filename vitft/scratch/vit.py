"""The whole model: images forward to logits, and the loss's gradient backward to every weight and pixel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod, sqrt
from typing import Any, TypeVar, cast

import numpy as np

from vitft.scratch.attention import Attention
from vitft.scratch.embedding import Embedding, embedding, embedding_backward
from vitft.scratch.encoder import Block, SavedBlock, block, block_backward, prefixed
from vitft.scratch.heads import Head, SavedHead, head, head_backward
from vitft.scratch.mlp import MLP
from vitft.scratch.tensors import (
    Array,
    Linear,
    Norm,
    SavedNorm,
    Watch,
    dropout,
    dropout_mask,
    layer_norm,
    layer_norm_backward,
    no_watch,
)
from vitft.spec import ViTSpec

Weights = TypeVar("Weights")


@dataclass
class ViT:
    """All weights of a model, or all their gradients."""

    embedding: Embedding
    blocks: list[Block]
    norm: Norm | None
    head: Head


@dataclass
class SavedViT:
    """What `vit_backward` needs."""

    patches: Array
    masks: Sequence[Array] | None
    blocks: list[SavedBlock]
    norm: SavedNorm | None
    head: SavedHead


def vit(
    images: Array, w: ViT, spec: ViTSpec, masks: Sequence[Array] | None = None, watch: Watch = no_watch
) -> tuple[Array, SavedViT]:
    """Images (B, C, H, W) to logits (B, classes) (Dosovitskiy et al. 2020, eq. 1-4).

    `masks` are those of `dropout_masks`, for training. `watch` is called with every stage of `vitft.spec.stages`.
    """
    x, patches = embedding(images, w.embedding, spec, watch)
    x = dropout(x, masks[0] if masks else None)
    saved_blocks = []
    for i, w_block in enumerate(w.blocks):
        block_masks = (masks[2 * i + 1], masks[2 * i + 2]) if masks else (None, None)
        x, saved_block = block(x, w_block, spec, block_masks, prefixed(watch, f"block.{i + 1}"))
        saved_blocks.append(saved_block)
    saved_norm = None
    if w.norm is not None:
        x, saved_norm = layer_norm(x, w.norm, spec.norm_eps)
        watch("norm", x)
    logits, saved_head = head(x, w.head, spec, watch)
    return logits, SavedViT(patches, masks, saved_blocks, saved_norm, saved_head)


def vit_backward(d_logits: Array, saved: SavedViT, w: ViT, spec: ViTSpec) -> tuple[Array, ViT]:
    """Gradients of the images (B, C, H, W) and of all weights: the chapters' backward passes, last to first."""
    d_x, d_head = head_backward(d_logits, saved.head, w.head, spec)
    d_norm = None
    if w.norm is not None and saved.norm is not None:
        d_x, d_norm = layer_norm_backward(d_x, saved.norm, w.norm)
    d_blocks = []
    for w_block, saved_block in zip(reversed(w.blocks), reversed(saved.blocks), strict=True):
        d_x, d_block = block_backward(d_x, saved_block, w_block, spec)
        d_blocks.append(d_block)
    d_x = dropout(d_x, saved.masks[0] if saved.masks else None)
    d_images, d_embedding = embedding_backward(d_x, saved.patches, w.embedding, spec)
    return d_images, ViT(d_embedding, d_blocks[::-1], d_norm, d_head)


def dropout_masks(
    spec: ViTSpec, images: int, rate: float, rng: np.random.Generator, dtype: Any = np.float32
) -> list[Array] | None:
    """A mask for the embedded tokens and two for each block, for the outputs of attention and MLP; None at rate 0."""
    if not rate:
        return None
    shape = (images, spec.tokens, spec.width)
    return [dropout_mask(shape, rate, rng, dtype) for _ in range(1 + 2 * spec.layers)]


# -- weights as one object ------------------------------------------------------------------------


def named_arrays(weights: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Every array of a ViT, or of a part of one, with its name, such as "blocks.0.attention.qkv.weight".

    Names count blocks from 0, as lists do; the stages of `vitft.spec` count them from 1, as people do.
    """
    if isinstance(weights, np.ndarray):
        yield prefix, weights
    elif weights is not None:
        parts = enumerate(weights) if isinstance(weights, list) else vars(weights).items()
        for name, part in parts:
            yield from named_arrays(part, f"{prefix}.{name}" if prefix else str(name))


def map_arrays(weights: Weights, function: Callable[[Array], Array]) -> Weights:
    """A copy of the weights with `function(array)` in place of every array."""
    result: Any = weights
    if isinstance(weights, np.ndarray):
        result = function(weights)
    elif isinstance(weights, list):
        result = [map_arrays(part, function) for part in weights]
    elif is_dataclass(weights):
        kind: Any = type(weights)
        result = kind(*(map_arrays(getattr(weights, field.name), function) for field in fields(weights)))
    return cast(Weights, result)


def init_weights(spec: ViTSpec, rng: np.random.Generator, dtype: Any = np.float32) -> ViT:
    """Initial weights: matrices are uniform in ±sqrt(6 / (in + out)) (Glorot & Bengio 2010, eq. 16).

    The patch kernel is normal with variance 1 / in; class token and positions are normal with standard deviation
    0.02; biases are 0. So is the head, which makes every class equally likely at first.
    """

    def draw(kind: str, shape: tuple[int, ...]) -> Array:
        if kind == "kernel":
            return rng.standard_normal(shape) / sqrt(prod(shape[1:]))
        if kind == "token":
            return rng.standard_normal(shape) * 0.02
        if kind in ("matrix", "qkv"):
            fan_out = shape[0] // 3 if kind == "qkv" else shape[0]  # qkv is three matrices, stacked
            bound = sqrt(6 / (fan_out + shape[1]))
            return rng.uniform(-bound, bound, shape)
        return np.full(shape, float(kind == "scale"))

    return build_vit(spec, lambda kind, shape: draw(kind, shape).astype(dtype))


def array_shapes(spec: ViTSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a model, by name."""
    empty = build_vit(spec, lambda kind, shape: np.broadcast_to(np.float32(0), shape))  # takes no memory
    return {name: array.shape for name, array in named_arrays(empty)}


def build_vit(spec: ViTSpec, make: Callable[[str, tuple[int, ...]], Array]) -> ViT:
    """A ViT whose arrays are `make(kind, shape)`; kinds are kernel, matrix, qkv, head, bias, scale and token."""

    def linear(kind: str, fan_out: int, *fan_in: int, bias: bool = True) -> Linear:
        return Linear(make(kind, (fan_out, *fan_in)), make("bias", (fan_out,)) if bias else None)

    def norm() -> Norm:
        return Norm(make("scale", (d,)), make("bias", (d,)))

    d, m = spec.width, spec.mlp
    return ViT(
        Embedding(
            linear("kernel", d, spec.channels, spec.patch_height, spec.patch_width),
            make("token", (spec.prefix_tokens, d)) if spec.prefix_tokens else None,
            make("token", (spec.tokens, d)) if spec.positions == "learned" else None,
        ),
        [
            Block(
                norm(),
                Attention(linear("qkv", 3 * d, d, bias=spec.qkv_bias), linear("matrix", d, d)),
                norm(),
                MLP(linear("matrix", m, d), linear("matrix", d, m)),
            )
            for _ in range(spec.layers)
        ],
        norm() if spec.final_norm else None,
        Head(
            linear("matrix", spec.pre_logits, d) if spec.pre_logits else None,
            linear("head", spec.classes, spec.pre_logits or d),
        ),
    )


def from_named_arrays(arrays: Mapping[str, Array], spec: ViTSpec) -> ViT:
    """The inverse of `named_arrays`. Raises ValueError, with the first name, if names or shapes do not fit the spec."""
    expected = array_shapes(spec)
    actual = {name: array.shape for name, array in arrays.items()}
    wrong = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
    if wrong:
        raise ValueError(f"{wrong[0]}: expected shape {expected.get(wrong[0])}, got {actual.get(wrong[0])}")
    values = iter(arrays[name] for name in expected)
    return build_vit(spec, lambda kind, shape: next(values))
