"""What a class loses when a part of the image is hidden (Zeiler & Fergus 2014, section 4.2)."""

from typing import Any

import torch
from torch import Tensor

BATCH = 64  # hidden copies per forward pass


def occlusion(model: Any, pixels: Tensor, classes: Tensor, *, grid: int = 7) -> Tensor:
    """Maps (B, grid, grid) of how far hiding each place lowers the class's log-odds; below 0 where it raises them.

    A gray square (the mean of the normalization) that is two cells wide is centered on each cell, so that neighboring
    squares overlap. Works for every classifier, with `grid` * `grid` forward passes an image.

    Args:
        model: a Transformers image classifier, in evaluation mode.
        pixels: its input, (B, C, H, W).
        classes: of each image, the class, (B,).
        grid: places along each side.
    """
    height, width = pixels.shape[-2:]
    cells = [
        (max(0, round((row - 0.5) * height / grid)), round((row + 1.5) * height / grid),
         max(0, round((column - 0.5) * width / grid)), round((column + 1.5) * width / grid))
        for row in range(grid) for column in range(grid)
    ]  # fmt: skip
    maps = []
    with torch.no_grad():
        for image, label in zip(pixels, classes.tolist(), strict=True):
            copies = image.repeat(len(cells) + 1, 1, 1, 1)
            for copy, (top, bottom, left, right) in zip(copies[1:], cells, strict=True):
                copy[:, top:bottom, left:right] = 0
            logits = torch.cat([model(pixel_values=part).logits.float() for part in copies.split(BATCH)])
            odds = _log_odds(logits, label)
            maps.append((odds[0] - odds[1:]).reshape(grid, grid))
    return torch.stack(maps)


def _log_odds(logits: Tensor, label: int) -> Tensor:
    """log p / (1 − p) of a class, (B,): unlike the probability, it still moves where that is close to 1."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - (others.logsumexp(dim=1) if others.shape[1] else 0)
