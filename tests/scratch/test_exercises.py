"""Answers to the exercises of docs/textbook.md: one test per exercise, in the order of the book."""

from math import log

import numpy as np
import torch
import torch.nn.functional as F

from tests.scratch.gradients import random_weights, relative
from vitft.scratch.attention import attention
from vitft.scratch.augment import crop, flip
from vitft.scratch.embedding import sinusoidal_positions
from vitft.scratch.encoder import block, block_backward
from vitft.scratch.heads import cross_entropy, cross_entropy_backward
from vitft.scratch.interop import to_transformers
from vitft.scratch.mlp import MLP, mlp
from vitft.scratch.optim import Adam
from vitft.scratch.patchify import windows_backward
from vitft.scratch.scalar import Scalar
from vitft.scratch.scalar_vit import PATTERNS, TINY, forward, init_parameters, scalars
from vitft.scratch.tensors import (
    Array,
    Linear,
    Norm,
    layer_norm,
    layer_norm_backward,
    linear,
    softmax,
    softmax_backward,
)
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.vit import ViT, map_arrays, named_arrays, vit, vit_backward
from vitft.spec import ViTSpec

SPEC = ViTSpec.square(image_size=8, patch_size=4, width=12, layers=2, heads=3, mlp=16, classes=4)
IMAGES = np.random.default_rng(1).standard_normal((5, 3, 8, 8))
LABELS = np.array([0, 1, 2, 3, 1])


def gradients(images: Array, labels: Array, w: ViT) -> tuple[float, Array, ViT]:
    """The mean loss of some images, and its gradients with respect to their pixels and to all weights."""
    logits, saved = vit(images, w, SPEC)
    loss, saved_loss = cross_entropy(logits, labels)
    return loss, *vit_backward(cross_entropy_backward(saved_loss), saved, w, SPEC)


def test_twenty_doublings_have_a_million_paths_but_twenty_nodes() -> None:
    def paths(node: Scalar, leaf: Scalar) -> int:
        return 1 if node is leaf else sum(paths(parent, leaf) for parent in node.parents)

    x = Scalar(1.0)
    y, after_ten = x, x
    for step in range(20):
        y = y + y
        after_ten = y if step == 9 else after_ten
    # Each doubling gives every path a choice of two edges, so walking the paths one by one soon becomes hopeless ...
    assert paths(after_ten, x) == 2**10
    # ... but a node whose gradient is complete is visited only once, on behalf of all paths from the result to it.
    y.backward()
    assert len(y.topological_order()) == 20
    assert x.grad == 2**20


def test_without_positions_all_four_patterns_look_the_same() -> None:
    images = [
        [[[0.6 if bright(row, column) else -0.6 for column in range(6)] for row in range(6)]]
        for bright in PATTERNS.values()
    ]
    p = init_parameters(TINY, seed=42)
    answers = [[logit.value for logit in forward(p, TINY, image)[0]] for image in images]
    for position in scalars(p["embedding.positions"]):
        position.value = 0.0
    without = [[logit.value for logit in forward(p, TINY, image)[0]] for image in images]
    # Each image has two bright patches and two dark ones. As sets of patches, all four images are the same, so no
    # pair can be told apart, whatever the weights are.
    assert np.ptp(without, axis=0).max() < 1e-12
    assert np.ptp(answers, axis=0).max() > 0.01


def test_layer_norm_ignores_shift_and_scale_and_so_does_its_gradient() -> None:
    rng = np.random.default_rng(0)
    x, d_y = rng.standard_normal((3, 16)), rng.standard_normal((3, 16))
    w = Norm(rng.standard_normal(16), rng.standard_normal(16))
    y, saved = layer_norm(x, w, eps=0.0)
    assert np.allclose(layer_norm(x + 1, w, eps=0.0)[0], y)
    assert np.allclose(layer_norm(2 * x, w, eps=0.0)[0], y)
    # Two ways of changing x leave y unchanged, so the loss has no slope in these directions: the sum of d_x, which is
    # the slope along (1, ..., 1), is 0, and so is the dot product of d_x with the centered x, along which x is scaled.
    d_x, _ = layer_norm_backward(d_y, saved, w)
    centered = x - x.mean(axis=1, keepdims=True)
    assert np.allclose(d_x.sum(axis=1), 0)
    assert np.allclose((d_x * centered).sum(axis=1), 0)
    assert np.abs(d_x).max() > 0.1


def test_with_half_a_stride_inner_pixels_are_in_four_patches() -> None:
    sizes = {"width": 8, "heads": 2, "layers": 1, "mlp": 8, "classes": 2, "channels": 1}
    spec = ViTSpec(image_height=28, image_width=28, patch_height=4, patch_width=4, stride_height=2, stride_width=2,
                   **sizes)  # fmt: skip
    # A patch starts at 0, 2, ..., 24: 13 starts down and 13 across.
    assert spec.grid == (13, 13)
    assert spec.patches == 169
    # If every number of every patch has a gradient of 1, a pixel's gradient is the number of patches it is in.
    counts = windows_backward(np.ones((1, spec.patches, 16)), spec)[0, 0]
    assert counts[0, 0] == counts[27, 27] == 1
    assert counts[0, 14] == 2
    assert counts[14, 14] == 4
    assert counts.sum() == 169 * 16


def test_equal_distances_are_equal_rotations() -> None:
    positions = sinusoidal_positions(50, 64)
    pairs = positions.reshape(50, 32, 2)  # (sin, cos) of one clock: a unit vector
    assert np.allclose(np.linalg.norm(pairs, axis=2), 1)
    # The dot product of two unit vectors is the cosine of their angle, which depends only on the distance.
    products = positions @ positions.T
    for distance in (1, 5, 20):
        along = np.diagonal(products, distance)
        assert np.allclose(along, along[0])
    # Three tokens further, clock i has turned by 3 / 10000^(2i / D) from any starting point: one matrix for all.
    angle = 3 / 10000 ** (2 * np.arange(32) / 64)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    assert np.allclose(np.einsum("abi,nib->nia", turn, pairs[:-3]), pairs[3:])


def test_without_the_division_softmax_saturates_and_its_gradient_vanishes() -> None:
    rng = np.random.default_rng(0)
    results = {}
    for width in (4, 64, 1024):
        q, k, d_y = rng.standard_normal((400, width)), rng.standard_normal((50, width)), rng.standard_normal((400, 50))
        scores = q @ k.T
        # A score is a sum of K products, each of variance 1.
        assert abs(scores.var() / width - 1) < 0.2
        for name, logits in (("plain", scores), ("divided", scores / np.sqrt(width))):
            weights = softmax(logits)
            results[width, name] = weights.max(axis=1).mean(), np.abs(softmax_backward(d_y, weights)).mean()
    # Without the division, wide heads give nearly all weight to one token, and the gradient through softmax vanishes.
    assert results[1024, "plain"][0] > 0.9 > 0.3 > results[4, "divided"][0]
    assert results[1024, "plain"][1] < 0.2 * results[4, "plain"][1]
    # With it, neither changes with the width.
    for i in (0, 1):
        across_widths = [results[width, "divided"][i] for width in (4, 64, 1024)]
        assert max(across_widths) < 1.5 * min(across_widths)


def test_an_mlp_without_nonlinearity_is_one_matrix() -> None:
    rng = np.random.default_rng(0)
    inner = Linear(rng.standard_normal((64, 8)), np.full(64, 1000.0))  # so high that relu changes nothing
    outer = Linear(rng.standard_normal((8, 64)), rng.standard_normal(8))
    x = rng.standard_normal((2, 5, 8))
    assert outer.bias is not None
    # outer(inner(x)) = W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2): D·D numbers, however large M is.
    merged = Linear(outer.weight @ inner.weight, outer.weight @ inner.bias + outer.bias)
    assert np.allclose(mlp(x, MLP(inner, outer), "relu")[0], linear(x, merged))
    without_bias, merged_without = Linear(inner.weight, np.zeros(64)), Linear(merged.weight, outer.bias)
    assert not np.allclose(mlp(x, MLP(without_bias, outer), "relu")[0], linear(x, merged_without))


def test_a_block_with_zero_output_matrices_is_the_identity() -> None:
    w = random_weights(SPEC).blocks[0]
    for last in (w.attention.output, w.mlp.outer):
        last.weight[:] = 0
        last.bias[:] = 0
    x, d_y = np.random.default_rng(0).standard_normal((2, 2, SPEC.tokens, SPEC.width))
    y, saved = block(x, w, SPEC)
    d_x, d_w = block_backward(d_y, saved, w, SPEC)
    assert np.array_equal(y, x)
    assert np.array_equal(d_x, d_y)  # the residual connections pass everything on, unchanged
    # The last matrices learn at once, because their inputs are not 0. Nothing before them does: the gradient is
    # multiplied by their zeros. After the first step they are no longer zero.
    learns = {name for name, gradient in named_arrays(d_w) if gradient.any()}
    assert learns == {f"{layer}.{kind}" for layer in ("attention.output", "mlp.outer") for kind in ("weight", "bias")}


def test_the_minimal_loss_of_a_smoothed_target_is_its_entropy() -> None:
    label = np.array([0])
    equal, _ = cross_entropy(np.zeros((1, 10)), label, smoothing=0.1)
    assert np.isclose(equal, log(10))
    # The gradient, probabilities - target, is 0 if the probabilities equal the target: 0.91 and nine times 0.01. Then
    # the label's logit is log(0.91 / 0.01) = log 91 above the others, and the loss is the entropy of the target.
    best = np.zeros((1, 10))
    best[0, 0] = log(91)
    least, saved = cross_entropy(best, label, smoothing=0.1)
    assert np.allclose(cross_entropy_backward(saved), 0)
    assert np.isclose(least, -(0.91 * log(0.91) + 9 * 0.01 * log(0.01)))
    # Being less certain is worse, and so is being more certain.
    for change in (-1.0, 1.0, 20.0):
        other = best.copy()
        other[0, 0] += change
        assert cross_entropy(other, label, smoothing=0.1)[0] > least


def test_the_worst_small_change_follows_the_sign_of_the_gradient() -> None:
    w, label, eps = random_weights(SPEC), LABELS[:1], 1e-5
    before, d_image, _ = gradients(IMAGES[:1], label, w)

    def rise(direction: Array) -> float:
        return gradients(IMAGES[:1] + eps * direction, label, w)[0] - before

    # To first order the loss rises by Σ gradient · change. If no change exceeds eps, each term is largest for a change
    # of eps with the sign of the gradient, and the sum is then eps · Σ |gradient|.
    worst = rise(np.sign(d_image))
    assert np.isclose(worst, eps * np.abs(d_image).sum(), rtol=1e-2)
    rng = np.random.default_rng(0)
    assert max(rise(rng.choice([-1.0, 1.0], d_image.shape)) for _ in range(50)) < 0.5 * worst


def test_a_border_of_one_and_a_flip_make_eighteen_images() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (1, 1, 6, 6), dtype=np.uint8)
    many = np.repeat(image, 2000, axis=0)
    # Three shifts down, three across, mirrored or not.
    assert len(np.unique(crop(many, 1, rng), axis=0)) == 9
    assert len(np.unique(flip(crop(many, 1, rng), rng), axis=0)) == 18
    # For an image that is its own mirror image, flipping adds nothing new.
    symmetric = np.maximum(many, many[..., ::-1])
    assert len(np.unique(flip(crop(symmetric, 1, rng), rng), axis=0)) == 9


def test_adams_first_step_is_lr_for_any_gradient() -> None:
    for gradient in (1e-3, -1.0, 1e3):
        w: dict[str, Array] = {"x": np.array([5.0])}
        adam = Adam()
        adam.update(w, {"x": np.array([gradient])}, lr=0.01)
        # m̂ = g and v̂ = g², so m̂ / √v̂ is the sign of g.
        assert np.isclose(w["x"][0], 5 - 0.01 * np.sign(gradient), rtol=1e-6)
        # Without the corrections, m = 0.1 g and v = 0.001 g²: the first step would be 0.1 / √0.001 = √10 times as long.
        assert np.isclose(abs(adam.m["x"][0]) / np.sqrt(adam.v["x"][0]), 10**0.5)


def test_micro_batches_are_weighted_by_their_size() -> None:
    w = random_weights(SPEC)
    whole = dict(named_arrays(gradients(IMAGES, LABELS, w)[2]))
    three = dict(named_arrays(gradients(IMAGES[:3], LABELS[:3], w)[2]))
    two = dict(named_arrays(gradients(IMAGES[3:], LABELS[3:], w)[2]))
    for name, expected in whole.items():
        # Each gradient is a mean over its own images, 3 of the batch's 5 and 2 of the 5.
        assert relative(3 / 5 * three[name] + 2 / 5 * two[name], expected) < 1e-10
        # With weights of one half, an image of the smaller micro-batch would count more than one of the larger.
        assert relative(0.5 * three[name] + 0.5 * two[name], expected) > 1e-3


def test_two_engines_differ_only_by_rounding() -> None:
    differences = {}
    for dtype in (np.float32, np.float64):
        w = map_arrays(random_weights(SPEC), lambda array, dtype=dtype: array.astype(dtype))
        images = IMAGES.astype(dtype)
        model = TorchViT(SPEC).load(w)
        F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(LABELS)).backward()
        ours, theirs = (
            dict(named_arrays(d_w)) for d_w in (gradients(images, LABELS, w)[2], model.weights(gradients=True))
        )
        differences[dtype] = max(np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in ours)
    # The formulas are the same, but sums are computed in different orders, and float32 rounds after each term: whether
    # adding 1 to 100,000,000 is lost depends on the order.
    large, one = np.float32(1e8), np.float32(1)
    assert (large + one) - large == 0
    assert (large - large) + one == 1
    # In float64, the difference is smaller by about the ratio of the types' machine epsilons, 2^-52 to 2^-23.
    assert 0 < differences[np.float32] < 1e-4
    assert differences[np.float64] < 1e-6 * differences[np.float32]


def test_a_head_with_zero_keys_attends_to_all_tokens_equally() -> None:
    w = random_weights(SPEC)
    d, k, head = SPEC.width, SPEC.head_width, 1  # the second head
    x = np.random.default_rng(0).standard_normal((1, SPEC.tokens, d))
    _, before = attention(x, w.blocks[0].attention, SPEC.heads)
    # First D rows of queries, then D rows of keys, K rows per head.
    rows = slice(d + head * k, d + (head + 1) * k)
    qkv = w.blocks[0].attention.qkv
    qkv.weight[rows] = 0
    qkv.bias[rows] = 0
    _, after = attention(x, w.blocks[0].attention, SPEC.heads)
    # All its scores are 0, and equal scores give equal weights. The other heads do not change.
    assert np.allclose(after.weights[:, head], 1 / SPEC.tokens)
    assert np.array_equal(np.delete(after.weights, head, axis=1), np.delete(before.weights, head, axis=1))
    assert not np.allclose(before.weights[:, head], 1 / SPEC.tokens)
    # In Transformers' file these are the head's rows of the key matrix.
    keys = to_transformers(w, SPEC)["vit.encoder.layer.0.attention.attention.key.weight"]
    assert np.flatnonzero(~keys.any(axis=1)).tolist() == list(range(head * k, (head + 1) * k))
