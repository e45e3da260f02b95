"""From the last tokens to class scores, and from scores and labels to the loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.scratch.tensors import Array, Linear, Watch, linear, linear_backward, no_watch, softmax
from vitft.spec import ViTSpec


@dataclass
class Head:
    """pre_logits (R, D) or None; logits (classes, R), or (classes, D) without pre_logits."""

    pre_logits: Linear | None
    logits: Linear


@dataclass
class SavedHead:
    """What `head_backward` needs: the pooled tokens (B, D), and the input of the last layer, (B, R) or (B, D)."""

    pooled: Array
    features: Array


def pool(tokens: Array, spec: ViTSpec) -> Array:
    """One vector per image, its class token or the mean of its patch tokens: (B, N, D) to (B, D)."""
    return tokens[:, 0] if spec.pooling == "cls" else tokens[:, spec.prefix_tokens :].mean(axis=1)


def pool_backward(d_pooled: Array, spec: ViTSpec) -> Array:
    """Tokens that were not read get a gradient of 0; each token of a mean gets 1 / count of the mean's gradient."""
    d_tokens = np.zeros((len(d_pooled), spec.tokens, spec.width), d_pooled.dtype)
    if spec.pooling == "cls":
        d_tokens[:, 0] = d_pooled
    else:
        d_tokens[:, spec.prefix_tokens :] = d_pooled[:, None] / d_pooled.dtype.type(spec.patches)
    return d_tokens


def head(tokens: Array, w: Head, spec: ViTSpec, watch: Watch = no_watch) -> tuple[Array, SavedHead]:
    """Tokens (B, N, D) to logits (B, classes) (Dosovitskiy et al. 2020, eq. 4).

    The optional tanh layer, pre_logits, is part of the head in pretraining; for fine-tuning it is removed.
    """
    pooled = features = pool(tokens, spec)
    watch("pool", pooled)
    if w.pre_logits is not None:
        features = np.tanh(linear(pooled, w.pre_logits))
        watch("pre_logits", features)
    logits = linear(features, w.logits)
    watch("head", logits)
    return logits, SavedHead(pooled, features)


def head_backward(d_logits: Array, saved: SavedHead, w: Head, spec: ViTSpec) -> tuple[Array, Head]:
    """Gradients of the tokens and of the weights; tanh' = 1 − tanh²."""
    d_pooled, d_last = linear_backward(d_logits, saved.features, w.logits)
    d_pre_logits = None
    if w.pre_logits is not None:
        d_pooled = d_pooled * (1 - saved.features * saved.features)
        d_pooled, d_pre_logits = linear_backward(d_pooled, saved.pooled, w.pre_logits)
    return pool_backward(d_pooled, spec), Head(d_pre_logits, d_last)


@dataclass
class SavedLoss:
    """probabilities: the softmax of the logits; target: the probabilities to learn. Both (B, classes)."""

    probabilities: Array
    target: Array


def cross_entropy(logits: Array, labels: NDArray[np.integer[Any]], smoothing: float = 0.0) -> tuple[float, SavedLoss]:
    """Mean over the images of −Σ_c target_c log softmax(logits)_c, in nats.

    The target is 1 for the label and 0 for all other classes. `smoothing` spreads that fraction of it evenly over
    all classes (Szegedy et al. 2016, section 7).
    """
    images, classes = logits.shape
    target = np.full_like(logits, smoothing / classes)
    target[np.arange(images), labels] += 1 - smoothing
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # never takes the log of 0
    return float(-(target * log_probabilities).sum() / images), SavedLoss(softmax(logits), target)


def cross_entropy_backward(saved: SavedLoss) -> Array:
    """dlogits = (softmax(logits) − target) / B: what the model predicts minus what it should predict."""
    return (saved.probabilities - saved.target) / saved.probabilities.dtype.type(len(saved.probabilities))
