"""From the last tokens to class scores, and from scores and labels to the loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.scratch.tensors import Array, Linear, Watch, linear, linear_backward, softmax, unwatched
from vitft.spec import ViTSpec


@dataclass
class Head:
    """pre_logits (R, D) or none; logits (classes, R), or (classes, D) without it."""

    pre_logits: Linear | None
    logits: Linear


@dataclass
class SavedHead:
    """What `head_backward` needs."""

    pooled: Array
    squashed: Array


def pool(tokens: Array, spec: ViTSpec) -> Array:
    """One vector of an image: its class token, or the mean of its patch tokens. (B, N, D) to (B, D)."""
    return tokens[:, 0] if spec.pooling == "cls" else tokens[:, spec.prefix_tokens :].mean(axis=1)


def pool_backward(d_pooled: Array, spec: ViTSpec) -> Array:
    """Tokens that were not read get no gradient; of a mean each gets its share."""
    d_tokens = np.zeros((len(d_pooled), spec.tokens, spec.width), d_pooled.dtype)
    if spec.pooling == "cls":
        d_tokens[:, 0] = d_pooled
    else:
        d_tokens[:, spec.prefix_tokens :] = d_pooled[:, None] / d_pooled.dtype.type(spec.patches)
    return d_tokens


def head(tokens: Array, w: Head, spec: ViTSpec, watch: Watch = unwatched) -> tuple[Array, SavedHead]:
    """Tokens (B, N, D) to logits (B, classes) (Dosovitskiy et al. 2020, eq. 4).

    The tanh layer of the pre-logits was in the pretrained model's head, and is left out in fine-tuning.
    """
    pooled = squashed = pool(tokens, spec)
    watch("pool", pooled)
    if w.pre_logits is not None:
        squashed = np.tanh(linear(pooled, w.pre_logits))
        watch("pre_logits", squashed)
    logits = linear(squashed, w.logits)
    watch("head", logits)
    return logits, SavedHead(pooled, squashed)


def head_backward(d_logits: Array, saved: SavedHead, w: Head, spec: ViTSpec) -> tuple[Array, Head]:
    """The gradient of the tokens, and those of the weights; tanh' = 1 − tanh²."""
    d_pooled, d_last = linear_backward(d_logits, saved.squashed, w.logits)
    d_pre_logits = None
    if w.pre_logits is not None:
        d_pooled = d_pooled * (1 - saved.squashed * saved.squashed)
        d_pooled, d_pre_logits = linear_backward(d_pooled, saved.pooled, w.pre_logits)
    return pool_backward(d_pooled, spec), Head(d_pre_logits, d_last)


@dataclass
class SavedLoss:
    """shares: the softmax of the logits; target: the shares that were wanted. Both (B, classes)."""

    shares: Array
    target: Array


def cross_entropy(logits: Array, labels: NDArray[np.integer[Any]], smoothing: float = 0.0) -> tuple[float, SavedLoss]:
    """Mean over the images of −Σ_c target_c log softmax(logits)_c, in nats.

    The target is 1 at the label and 0 elsewhere; `smoothing` spreads that share of it evenly over all
    classes (Szegedy et al. 2016, section 7).
    """
    images, classes = logits.shape
    target = np.full_like(logits, smoothing / classes)
    target[np.arange(images), labels] += 1 - smoothing
    shares = softmax(logits)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # never the log of a 0
    return float(-(target * log_shares).sum() / images), SavedLoss(shares, target)


def cross_entropy_backward(saved: SavedLoss) -> Array:
    """dlogits = (softmax(logits) − target) / B: what is given less what was wanted."""
    return (saved.shares - saved.target) / saved.shares.dtype.type(len(saved.shares))
