"""Transformers' ViTs and the textbook's: the same numbers under different names.

Transformers 5 stores `encoder.layer.0.attention.attention.query.weight` in files and calls the same matrix
`layers.0.attention.q_proj.weight` in memory. Both are read, with or without "vit." in front.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitft.scratch.tensors import Array
from vitft.scratch.vit import ViT, from_named_arrays, named_arrays
from vitft.spec import ViTSpec, spec_from_config

# Arrays of a block: our name, Transformers' name in files, and its name in memory.
_BLOCK = (
    ("attention_norm.scale", "layernorm_before.weight", "layernorm_before.weight"),
    ("attention_norm.shift", "layernorm_before.bias", "layernorm_before.bias"),
    ("attention.output.weight", "attention.output.dense.weight", "attention.o_proj.weight"),
    ("attention.output.bias", "attention.output.dense.bias", "attention.o_proj.bias"),
    ("mlp_norm.scale", "layernorm_after.weight", "layernorm_after.weight"),
    ("mlp_norm.shift", "layernorm_after.bias", "layernorm_after.bias"),
    ("mlp.inner.weight", "intermediate.dense.weight", "mlp.fc1.weight"),
    ("mlp.inner.bias", "intermediate.dense.bias", "mlp.fc1.bias"),
    ("mlp.outer.weight", "output.dense.weight", "mlp.fc2.weight"),
    ("mlp.outer.bias", "output.dense.bias", "mlp.fc2.bias"),
)
# Query, key and value, which the textbook stacks into one array: name in files, and in memory.
_QKV = (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"))  # fmt: skip
_OUTSIDE_BLOCKS = {
    "embedding.projection.weight": "embeddings.patch_embeddings.projection.weight",
    "embedding.projection.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.scale": "layernorm.weight",
    "norm.shift": "layernorm.bias",
}
_HEAD = {
    "head.pre_logits.weight": "pooler.dense.weight",
    "head.pre_logits.bias": "pooler.dense.bias",
    "head.logits.weight": "classifier.weight",
    "head.logits.bias": "classifier.bias",
}
_PREFIX_TOKENS = ("embeddings.cls_token", "embeddings.distillation_token")


def load_folder(folder: Path, dtype: Any = np.float32) -> tuple[ViT, ViTSpec]:
    """Weights and spec of a Transformers ViT folder with config.json and model.safetensors.

    A model without a classifier gets one of zeros. Raises ValueError for weights that do not fit a plain ViT,
    ModelError for the config of another architecture, OSError for files that cannot be read.
    """
    spec = spec_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    try:
        arrays = load_file(folder / "model.safetensors")
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read into NumPy ({error})") from None
    return from_transformers(arrays, spec, dtype), spec


def from_transformers(arrays: Mapping[str, Array], spec: ViTSpec, dtype: Any = np.float32) -> ViT:
    """The weights in a state dict of ViTModel, ViTForImageClassification or their DeiT versions, in either naming."""
    theirs = {name.removeprefix("vit.").removeprefix("deit."): array for name, array in arrays.items()}
    ours: dict[str, Array] = {}
    if tokens := [theirs[name][0] for name in _PREFIX_TOKENS if name in theirs]:
        ours["embedding.class_token"] = np.concatenate(tokens)
    if "embeddings.position_embeddings" in theirs:
        ours["embedding.positions"] = theirs["embeddings.position_embeddings"][0]
    if "classifier.weight" not in theirs:
        ours["head.logits.weight"] = np.zeros((spec.classes, spec.width))
        ours["head.logits.bias"] = np.zeros(spec.classes)
    for name, their_name in (_OUTSIDE_BLOCKS | _HEAD).items():
        if their_name in theirs and (spec.pre_logits or "pre_logits" not in name):
            ours[name] = theirs[their_name]
    for layer in range(spec.layers):

        def find(in_file: str, in_memory: str, layer: int = layer) -> Array | None:
            return theirs.get(f"encoder.layer.{layer}.{in_file}", theirs.get(f"layers.{layer}.{in_memory}"))

        for name, in_file, in_memory in _BLOCK:
            if (array := find(in_file, in_memory)) is not None:
                ours[f"blocks.{layer}.{name}"] = array
        for kind in ("weight", "bias"):
            matrices = [find(f"{in_file}.{kind}", f"{in_memory}.{kind}") for in_file, in_memory in _QKV]
            present = [matrix for matrix in matrices if matrix is not None]
            if len(present) == 3:
                ours[f"blocks.{layer}.attention.qkv.{kind}"] = np.concatenate(present)
    return from_named_arrays({name: np.asarray(array, dtype) for name, array in ours.items()}, spec)


def to_transformers(w: ViT, spec: ViTSpec, *, in_memory: bool = False, prefix: str = "vit.") -> dict[str, Array]:
    """A state dict of ViTForImageClassification, with names as in files or `in_memory`.

    With an empty `prefix` it is one of ViTModel, without the classifier. Raises ValueError for what Transformers' ViT
    does not support: overlapping or padded patches, mean pooling, fixed positions, other norms.
    """
    supported = {
        "stride_height": spec.patch_height, "stride_width": spec.patch_width, "padding": 0, "pooling": "cls",
        "pre_logits": None, "positions": "learned", "norm": "pre", "final_norm": True,
    }  # fmt: skip
    for name, value in supported.items():
        if getattr(spec, name) != value:
            raise ValueError(f"Transformers' ViT has no {name} {getattr(spec, name)}")
    ours = dict(named_arrays(w))
    theirs = {
        name: token[None, None] for name, token in zip(_PREFIX_TOKENS, ours["embedding.class_token"], strict=False)
    }
    theirs["embeddings.position_embeddings"] = ours["embedding.positions"][None]
    theirs |= {their_name: ours[name] for name, their_name in _OUTSIDE_BLOCKS.items()}
    for layer in range(spec.layers):
        block = f"layers.{layer}." if in_memory else f"encoder.layer.{layer}."
        theirs |= {block + names[in_memory]: ours[f"blocks.{layer}.{name}"] for name, *names in _BLOCK}
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            matrices = np.split(ours[f"blocks.{layer}.attention.qkv.{kind}"], 3)
            theirs |= {f"{block}{names[in_memory]}.{kind}": m for names, m in zip(_QKV, matrices, strict=True)}
    state = {prefix + name: array for name, array in theirs.items()}
    return state | {their_name: ours[name] for name, their_name in _HEAD.items() if name in ours and prefix}
