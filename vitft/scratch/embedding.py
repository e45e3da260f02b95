"""Patches become a sequence: a class token is prepended, and every token's position is added.

Attention treats its input as a set. Without positions, an image with shuffled patches would get the same answer.
"""

from dataclasses import dataclass

import numpy as np

from vitft.scratch.patchify import patch_embedding, patch_embedding_backward
from vitft.scratch.tensors import Array, Linear, Watch, no_watch
from vitft.spec import ViTSpec


@dataclass
class Embedding:
    """projection: kernel (D, C, P, P) and bias (D); class_token (1, D) or None; positions (N, D), None if fixed."""

    projection: Linear
    class_token: Array | None
    positions: Array | None


def embedding(images: Array, w: Embedding, spec: ViTSpec, watch: Watch = no_watch) -> tuple[Array, Array]:
    """Images (B, C, H, W) to tokens (B, N, D) (Dosovitskiy et al. 2020, eq. 1). The backward pass needs the patches."""
    tokens, patches = patch_embedding(images, w.projection, spec)
    watch("image", images)
    watch("embed.projection", tokens.swapaxes(1, 2).reshape(len(images), spec.width, *spec.grid))
    watch("embed.patches", tokens)
    if w.class_token is not None:
        class_tokens = np.broadcast_to(w.class_token, (len(images), *w.class_token.shape))
        tokens = np.concatenate([class_tokens, tokens], axis=1)
        watch("embed.class_token", tokens)
    positions = fixed_positions(spec) if w.positions is None else w.positions
    tokens = tokens + positions.astype(tokens.dtype, copy=False)
    watch("embed.positions", tokens)
    return tokens, patches


def embedding_backward(d_tokens: Array, patches: Array, w: Embedding, spec: ViTSpec) -> tuple[Array, Embedding]:
    """Gradients of the images and the weights. Weights shared by all images get the sum over the batch."""
    d_shared = d_tokens.sum(axis=0)
    prefix = spec.prefix_tokens
    d_images, d_projection = patch_embedding_backward(d_tokens[:, prefix:], patches, w.projection, spec)
    d_class_token = None if w.class_token is None else d_shared[:prefix]
    return d_images, Embedding(d_projection, d_class_token, None if w.positions is None else d_shared)


def fixed_positions(spec: ViTSpec) -> Array:
    """The positions (N, D) of a spec whose positions are not learned, float64."""
    if spec.positions == "sinusoidal_2d":
        return grid_positions(spec)
    return sinusoidal_positions(spec.tokens, spec.width)


def grid_positions(spec: ViTSpec) -> Array:
    """Sinusoids of a patch's row in the first half of its D numbers, of its column in the second: (N, D), float64.

    The class token belongs to no patch, so its position is all zeros. Source: Beyer et al. 2022.
    """
    rows, columns = spec.grid
    half = spec.width // 2
    row = sinusoidal_positions(rows, half).repeat(columns, axis=0)
    column = np.tile(sinusoidal_positions(columns, spec.width - half), (rows, 1))
    return np.concatenate([np.zeros((spec.prefix_tokens, spec.width)), np.concatenate([row, column], axis=1)])


def sinusoidal_positions(tokens: int, width: int) -> Array:
    """Positions in a sequence as sines and cosines: (N, D), float64 (Vaswani et al. 2017, section 3.5).

    For token n, column 2i is sin(n / 10000^(2i/D)) and column 2i + 1 its cosine: the hands of ever slower clocks.
    """
    columns = np.arange(width)
    angles = np.arange(tokens)[:, None] / 10000 ** ((columns // 2 * 2) / width)
    return np.where(columns % 2, np.cos(angles), np.sin(angles))
