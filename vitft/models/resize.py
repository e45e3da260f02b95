"""A model for another input size: what it knows of positions is resized once, at load."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.errors import ModelError
from vitft.models.memory_guard import check_demand


def at_image_size(model: Any, image_size: int) -> Any:
    """The same weights for another, square input size: what knows positions is resized once.

    To what the model itself would make of it at that size, where its architecture has a way; else bicubically
    (Dosovitskiy et al. 2020, section 3.2). The new size stands in the model's configuration. Raises ModelError
    for a size that does not fit, and for an architecture whose positions cannot be resized.
    """
    old = size_of(model.config)
    if old is None:
        return model  # a convolutional network takes any size
    config = with_image_size(model.config, image_size)
    check_size(config, image_size, image_size)
    check_demand(type(model), config, f"image_size {image_size}")
    resized = type(model)(config)
    wanted, weights = resized.state_dict(), model.state_dict()
    patch = _pair(_vision(config).patch_size) if hasattr(_vision(config), "patch_size") else (1, 1)
    before = old[0] // patch[0], old[1] // patch[1]
    after = image_size // patch[0], image_size // patch[1]
    for name, tensor in weights.items():
        if tensor.shape == wanted[name].shape:
            continue
        table = None
        if name.endswith("relative_position_bias_table") and tensor.shape[0] == _offsets(before) + 3:
            # Offsets, and three rows for the class token; bilinearly, as BEiT and Data2Vec do it themselves.
            then, now = (tuple(2 * side - 1 for side in grid) for grid in (before, after))
            table = torch.cat([_resize_grid(tensor[:-3], then, now, "bilinear"), tensor[-3:]])
        elif name.endswith(("position_embeddings", "position_embedding.weight")):
            table = _by_the_model(model, name, wanted[name].shape, image_size) if before[0] == before[1] else None
            rows = tensor.flatten(0, -2)
            prefix = len(rows) - math.prod(before)
            if table is None and 0 <= prefix <= 2:
                table = torch.cat([rows[:prefix], _resize_grid(rows[prefix:], before, after, "bicubic")])
        if table is None or table.numel() != wanted[name].numel() or not torch.isfinite(table).all():
            raise ModelError(
                f"image_size {image_size}: the {name} of a {config.model_type} cannot be resized; use {_listed(old)}."
            )
        weights[name] = table.reshape(wanted[name].shape)
    resized.load_state_dict(weights)
    try:
        with torch.no_grad():  # some, such as Swin's windows, need more than tables
            resized.eval()(pixel_values=torch.zeros(1, channels_of(config), image_size, image_size))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"image_size {image_size}: {config.model_type} cannot read it; use {_listed(old)}.") from error
    return resized


def _by_the_model(model: nn.Module, name: str, shape: torch.Size, image_size: int) -> Tensor | None:
    """A table as the model itself interpolates it; None where it cannot.

    Its method takes the tokens for their number alone; as they are no numbers here, it shows if it used more.
    """
    owner: Any = next(
        (module for end in (1, 2) if hasattr(module := model.get_submodule(".".join(name.split(".")[:-end])),
                                             "interpolate_pos_encoding")), None,
    )  # fmt: skip
    if owner is None:
        return None
    tokens = torch.full((1, *shape[-2:]), math.nan)
    try:
        with torch.no_grad():
            made: Tensor = owner.interpolate_pos_encoding(tokens, image_size, image_size)
    except (RuntimeError, TypeError):  # a method of another kind, or patches that are not square
        return None
    return made if made.numel() == math.prod(shape) else None


def _offsets(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _resize_grid(rows: Tensor, before: tuple[int, ...], after: tuple[int, ...], mode: str) -> Tensor:
    """(height * width, D) of one grid -> of another."""
    grid = rows.reshape(1, *before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, after, mode=mode, align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(math.prod(after), -1)


def _vision(config: Any) -> Any:
    """The part of a configuration that is about images: of CLIP and its like a part, else the whole."""
    return getattr(config, "vision_config", None) or config


def size_of(config: Any) -> tuple[int, int] | None:
    """Height and width of the input that a configuration states; None where it states none."""
    stated = getattr(_vision(config), "image_size", None)
    return None if stated is None else _pair(stated)


def channels_of(config: Any) -> int:
    """Channels of the input: 3, or 1 for gray. Raises ModelError for others."""
    channels = getattr(_vision(config), "num_channels", 3)
    if channels not in (1, 3):
        raise ModelError(f"a model of {channels} channels: images have 3, or 1 where they are gray; use another model.")
    return int(channels)


def with_image_size(config: Any, image_size: int) -> Any:
    """The configuration for a square input of this size."""
    changed = type(config).from_dict(config.to_dict())
    vision = _vision(changed)
    one = isinstance(getattr(vision, "image_size", image_size), int)
    vision.image_size = image_size if one else [image_size, image_size]
    return changed


def is_fixed(config: Any, size: tuple[int, int]) -> bool:
    """Whether a model of this configuration cannot read images of another size: its tables would have other shapes.

    DINOv2 checkpoints state the size they were trained at, and take any.
    """
    if config.model_type.startswith("dinov2") or size[0] != size[1]:
        return not config.model_type.startswith("dinov2")
    import transformers

    kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    with torch.device("meta"):
        shapes = [
            {name: tensor.shape for name, tensor in kind(one).state_dict().items()}
            for one in (config, with_image_size(config, size[0]))
        ]
    return shapes[0] != shapes[1]


def check_size(config: Any, height: int, width: int) -> None:
    """Raise ModelError unless patches fill the image."""
    vision = _vision(config)
    stride: Any = getattr(vision, "patch_stride", None) or getattr(vision, "patch_size", 1)
    patches = _pair(stride)
    for side, patch in zip((height, width), patches, strict=True):
        if side % patch:
            low = max(side // patch, 1) * patch
            raise ModelError(f"image_size {side} is not a multiple of patch_size {patch}; try {low} or {low + patch}.")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, where one number stands for both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _listed(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"
