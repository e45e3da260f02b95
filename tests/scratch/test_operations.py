"""Forward and backward pass of every operation, compared with torch and with central differences, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.scratch.gradients import numerical, relative
from vitft.scratch import attention as att
from vitft.scratch import embedding as emb
from vitft.scratch import heads, patchify, tensors
from vitft.scratch.attention import Attention
from vitft.scratch.embedding import Embedding
from vitft.scratch.heads import Head
from vitft.scratch.mlp import MLP, mlp, mlp_backward
from vitft.scratch.tensors import Array, Linear, Norm
from vitft.scratch.vit import named_arrays
from vitft.spec import ViTSpec

RNG = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape)


@dataclass
class Case:
    """An operation on arrays: `run` returns its result and backward pass, `torch` the result that torch computes."""

    name: str
    arrays: list[Array]
    run: Callable[..., tuple[Array, Callable[[Array], list[Array]]]]
    torch: Callable[..., torch.Tensor]


def run_with(
    pack: Callable[..., Any], forward: Callable[[Array, Any], tuple[Array, Any]],
    backward: Callable[[Array, Any, Any], tuple[Array, Any]],
) -> Any:  # fmt: skip
    """`Case.run` of an operation whose weights are `pack(*arrays)`; gradients have the order of the arrays."""

    def run(x: Array, *arrays: Array) -> Any:
        w = pack(*arrays)
        y, saved = forward(x, w)

        def back(d_y: Array) -> list[Array]:
            d_x, d_w = backward(d_y, saved, w)
            return [d_x, *(array for _, array in named_arrays(d_w))]

        return y, back

    return run


def run_activation(name: str) -> Any:
    def run(x: Array) -> Any:
        y, slope = getattr(tensors, name)(x)
        return y, lambda d: [tensors.activation_backward(d, slope)]

    return run


def run_softmax(x: Array) -> Any:
    y = tensors.softmax(x)
    return y, lambda d: [tensors.softmax_backward(d, y)]


MASK = tensors.dropout_mask((3, 7), 0.4, np.random.default_rng(3))
OVERLAPPING = ViTSpec(
    image_height=7, image_width=4, patch_height=3, patch_width=2, stride_height=2, stride_width=1, padding=1,
    channels=2, width=5, heads=1, layers=1, mlp=1, classes=2, prefix_tokens=2,
)  # fmt: skip
MEAN = ViTSpec(
    image_height=6, image_width=4, patch_height=2, patch_width=2, stride_height=2, stride_width=2, channels=1,
    width=5, heads=1, layers=1, mlp=1, classes=3, pooling="mean", prefix_tokens=1, pre_logits=4,
)  # fmt: skip

run_linear = run_with(Linear, lambda x, w: (tensors.linear(x, w), x), tensors.linear_backward)
run_norm = run_with(Norm, lambda x, w: tensors.layer_norm(x, w, 1e-3), tensors.layer_norm_backward)
run_patches = run_with(
    Linear,
    lambda images, w: patchify.patch_embedding(images, w, OVERLAPPING),
    lambda d, patches, w: patchify.patch_embedding_backward(d, patches, w, OVERLAPPING),
)
run_embedding = run_with(
    lambda weight, bias, token, positions: Embedding(Linear(weight, bias), token, positions),
    lambda images, w: emb.embedding(images, w, OVERLAPPING),
    lambda d, patches, w: emb.embedding_backward(d, patches, w, OVERLAPPING),
)
run_attention = run_with(
    lambda qkv, qkv_bias, output, bias: Attention(Linear(qkv, qkv_bias), Linear(output, bias)),
    lambda x, w: att.attention(x, w, heads=2),
    att.attention_backward,
)
run_mlp = run_with(
    lambda inner, inner_bias, outer, bias: MLP(Linear(inner, inner_bias), Linear(outer, bias)),
    lambda x, w: mlp(x, w, "gelu"),
    mlp_backward,
)
run_head = run_with(
    lambda pre, pre_bias, weight, bias: Head(Linear(pre, pre_bias), Linear(weight, bias)),
    lambda tokens, w: heads.head(tokens, w, MEAN),
    lambda d, saved, w: heads.head_backward(d, saved, w, MEAN),
)


def torch_patches(images: Any, weight: Any, bias: Any) -> Any:
    return F.conv2d(images, weight, bias, stride=(2, 1), padding=1).flatten(2).mT


def torch_embedding(images: Any, weight: Any, bias: Any, token: Any, positions: Any) -> Any:
    tokens = torch_patches(images, weight, bias)
    return torch.cat([token.expand(len(images), -1, -1), tokens], dim=1) + positions


def torch_attention(x: Any, qkv: Any, qkv_bias: Any, output: Any, bias: Any) -> Any:
    q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in F.linear(x, qkv, qkv_bias).chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, output, bias)


def torch_mlp(x: Any, inner: Any, inner_bias: Any, outer: Any, bias: Any) -> Any:
    return F.linear(F.gelu(F.linear(x, inner, inner_bias)), outer, bias)


def torch_head(tokens: Any, pre: Any, pre_bias: Any, weight: Any, bias: Any) -> Any:
    return F.linear(torch.tanh(F.linear(tokens[:, 1:].mean(1), pre, pre_bias)), weight, bias)


AWAY_FROM_0 = normal(3, 7)
AWAY_FROM_0 += 0.01 * np.sign(AWAY_FROM_0)  # relu has a corner at 0

CASES = [
    Case("linear", [normal(2, 3, 4), normal(5, 4), normal(5)], run_linear, F.linear),
    Case("linear without bias", [normal(2, 3, 4), normal(5, 4)], run_linear, F.linear),
    Case(
        "layer norm", [normal(2, 3, 5), normal(5), normal(5)], run_norm,
        lambda x, scale, shift: F.layer_norm(x, (5,), scale, shift, eps=1e-3),
    ),
    Case("relu", [AWAY_FROM_0], run_activation("relu"), F.relu),
    Case("gelu", [AWAY_FROM_0], run_activation("gelu"), F.gelu),
    Case("gelu_tanh", [AWAY_FROM_0], run_activation("gelu_tanh"), lambda x: F.gelu(x, approximate="tanh")),
    Case("softmax", [normal(2, 3, 5)], run_softmax, lambda x: x.softmax(-1)),
    Case(
        "dropout", [normal(3, 7)], lambda x: (tensors.dropout(x, MASK), lambda d: [tensors.dropout(d, MASK)]),
        lambda x: x * torch.from_numpy(MASK),
    ),
    Case("patch embedding", [normal(2, 2, 7, 4), normal(5, 2, 3, 2), normal(5)], run_patches, torch_patches),
    Case(
        "embedding", [normal(2, 2, 7, 4), normal(5, 2, 3, 2), normal(5), normal(2, 5), normal(22, 5)],
        run_embedding, torch_embedding,
    ),
    Case(
        "attention", [normal(2, 4, 6), normal(18, 6), normal(18), normal(6, 6), normal(6)],
        run_attention, torch_attention,
    ),
    Case("mlp", [normal(2, 3, 4), normal(7, 4), normal(7), normal(4, 7), normal(4)], run_mlp, torch_mlp),
    Case("head", [normal(2, 7, 5), normal(4, 5), normal(4), normal(3, 4), normal(3)], run_head, torch_head),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward_equal_torch(case: Case) -> None:
    arrays = [array.copy() for array in case.arrays]
    y, back = case.run(*arrays)
    tensors_of_torch = [torch.from_numpy(array).requires_grad_() for array in arrays]
    expected = case.torch(*tensors_of_torch)
    assert relative(y, expected.detach().numpy()) <= 1e-11
    d_y = np.random.default_rng(1).standard_normal(y.shape)
    expected.backward(torch.from_numpy(d_y))
    for array, gradient, tensor in zip(arrays, back(d_y), tensors_of_torch, strict=True):
        assert gradient.shape == array.shape
        assert relative(gradient, tensor.grad.numpy(), floor=1e-3) <= 1e-10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward_equals_the_numerical_gradient_and_leaves_inputs_unchanged(case: Case) -> None:
    arrays = [array.copy() for array in case.arrays]
    y, back = case.run(*arrays)
    d_y = np.random.default_rng(1).standard_normal(y.shape)
    gradients = back(d_y)
    for array, before in zip(arrays, case.arrays, strict=True):
        assert np.array_equal(array, before)
    for array, gradient in zip(arrays, gradients, strict=True):
        assert relative(gradient, numerical(lambda: float((case.run(*arrays)[0] * d_y).sum()), array), 1e-2) <= 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(smoothing: float) -> None:
    logits, labels = normal(4, 3) * 5, np.array([0, 2, 1, 2])
    loss, saved = heads.cross_entropy(logits, labels, smoothing)
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = F.cross_entropy(theirs, torch.from_numpy(labels), label_smoothing=smoothing)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-11)
    gradient = heads.cross_entropy_backward(saved)
    assert relative(gradient, theirs.grad.numpy()) <= 1e-12
    assert relative(gradient, numerical(lambda: heads.cross_entropy(logits, labels, smoothing)[0], logits)) <= 1e-6


def test_softmax_and_cross_entropy_of_large_scores_do_not_overflow() -> None:
    scores = np.array([[1e4, 0.0, -1e4]], dtype=np.float32)
    assert tensors.softmax(scores).tolist() == [[1.0, 0.0, 0.0]]
    assert tensors.softmax(np.array([[-1e4, -1e4], [0.0, 0.0]], np.float32)).tolist() == [[0.5, 0.5]] * 2
    edge = np.array([[79.0, 79.0 - np.log(3)], [-79.0, -79.0 - np.log(3)]], np.float32)
    assert np.abs(tensors.softmax(edge) - [0.75, 0.25]).max() < 1e-5  # the scores themselves are rounded to 4e-6
    assert np.isnan(tensors.softmax(np.array([np.nan, 1.0]))).all()
    loss, _ = heads.cross_entropy(scores, np.array([2]))
    assert loss == pytest.approx(2e4)


def test_with_cls_pooling_only_the_class_token_gets_a_gradient() -> None:
    spec = ViTSpec.square(4, 2, 3, 1, 1, 2, 2)
    d_tokens = heads.pool_backward(np.ones((2, 3)), spec)
    assert d_tokens.shape == (2, 5, 3)
    assert np.array_equal(np.argwhere(d_tokens.any(axis=(0, 2))), [[0]])


def test_patchify_equals_the_windows_of_the_convolution() -> None:
    spec = ViTSpec(
        image_height=6, image_width=8, patch_height=3, patch_width=2, stride_height=3, stride_width=2,
        channels=2, width=4, heads=1, layers=1, mlp=1, classes=2,
    )  # fmt: skip
    images = normal(3, 2, 6, 8)
    patches = patchify.patchify(images, 3, 2)
    assert patches.shape == (3, spec.patches, 12)
    assert np.array_equal(patches, patchify.windows(images, spec))
    assert np.array_equal(patches[1, 5].reshape(2, 3, 2), images[1, :, 3:6, 2:4])


def test_sinusoidal_positions_follow_the_paper() -> None:
    table = emb.sinusoidal_positions(5, 6)
    for n in range(5):
        for i in range(3):
            assert table[n, 2 * i] == pytest.approx(np.sin(n / 10000 ** (2 * i / 6)))
            assert table[n, 2 * i + 1] == pytest.approx(np.cos(n / 10000 ** (2 * i / 6)))
    assert emb.sinusoidal_positions(4, 5).shape == (4, 5)


def test_grid_positions_combine_those_of_row_and_column() -> None:
    spec = ViTSpec(
        image_height=6, image_width=8, patch_height=3, patch_width=2, stride_height=3, stride_width=2,
        channels=2, width=7, heads=1, layers=1, mlp=1, classes=2, positions="sinusoidal_2d",
    )  # fmt: skip
    table = emb.fixed_positions(spec)
    assert table.shape == (spec.tokens, 7)
    assert not table[0].any()  # the class token belongs to no patch
    for row in range(2):
        for column in range(4):
            place = table[1 + 4 * row + column]
            assert np.array_equal(place[:3], emb.sinusoidal_positions(2, 3)[row])
            assert np.array_equal(place[3:], emb.sinusoidal_positions(4, 4)[column])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_a_fraction_of_rate(rate: float) -> None:
    mask = tensors.dropout_mask((400, 500), rate, np.random.default_rng(0), np.float32)
    assert mask.dtype == np.float32
    assert (mask == 0).mean() == pytest.approx(rate, abs=0.005)
    assert mask.mean() == pytest.approx(1, abs=0.01)
    x = np.ones((2, 2))
    assert tensors.dropout(x, None) is x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations_keep_the_dtype(dtype: Any) -> None:
    for case in (case for case in CASES if case.name != "dropout"):  # its mask is in float64
        arrays = [array.astype(dtype) for array in case.arrays]
        y, back = case.run(*arrays)
        assert y.dtype == dtype
        assert {gradient.dtype for gradient in back(y)} == {np.dtype(dtype)}
