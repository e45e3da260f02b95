"""Multinomial logistic regression with an L2 penalty, on features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of logits (N, C) and class indices (N,)."""

STRENGTHS = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
"""L2 penalties that are tried, strongest first; on features of variance 1 and the mean cross-entropy."""


def location_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each feature, (F,), and the standard deviation of all, (): what a fit subtracts and divides by.

    One scale for all features: scaling each by its own changes the accuracy little, and gives those that hardly vary
    large weights, which multiply every change that fine-tuning makes to them.
    """
    mean = features.mean(dim=0)
    return mean, (features - mean).square().mean().sqrt().clamp(min=1e-12)


def regress(
    features: Tensor, labels: Tensor, classes: int, strength: float, start: Tensor | None = None,
    mean_loss: Loss = F.cross_entropy, tolerance: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Fit by L-BFGS: features (N, F), labels (N,) in 0..C-1 -> weights and, in the last column, biases: (C, F + 1).

    What is minimized is `mean_loss` plus strength / 2 times the squared norm of all parameters. `start` is where to
    begin, such as the fit of a neighboring strength; a fit ends when no gradient is above `tolerance`. With features
    (D, N, F) and labels (D, N), D fits are made at once, (D, C, F + 1): of a few images each, they take hardly longer
    than one.

    Of more images than features, it is preconditioned: done in coordinates in which all directions are about equally
    curved. L-BFGS then takes half as many steps, and the gradient says how far the loss is from its minimum.
    """
    inputs, fits = F.pad(features, (0, 1), value=1.0), features.shape[:-2].numel()
    shape = (*features.shape[:-2], classes, inputs.shape[-1])
    begin = features.new_zeros(shape) if start is None else start
    factor = _curvature(inputs, classes, strength) if inputs.shape[-2] >= inputs.shape[-1] else None
    if factor is not None:
        begin = begin @ factor
        back = torch.linalg.solve_triangular(factor, torch.eye(shape[-1]).to(factor).expand_as(factor), upper=False)
    variable = begin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [variable], max_iter=100, tolerance_grad=tolerance, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def parameters() -> Tensor:
        return variable if factor is None else variable @ back

    def loss() -> Tensor:
        optimizer.zero_grad()
        current = parameters()
        logits = (inputs @ current.mT).flatten(end_dim=-2)
        value = fits * mean_loss(logits, labels.flatten()) + strength / 2 * current.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return parameters().detach()


def _curvature(inputs: Tensor, classes: int, strength: float) -> Tensor | None:
    """The Cholesky factor, (F, F), of about the curvature of the loss along the parameters of a class.

    That of class c is the mean of p_c (1 - p_c) x x^T over the images, plus the penalty. None if it has no factor by
    rounding: some direction is millions of times as curved as another, or a feature is not finite.
    """
    share = _SURE / classes
    gram = inputs.mT @ inputs * (share / inputs.shape[-2])
    gram.diagonal(dim1=-2, dim2=-1).add_(strength)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return None if failed.any() or not factor.isfinite().all() else factor


_SURE = 0.3  # the mean of p (1 - p) is about this fraction of 1 / C, between no fit at all (1) and a close one
