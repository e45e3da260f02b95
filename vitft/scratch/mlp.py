"""The MLP of a block: each token by itself, widened, bent, and narrowed again."""

from dataclasses import dataclass

from vitft.scratch.tensors import (
    Array,
    Linear,
    Watch,
    activation_backward,
    gelu,
    gelu_tanh,
    linear,
    linear_backward,
    relu,
    unwatched,
)

_ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


@dataclass
class MLP:
    """inner (M, D) and outer (D, M)."""

    inner: Linear
    outer: Linear


@dataclass
class SavedMLP:
    """What `mlp_backward` needs."""

    x: Array
    slope: Array
    bent: Array


def mlp(x: Array, w: MLP, activation: str, watch: Watch = unwatched) -> tuple[Array, SavedMLP]:
    """y = outer(activation(inner(x))); x and y are (B, N, D) (Dosovitskiy et al. 2020, eq. 3)."""
    hidden = linear(x, w.inner)
    watch("in", hidden)
    bent, slope = _ACTIVATIONS[activation](hidden)
    watch("activation", bent)
    y = linear(bent, w.outer)
    watch("out", y)
    return y, SavedMLP(x, slope, bent)


def mlp_backward(d_y: Array, saved: SavedMLP, w: MLP) -> tuple[Array, MLP]:
    """The gradient of x, and those of the weights."""
    d_bent, d_outer = linear_backward(d_y, saved.bent, w.outer)
    d_x, d_inner = linear_backward(activation_backward(d_bent, saved.slope), saved.x, w.inner)
    return d_x, MLP(d_inner, d_outer)
