"""Multi-head self-attention: every token queries all tokens, and takes a weighted mean of their values."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from vitft.scratch.tensors import Array, Linear, Watch, linear, linear_backward, no_watch, softmax, softmax_backward


@dataclass
class Attention:
    """qkv (3·D, D): the query, key and value matrices of all heads, stacked in that order; output (D, D)."""

    qkv: Linear
    output: Linear


@dataclass
class SavedAttention:
    """What `attention_backward` needs. The attention weights (B, A, N, N) are also what attention maps show."""

    x: Array
    q: Array  # (B, A, N, K), already divided by sqrt(K)
    k: Array
    v: Array
    weights: Array
    mixed: Array


def attention(x: Array, w: Attention, heads: int, watch: Watch = no_watch) -> tuple[Array, SavedAttention]:
    """softmax(q kᵀ / sqrt(K)) v in each head, then a linear layer (Vaswani et al. 2017, eq. 1; Dosovitskiy, eq. 5-8).

    x is (B, N, D) and so is the result. Dividing the scores by sqrt(K) keeps their variance independent of the head
    width. The code divides q instead, which has fewer elements.
    """
    b, n, d = x.shape
    qkv = linear(x, w.qkv).reshape(b, n, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)  # (3, B, A, N, K)
    watch("qkv", qkv.swapaxes(0, 1))
    q, k, v = qkv[0] * x.dtype.type(1 / sqrt(d // heads)), qkv[1], qkv[2]
    scores = q @ k.swapaxes(-1, -2)  # (B, A, N, K) @ (B, A, K, N) -> (B, A, N, N)
    watch("scores", scores)
    weights = softmax(scores)
    watch("softmax", weights)
    mixed = (weights @ v).swapaxes(1, 2).reshape(b, n, d)  # concatenates the heads
    watch("mix", mixed)
    y = linear(mixed, w.output)
    watch("output", y)
    return y, SavedAttention(x, q, k, v, weights, mixed)


def attention_backward(d_y: Array, saved: SavedAttention, w: Attention) -> tuple[Array, Attention]:
    """The same steps in reverse. The gradient of each factor of a product is a product with the other, transposed."""
    b, heads, n, width = saved.q.shape
    d_mixed, d_output = linear_backward(d_y, saved.mixed, w.output)
    d_mixed = d_mixed.reshape(b, n, heads, width).swapaxes(1, 2)  # (B, A, N, K)
    d_scores = softmax_backward(d_mixed @ saved.v.swapaxes(-1, -2), saved.weights)
    d_qkv = np.empty((b, n, 3, heads, width), d_y.dtype)
    d_q, d_k, d_v = d_qkv.transpose(2, 0, 3, 1, 4)  # views of it, each (B, A, N, K)
    d_q[...] = d_scores @ saved.k
    d_q *= d_y.dtype.type(1 / sqrt(width))
    d_k[...] = d_scores.swapaxes(-1, -2) @ saved.q
    d_v[...] = saved.weights.swapaxes(-1, -2) @ d_mixed
    d_x, d_w = linear_backward(d_qkv.reshape(b, n, -1), saved.x, w.qkv)
    return d_x, Attention(d_w, d_output)
