"""One number and its derivative: reverse-mode automatic differentiation.

A Scalar remembers its parents, the Scalars it was computed from, and its partial derivative with respect to each
of them. Every result therefore sits at the end of a graph. `backward` walks that graph once, from the result back
to the inputs, and applies the chain rule:

    d result / d x = Σ over all uses y of x:  d result / d y · d y / d x

Each operation below states its value, its parents and its partial derivatives side by side. Nothing else is needed
(Baydin et al. 2018, "Automatic Differentiation in Machine Learning", section 3.2).
"""

import math
from collections.abc import Sequence
from operator import mul


class Scalar:
    """A number that remembers how it was computed. `result.backward()` sets `x.grad` to d result / d x.

    Outside a function's domain, and where its slope is infinite, an operation raises ValueError or
    ZeroDivisionError, as `math` does: log(0), sqrt(0), 1 / 0.
    """

    __slots__ = ("grad", "parents", "partials", "value")

    def __init__(self, value: float, parents: "Sequence[Scalar]" = (), partials: Sequence[float] = ()) -> None:
        self.value = value
        self.grad = 0.0
        self.parents = parents
        self.partials = partials

    def __repr__(self) -> str:
        return f"Scalar({self.value:g}, grad={self.grad:g})"

    def __add__(self, other: "Scalar | float") -> "Scalar":
        x, y = self, as_scalar(other)
        return Scalar(x.value + y.value, (x, y), (1.0, 1.0))

    def __sub__(self, other: "Scalar | float") -> "Scalar":
        x, y = self, as_scalar(other)
        return Scalar(x.value - y.value, (x, y), (1.0, -1.0))

    def __mul__(self, other: "Scalar | float") -> "Scalar":
        x, y = self, as_scalar(other)
        return Scalar(x.value * y.value, (x, y), (y.value, x.value))

    def __truediv__(self, other: "Scalar | float") -> "Scalar":
        x, y = self, as_scalar(other)
        ratio = x.value / y.value
        return Scalar(ratio, (x, y), (1.0 / y.value, -ratio / y.value))

    def __pow__(self, power: "Scalar | float") -> "Scalar":
        if isinstance(power, Scalar):
            return (power * self.log()).exp()  # base and exponent are both variables: only for a base above 0
        slope = power * math.pow(self.value, power - 1) if power else 0.0
        return Scalar(math.pow(self.value, power), (self,), (slope,))

    def __neg__(self) -> "Scalar":
        return Scalar(-self.value, (self,), (-1.0,))

    # With a plain number on the left, Python asks the right operand: 2 - x calls x.__rsub__(2).
    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: float) -> "Scalar":
        return Scalar(other) - self

    def __rtruediv__(self, other: float) -> "Scalar":
        return Scalar(other) / self

    def __rpow__(self, other: float) -> "Scalar":
        return Scalar(other) ** self

    def exp(self) -> "Scalar":
        """e to the power of x, which is its own slope."""
        y = math.exp(self.value)
        return Scalar(y, (self,), (y,))

    def log(self) -> "Scalar":
        """Natural logarithm; slope 1 / x."""
        return Scalar(math.log(self.value), (self,), (1.0 / self.value,))

    def sqrt(self) -> "Scalar":
        """Square root y; slope 1 / (2 y)."""
        y = math.sqrt(self.value)
        return Scalar(y, (self,), (0.5 / y,))

    def tanh(self) -> "Scalar":
        """Hyperbolic tangent y; slope 1 - y²."""
        y = math.tanh(self.value)
        return Scalar(y, (self,), (1.0 - y * y,))

    def relu(self) -> "Scalar":
        """max(x, 0); slope 1 above 0, else 0."""
        return Scalar(0.0, (self,), (0.0,)) if self.value <= 0 else Scalar(self.value, (self,), (1.0,))

    def gelu(self) -> "Scalar":
        """x Φ(x), where Φ(x) = (1 + erf(x / √2)) / 2 is the normal distribution function (Hendrycks & Gimpel 2016).

        The slope is Φ(x) + x φ(x), where φ(x) = exp(-x² / 2) / √(2π) is the normal density, the slope of Φ.
        """
        x = self.value
        cdf = 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))
        density = math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
        return Scalar(x * cdf, (self,), (cdf + x * density,))

    def backward(self) -> None:
        """Add d self / d x to the `grad` of every leaf x, and set the `grad` of every computed node.

        A leaf is a Scalar without parents. The gradients of leaves accumulate over calls, because the gradient of a
        batch is the sum of its images' gradients; reset them to 0 before the next batch. A computed node holds the
        gradient of the last call only.
        """
        order = self.topological_order()
        for node in order:
            node.grad = 0.0
        self.grad += 1.0  # d self / d self
        for node in reversed(order):  # every use of a node comes before the node, so its own sum is complete
            grad = node.grad
            for parent, partial in zip(node.parents, node.partials):  # noqa: B905 (strict costs a third more)
                parent.grad += grad * partial

    def topological_order(self) -> "list[Scalar]":
        """The computed nodes that this one depends on, and this one itself last: parents before children.

        Depth-first search with an explicit stack, because recursion would hit Python's recursion limit. A node is
        popped twice: first to push its parents above it, then again when all of them have been listed.
        """
        order: list[Scalar] = []
        visited: set[Scalar] = set()
        stack = [(self, False)]
        while stack:
            node, parents_listed = stack.pop()
            if parents_listed:
                order.append(node)
            elif node.parents and node not in visited:
                visited.add(node)
                stack.append((node, True))
                stack.extend([(parent, False) for parent in node.parents if parent.parents and parent not in visited])
        return order


def as_scalar(x: Scalar | float) -> Scalar:
    """A Scalar unchanged, a plain number as a new leaf."""
    return x if isinstance(x, Scalar) else Scalar(x)


def dot(xs: Sequence[Scalar], ys: Sequence[Scalar], start: Scalar | float = 0.0) -> Scalar:
    """start + x_1 y_1 + ... + x_n y_n as one node; the slope is y_i for x_i, x_i for y_i, and 1 for start.

    Raises ValueError if xs and ys differ in length.
    """
    if len(xs) != len(ys):
        raise ValueError(f"dot of {len(xs)} and {len(ys)} numbers")
    start = as_scalar(start)
    x_values, y_values = [x.value for x in xs], [y.value for y in ys]
    value = sum(map(mul, x_values, y_values), start.value)
    return Scalar(value, (*xs, *ys, start), (*y_values, *x_values, 1.0))


def total(xs: Sequence[Scalar]) -> Scalar:
    """x_1 + ... + x_n as one node; every slope is 1."""
    return Scalar(sum([x.value for x in xs]), tuple(xs), (1.0,) * len(xs))
