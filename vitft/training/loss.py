"""The training loss: the sum over a micro-batch, which the step divides by the size of the whole batch.

Where some classes have far more images than others, cross-entropy favors them. Class weights, logit adjustment and
balanced sampling count all classes alike; the focal loss counts hard images more.
"""

import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitft.config.train import TrainConfig
from vitft.errors import UsageError, nearest
from vitft.io.paths import composed, expanded

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassBalance:
    """What a loss has against unequal classes: weights, with mean 1 over the images seen, and what logits get added.

    Both are (C,), or None.
    """

    weights: Tensor | None = None
    adjustment: Tensor | None = None


def summed_loss(logits: Tensor, targets: Tensor, config: TrainConfig, balance: ClassBalance | None = None) -> Tensor:
    """The loss summed over the images of a micro-batch, a scalar: cross-entropy, or focal loss.

    `logits` is float32 (B, C); `targets` is class indices (B,), or class probabilities (B, C) of mixed images. Of
    these, the loss is that mean of the losses which the image would have in each class.
    """
    weights = None if balance is None else balance.weights
    if balance is not None and balance.adjustment is not None:
        logits = logits + balance.adjustment  # Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10
    if weights is None and not config.focal_loss:
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=config.label_smoothing)
    log_p = logits.log_softmax(dim=1)
    losses = -log_p
    if config.focal_loss:  # Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4
        # Without the smallest number, the derivative at p = 1 would be infinity times 0.
        losses = losses * (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny) ** config.focal_loss
    # (B, C): the loss that the image would have in each class.
    losses = (1 - config.label_smoothing) * losses + config.label_smoothing * losses.mean(dim=1, keepdim=True)
    if weights is not None:
        losses = losses * weights
    return losses.gather(1, targets[:, None]).sum() if targets.ndim == 1 else (losses * targets).sum()


def class_balance(config: TrainConfig, labels: Tensor, names: Sequence[str]) -> ClassBalance:
    """The balance that the settings ask for, of training images with class indices `labels` (N,)."""
    counts = np.bincount(labels.cpu().numpy(), minlength=len(names)).astype(np.float64)
    weights, adjustment = class_weights(config, names, counts), config.logit_adjustment * log_priors(counts)
    return ClassBalance(
        None if weights is None else torch.tensor(weights, dtype=torch.float32, device=labels.device),
        torch.tensor(adjustment, dtype=torch.float32, device=labels.device) if config.logit_adjustment else None,
    )


def head_loss(config: TrainConfig, labels: Tensor, names: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss by which the start of a head is fitted to images with class indices `labels` (N,).

    It counts the classes as the run does, whose balanced sampling becomes weights: otherwise the first steps would have
    to unlearn what the head prefers.
    """
    plain = config.model_copy(update={"label_smoothing": 0.0, "focal_loss": 0.0})
    balance = class_balance(plain, labels, names)
    if config.sampling == "balanced":
        counts = torch.bincount(labels, minlength=len(names))
        even = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))
        balance = replace(balance, weights=even if balance.weights is None else even * balance.weights)
    return lambda logits, targets: summed_loss(logits, targets, plain, balance) / len(targets)


def counts_alike(config: TrainConfig) -> bool:
    """Whether the settings have a remedy for unequal classes."""
    return config.class_weights is not None or config.sampling == "balanced" or config.logit_adjustment > 0


def log_priors(counts: Floats) -> Floats:
    """The logarithms of the fractions of images in each class: (C,) counts -> (C,). No image counts as one."""
    some = np.maximum(counts, 1.0)
    priors: Floats = np.log(some / some.sum())
    return priors


def class_weights(config: TrainConfig, names: Sequence[str], counts: Floats) -> Floats | None:
    """The weight of each class, with mean 1 over the images that are seen: (C,) counts -> (C,); None without any.

    `balanced` is inverse to the number of images, as scikit-learn's. Raises UsageError for a file that is no use.
    """
    if config.class_weights is None:
        return None
    seen = counts if config.sampling == "uniform" else (counts > 0).astype(np.float64)
    if config.class_weights == "balanced":
        weights = 1 / np.maximum(counts, 1.0)
    else:
        weights = np.array(list(read_weights(config.class_weights, names).values()))
    return weights * float(seen.sum() / (seen @ weights))


def pinned_weights(config: TrainConfig, names: Sequence[str]) -> str | None:
    """The setting `class_weights` with the weights instead of their file, which may change before a run is resumed."""
    if config.class_weights in (None, "balanced"):
        return config.class_weights
    return json.dumps(read_weights(config.class_weights, names), ensure_ascii=False)


def read_weights(file: str, names: Sequence[str]) -> dict[str, float]:
    """Read the weight of each class, in order, from a JSON file, or from JSON itself. Raises UsageError."""
    given = file.lstrip().startswith("{")
    what = "class_weights" if given else f"class_weights {file}"
    remedy = 'use balanced, or a JSON file with the weight of each class, such as {"cat": 1, "dog": 2.5}'
    try:
        document = json.loads(file if given else expanded(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UsageError(f"{what}: {reason}; {remedy}.") from error
    if not isinstance(document, dict):
        raise UsageError(f"{what}: it is not a JSON object; {remedy}.")
    known = {composed(name): name for name in names}
    weights: dict[str, float] = {}
    for key, value in document.items():
        name = known.get(composed(key))
        if name is None:
            hint = nearest(key, names) or f"; the classes are {_some(names)}"
            raise UsageError(f"{what}: {key} is not a class{hint}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
            got = reprlib.repr(value)
            raise UsageError(f"{what}: the weight of {key} should be a number from 1e-6 to 1e6, got {got}")
        weights[name] = float(value)
    if missing := [name for name in names if name not in weights]:
        raise UsageError(f"{what}: lacks {_some(missing)}; give every class a weight.")
    return {name: weights[name] for name in names}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
