"""Scalar against finite differences and torch's autograd, and on graphs too deep for recursion."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitft.scratch.scalar import Scalar, dot, total

Expression = Callable[..., Any]

# Each operation for Scalars and for torch's tensors.
UNARY: dict[str, tuple[Expression, Expression]] = {
    "neg": (lambda x: -x, lambda x: -x),
    "exp": (Scalar.exp, torch.exp),
    "log": (Scalar.log, torch.log),
    "sqrt": (Scalar.sqrt, torch.sqrt),
    "tanh": (Scalar.tanh, torch.tanh),
    "relu": (Scalar.relu, torch.relu),
    "gelu": (Scalar.gelu, torch.nn.functional.gelu),
    "square": (lambda x: x**2, lambda x: x**2),
    "power": (lambda x: x**-1.7, lambda x: x**-1.7),
    "power 0": (lambda x: x**0, lambda x: x**0),
    "number + x": (lambda x: 3 + x, lambda x: 3 + x),
    "number - x": (lambda x: 3 - x, lambda x: 3 - x),
    "number * x": (lambda x: 3 * x, lambda x: 3 * x),
    "number / x": (lambda x: 3 / x, lambda x: 3 / x),
    "number ** x": (lambda x: 3**x, lambda x: 3**x),
    "x + number": (lambda x: x + 0.3, lambda x: x + 0.3),
    "x - number": (lambda x: x - 0.3, lambda x: x - 0.3),
    "x * number": (lambda x: x * 0.3, lambda x: x * 0.3),
    "x / number": (lambda x: x / 0.3, lambda x: x / 0.3),
}
BINARY: dict[str, Expression] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "**": lambda x, y: x**y,
    "x*x + x": lambda x, y: x * x + x + 0 * y,
}
POSITIVE_ONLY = {"log", "sqrt", "power"}


def finite_difference(function: Callable[[float], float], x: float) -> float:
    """The slope from four points, with an error of O(step⁴) plus a rounding error of about 1e-16 / step."""
    step = 1e-3 * max(1.0, abs(x))
    near = function(x + step) - function(x - step)
    far = function(x + 2 * step) - function(x - 2 * step)
    return (8 * near - far) / (12 * step)


def slopes_of(expression: Expression, *values: float) -> tuple[float, list[float]]:
    leaves = [Scalar(value) for value in values]
    result = expression(*leaves)
    result.backward()
    return result.value, [leaf.grad for leaf in leaves]


def torch_slopes_of(expression: Expression, *values: float) -> tuple[float, list[float]]:
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    result = expression(*leaves)
    result.backward()
    return result.item(), [leaf.grad.item() if leaf.grad is not None else 0.0 for leaf in leaves]


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("x", [-2.6, -0.8, 0.05, 0.7, 2.3])
def test_slopes_of_one_number(name: str, x: float) -> None:
    if name in POSITIVE_ONLY:
        x = abs(x)
    ours, theirs = UNARY[name]
    value, [slope] = slopes_of(ours, x)
    torch_value, [torch_slope] = torch_slopes_of(theirs, x)
    assert value == pytest.approx(torch_value, rel=1e-12)
    assert slope == pytest.approx(torch_slope, rel=1e-12)
    if x > 0.05 or name not in POSITIVE_ONLY | {"number / x"}:  # there the function is too curved for the step
        assert slope == pytest.approx(finite_difference(lambda x: ours(Scalar(x)).value, x), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(("x", "y"), [(0.7, -1.9), (2.5, 0.4), (1.3, 1.3)])
def test_slopes_of_two_numbers(name: str, x: float, y: float) -> None:
    operation = BINARY[name]
    value, slopes = slopes_of(operation, x, y)
    torch_value, torch_slopes = torch_slopes_of(operation, x, y)
    assert value == pytest.approx(torch_value, rel=1e-12)
    assert slopes == pytest.approx(torch_slopes, rel=1e-12)
    assert slopes[0] == pytest.approx(finite_difference(lambda x: operation(Scalar(x), Scalar(y)).value, x), rel=1e-6)
    in_y = finite_difference(lambda y: operation(Scalar(x), Scalar(y)).value, y)
    assert slopes[1] == pytest.approx(in_y, rel=1e-6, abs=1e-10)


@given(
    xs=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    start=st.floats(-3, 3),
    scale=st.floats(-3, 3),
)
def test_dot_and_total_equal_sums_of_many_nodes(xs: list[float], start: float, scale: float) -> None:
    values = [start, *xs]

    def fused(start: Any, *xs: Any) -> Any:
        return dot(xs, xs[::-1], start) * total([*xs, start, start])

    def plain(start: Any, *xs: Any) -> Any:
        products = sum((x * y for x, y in zip(xs, xs[::-1], strict=True)), start)
        return products * (sum(xs) + 2 * start)

    for expression in (fused, plain):
        value, slopes = slopes_of(expression, *values)
        torch_value, torch_slopes = torch_slopes_of(plain, *values)
        assert value == pytest.approx(torch_value, rel=1e-12, abs=1e-12)
        assert slopes == pytest.approx(torch_slopes, rel=1e-12, abs=1e-12)
    assert dot([Scalar(scale)], [Scalar(2.0)]).value == 2 * scale
    assert total([]).value == 0


def test_dot_of_different_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match="dot of 2 and 1"):
        dot([Scalar(1.0)] * 2, [Scalar(1.0)])


# A random program picks its inputs among earlier results, so a result may be used several times or never.
# Every step keeps numbers small and within the domains of the functions.
STEPS: list[tuple[Expression, Expression]] = [
    (lambda x, y: x + y, lambda x, y: x + y),
    (lambda x, y: x - y, lambda x, y: x - y),
    (lambda x, y: x * y.tanh(), lambda x, y: x * y.tanh()),
    (lambda x, y: x / (y * y + 1), lambda x, y: x / (y * y + 1)),
    (lambda x, y: (x * x + 1) ** y.tanh(), lambda x, y: (x * x + 1) ** y.tanh()),
    (lambda x, y: x.tanh().exp() - y, lambda x, y: x.tanh().exp() - y),
    (lambda x, y: (x * x + 0.5).log() - y, lambda x, y: (x * x + 0.5).log() - y),
    (lambda x, y: (x * x + 0.5).sqrt() - y, lambda x, y: (x * x + 0.5).sqrt() - y),
    (lambda x, y: x.gelu() + y.relu(), lambda x, y: torch.nn.functional.gelu(x) + y.relu()),
    (lambda x, y: 2 ** x.tanh() - 1 / (2 + y.tanh()), lambda x, y: 2 ** x.tanh() - 1 / (2 + y.tanh())),
    (lambda x, y: -x * 0.5 + 3 - y, lambda x, y: -x * 0.5 + 3 - y),
    (lambda x, y: dot([x, y], [y, x]).tanh(), lambda x, y: (2 * x * y).tanh()),
]


@given(
    leaves=st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0), st.integers(0)), min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_random_programs_have_the_gradients_of_torch(leaves: list[float], steps: list[tuple[int, int, int]]) -> None:
    def run(side: int) -> Expression:
        def expression(*known: Any) -> Any:
            results = list(known)
            for step, i, j in steps:
                results.append(STEPS[step][side](results[i % len(results)], results[j % len(results)]))
            return results[-1]

        return expression

    value, slopes = slopes_of(run(0), *leaves)
    torch_value, torch_slopes = torch_slopes_of(run(1), *leaves)
    # Rounding errors grow when 12 steps double a number 12 times and another subtracts two such numbers.
    assert value == pytest.approx(torch_value, rel=1e-10, abs=1e-10)
    assert slopes == pytest.approx(torch_slopes, rel=1e-10, abs=1e-10)


def test_a_chain_of_a_hundred_thousand_sums() -> None:
    """Neither backward nor Python's deallocation of the chain may overflow the stack."""
    x = Scalar(1.5)
    chain = x
    for _ in range(100_000):
        chain = chain + x
    assert chain.value == pytest.approx(1.5 * 100_001)
    chain.backward()
    assert x.grad == 100_001
    del chain
    deep = Scalar(0.0)
    for _ in range(100_000):
        deep = (deep * deep + x) * 1e-3
    del deep  # deallocated without a backward pass


def test_leaves_accumulate_gradients_and_computed_nodes_do_not() -> None:
    x, y = Scalar(3.0), Scalar(5.0)
    inner = x * y
    result = inner * inner
    result.backward()
    assert (x.grad, y.grad, inner.grad, result.grad) == (150, 90, 30, 1)
    result.backward()
    assert (x.grad, y.grad, inner.grad, result.grad) == (300, 180, 30, 1)
    (inner + x).backward()
    assert (x.grad, y.grad, inner.grad) == (306, 183, 1)
    x.backward()
    assert x.grad == 307


def test_topological_order_lists_parents_first_and_each_node_once() -> None:
    x = Scalar(0.5)
    inner = x * x + x
    result = inner * inner + inner
    order = result.topological_order()
    assert len(order) == len(set(order)) == 4
    assert x not in order
    assert order[-1] is result
    for i, node in enumerate(order):
        assert all(parent in order[:i] for parent in node.parents if parent.parents)


def test_slopes_at_corners_and_at_the_end_of_domains() -> None:
    assert slopes_of(Scalar.relu, 0.0) == (0.0, [0.0])
    assert slopes_of(Scalar.gelu, 0.0) == (0.0, [0.5])
    assert slopes_of(lambda x: x**1, 0.0) == (0.0, [1.0])
    assert slopes_of(lambda x: x**0, 0.0) == (1.0, [0.0])
    assert math.isnan(Scalar(math.nan).relu().value)
    for function in (Scalar.log, lambda x: x**-1, lambda x: x**0.5, lambda x: 1 / x, lambda x: x / 0):
        with pytest.raises((ValueError, ZeroDivisionError)):
            function(Scalar(0.0))
    for function in (Scalar.sqrt, Scalar.log, lambda x: x**0.5, lambda x: x**x):
        with pytest.raises(ValueError, match=r"domain|expected"):
            function(Scalar(-1.0))


def test_a_scalar_has_a_repr_and_no_other_attributes() -> None:
    x = Scalar(2)
    (x * x).backward()
    assert repr(x) == "Scalar(2, grad=4)"
    with pytest.raises(AttributeError):
        x.gradient = 1.0  # type: ignore[attr-defined]
