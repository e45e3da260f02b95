"""How gradients change weights: SGD, Adam, AdamW, and the learning rate of each step."""

from dataclasses import dataclass, field
from math import cos, pi, sqrt
from typing import Literal

import numpy as np

from vitft.scratch.tensors import Array


def lr_at(
    step: int, lr: float, total_steps: int, warmup_steps: int = 0,
    schedule: Literal["constant", "step", "cosine"] = "constant", decay_step: int = 0, decay_factor: float = 0.1,
) -> float:  # fmt: skip
    """The learning rate of a step, counted from 0: linear warmup to lr, then the schedule.

    step: lr, and lr · decay_factor from decay_step on. cosine: from lr to 0, which it reaches one step after the
    last (Loshchilov & Hutter 2017, eq. 5).
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "step":
        return lr * (decay_factor if step >= decay_step else 1.0)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return lr * (1 + cos(pi * progress)) / 2
    return lr


@dataclass
class SGD:
    """v ← momentum · v + g;  w ← w − lr · v."""

    momentum: float = 0.0
    velocity: dict[str, Array] = field(default_factory=dict)

    def update(self, weights: dict[str, Array], gradients: dict[str, Array], lr: float) -> None:
        """Change every weight in place."""
        for name, weight in weights.items():
            velocity = gradients[name]
            if self.momentum and name in self.velocity:
                velocity = self.momentum * self.velocity[name] + velocity
            if self.momentum:
                self.velocity[name] = velocity
            weight -= lr * velocity


@dataclass
class Adam:
    """A step size for each weight (Kingma & Ba 2015, algorithm 1); AdamW if weight_decay is not 0.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²: running means of the gradient and of its square.
    w ← w − lr · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ) correct for their start at 0.

    AdamW first shrinks w by lr · weight_decay · w, decoupled from the gradient (Loshchilov & Hutter 2019,
    algorithm 2). Only matrices and kernels decay. A norm's scale, a bias or a token does not sum over many inputs,
    so there is no need to keep it small.
    """

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    step: int = 0
    m: dict[str, Array] = field(default_factory=dict)
    v: dict[str, Array] = field(default_factory=dict)

    def update(self, weights: dict[str, Array], gradients: dict[str, Array], lr: float) -> None:
        """Change every weight in place."""
        self.step += 1
        correction_m, correction_v = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        for name, weight in weights.items():
            if name not in self.m:
                self.m[name], self.v[name] = np.zeros_like(weight), np.zeros_like(weight)
            gradient, m, v = gradients[name], self.m[name], self.v[name]
            m += (1 - self.beta1) * (gradient - m)
            v += (1 - self.beta2) * (gradient * gradient - v)
            if self.weight_decay and decays(name):
                weight *= 1 - lr * self.weight_decay
            weight -= (lr / correction_m) * m / (np.sqrt(v) / sqrt(correction_v) + self.eps)


def decays(name: str) -> bool:
    """Whether weight decay applies to the array of this name: it does to matrices and kernels."""
    return name.endswith(".weight")
