"""Change the input size of a model: position embeddings are resized once, when it is loaded."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.errors import ModelError
from vitft.models.classifiers import TIMM, classifier_class
from vitft.models.memory_guard import check_memory


def resize_model(model: Any, image_size: int) -> Any:
    """A copy of the model for another, square input size, with resized position embeddings.

    They are interpolated by the model's own method if it has one, otherwise bicubically (Dosovitskiy et al. 2020,
    section 3.2). The new model's configuration has the new size. Raises ModelError for an invalid size, and for an
    architecture whose positions cannot be resized.
    """
    old = input_size(model.config)
    if old is None:
        return model  # a convolutional network accepts any size
    config = with_image_size(model.config, image_size)
    check_size(config, image_size, image_size)
    check_memory(type(model), config, f"image_size {image_size}")
    if config.model_type == TIMM:
        return _resized_by_timm(model, config, image_size)
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
            # Offsets, and three rows for the class token; bilinear, like BEiT and Data2Vec themselves.
            old_grid, new_grid = (tuple(2 * side - 1 for side in grid) for grid in (before, after))
            table = torch.cat([_resize_grid(tensor[:-3], old_grid, new_grid, "bilinear"), tensor[-3:]])
        elif name.endswith(("position_embeddings", "position_embedding.weight")):
            table = (
                _interpolate_by_model(model, name, wanted[name].shape, image_size) if before[0] == before[1] else None
            )
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
        with torch.no_grad():  # position tables may not be enough, such as for Swin's windows
            resized.eval()(pixel_values=torch.zeros(1, input_channels(config), image_size, image_size))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"image_size {image_size}: {config.model_type} does not accept it; use {_listed(old)}."
        ) from error
    return resized


def _resized_by_timm(model: Any, config: Any, image_size: int) -> Any:
    """A copy of a timm model for another input size, resized by its own method."""
    resized = copy.deepcopy(model)
    with torch.device("meta"):  # what the configuration will be loaded as
        shapes = {name: tensor.shape for name, tensor in type(model)(config).state_dict().items()}
    patch = getattr(getattr(model.timm_model, "patch_embed", None), "patch_size", (1, 1))
    try:
        if any(image_size % side for side in patch):
            raise ValueError(f"not a multiple of {patch}")
        resized.timm_model.set_input_size(img_size=(image_size, image_size))
        if shapes != {name: tensor.shape for name, tensor in resized.state_dict().items()}:
            raise ValueError("its tensors would have other shapes")
        with torch.no_grad():
            resized.eval()(pixel_values=torch.zeros(1, input_channels(config), image_size, image_size))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        old = input_size(model.config)
        assert old is not None
        raise ModelError(
            f"image_size {image_size}: {config.architecture} does not accept it; use {_listed(old)}."
        ) from error
    resized.config = config
    return resized


def _interpolate_by_model(model: nn.Module, name: str, shape: torch.Size, image_size: int) -> Tensor | None:
    """Position embeddings interpolated by the model's own method; None if that fails.

    The method should use only the number of tokens. The tokens are NaN here, which shows if it uses their values.
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
            table: Tensor = owner.interpolate_pos_encoding(tokens, image_size, image_size)
    except (RuntimeError, TypeError):  # another signature, or patches that are not square
        return None
    return table if table.numel() == math.prod(shape) else None


def _offsets(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _resize_grid(rows: Tensor, before: tuple[int, ...], after: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate (height * width, D) from one grid size to another."""
    grid = rows.reshape(1, *before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, after, mode=mode, align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(math.prod(after), -1)


def _vision(config: Any) -> Any:
    """The vision part of a configuration, such as CLIP's; for vision-only models, all of it."""
    return getattr(config, "vision_config", None) or config


def input_size(config: Any) -> tuple[int, int] | None:
    """The input height and width in a configuration; None if it has none, or if a timm model takes any size."""
    if config.model_type == TIMM:
        given = getattr(config, "pretrained_cfg", None) or {}
        fixed = tuple(given.get("input_size") or (3, 224, 224))[1:] if given.get("fixed_input_size") else None
        chosen = (config.model_args or {}).get("img_size", fixed)
        return None if chosen is None else _pair(chosen)
    size = getattr(_vision(config), "image_size", None)
    return None if size is None else _pair(size)


def input_channels(config: Any) -> int:
    """The number of input channels: 3, or 1 for grayscale. Raises ModelError for others."""
    if config.model_type == TIMM:
        channels = (config.model_args or {}).get("in_chans", 3)
    else:
        channels = getattr(_vision(config), "num_channels", 3)
    if channels not in (1, 3):
        raise ModelError(f"a model with {channels} channels; use one with 3, or with 1 for grayscale images.")
    return int(channels)


def with_image_size(config: Any, image_size: int) -> Any:
    """A copy of the configuration for a square input of this size."""
    changed = type(config).from_dict(config.to_dict())
    if config.model_type == TIMM:
        given = getattr(config, "pretrained_cfg", None) or {}
        changed.model_args = {**(config.model_args or {}), "img_size": image_size}
        changed.pretrained_cfg = given | {"input_size": [input_channels(config), image_size, image_size]}
        return changed
    vision = _vision(changed)
    is_int = isinstance(getattr(vision, "image_size", image_size), int)
    vision.image_size = image_size if is_int else [image_size, image_size]
    return changed


def has_fixed_size(config: Any, size: tuple[int, int]) -> bool:
    """Whether a model cannot read images of height and width `size`, because its tensors would have other shapes.

    DINOv2 and DINOv3 models accept any size; their configuration states the training size.
    """
    if config.model_type.startswith(("dinov2", "dinov3")):
        return False
    if size[0] != size[1]:
        return True
    model_class = classifier_class(config)
    with torch.device("meta"):
        shapes, resized = (
            {name: tensor.shape for name, tensor in model_class(variant).state_dict().items()}
            for variant in (config, with_image_size(config, size[0]))
        )
    return shapes != resized


def check_size(config: Any, height: int, width: int) -> None:
    """Raise ModelError unless height and width are multiples of the patch size."""
    vision = _vision(config)
    stride: Any = getattr(vision, "patch_stride", None) or getattr(vision, "patch_size", 1)
    patches = _pair(stride)
    for side, patch in zip((height, width), patches, strict=True):
        if side % patch:
            low = max(side // patch, 1) * patch
            raise ModelError(f"image_size {side} is not a multiple of patch_size {patch}; try {low} or {low + patch}.")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; a single number stands for both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _listed(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"
