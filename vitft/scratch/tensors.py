"""The operations of a ViT on arrays, each beside its backward.

Arrays are (..., D): whatever stands before the last axis, every row is treated alike. No operation
changes its input. The dtype of the input is the dtype of the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

Array: TypeAlias = NDArray[np.floating[Any]]
Watch: TypeAlias = Callable[[str, Array], None]
"""Called with the name of a stage, as in `vitft.spec.stages`, and the array that it made."""


def unwatched(name: str, array: Array) -> None:
    """The Watch that looks at nothing."""


# -- linear ---------------------------------------------------------------------------------------


@dataclass
class Linear:
    """Weights of an affine map: weight (out, in), bias (out) or none. Stored as torch stores them."""

    weight: Array
    bias: Array | None = None


def linear(x: Array, w: Linear) -> Array:
    """y = x Wᵀ + b: (..., in) to (..., out). Its backward needs x."""
    y = x.reshape(-1, x.shape[-1]) @ w.weight.T  # one large product, not one for each image
    if w.bias is not None:
        y += w.bias
    return y.reshape(*x.shape[:-1], len(w.weight))


def linear_backward(d_y: Array, x: Array, w: Linear) -> tuple[Array, Linear]:
    """dx = dy W, dW = dyᵀ x, db = the sum of dy over all rows."""
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_w = Linear(d_rows.T @ rows, None if w.bias is None else d_rows.sum(axis=0))
    return (d_rows @ w.weight).reshape(x.shape), d_w


# -- softmax --------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    """y_i = exp(x_i) / Σ_j exp(x_j) along the last axis. Its backward needs y.

    What is subtracted from a whole row first does not change the result. Where exp could overflow, or
    every term of a row vanish, it is the row's largest x; finding that costs more than all the rest.
    """
    safe = x.min() > -80 and x.max() < 80  # exp(80) is 5e34, and float32 ends at 3e38
    y: Array = np.exp(x) if safe else np.exp(x - x.max(axis=-1, keepdims=True))
    y /= row_sums(y)
    return y


def softmax_backward(d_y: Array, y: Array) -> Array:
    """dx_i = y_i (dy_i − Σ_j dy_j y_j): raising one score lowers all other shares."""
    d_x = d_y - row_dots(d_y, y)
    d_x *= y
    return d_x


def row_sums(x: Array) -> Array:
    """Σ_j x_j along the last axis, which stays with length 1. einsum is faster than sum on short rows."""
    sums: Array = np.einsum("...j->...", x)
    return sums[..., None]


def row_dots(x: Array, y: Array) -> Array:
    """Σ_j x_j y_j along the last axis, which stays with length 1; the product is never stored."""
    dots: Array = np.einsum("...j,...j->...", x, y)
    return dots[..., None]


# -- layer norm (Ba et al. 2016, "Layer Normalization", eq. 4) --------------------------------------


@dataclass
class Norm:
    """Affine part of a layer norm: scale and shift, each (D)."""

    scale: Array
    shift: Array


@dataclass
class SavedNorm:
    """normed: the rows with mean 0 and variance 1; inverse_std: what each centred row was multiplied by."""

    normed: Array
    inverse_std: Array


def layer_norm(x: Array, w: Norm | None, eps: float) -> tuple[Array, SavedNorm]:
    """y = (x − mean) / sqrt(variance + eps) · scale + shift, each token by itself; w None: neither of them."""
    width = x.shape[-1]
    normed = x - row_sums(x) / width
    inverse_std = 1 / np.sqrt(row_dots(normed, normed) / width + eps)
    normed *= inverse_std
    saved = SavedNorm(normed, inverse_std)
    return (normed if w is None else normed * w.scale + w.shift), saved


def layer_norm_backward(d_y: Array, saved: SavedNorm, w: Norm | None) -> tuple[Array, Norm | None]:
    """With n = normed and dn = dy · scale: dx = (dn − mean(dn) − n · mean(dn · n)) / std.

    The two means are what dn loses because a row's own mean and variance move with it.
    """
    normed, width = saved.normed, d_y.shape[-1]
    d_w, d_normed = None, d_y
    if w is not None:
        rows = (-1, width)
        d_scale = np.einsum("rj,rj->j", d_y.reshape(rows), normed.reshape(rows))
        d_w, d_normed = Norm(d_scale, d_y.reshape(rows).sum(axis=0)), d_y * w.scale
    d_x = d_normed - row_sums(d_normed) / width
    d_x -= normed * (row_dots(d_normed, normed) / width)
    d_x *= saved.inverse_std
    return d_x, d_w


# -- activations ----------------------------------------------------------------------------------


def relu(x: Array) -> tuple[Array, Array]:
    """y = max(x, 0). Its backward needs the slope: 1 where x is above 0, else 0."""
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def gelu(x: Array) -> tuple[Array, Array]:
    """y = x Φ(x), where Φ(x) = (1 + erf(x / √2)) / 2 (Hendrycks & Gimpel 2016, eq. 2).

    Φ is the normal distribution's. Its backward needs the slope Φ(x) + x φ(x), φ the normal density.
    """
    share = erf(x * (1 / sqrt(2)))
    share += 1
    share *= 0.5
    slope = x * x
    slope *= -0.5
    np.exp(slope, out=slope)
    slope *= x
    slope *= 1 / sqrt(2 * pi)
    slope += share
    return x * share, slope


def gelu_tanh(x: Array) -> tuple[Array, Array]:
    """y = x (1 + t) / 2, t = tanh(√(2/π) (x + 0.044715 x³)) (Hendrycks & Gimpel 2016, section 2).

    The slope is (1 + t) / 2 + x (1 − t²) / 2 · √(2/π) (1 + 3 · 0.044715 x²). Products, for powers are slow.
    """
    square = x * x
    t = square * 0.044715
    t += 1
    t *= x
    t *= sqrt(2 / pi)
    np.tanh(t, out=t)
    inner = square
    inner *= 3 * 0.044715
    inner += 1
    inner *= x
    inner *= sqrt(2 / pi) / 2
    slope = 1 - t * t
    slope *= inner
    t += 1
    t *= 0.5
    slope += t
    t *= x
    return t, slope


def activation_backward(d_y: Array, slope: Array) -> Array:
    """dx = dy · dy/dx, number by number: the chain rule with nothing mixed."""
    return d_y * slope


# -- dropout (Srivastava et al. 2014) ---------------------------------------------------------------


def dropout_mask(shape: tuple[int, ...], rate: float, rng: np.random.Generator, dtype: Any = np.float64) -> Array:
    """1 / (1 − rate) where a number stays, which has probability 1 − rate, and 0 where it is dropped.

    The rate is rounded to a 65,536th, but never to 1.
    """
    below = min(round(rate * 2**16), 2**16 - 1)
    words = rng.integers(0, 2**64, size=-(-prod(shape) // 4), dtype=np.uint64)  # one draw decides on four numbers
    mask = (words.view(np.uint16)[: prod(shape)].reshape(shape) >= below).astype(dtype)
    mask *= 2**16 / (2**16 - below)
    return mask


def dropout(x: Array, mask: Array | None) -> Array:
    """y = x · mask, so that the expected y is x; without a mask y = x. It is its own backward."""
    return x if mask is None else x * mask
