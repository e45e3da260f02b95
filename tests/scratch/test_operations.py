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
from vitft.spec import ViTSpec

RNG = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape)


@dataclass
class Case:
    """An operation on arrays: `run` gives its result and its backward pass, `torch` the result that torch computes."""

    name: str
    arrays: list[Array]
    run: Callable[..., tuple[Array, Callable[[Array], list[Array]]]]
    torch: Callable[..., torch.Tensor]


def linear_case(bias: bool) -> Case:
    def run(x: Array, weight: Array, *rest: Array) -> Any:
        w = Linear(weight, *rest)

        def back(d: Array) -> list[Array]:
            d_x, d_w = tensors.linear_backward(d, x, w)
            return [d_x, d_w.weight, *([d_w.bias] if bias else [])]

        return tensors.linear(x, w), back

    return Case(f"linear, bias {bias}", [normal(2, 3, 4), normal(5, 4), *([normal(5)] if bias else [])], run, F.linear)


def norm_run(x: Array, scale: Array, shift: Array) -> Any:
    w = Norm(scale, shift)
    y, saved = tensors.layer_norm(x, w, 1e-3)

    def back(d: Array) -> list[Array]:
        d_x, d_w = tensors.layer_norm_backward(d, saved, w)
        return [d_x, d_w.scale, d_w.shift]

    return y, back


def norm_torch(x: Any, scale: Any, shift: Any) -> Any:
    return F.layer_norm(x, (5,), scale, shift, eps=1e-3)


def activation_case(name: str, torch_function: Callable[[Any], Any]) -> Case:
    def run(x: Array) -> Any:
        y, slope = getattr(tensors, name)(x)
        return y, lambda d: [tensors.activation_backward(d, slope)]

    x = normal(3, 7)
    return Case(name, [x + 0.01 * np.sign(x)], run, torch_function)  # away from relu's corner


def softmax_run(x: Array) -> Any:
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


def patch_run(images: Array, weight: Array, bias: Array) -> Any:
    w = Linear(weight, bias)
    y, saved = patchify.patch_embedding(images, w, OVERLAPPING)

    def back(d: Array) -> list[Array]:
        d_images, d_w = patchify.patch_embedding_backward(d, saved, w, OVERLAPPING)
        return [d_images, d_w.weight, d_w.bias]

    return y, back


def patch_torch(images: Any, weight: Any, bias: Any) -> Any:
    return F.conv2d(images, weight, bias, stride=(2, 1), padding=1).flatten(2).mT


def embedding_run(images: Array, weight: Array, bias: Array, token: Array, positions: Array) -> Any:
    w = Embedding(Linear(weight, bias), token, positions)
    y, saved = emb.embedding(images, w, OVERLAPPING)

    def back(d: Array) -> list[Array]:
        d_images, d_w = emb.embedding_backward(d, saved, w, OVERLAPPING)
        return [d_images, d_w.projection.weight, d_w.projection.bias, d_w.class_token, d_w.positions]

    return y, back


def embedding_torch(images: Any, weight: Any, bias: Any, token: Any, positions: Any) -> Any:
    tokens = patch_torch(images, weight, bias)
    return torch.cat([token.expand(len(images), -1, -1), tokens], dim=1) + positions


def attention_run(x: Array, qkv: Array, qkv_bias: Array, output: Array, output_bias: Array) -> Any:
    w = Attention(Linear(qkv, qkv_bias), Linear(output, output_bias))
    y, saved = att.attention(x, w, heads=2)

    def back(d: Array) -> list[Array]:
        d_x, d_w = att.attention_backward(d, saved, w)
        return [d_x, d_w.qkv.weight, d_w.qkv.bias, d_w.output.weight, d_w.output.bias]

    return y, back


def attention_torch(x: Any, qkv: Any, qkv_bias: Any, output: Any, output_bias: Any) -> Any:
    q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in F.linear(x, qkv, qkv_bias).chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, output, output_bias)


def mlp_run(x: Array, inner: Array, inner_bias: Array, outer: Array, outer_bias: Array) -> Any:
    w = MLP(Linear(inner, inner_bias), Linear(outer, outer_bias))
    y, saved = mlp(x, w, "gelu")

    def back(d: Array) -> list[Array]:
        d_x, d_w = mlp_backward(d, saved, w)
        return [d_x, d_w.inner.weight, d_w.inner.bias, d_w.outer.weight, d_w.outer.bias]

    return y, back


def mlp_torch(x: Any, inner: Any, inner_bias: Any, outer: Any, outer_bias: Any) -> Any:
    return F.linear(F.gelu(F.linear(x, inner, inner_bias)), outer, outer_bias)


def head_run(tokens: Array, pre: Array, pre_bias: Array, weight: Array, bias: Array) -> Any:
    w = Head(Linear(pre, pre_bias), Linear(weight, bias))
    y, saved = heads.head(tokens, w, MEAN)

    def back(d: Array) -> list[Array]:
        d_tokens, d_w = heads.head_backward(d, saved, w, MEAN)
        assert d_w.pre_logits is not None
        return [d_tokens, d_w.pre_logits.weight, d_w.pre_logits.bias, d_w.logits.weight, d_w.logits.bias]

    return y, back


def head_torch(tokens: Any, pre: Any, pre_bias: Any, weight: Any, bias: Any) -> Any:
    return F.linear(torch.tanh(F.linear(tokens[:, 1:].mean(1), pre, pre_bias)), weight, bias)


CASES = [
    linear_case(True),
    linear_case(False),
    Case("layer norm", [normal(2, 3, 5), normal(5), normal(5)], norm_run, norm_torch),
    activation_case("relu", F.relu),
    activation_case("gelu", F.gelu),
    activation_case("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    Case("softmax", [normal(2, 3, 5)], softmax_run, lambda x: x.softmax(-1)),
    Case(
        "dropout", [normal(3, 7)], lambda x: (tensors.dropout(x, MASK), lambda d: [tensors.dropout(d, MASK)]),
        lambda x: x * torch.from_numpy(MASK),
    ),
    Case("patch embedding", [normal(2, 2, 7, 4), normal(5, 2, 3, 2), normal(5)], patch_run, patch_torch),
    Case(
        "embedding", [normal(2, 2, 7, 4), normal(5, 2, 3, 2), normal(5), normal(2, 5), normal(22, 5)],
        embedding_run, embedding_torch,
    ),
    Case(
        "attention", [normal(2, 4, 6), normal(18, 6), normal(18), normal(6, 6), normal(6)],
        attention_run, attention_torch,
    ),
    Case("mlp", [normal(2, 3, 4), normal(7, 4), normal(7), normal(4, 7), normal(4)], mlp_run, mlp_torch),
    Case("head", [normal(2, 7, 5), normal(4, 5), normal(4), normal(3, 4), normal(3)], head_run, head_torch),
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
    for case in CASES[:7]:
        arrays = [array.astype(dtype) for array in case.arrays]
        y, back = case.run(*arrays)
        assert y.dtype == dtype
        assert {gradient.dtype for gradient in back(y)} == {np.dtype(dtype)}
