"""What the head would say of the tokens after each block (the logit lens: nostalgebraist 2020)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitft.explain.trace import Trace
from vitft.scratch.heads import pool
from vitft.scratch.tensors import Array, layer_norm, linear, softmax


@dataclass(frozen=True)
class Lens:
    """Probabilities by depth: 0 is before the first block, L after the last.

    `pooled` (L + 1, classes) reads what the head would be given; at depth L that is the prediction. `best` (L + 1, N)
    is the most probable class of each token, if the head read that token alone, and `sure` (L + 1, N) its probability.
    """

    pooled: Array
    best: NDArray[np.int64]
    sure: Array


def lens(trace: Trace) -> Lens:
    """Read the tokens after each block with the final norm and the head of the trained model."""
    outputs = [f"block.{layer}.mlp.{'residual' if trace.spec.norm == 'pre' else 'norm'}"
               for layer in range(1, trace.spec.layers + 1)]  # fmt: skip
    tokens = np.concatenate([trace.by_numpy[name] for name in ("embed.positions", *outputs)])
    if (norm := trace.weights.norm) is not None:
        tokens, _ = layer_norm(tokens, norm, trace.spec.norm_eps)
    pooled, each = _read(pool(tokens, trace.spec), trace), _read(tokens, trace)
    return Lens(pooled, each.argmax(axis=-1), each.max(axis=-1))


def _read(features: Array, trace: Trace) -> Array:
    """Probabilities (..., classes) of features (..., D)."""
    head = trace.weights.head
    if head.pre_logits is not None:
        features = np.tanh(linear(features, head.pre_logits))
    return softmax(linear(features, head.logits).astype(np.float64))
