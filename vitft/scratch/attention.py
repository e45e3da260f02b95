"""Multi-head self-attention: every token asks all tokens, and mixes what they answer."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from vitft.scratch.tensors import (
    Array,
    Linear,
    Watch,
    linear,
    linear_backward,
    softmax,
    softmax_backward,
    unwatched,
)


@dataclass
class Attention:
    """qkv (3·D, D): queries, keys and values of all heads, one above the other; output (D, D)."""

    qkv: Linear
    output: Linear


@dataclass
class SavedAttention:
    """What `attention_backward` needs; shares (B, A, N, N) are also what attention pictures show."""

    x: Array
    q: Array  # (B, A, N, K), already divided by sqrt(K)
    k: Array
    v: Array
    shares: Array
    mixed: Array


def attention(x: Array, w: Attention, heads: int, watch: Watch = unwatched) -> tuple[Array, SavedAttention]:
    """Mix tokens by similarity (Dosovitskiy et al. 2020, eq. 5-8; Vaswani et al. 2017, eq. 1).

    x is (B, N, D) and so is the result. Scores are divided by sqrt(K) so that their variance does not
    grow with the head width; q is, for it is smaller than the scores.
    """
    b, n, d = x.shape
    qkv = linear(x, w.qkv).reshape(b, n, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)  # (3, B, A, N, K)
    watch("qkv", qkv.swapaxes(0, 1))
    q, k, v = qkv[0] * x.dtype.type(1 / sqrt(d // heads)), qkv[1], qkv[2]
    scores = q @ k.swapaxes(-1, -2)  # (B, A, N, K) @ (B, A, K, N) -> (B, A, N, N)
    watch("scores", scores)
    shares = softmax(scores)
    watch("softmax", shares)
    mixed = (shares @ v).swapaxes(1, 2).reshape(b, n, d)  # the heads' results side by side again
    watch("mix", mixed)
    y = linear(mixed, w.output)
    watch("output", y)
    return y, SavedAttention(x, q, k, v, shares, mixed)


def attention_backward(d_y: Array, saved: SavedAttention, w: Attention) -> tuple[Array, Attention]:
    """The same steps from the end: a product's gradient is a product with the other factor, transposed."""
    b, heads, n, width = saved.q.shape
    d_mixed, d_output = linear_backward(d_y, saved.mixed, w.output)
    d_mixed = d_mixed.reshape(b, n, heads, width).swapaxes(1, 2)  # (B, A, N, K)
    d_scores = softmax_backward(d_mixed @ saved.v.swapaxes(-1, -2), saved.shares)
    d_qkv = np.empty((b, n, 3, heads, width), d_y.dtype)
    into = d_qkv.transpose(2, 0, 3, 1, 4)
    into[0] = d_scores @ saved.k
    into[0] *= d_y.dtype.type(1 / sqrt(width))
    into[1] = d_scores.swapaxes(-1, -2) @ saved.q
    into[2] = saved.shares.swapaxes(-1, -2) @ d_mixed
    d_x, d_w = linear_backward(d_qkv.reshape(b, n, -1), saved.x, w.qkv)
    return d_x, Attention(d_w, d_output)
