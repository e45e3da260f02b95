"""The whole model against torch's autograd, central differences, and the arithmetic of the spec."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scratch.gradients import along, random_weights, relative, specs
from vitft.scratch.heads import cross_entropy, cross_entropy_backward
from vitft.scratch.tensors import Array
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.vit import ViT, dropout_masks, init_weights, map_arrays, named_arrays, vit, vit_backward
from vitft.spec import PRESETS, ViTSpec, stages, total

SMALL = ViTSpec.square(6, 3, 8, 2, 2, 12, 4, channels=1)


def batch(
    spec: ViTSpec, images: int = 2, dropout: float = 0.0, seed: int = 5
) -> tuple[Array, Array, list[Array] | None]:
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((images, spec.channels, spec.image_height, spec.image_width))
    return pixels, rng.integers(0, spec.classes, images), dropout_masks(spec, images, dropout, rng, np.float64)


def gradients(spec: ViTSpec, w: ViT, images: Array, labels: Array, masks: list[Array] | None) -> tuple[Array, ViT]:
    logits, saved = vit(images, w, spec, masks)
    _, saved_loss = cross_entropy(logits, labels, 0.1)
    return vit_backward(cross_entropy_backward(saved_loss), saved, w, spec)


@settings(max_examples=25, deadline=None)
@given(specs(smooth=True), st.sampled_from([0.0, 0.3]))
def test_backward_equals_the_numerical_gradient(spec: ViTSpec, dropout: float) -> None:
    w = random_weights(spec)
    images, labels, masks = batch(spec, 2, dropout)

    def value() -> float:
        return cross_entropy(vit(images, w, spec, masks)[0], labels, 0.1)[0]

    d_images, d_w = gradients(spec, w, images, labels, masks)
    # Some gradients are nothing but rounding: softmax ignores a bias of the keys.
    floor = 1e-3 * max(0.1, np.sqrt(sum(np.sum(d**2) for _, d in named_arrays(d_w))))
    rng = np.random.default_rng(1)
    weights = zip(named_arrays(w), named_arrays(d_w), strict=True)
    for (name, array), (gradient_name, gradient) in [(("images", images), ("images", d_images)), *weights]:
        assert name == gradient_name
        # A random direction involves every number at the cost of four passes; single numbers would take four each.
        for _ in range(2):
            direction = rng.standard_normal(array.shape)
            direction /= np.linalg.norm(direction)
            difference = abs(np.sum(gradient * direction) - along(value, array, direction))
            assert difference <= 1e-6 * max(np.linalg.norm(gradient), floor), name


@settings(max_examples=60, deadline=None)
@given(specs(), st.sampled_from([0.0, 0.3]))
def test_forward_and_backward_equal_torch(spec: ViTSpec, dropout: float) -> None:
    w = random_weights(spec)
    images, labels, masks = batch(spec, 3, dropout)
    d_images, d_w = gradients(spec, w, images, labels, masks)

    model = TorchViT(spec).load(w)
    pixels = torch.from_numpy(images).requires_grad_()
    logits = model(pixels, [torch.from_numpy(mask) for mask in masks] if masks else None)
    assert relative(vit(images, w, spec, masks)[0], logits.detach().numpy()) <= 1e-12
    F.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=0.1).backward()
    scale = np.sqrt(sum(np.sum(d**2) for _, d in named_arrays(d_w)))
    assert relative(d_images, pixels.grad.numpy(), floor=1e-3 * scale) <= 1e-10
    for (name, ours), (_, theirs) in zip(named_arrays(d_w), named_arrays(model.weights(gradients=True)), strict=True):
        assert relative(ours, theirs, floor=1e-3 * scale) <= 1e-10, name


@settings(max_examples=40, deadline=None)
@given(specs(), st.integers(1, 3))
def test_every_stage_has_the_shape_in_the_spec(spec: ViTSpec, images: int) -> None:
    expected = {stage.name: stage.output for stage in stages(spec, images)}
    w, pixels = random_weights(spec), batch(spec, images)[0]
    shapes: dict[str, tuple[int, ...]] = {}
    vit(pixels, w, spec, watch=lambda name, array: shapes.update({name: array.shape}))
    assert shapes == expected
    assert list(shapes) == list(expected)
    torch_shapes: dict[str, tuple[int, ...]] = {}
    TorchViT(spec).load(w).watched_by(lambda name, array: torch_shapes.update({name: array.shape}))(
        torch.from_numpy(pixels)
    )
    assert torch_shapes == expected
    assert list(torch_shapes) == list(expected)


@settings(max_examples=40, deadline=None)
@given(specs())
def test_the_spec_counts_all_parameters(spec: ViTSpec) -> None:
    count = sum(array.size for _, array in named_arrays(init_weights(spec, np.random.default_rng(0))))
    assert count == total(spec).parameters
    assert count == sum(parameter.numel() for parameter in TorchViT(spec).parameters())


def test_stages_equal_those_of_torch() -> None:
    for norm in ("pre", "post"):
        spec = replace(SMALL, norm=norm, pre_logits=5)
        w, pixels = random_weights(spec), batch(spec)[0]
        ours: dict[str, Array] = {}
        theirs: dict[str, Array] = {}
        vit(pixels, w, spec, watch=lambda name, array: ours.update({name: array.copy()}))  # noqa: B023
        TorchViT(spec).load(w).watched_by(lambda name, array: theirs.update({name: array.copy()}))(  # noqa: B023
            torch.from_numpy(pixels)
        )
        for name, array in ours.items():
            assert relative(array, theirs[name]) <= 1e-12, name


def test_named_arrays_and_map_arrays() -> None:
    w = init_weights(SMALL, np.random.default_rng(0))
    names = [name for name, _ in named_arrays(w)]
    assert len(set(names)) == len(names)
    assert "blocks.1.attention.qkv.weight" in names
    doubled = map_arrays(w, lambda array: 2 * array)
    assert type(doubled) is ViT
    assert all(
        np.array_equal(result, 2 * array)
        for (_, result), (_, array) in zip(named_arrays(doubled), named_arrays(w), strict=True)
    )


def test_initial_weights_depend_on_the_seed_and_give_logits_of_0() -> None:
    first, repeated = (init_weights(SMALL, np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(named_arrays(first), named_arrays(repeated), strict=True))
    logits, _ = vit(batch(SMALL)[0].astype(np.float32), first, SMALL)
    assert not logits.any()
    assert {array.dtype for _, array in named_arrays(first)} == {np.dtype(np.float32)}


def test_the_order_of_the_patches_matters_only_with_positions() -> None:
    spec = replace(SMALL, pooling="mean", prefix_tokens=0)
    w, (pixels, *_) = random_weights(spec), batch(spec)
    halves = np.concatenate([pixels[..., 3:], pixels[..., :3]], axis=-1)
    assert relative(vit(pixels, w, spec)[0], vit(halves, w, spec)[0]) > 1e-3
    assert w.embedding.positions is not None
    w.embedding.positions[:] = 0
    assert relative(vit(pixels, w, spec)[0], vit(halves, w, spec)[0]) <= 1e-11


@pytest.mark.parametrize("name", ["vit-micro", "vit-tiny", "vit-small-patch14-224"])
def test_parameter_counts_of_presets(name: str) -> None:
    spec = PRESETS[name]
    assert sum(parameter.numel() for parameter in TorchViT(spec).parameters()) == total(spec).parameters
