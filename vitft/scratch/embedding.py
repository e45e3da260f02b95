"""Patches become a sequence: a class token before them, and to every token its position.

Attention sees a set. Without positions, a shuffled image would get the same answer.
"""

from dataclasses import dataclass

import numpy as np

from vitft.scratch.patchify import patch_embedding, patch_embedding_backward
from vitft.scratch.tensors import Array, Linear, Watch, unwatched
from vitft.spec import ViTSpec


@dataclass
class Embedding:
    """projection: kernel (D, C, P, P) and bias (D); class_token (1, D) or none; positions (N, D) if learned."""

    projection: Linear
    class_token: Array | None
    positions: Array | None


def embedding(images: Array, w: Embedding, spec: ViTSpec, watch: Watch = unwatched) -> tuple[Array, Array]:
    """Images (B, C, H, W) to tokens (B, N, D) (Dosovitskiy et al. 2020, eq. 1). Its backward needs the patches."""
    tokens, patches = patch_embedding(images, w.projection, spec)
    watch("image", images)
    watch("embed.projection", tokens.swapaxes(1, 2).reshape(len(images), spec.width, *spec.grid))
    watch("embed.patches", tokens)
    if w.class_token is not None:
        first = np.broadcast_to(w.class_token, (len(images), *w.class_token.shape))
        tokens = np.concatenate([first, tokens], axis=1)
        watch("embed.class_token", tokens)
    positions = fixed_positions(spec) if w.positions is None else w.positions
    tokens = tokens + positions.astype(tokens.dtype, copy=False)
    watch("embed.positions", tokens)
    return tokens, patches


def embedding_backward(d_tokens: Array, patches: Array, w: Embedding, spec: ViTSpec) -> tuple[Array, Embedding]:
    """Gradients of the images, and of the weights: what all images share gets the sum over the batch."""
    d_shared = d_tokens.sum(axis=0)
    prefix = spec.prefix_tokens
    d_images, d_projection = patch_embedding_backward(d_tokens[:, prefix:], patches, w.projection, spec)
    d_class_token = None if w.class_token is None else d_shared[:prefix]
    return d_images, Embedding(d_projection, d_class_token, None if w.positions is None else d_shared)


def fixed_positions(spec: ViTSpec) -> Array:
    """Positions that need no learning, as the specification wants them: (N, D), float64."""
    if spec.positions == "sinusoidal_2d":
        return grid_positions(spec)
    return sinusoidal_positions(spec.tokens, spec.width)


def grid_positions(spec: ViTSpec) -> Array:
    """The row's clocks in the first half of the columns, the column's in the second (Beyer et al. 2022): (N, D).

    What belongs to no patch, the class token, has zeros.
    """
    rows, columns = spec.grid
    half = spec.width // 2
    row = sinusoidal_positions(rows, half).repeat(columns, axis=0)
    column = np.tile(sinusoidal_positions(columns, spec.width - half), (rows, 1))
    return np.concatenate([np.zeros((spec.prefix_tokens, spec.width)), np.concatenate([row, column], axis=1)])


def sinusoidal_positions(tokens: int, width: int) -> Array:
    """The places of a sequence: (N, D), float64 (Vaswani et al. 2017, section 3.5).

    Column 2i is sin(n / 10000^(2i/D)) of token n, column 2i + 1 its cosine: clocks of ever slower hands.
    """
    columns = np.arange(width)
    angles = np.arange(tokens)[:, None] / 10000 ** ((columns // 2 * 2) / width)
    return np.where(columns % 2, np.cos(angles), np.sin(angles))
