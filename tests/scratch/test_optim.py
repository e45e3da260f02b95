"""Optimizers against torch.optim, and the values of the learning rate schedules."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.scratch.gradients import random_weights, relative
from vitft.scratch.optim import SGD, Adam, decays, lr_at
from vitft.scratch.vit import named_arrays
from vitft.spec import ViTSpec

SHAPES = {"blocks.0.mlp.inner.weight": (4, 3), "blocks.0.mlp.inner.bias": (4,), "norm.scale": (3,)}
SHRUNK = {name for name in SHAPES if name.endswith(".weight")}


def torch_optimizer(kind: str, weights: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    if kind == "adamw":
        groups: list[dict[str, Any]] = [
            {"params": [weights[name] for name in SHAPES if (name in SHRUNK) == shrunk], "weight_decay": decay}
            for shrunk, decay in ((True, 0.1), (False, 0.0))
        ]
        return torch.optim.AdamW(groups)
    if kind == "adam":
        return torch.optim.Adam(weights.values())
    return torch.optim.SGD(weights.values(), momentum=0.9 if kind == "momentum" else 0.0)


OURS = {"sgd": SGD(), "momentum": SGD(0.9), "adam": Adam(), "adamw": Adam(0.1)}


@pytest.mark.parametrize("kind", OURS)
def test_twenty_steps_equal_torch(kind: str) -> None:
    """Up to 1e-12, because torch fuses some products and sums."""
    rng = np.random.default_rng(1)
    ours = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    theirs = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in ours.items()}
    before = {name: array.copy() for name, array in ours.items()}
    optimizer = torch_optimizer(kind, theirs)
    for step in range(20):
        lr = 0.1 / (step + 1)
        # Gradients of very different sizes, so that Adam's eps and its bias corrections matter.
        gradients = {name: 10.0 ** rng.integers(-9, 2) * rng.standard_normal(shape) for name, shape in SHAPES.items()}
        for name, tensor in theirs.items():
            tensor.grad = torch.from_numpy(gradients[name].copy())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        OURS[kind].update(ours, gradients, lr)
        for name, array in ours.items():
            assert relative(array, theirs[name].detach().numpy()) <= 1e-12, (step, name)
    assert all(relative(array, before[name]) > 1e-3 for name, array in ours.items())


def test_weights_change_in_place_and_gradients_do_not() -> None:
    for optimizer in (SGD(0.9), Adam(0.1)):
        weight, gradient = np.ones(2), np.ones(2)
        optimizer.update({"a.weight": weight}, {"a.weight": gradient}, 0.5)
        optimizer.update({"a.weight": weight}, {"a.weight": gradient}, 0.5)
        assert (weight < 1).all()
        assert (gradient == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers_keep_the_dtype_of_the_weights(dtype: Any) -> None:
    for optimizer in (SGD(0.9), Adam(0.1)):
        weight = np.ones(2, dtype)
        optimizer.update({"a.weight": weight}, {"a.weight": np.ones(2, dtype)}, 0.1)
        states = optimizer.velocity if isinstance(optimizer, SGD) else optimizer.m | optimizer.v
        assert {weight.dtype, *(state.dtype for state in states.values())} == {np.dtype(dtype)}


def test_only_matrices_and_kernels_decay() -> None:
    w = random_weights(ViTSpec.square(6, 3, 8, 1, 2, 12, 4, pre_logits=5))
    shrunk = {name for name, _ in named_arrays(w) if decays(name)}
    assert shrunk == {
        "embedding.projection.weight", "blocks.0.attention.qkv.weight", "blocks.0.attention.output.weight",
        "blocks.0.mlp.inner.weight", "blocks.0.mlp.outer.weight", "head.pre_logits.weight", "head.logits.weight",
    }  # fmt: skip
    weights = dict(named_arrays(w))
    before = {name: array.copy() for name, array in weights.items()}
    Adam(weight_decay=0.5).update(weights, {name: np.zeros_like(array) for name, array in weights.items()}, lr=0.1)
    assert {name for name, array in weights.items() if not np.array_equal(array, before[name])} == shrunk
    assert relative(weights["head.logits.weight"], before["head.logits.weight"] * (1 - 0.1 * 0.5)) <= 1e-12


def test_warmup_rises_in_equal_steps_to_below_the_peak() -> None:
    rates = [lr_at(step, 1.0, 100, warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], abs=1e-12)


def test_step_schedule_decays_once() -> None:
    rates = [lr_at(step, 0.01, 30, 2, "step", decay_step=10, decay_factor=0.1) for step in range(30)]
    assert rates[:2] == pytest.approx([0.01 / 3, 0.02 / 3])
    assert rates[2:10] == [0.01] * 8
    assert rates[10:] == pytest.approx([0.001] * 20)


def test_cosine_schedule_falls_to_0_one_step_after_the_last() -> None:
    rates = [lr_at(step, 1.0, 50, 10, "cosine") for step in range(10, 51)]
    assert rates[0] == 1.0
    assert rates[20] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_constant_schedule() -> None:
    assert {lr_at(step, 0.3, 10) for step in range(10)} == {0.3}
