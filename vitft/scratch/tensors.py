"""The operations of a ViT on arrays, each next to its backward pass.

Arrays are (..., D): operations treat every row along the last axis alike. No operation changes its input. The result
has the dtype of the input.
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
"""A hook, called with the name of each stage, as in `vitft.spec.stages`, and the array it produced."""


def no_watch(name: str, array: Array) -> None:
    """A Watch that does nothing."""


# -- linear ---------------------------------------------------------------------------------------


@dataclass
class Linear:
    """Weights of a linear layer: weight (out, in) and bias (out) or None, the shapes that torch uses."""

    weight: Array
    bias: Array | None = None


def linear(x: Array, w: Linear) -> Array:
    """y = x Wᵀ + b: (..., in) to (..., out). The backward pass needs x."""
    y = x.reshape(-1, x.shape[-1]) @ w.weight.T  # one large product instead of one per image
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
    """y_i = exp(x_i) / Σ_j exp(x_j) along the last axis. The backward pass needs y.

    Subtracting one number from a whole row does not change the result. The row's maximum is subtracted only when exp
    could overflow, or a whole row underflow to 0, because finding it costs more than everything else here.
    """
    safe = x.min() > -80 and x.max() < 80  # exp(80) is 5e34; the largest float32 is 3e38
    y: Array = np.exp(x) if safe else np.exp(x - x.max(axis=-1, keepdims=True))
    y /= row_sums(y)
    return y


def softmax_backward(d_y: Array, y: Array) -> Array:
    """dx_i = y_i (dy_i − Σ_j dy_j y_j): raising one score lowers all the other probabilities."""
    d_x = d_y - row_dots(d_y, y)
    d_x *= y
    return d_x


def row_sums(x: Array) -> Array:
    """Σ_j x_j along the last axis, which stays with length 1. On short rows einsum is faster than sum."""
    sums: Array = np.einsum("...j->...", x)
    return sums[..., None]


def row_dots(x: Array, y: Array) -> Array:
    """Σ_j x_j y_j along the last axis, which stays with length 1; the product itself is never stored."""
    dots: Array = np.einsum("...j,...j->...", x, y)
    return dots[..., None]


# -- layer norm (Ba et al. 2016, "Layer Normalization", eq. 4) --------------------------------------


@dataclass
class Norm:
    """Weights of a layer norm: scale and shift, each (D)."""

    scale: Array
    shift: Array


@dataclass
class SavedNorm:
    """normed: the rows with mean 0 and variance 1; inverse_std (..., 1): 1 / sqrt(variance + eps) of each row."""

    normed: Array
    inverse_std: Array


def layer_norm(x: Array, w: Norm, eps: float) -> tuple[Array, SavedNorm]:
    """y = (x − mean) / sqrt(variance + eps) · scale + shift, for each token on its own."""
    width = x.shape[-1]
    normed = x - row_sums(x) / width
    inverse_std = 1 / np.sqrt(row_dots(normed, normed) / width + eps)
    normed *= inverse_std
    return normed * w.scale + w.shift, SavedNorm(normed, inverse_std)


def layer_norm_backward(d_y: Array, saved: SavedNorm, w: Norm) -> tuple[Array, Norm]:
    """With n = normed and dn = dy · scale: dx = (dn − mean(dn) − n · mean(dn · n)) / std.

    The two means are what dn loses because a row's own mean and variance move with the row.
    """
    normed, width = saved.normed, d_y.shape[-1]
    rows = (-1, width)
    d_scale = np.einsum("rj,rj->j", d_y.reshape(rows), normed.reshape(rows))
    d_w, d_normed = Norm(d_scale, d_y.reshape(rows).sum(axis=0)), d_y * w.scale
    d_x = d_normed - row_sums(d_normed) / width
    d_x -= normed * (row_dots(d_normed, normed) / width)
    d_x *= saved.inverse_std
    return d_x, d_w


# -- activations: each returns y and its slope dy/dx -----------------------------------------------


def relu(x: Array) -> tuple[Array, Array]:
    """y = max(x, 0). The slope is 1 where x is above 0, else 0."""
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def gelu(x: Array) -> tuple[Array, Array]:
    """y = x Φ(x), where Φ(x) = (1 + erf(x / √2)) / 2 (Hendrycks & Gimpel 2016, eq. 2).

    Φ is the normal distribution function. The slope is Φ(x) + x φ(x), where φ is the normal density.
    """
    cdf = erf(x * (1 / sqrt(2)))
    cdf += 1
    cdf *= 0.5
    slope = x * x
    slope *= -0.5
    np.exp(slope, out=slope)
    slope *= x
    slope *= 1 / sqrt(2 * pi)
    slope += cdf
    return x * cdf, slope


def gelu_tanh(x: Array) -> tuple[Array, Array]:
    """y = x (1 + t) / 2, t = tanh(√(2/π) (x + 0.044715 x³)) (Hendrycks & Gimpel 2016, section 2).

    The slope is (1 + t) / 2 + x (1 − t²) / 2 · √(2/π) (1 + 3 · 0.044715 x²). Powers are written as products, which
    are faster in NumPy.
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


ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def activation_backward(d_y: Array, slope: Array) -> Array:
    """dx = dy · dy/dx, elementwise: the chain rule for one input and one output."""
    return d_y * slope


# -- dropout (Srivastava et al. 2014) ---------------------------------------------------------------


def dropout_mask(shape: tuple[int, ...], rate: float, rng: np.random.Generator, dtype: Any = np.float64) -> Array:
    """0 with probability `rate`, else 1 / (1 − rate), for each element.

    The rate is rounded to a multiple of 1 / 65,536 below 1.
    """
    threshold = min(round(rate * 2**16), 2**16 - 1)
    words = rng.integers(0, 2**64, size=-(-prod(shape) // 4), dtype=np.uint64)  # 64 random bits serve four elements
    mask = (words.view(np.uint16)[: prod(shape)].reshape(shape) >= threshold).astype(dtype)
    mask *= 2**16 / (2**16 - threshold)
    return mask


def dropout(x: Array, mask: Array | None) -> Array:
    """y = x · mask, whose expected value is x; y = x without a mask. Applied to d_y, it is its own backward pass."""
    return x if mask is None else x * mask
