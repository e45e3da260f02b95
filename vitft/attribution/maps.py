"""Maps of what speaks for a class, by the method that suits the model, and as pictures."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitft.attribution.gradient_attention import gradient_attention
from vitft.attribution.occlusion import occlusion
from vitft.errors import ModelError

_BATCH = 8  # attention weights of all blocks and their gradients are large
Method = Literal["attention", "occlusion"]
Map = NDArray[np.float32]
"""Of each place, how much it speaks for the class: (rows, columns), 0 or less where it does not."""


def class_maps(model: Any, pixels: Tensor, classes: Tensor, by: Method | None = None) -> tuple[list[Map], Method]:
    """What speaks for a class in each image, and how that was found.

    Args:
        model: a Transformers image classifier, in evaluation mode.
        pixels: its input, (B, C, H, W).
        classes: of each image, the class, (B,).
        by: the method; by default gradient-weighted attention where all patches attend to each other, else (in a Swin
            or a ConvNeXt) occlusion.

    Raises:
        ModelError: by attention, but this model does not have it between all patches.
    """
    maps: list[Map] = []
    for start in range(0, len(pixels), _BATCH):
        some, of = pixels[start : start + _BATCH], classes[start : start + _BATCH]
        found = None if by == "occlusion" else gradient_attention(model, some, of)
        if found is None and by == "attention":
            raise ModelError("attention: not between all patches of this model, so it shows nothing; use occlusion.")
        by = "occlusion" if found is None else "attention"
        maps += list((occlusion(model, some, of) if found is None else found).detach().cpu().numpy())
    return maps, by or "attention"


def overlay(pixels: NDArray[np.uint8], weights: NDArray[Any], width: int) -> Image.Image:
    """The image (H, W, 3) at a width in pixels: gray where the weights (rows, columns) are low, amber where high."""
    height = round(width * pixels.shape[0] / pixels.shape[1])
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    positive = np.clip(weights, 0, None)
    scaled = Image.fromarray((255 * positive / max(positive.max(), 1e-12)).astype(np.uint8))
    mask = np.asarray(scaled.resize((width, height), Image.Resampling.NEAREST), np.float32)[..., None] / 255
    gray = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    tinted = 0.55 * np.asarray(picture, np.float32) + 0.45 * np.array([255, 176, 32])
    return Image.fromarray((0.35 * gray * (1 - mask) + mask * tinted).clip(0, 255).astype(np.uint8))
