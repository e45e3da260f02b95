"""Low-rank adapters by PEFT: LoRA (Hu et al. 2022) and DoRA (Liu et al. 2024).

The weights W of the backbone stay as they are. LoRA adds a trained product of two thin matrices to those of chosen
linear layers: W + alpha / rank * B A, with A (rank, in) and B (out, rank), which starts at 0. DoRA scales each row of
that sum to a trained length, too. The head is trained in full.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitft.config.train import TrainConfig
from vitft.errors import ModelError, UsageError, require_extra
from vitft.hardware.shards import write
from vitft.models.heads import head_modules, head_of, in_head
from vitft.randomness import derive_seed

FOLDER = "adapter"
"""The folder, in a model folder, of its adapter in PEFT's format."""

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in PEFT's files
_NAME = "default"  # PEFT's, of the only adapter of a model


def require_peft(config: TrainConfig) -> None:
    """Raise UsageError if the settings need PEFT, and it is not installed."""
    if config.lora_rank is not None:
        require_extra("lora", "lora_rank", "peft")


def add_adapter(model: Any, config: TrainConfig) -> None:
    """Add a new adapter, drawn from the seed, to a model; only it and the head are then trainable.

    Raises UsageError if the model has no such linear layers, or if they are not larger than the rank.
    """
    import peft

    from vitft.models.lora_linear import LoraLinear

    rank = config.lora_rank
    assert rank is not None
    layers = _targets(model, config.lora_targets)
    family = model.config.model_type
    if not layers:
        remedy = "set lora_targets to all" if _targets(model, "all") else "remove it"
        raise UsageError(f"lora_rank: no linear layers of {config.lora_targets} in a {family} model; {remedy}.")
    smallest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if rank > smallest:
        raise UsageError(f"lora_rank {rank}: a linear layer of this {family} model has only rank {smallest}; lower it.")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=config.lora_alpha or rank, target_modules=list(layers), use_dora=config.dora
    )
    settings._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(derive_seed(config.seed, "adapter"))
    peft.inject_adapter_in_model(settings, model, _NAME)
    for head in head_modules(model):
        head.requires_grad_(True)


def has_adapter(model: Any) -> bool:
    """Whether `add_adapter` added an adapter to a model."""
    return hasattr(model, "peft_config")


def _targets(model: nn.Module, kind: str) -> dict[str, nn.Linear]:
    """The linear layers of the repeated blocks, by name: `all`, or those of `attention`."""
    found = {}
    for name, layer in model.named_modules():
        # A subclass may use its weights without being called, as in torch's MultiheadAttention.
        if type(layer) is nn.Linear and any(part.isdecimal() for part in name.split(".")):
            parts = name.split(".")
            around = [model.get_submodule(".".join(parts[:length])) for length in range(1, len(parts))]
            attends = any("attention" in type(module).__name__.lower() for module in around)
            positions = "position_bias" in name  # not of tokens: Swin V2 computes its position biases by a network
            if (attends or kind == "all") and not positions and not in_head(model, f"{name}.weight"):
                found[name] = layer
    return found


def write_weights(model: Any, folder: Path, origin: str) -> None:
    """Write a Transformers model folder. An adapter is merged into the weights, and written beside them, unmerged.

    `origin`: the name of the pretrained model, for PEFT's adapter_config.json.
    """
    if not has_adapter(model):
        model.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict=_base(model) | _merged(model))
    settings = copy.copy(model.peft_config[_NAME])
    settings.target_modules = sorted(settings.target_modules)  # a set, whose order differs from process to process
    settings.modules_to_save, settings.inference_mode = list(head_of(model)), True
    settings.base_model_name_or_path = origin
    settings.save_pretrained(folder / FOLDER)
    save_file({name: tensor.contiguous() for name, tensor in _adapter(model).items()}, folder / FOLDER / _WEIGHTS)


def write_base(model: Any, folder: Path) -> None:
    """Write a Transformers model folder without the adapter, with the weights that it was added to."""
    model.save_pretrained(folder, state_dict=_base(model))


def read_adapter(model: Any, folder: Path) -> None:
    """Read an adapter and a head that `write_weights` wrote in a model folder into a model. Raises ModelError."""
    file = folder / FOLDER / _WEIGHTS
    try:
        read = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read: {error}.") from error
    own = _adapter(model)
    if {name: tensor.shape for name, tensor in read.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ModelError(f"{file}: is of an adapter with other layers; use another checkpoint.")
    for name, tensor in read.items():
        write(own[name], tensor)


def _adapter(model: Any) -> dict[str, Tensor]:
    """The tensors of the adapter and the head, by their names in PEFT's files; they share the model's memory."""
    import peft

    tensors = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    head = {name: tensor for name, tensor in model.state_dict().items() if in_head(model, name)}
    return {f"{_PREFIX}{name}": tensor for name, tensor in (tensors | head).items()}


def _base(model: Any) -> dict[str, Tensor]:
    """The tensors of the model without the adapter."""
    tensors = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


def _merged(model: Any) -> dict[str, Tensor]:
    """The weights of the adapted layers with the adapter merged. The model does not change: unmerging would round."""
    from peft.tuners.lora import LoraLayer

    merged = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            alone: Any = copy.deepcopy(layer)
            alone.merge()
            merged[f"{name}.weight"] = alone.base_layer.weight.detach()
    return merged
