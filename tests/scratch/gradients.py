"""Numerical gradients, random weights and random small specs for the tests of the textbook."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from vitft.scratch.tensors import Array
from vitft.scratch.vit import ViT, init_weights, map_arrays
from vitft.spec import ViTSpec


def along(loss: Callable[[], float], array: Array, direction: Array, step: float = 3e-5) -> float:
    """The directional derivative of the loss, by central differences over one step and two, with an error of O(step⁴).

    One step alone, with an error of O(step²), is not enough: a layer norm of few numbers is sharply curved.
    """
    before, losses = array.copy(), {}
    for steps in (-2, -1, 1, 2):
        array[...] = before + steps * step * direction
        losses[steps] = loss()
    array[...] = before
    return (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)


def numerical(loss: Callable[[], float], array: Array, step: float = 3e-5) -> Array:
    """d loss / d array, elementwise."""
    gradient, direction = np.zeros_like(array), np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        direction[index] = 1
        gradient[index] = along(loss, array, direction, step)
        direction[index] = 0
    return gradient


def relative(actual: Array, expected: Array, floor: float = 0.0) -> float:
    """Norm of the difference of two arrays, relative to the larger norm (or to the floor)."""
    largest = max(np.linalg.norm(actual), np.linalg.norm(expected), floor, 1e-300)
    return float(np.linalg.norm(actual - expected) / largest)


def random_weights(spec: ViTSpec, seed: int = 0, std: float = 0.3) -> ViT:
    """Weights in float64, none of them 0 or 1: at such values a missing term would go unnoticed."""
    rng = np.random.default_rng(seed)
    return map_arrays(init_weights(spec, rng, np.float64), lambda array: array + std * rng.standard_normal(array.shape))


@st.composite
def specs(draw: st.DrawFn, smooth: bool = False, channels: int | None = None) -> ViTSpec:
    """Small ViTs of every kind: overlapping and padded patches, non-square images, both poolings and norms.

    With `smooth`, never relu: numerical gradients may step across its corner.
    """
    sides = {}
    padding = draw(st.integers(0, 1))
    for axis in ("height", "width"):
        patch = draw(st.integers(padding + 1, 3))
        stride = draw(st.integers(1, patch))
        steps = draw(st.integers(max(0, -(-(1 + 2 * padding - patch) // stride)), 3))
        sides |= {f"patch_{axis}": patch, f"stride_{axis}": stride}
        sides[f"image_{axis}"] = patch + steps * stride - 2 * padding
    heads = draw(st.integers(1, 3))
    pooling = draw(st.sampled_from(["cls", "mean"]))
    return ViTSpec(
        **sides, padding=padding, channels=channels or draw(st.integers(1, 3)), heads=heads,
        width=heads * draw(st.integers(1, 3)), layers=draw(st.integers(1, 2)), mlp=draw(st.integers(1, 5)),
        classes=draw(st.integers(2, 4)), pooling=pooling,
        prefix_tokens=draw(st.integers(1 if pooling == "cls" else 0, 2)),
        pre_logits=draw(st.none() | st.integers(1, 4)), qkv_bias=draw(st.booleans()),
        positions=draw(st.sampled_from(["learned", "sinusoidal", "sinusoidal_2d"])),
        norm=draw(st.sampled_from(["pre", "post"])),
        final_norm=draw(st.booleans()), norm_eps=1e-3,
        activation=draw(st.sampled_from(["gelu", "gelu_tanh"] + ([] if smooth else ["relu"]))),
    )  # fmt: skip
