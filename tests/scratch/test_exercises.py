"""The exercises of docs/textbook.md, worked: each test is an answer, in the order of the book."""

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
from vitft.scratch.scalar_vit import PATTERNS, TINY, forward, new_parameters, scalars
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
from vitft.scratch.vit import ViT, mapped, named, vit, vit_backward
from vitft.spec import ViTSpec

SPEC = ViTSpec.square(image_size=8, patch_size=4, width=12, layers=2, heads=3, mlp=16, classes=4)
IMAGES = np.random.default_rng(1).standard_normal((5, 3, 8, 8))
LABELS = np.array([0, 1, 2, 3, 1])


def gradients(images: Array, labels: Array, w: ViT) -> tuple[float, Array, ViT]:
    """The mean loss of some images, and its gradients: of their pixels, and of all weights."""
    logits, saved = vit(images, w, SPEC)
    loss, saved_loss = cross_entropy(logits, labels)
    return loss, *vit_backward(cross_entropy_backward(saved_loss), saved, w, SPEC)


def test_twenty_doublings_have_a_million_paths_and_twenty_nodes() -> None:
    def paths(node: Scalar, leaf: Scalar) -> int:
        return 1 if node is leaf else sum(paths(parent, leaf) for parent in node.parents)

    x = Scalar(1.0)
    y, after_ten = x, x
    for step in range(20):
        y = y + y
        after_ten = y if step == 9 else after_ten
    # Each doubling gives every path a choice of two edges. Walking them one by one is hopeless soon ...
    assert paths(after_ten, x) == 2**10
    # ... but a node whose gradient is complete needs to be visited only once, and then speaks for all paths above it.
    y.backward()
    assert len(y.computed()) == 20
    assert x.grad == 2**20


def test_without_positions_the_four_patterns_are_one() -> None:
    images = [
        [[[0.6 if bright(row, column) else -0.6 for column in range(6)] for row in range(6)]]
        for bright in PATTERNS.values()
    ]
    p = new_parameters(TINY, seed=42)
    answers = [[logit.value for logit in forward(p, TINY, image)[0]] for image in images]
    for position in scalars(p["embedding.positions"]):
        position.value = 0.0
    blind = [[logit.value for logit in forward(p, TINY, image)[0]] for image in images]
    # Each image has two bright patches and two dark ones. As a set, that is the same image four times: no pair is
    # left to tell apart, whatever the weights are.
    assert np.ptp(blind, axis=0).max() < 1e-12
    assert np.ptp(answers, axis=0).max() > 0.01


def test_a_layer_norm_hands_back_nothing_along_what_it_does_not_see() -> None:
    rng = np.random.default_rng(0)
    x, d_y = rng.standard_normal((3, 16)), rng.standard_normal((3, 16))
    w = Norm(rng.standard_normal(16), rng.standard_normal(16))
    y, saved = layer_norm(x, w, eps=0.0)
    assert np.allclose(layer_norm(x + 1, w, eps=0.0)[0], y)
    assert np.allclose(layer_norm(2 * x, w, eps=0.0)[0], y)
    # Two ways to change x leave y as it is, so the loss has no slope along them: the sum of d_x, which is the
    # slope along (1, ..., 1), is 0, and so is its product with the centred x, along which x is stretched.
    d_x, _ = layer_norm_backward(d_y, saved, w)
    centred = x - x.mean(axis=1, keepdims=True)
    assert np.allclose(d_x.sum(axis=1), 0)
    assert np.allclose((d_x * centred).sum(axis=1), 0)
    assert np.abs(d_x).max() > 0.1


def test_with_half_a_stride_inner_pixels_are_seen_four_times() -> None:
    sizes = {"width": 8, "heads": 2, "layers": 1, "mlp": 8, "classes": 2, "channels": 1}
    spec = ViTSpec(image_height=28, image_width=28, patch_height=4, patch_width=4, stride_height=2, stride_width=2,
                   **sizes)  # fmt: skip
    # A patch starts at 0, 2, ..., 24: 13 starts down and 13 across.
    assert spec.grid == (13, 13)
    assert spec.patches == 169
    # If every number of every patch has the gradient 1, a pixel's gradient is how many patches it stands in.
    seen = windows_backward(np.ones((1, spec.patches, 16)), spec)[0, 0]
    assert seen[0, 0] == seen[27, 27] == 1
    assert seen[0, 14] == 2
    assert seen[14, 14] == 4
    assert seen.sum() == 169 * 16


def test_the_same_step_is_the_same_turn_everywhere() -> None:
    positions = sinusoidal_positions(50, 64)
    pairs = positions.reshape(50, 32, 2)  # (sin, cos) of one clock: a hand of length 1
    assert np.allclose(np.linalg.norm(pairs, axis=2), 1)
    # The product of two hands is the cosine of the angle between them, which depends on their distance alone.
    products = positions @ positions.T
    for distance in (1, 5, 20):
        along = np.diagonal(products, distance)
        assert np.allclose(along, along[0])
    # And three tokens on, clock i has turned by 3 / 10000^(2i / D), from wherever it stood: one matrix for all.
    angle = 3 / 10000 ** (2 * np.arange(32) / 64)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    assert np.allclose(np.einsum("abi,nib->nia", turn, pairs[:-3]), pairs[3:])


def test_without_the_root_of_k_softmax_is_certain_and_learns_nothing() -> None:
    rng = np.random.default_rng(0)
    found = {}
    for width in (4, 64, 1024):
        q, k, d_y = rng.standard_normal((400, width)), rng.standard_normal((50, width)), rng.standard_normal((400, 50))
        scores = q @ k.T
        # A score is a sum of K products, each of variance 1.
        assert abs(scores.var() / width - 1) < 0.2
        for name, given in (("plain", scores), ("divided", scores / np.sqrt(width))):
            shares = softmax(given)
            found[width, name] = shares.max(axis=1).mean(), np.abs(softmax_backward(d_y, shares)).mean()
    # Undivided, wide heads give nearly all to one token, and the gradient that comes back through softmax dies.
    assert found[1024, "plain"][0] > 0.9 > 0.3 > found[4, "divided"][0]
    assert found[1024, "plain"][1] < 0.2 * found[4, "plain"][1]
    # Divided, neither changes with the width.
    for which in (0, 1):
        across = [found[width, "divided"][which] for width in (4, 64, 1024)]
        assert max(across) < 1.5 * min(across)


def test_an_mlp_that_does_not_bend_is_one_matrix() -> None:
    rng = np.random.default_rng(0)
    inner = Linear(rng.standard_normal((64, 8)), np.full(64, 1000.0))  # so high that relu never cuts
    outer = Linear(rng.standard_normal((8, 64)), rng.standard_normal(8))
    x = rng.standard_normal((2, 5, 8))
    assert outer.bias is not None
    # outer(inner(x)) = W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2): D·D numbers, however large M is.
    one = Linear(outer.weight @ inner.weight, outer.weight @ inner.bias + outer.bias)
    assert np.allclose(mlp(x, MLP(inner, outer), "relu")[0], linear(x, one))
    bent = Linear(inner.weight, np.zeros(64))
    flat = Linear(one.weight, outer.bias)
    assert not np.allclose(mlp(x, MLP(bent, outer), "relu")[0], linear(x, flat))


def test_a_block_whose_parts_say_nothing_hands_on_what_it_read() -> None:
    w = random_weights(SPEC).blocks[0]
    for last in (w.attention.output, w.mlp.outer):
        last.weight[:] = 0
        last.bias[:] = 0
    x, d_y = np.random.default_rng(0).standard_normal((2, 2, SPEC.tokens, SPEC.width))
    y, saved = block(x, w, SPEC)
    d_x, d_w = block_backward(d_y, saved, w, SPEC)
    assert np.array_equal(y, x)
    assert np.array_equal(d_x, d_y)  # forward and back the sums carry all, untouched
    # The last matrices learn at once, for what they would have read is there. Nothing before them does: what
    # comes back is multiplied by their zeros. After the first step they are no longer zeros.
    learns = {name for name, gradient in named(d_w) if gradient.any()}
    assert learns == {f"{part}.{kind}" for part in ("attention.output", "mlp.outer") for kind in ("weight", "bias")}


def test_the_least_loss_of_a_smoothed_target_is_its_entropy() -> None:
    label = np.array([0])
    equal, _ = cross_entropy(np.zeros((1, 10)), label, smoothing=0.1)
    assert np.isclose(equal, log(10))
    # The gradient, shares - target, is 0 where the shares are the target: 0.91 and nine times 0.01. There the
    # label's logit is log(0.91 / 0.01) = log 91 above the others, and the loss is the target's own entropy.
    best = np.zeros((1, 10))
    best[0, 0] = log(91)
    least, saved = cross_entropy(best, label, smoothing=0.1)
    assert np.allclose(cross_entropy_backward(saved), 0)
    assert np.isclose(least, -(0.91 * log(0.91) + 9 * 0.01 * log(0.01)))
    # More certain is worse.
    for more in (-1.0, 1.0, 20.0):
        other = best.copy()
        other[0, 0] += more
        assert cross_entropy(other, label, smoothing=0.1)[0] > least


def test_no_small_change_is_worse_than_the_sign_of_the_pixels_gradient() -> None:
    w, label, most = random_weights(SPEC), LABELS[:1], 1e-5
    before, d_image, _ = gradients(IMAGES[:1], label, w)

    def rise(direction: Array) -> float:
        return gradients(IMAGES[:1] + most * direction, label, w)[0] - before

    # To first order the loss rises by Σ gradient · change. With no change above `most`, each term is largest where
    # the change is `most` with the gradient's sign, and the sum is then `most` · Σ |gradient|.
    worst = rise(np.sign(d_image))
    assert np.isclose(worst, most * np.abs(d_image).sum(), rtol=1e-2)
    rng = np.random.default_rng(0)
    assert max(rise(rng.choice([-1.0, 1.0], d_image.shape)) for _ in range(50)) < 0.5 * worst


def test_a_border_of_one_and_a_mirror_make_eighteen_images() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (1, 1, 6, 6), dtype=np.uint8)
    many = np.repeat(image, 2000, axis=0)
    # Three places down, three across, two sides.
    assert len(np.unique(crop(many, 1, rng), axis=0)) == 9
    assert len(np.unique(flip(crop(many, 1, rng), rng), axis=0)) == 18
    # A picture that is its own mirror image gains nothing: 2 · 9 views, but only 9 different ones.
    symmetric = np.maximum(many, many[..., ::-1])
    assert len(np.unique(flip(crop(symmetric, 1, rng), rng), axis=0)) == 9


def test_adams_first_step_is_the_rate_whatever_the_gradient() -> None:
    for gradient in (1e-3, -1.0, 1e3):
        w: dict[str, Array] = {"x": np.array([5.0])}
        adam = Adam()
        adam.update(w, {"x": np.array([gradient])}, lr=0.01)
        # m̂ = g and v̂ = g², so m̂ / √v̂ is g's sign.
        assert np.isclose(w["x"][0], 5 - 0.01 * np.sign(gradient), rtol=1e-6)
        # Uncorrected, m = 0.1 g and v = 0.001 g²: the first step would be 0.1 / √0.001 = √10 times as long.
        assert np.isclose(abs(adam.m["x"][0]) / np.sqrt(adam.v["x"][0]), 10**0.5)


def test_pieces_weigh_what_they_hold() -> None:
    w = random_weights(SPEC)
    whole = dict(named(gradients(IMAGES, LABELS, w)[2]))
    three = dict(named(gradients(IMAGES[:3], LABELS[:3], w)[2]))
    two = dict(named(gradients(IMAGES[3:], LABELS[3:], w)[2]))
    for name, wanted in whole.items():
        # Each piece's gradient is the mean over its own images: 3 of 5 and 2 of 5 of the batch.
        assert relative(3 / 5 * three[name] + 2 / 5 * two[name], wanted) < 1e-10
        # With one half each, an image of the smaller piece would count for more than one of the larger.
        assert relative(0.5 * three[name] + 0.5 * two[name], wanted) > 1e-3


def test_two_engines_differ_by_rounding_alone() -> None:
    far = {}
    for dtype in (np.float32, np.float64):
        w = mapped(random_weights(SPEC), lambda array, dtype=dtype: array.astype(dtype))
        images = IMAGES.astype(dtype)
        model = TorchViT(SPEC).load(w)
        F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(LABELS)).backward()
        ours, theirs = (dict(named(d_w)) for d_w in (gradients(images, LABELS, w)[2], model.weights(gradients=True)))
        far[dtype] = max(np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in ours)
    # The formulas are the same. What differs is the order in which a sum is taken, and float32 rounds after each
    # term: a 1 beside 100,000,000 is lost, or not, as the order will have it.
    large, one = np.float32(1e8), np.float32(1)
    assert (large + one) - large == 0
    assert (large - large) + one == 1
    # With twice the digits the gap is smaller by about as much as the type's own rounding: 2^-52 for 2^-23.
    assert 0 < far[np.float32] < 1e-4
    assert far[np.float64] < 1e-6 * far[np.float32]


def test_a_head_whose_keys_are_zero_looks_everywhere_alike() -> None:
    w = random_weights(SPEC)
    d, k, head = SPEC.width, SPEC.head_width, 1  # the second head
    x = np.random.default_rng(0).standard_normal((1, SPEC.tokens, d))
    _, before = attention(x, w.blocks[0].attention, SPEC.heads)
    # D rows of queries come first; of the D rows of keys, K for each head.
    rows = slice(d + head * k, d + (head + 1) * k)
    qkv = w.blocks[0].attention.qkv
    qkv.weight[rows] = 0
    qkv.bias[rows] = 0
    _, after = attention(x, w.blocks[0].attention, SPEC.heads)
    # All its scores are then 0, and equal scores are equal shares. The other heads do not notice.
    assert np.allclose(after.shares[:, head], 1 / SPEC.tokens)
    assert np.array_equal(np.delete(after.shares, head, axis=1), np.delete(before.shares, head, axis=1))
    assert not np.allclose(before.shares[:, head], 1 / SPEC.tokens)
    # In Transformers' file it is the key matrix, and there the head's own rows.
    keys = to_transformers(w, SPEC)["vit.encoder.layer.0.attention.attention.key.weight"]
    assert np.flatnonzero(~keys.any(axis=1)).tolist() == list(range(head * k, (head + 1) * k))
