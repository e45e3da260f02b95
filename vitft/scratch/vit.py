"""The whole model: an image forward to its logits, and the loss backward to every weight and pixel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import sqrt
from typing import Any, TypeVar, cast

import numpy as np

from vitft.scratch.attention import Attention
from vitft.scratch.embedding import Embedding, embedding, embedding_backward
from vitft.scratch.encoder import Block, SavedBlock, block, block_backward
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
    unwatched,
)
from vitft.spec import ViTSpec

Bundle = TypeVar("Bundle")


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
    images: Array, w: ViT, spec: ViTSpec, masks: Sequence[Array] | None = None, watch: Watch = unwatched
) -> tuple[Array, SavedViT]:
    """Images (B, C, H, W) to logits (B, classes) (Dosovitskiy et al. 2020, eq. 1-4).

    `masks` are those of `dropout_masks`, for training; `watch` is shown each stage of `vitft.spec.stages`.
    """
    x, patches = embedding(images, w.embedding, spec, watch)
    x = dropout(x, masks[0] if masks else None)
    saved_blocks = []
    for number, w_block in enumerate(w.blocks):
        pair = (masks[2 * number + 1], masks[2 * number + 2]) if masks else (None, None)
        x, saved_block = block(x, w_block, spec, pair, _within(watch, f"block.{number + 1}"))
        saved_blocks.append(saved_block)
    saved_norm = None
    if w.norm is not None:
        x, saved_norm = layer_norm(x, w.norm, spec.norm_eps)
        watch("norm", x)
    logits, saved_head = head(x, w.head, spec, watch)
    return logits, SavedViT(patches, masks, saved_blocks, saved_norm, saved_head)


def vit_backward(d_logits: Array, saved: SavedViT, w: ViT, spec: ViTSpec) -> tuple[Array, ViT]:
    """Gradients of the images (B, C, H, W), and of all weights: the chapters' backwards, last to first."""
    d_x, d_head = head_backward(d_logits, saved.head, w.head, spec)
    d_norm = None
    if saved.norm is not None:
        d_x, d_norm = layer_norm_backward(d_x, saved.norm, w.norm)
    d_blocks = []
    for w_block, saved_block in zip(reversed(w.blocks), reversed(saved.blocks), strict=True):
        d_x, d_block = block_backward(d_x, saved_block, w_block, spec)
        d_blocks.append(d_block)
    d_x = dropout(d_x, saved.masks[0] if saved.masks else None)
    d_images, d_embedding = embedding_backward(d_x, saved.patches, w.embedding, spec)
    return d_images, ViT(d_embedding, d_blocks[::-1], d_norm, d_head)


def _within(watch: Watch, part: str) -> Watch:
    return lambda name, array: watch(f"{part}.{name}", array)


def dropout_masks(
    spec: ViTSpec, images: int, rate: float, rng: np.random.Generator, dtype: Any = np.float32
) -> list[Array] | None:
    """A mask for the embedded tokens, and two for each block: of what attention and the MLP add."""
    if not rate:
        return None
    shape = (images, spec.tokens, spec.width)
    return [dropout_mask(shape, rate, rng, dtype) for _ in range(1 + 2 * spec.layers)]


# -- the bundle of weights ------------------------------------------------------------------------


def named(bundle: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Every array of a bundle with its path: "blocks.0.attention.qkv.weight". None is left out."""
    if isinstance(bundle, np.ndarray):
        yield prefix, bundle
    elif bundle is not None:
        parts = enumerate(bundle) if isinstance(bundle, list) else vars(bundle).items()
        for name, part in parts:
            yield from named(part, f"{prefix}.{name}" if prefix else str(name))


def mapped(bundle: Bundle, function: Callable[[Array], Array]) -> Bundle:
    """A bundle of the same type, with `function(array)` in place of every array."""
    made: Any = bundle
    if isinstance(bundle, np.ndarray):
        made = function(bundle)
    elif isinstance(bundle, list):
        made = [mapped(part, function) for part in bundle]
    elif is_dataclass(bundle):
        kind: Any = type(bundle)
        made = kind(*(mapped(getattr(bundle, field.name), function) for field in fields(bundle)))
    return cast(Bundle, made)


def new_weights(spec: ViTSpec, rng: np.random.Generator, dtype: Any = np.float32) -> ViT:
    """Weights to train from: matrices uniform in ±sqrt(6 / (in + out)) (Glorot & Bengio 2010, eq. 16).

    The patch kernel is normal with variance 1 / in; class token and positions are normal with standard
    deviation 0.02; biases begin at 0. So does the head: at first every class is as likely as any other.
    """

    def normal(*shape: int, std: float = 0.02) -> Array:
        return (rng.standard_normal(shape) * std).astype(dtype)

    def matrix(fan_out: int, fan_in: int, bias: bool = True) -> Linear:
        bound = sqrt(6 / (fan_in + fan_out))
        weight = rng.uniform(-bound, bound, (fan_out, fan_in)).astype(dtype)
        return Linear(weight, np.zeros(fan_out, dtype) if bias else None)

    def qkv() -> Linear:
        parts = [matrix(d, d, spec.qkv_bias) for _ in range(3)]
        biases = [part.bias for part in parts if part.bias is not None]
        return Linear(np.concatenate([part.weight for part in parts]), np.concatenate(biases) if biases else None)

    def norm() -> Norm:
        return Norm(np.ones(d, dtype), np.zeros(d, dtype))

    d, m, features = spec.width, spec.mlp, spec.pre_logits or spec.width
    pixels = spec.channels * spec.patch_height * spec.patch_width
    kernel = normal(d, spec.channels, spec.patch_height, spec.patch_width, std=1 / sqrt(pixels))
    return ViT(
        Embedding(
            Linear(kernel, np.zeros(d, dtype)),
            normal(spec.prefix_tokens, d) if spec.prefix_tokens else None,
            normal(spec.tokens, d) if spec.positions == "learned" else None,
        ),
        [
            Block(norm(), Attention(qkv(), matrix(d, d)), norm(), MLP(matrix(m, d), matrix(d, m)))
            for _ in range(spec.layers)
        ],
        norm() if spec.final_norm else None,
        Head(
            matrix(spec.pre_logits, d) if spec.pre_logits else None,
            Linear(np.zeros((spec.classes, features), dtype), np.zeros(spec.classes, dtype)),
        ),
    )
