"""A model for another input size: what it knows of positions is resized once, at load."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitft.demand import check_demand
from vitft.errors import ModelError


def at_image_size(model: Any, image_size: int) -> Any:
    """The same weights for another input size: position embeddings are resized once, bicubically.

    (Dosovitskiy et al. 2020, section 3.2.) The new size stands in the model's configuration.
    """
    config = model.config.__class__.from_dict(model.config.to_dict())
    old = getattr(config, "image_size", None)
    if old is None:
        return model  # a convolutional network takes any size
    config.image_size = image_size
    check_size(config, image_size)
    check_demand(type(model), config, f"image_size {image_size}")
    resized = type(model)(config)
    wanted, weights = resized.state_dict(), model.state_dict()
    for name, tensor in weights.items():
        if tensor.shape == wanted[name].shape:
            continue
        patch = side_of(config.patch_size)
        before, after = side_of(old) // patch, image_size // patch
        if name.endswith("position_embeddings"):  # (1, prefix tokens + patches, D)
            prefix = tensor.shape[1] - before**2
            grid = _resize_grid(tensor[0, prefix:], before, after)
            weights[name] = torch.cat([tensor[:, :prefix], grid[None]], dim=1)
        elif name.endswith("relative_position_bias_table"):  # (offsets + 3 for the class token, A)
            grid = _resize_grid(tensor[:-3], 2 * before - 1, 2 * after - 1)
            weights[name] = torch.cat([grid, tensor[-3:]])
        else:
            raise ModelError(f"image_size {image_size}: {config.model_type}'s {name} cannot be resized; use {old}.")
    resized.load_state_dict(weights)
    return resized


def _resize_grid(rows: Tensor, before: int, after: int) -> Tensor:
    """(before², D) -> (after², D)."""
    grid = rows.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (after, after), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(after**2, -1)


def check_size(config: Any, image_size: int) -> None:
    """Raise ModelError unless patches fill the image."""
    patch = side_of(getattr(config, "patch_size", 1))
    if image_size % patch:
        low = max(image_size // patch, 1) * patch
        raise ModelError(
            f"image_size {image_size} is not a multiple of patch_size {patch}; try {low} or {low + patch}."
        )


def side_of(size: int | Sequence[int]) -> int:
    """The side in pixels, or the height where a configuration has two."""
    return size if isinstance(size, int) else size[0]
