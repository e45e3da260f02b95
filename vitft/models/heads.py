"""Find the head of an image classifier, in any architecture, by its tensor shapes instead of names."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vitft.models.classifiers import TIMM

_cache: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def label_tensors(model: Any) -> frozenset[str]:
    """The names of the parameters whose shapes depend on the number of labels; empty if there are none."""
    if model not in _cache:
        config = type(model.config).from_dict(model.config.to_dict())
        config.num_labels = model.config.num_labels + 1
        with torch.device("meta"):  # only shapes
            other = dict(type(model)(config).named_parameters())
        # An adapter adds parameters, and renames those of the layers that it changes.
        shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in other}
        _cache[model] = frozenset(name for name, shape in shapes.items() if shape != other[name].shape)
    return _cache[model]


def head_of(model: Any) -> tuple[str, ...]:
    """The names of the head's modules: the largest ones around `label_tensors` that contain no stack of blocks.

    Usually one linear layer; with LeViT also the norm before it, with a distilled DeiT two layers. Of a timm model it
    is the layer alone: the module around it also pools.
    """
    if model.config.model_type == TIMM:
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in sorted(label_tensors(model))))
    return tuple(dict.fromkeys(_largest(model, name) for name in sorted(label_tensors(model))))


def in_head(model: Any, tensor: str) -> bool:
    """Whether a parameter or buffer of this name belongs to the head."""
    return tensor.startswith(tuple(f"{name}." for name in head_of(model)))


def head_modules(model: Any) -> Iterator[nn.Module]:
    """The modules of `head_of`."""
    return map(model.get_submodule, head_of(model))


def classifier_of(model: Any) -> nn.Module:
    """The classification layer: of several, the first."""
    return model.get_submodule(head_of(model)[0])  # type: ignore[no-any-return]


def _largest(model: nn.Module, tensor: str) -> str:
    """The outermost submodule around a tensor that contains no ModuleList."""
    parts = tensor.split(".")[:-1]
    around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return next(
        (name for name in around if not any(isinstance(m, nn.ModuleList) for m in model.get_submodule(name).modules())),
        around[-1] if around else "",
    )
