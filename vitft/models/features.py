"""The features of images: what the backbone of a model gives its head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitft.hardware.device import autocast
from vitft.models.heads import classifier_of

Features = Callable[[Tensor], Tensor]
"""From pixels (B, 3, H, W) to the input of the head, (B, F)."""


def backbone(model: nn.Module, device: str, precision: str) -> Features:
    """The model up to its classifier, with its own pooling: float32 features, without gradients.

    `precision` is that of its matrix products.
    """

    def features(pixels: Tensor) -> Tensor:
        with heads_input(model) as read, torch.no_grad(), autocast(device, precision):
            model(pixel_values=pixels)
        return read[0].float()

    return features


@contextmanager
def heads_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, what the head reads in each forward pass is listed: (B, F), or (B, F, 1, 1), as in a ResNet."""
    read: list[Tensor] = []
    handle = classifier_of(model).register_forward_pre_hook(lambda _module, given: read.append(given[0]))
    try:
        yield read
    finally:
        handle.remove()
