"""The MLP of a block: two linear layers with an activation between them, applied to each token on its own."""

from dataclasses import dataclass

from vitft.scratch.tensors import (
    ACTIVATIONS,
    Array,
    Linear,
    Watch,
    activation_backward,
    linear,
    linear_backward,
    no_watch,
)


@dataclass
class MLP:
    """inner: weight (M, D), bias (M); outer: weight (D, M), bias (D)."""

    inner: Linear
    outer: Linear


@dataclass
class SavedMLP:
    """What `mlp_backward` needs: the input x, and of the activation its slope and its result, both (B, N, M)."""

    x: Array
    slope: Array
    activated: Array


def mlp(x: Array, w: MLP, activation: str, watch: Watch = no_watch) -> tuple[Array, SavedMLP]:
    """y = outer(activation(inner(x))); x and y are (B, N, D) (Dosovitskiy et al. 2020, eq. 3)."""
    hidden = linear(x, w.inner)
    watch("in", hidden)
    activated, slope = ACTIVATIONS[activation](hidden)
    watch("activation", activated)
    y = linear(activated, w.outer)
    watch("out", y)
    return y, SavedMLP(x, slope, activated)


def mlp_backward(d_y: Array, saved: SavedMLP, w: MLP) -> tuple[Array, MLP]:
    """Gradients of x and of the weights."""
    d_activated, d_outer = linear_backward(d_y, saved.activated, w.outer)
    d_x, d_inner = linear_backward(activation_backward(d_activated, saved.slope), saved.x, w.inner)
    return d_x, MLP(d_inner, d_outer)
