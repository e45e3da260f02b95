"""Transformers' ViTs and the textbook's: the same numbers under other names.

Transformers 5 stores `encoder.layer.0.attention.attention.query.weight` and calls the same matrix
`layers.0.attention.q_proj.weight` in memory; both are understood, with or without "vit." before them.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitft.scratch.tensors import Array
from vitft.scratch.vit import ViT, filled, named
from vitft.spec import ViTSpec, spec_from_config

# Of a block: our name, the stored one, and the one in memory.
_IN_BLOCK = (
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
_QKV = (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"))  # fmt: skip
_OUTSIDE = (
    ("embedding.projection.weight", "embeddings.patch_embeddings.projection.weight"),
    ("embedding.projection.bias", "embeddings.patch_embeddings.projection.bias"),
    ("norm.scale", "layernorm.weight"),
    ("norm.shift", "layernorm.bias"),
)
_HEADS = (
    ("head.pre_logits.weight", "pooler.dense.weight"),
    ("head.pre_logits.bias", "pooler.dense.bias"),
    ("head.logits.weight", "classifier.weight"),
    ("head.logits.bias", "classifier.bias"),
)
_PREFIX = ("embeddings.cls_token", "embeddings.distillation_token")


def load_folder(folder: Path, dtype: Any = np.float32) -> tuple[ViT, ViTSpec]:
    """The weights and the spec of a Transformers ViT folder: config.json and model.safetensors.

    A model without a classifier gets one of zeros. Raises ValueError for weights that are not a plain
    ViT's, ModelError for a config that is not, OSError for files that cannot be read.
    """
    spec = spec_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    try:
        arrays = load_file(folder / "model.safetensors")
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read into NumPy ({error})") from None
    return from_transformers(arrays, spec, dtype), spec


def from_transformers(arrays: Mapping[str, Array], spec: ViTSpec, dtype: Any = np.float32) -> ViT:
    """The bundle of a state dict of ViTModel, ViTForImageClassification or DeiT's, in either naming."""
    plain = {name.removeprefix("vit.").removeprefix("deit."): array for name, array in arrays.items()}
    found: dict[str, Array] = {}
    prefix = [plain[name][0] for name in _PREFIX if name in plain]
    if prefix:
        found["embedding.class_token"] = np.concatenate(prefix)
    if "embeddings.position_embeddings" in plain:
        found["embedding.positions"] = plain["embeddings.position_embeddings"][0]
    found |= {ours: plain[theirs] for ours, theirs in _OUTSIDE if theirs in plain}
    if "classifier.weight" not in plain:
        found["head.logits.weight"] = np.zeros((spec.classes, spec.width))
        found["head.logits.bias"] = np.zeros(spec.classes)
    found |= {
        ours: plain[theirs] for ours, theirs in _HEADS if theirs in plain and (spec.pre_logits or "head.logits" in ours)
    }
    for layer in range(spec.layers):
        theirs = partial(_either, plain, f"encoder.layer.{layer}.", f"layers.{layer}.")
        for name, stored, memory in _IN_BLOCK:
            if (array := theirs(stored, memory)) is not None:
                found[f"blocks.{layer}.{name}"] = array
        for kind in ("weight", "bias"):
            parts = [theirs(f"{stored}.{kind}", f"{memory}.{kind}") for stored, memory in _QKV]
            there = [part for part in parts if part is not None]
            if len(there) == 3:
                found[f"blocks.{layer}.attention.qkv.{kind}"] = np.concatenate(there)
    return filled({name: np.asarray(array, dtype) for name, array in found.items()}, spec)


def _either(plain: Mapping[str, Array], before: str, before_in_memory: str, stored: str, memory: str) -> Array | None:
    """What stands under the stored name or the one in memory."""
    return plain.get(before + stored, plain.get(before_in_memory + memory))


def to_transformers(w: ViT, spec: ViTSpec, *, in_memory: bool = False, prefix: str = "vit.") -> dict[str, Array]:
    """The state dict of a ViTForImageClassification (with `prefix` "" the body of a ViTModel) with these weights.

    Raises ValueError for what Transformers' ViT cannot be: overlapping or padded patches, other norms.
    """
    wanted = {
        "stride_height": spec.patch_height, "stride_width": spec.patch_width, "padding": 0, "pooling": "cls",
        "pre_logits": None, "positions": "learned", "norm": "pre", "final_norm": True,
    }  # fmt: skip
    foreign = [f"{name} {getattr(spec, name)}" for name, value in wanted.items() if getattr(spec, name) != value]
    if foreign:
        raise ValueError(f"Transformers' ViT has no {foreign[0]}")
    ours = dict(named(w))
    found = {name: token[None, None] for name, token in zip(_PREFIX, ours["embedding.class_token"], strict=False)}
    found["embeddings.position_embeddings"] = ours["embedding.positions"][None]
    found |= {theirs: ours[name] for name, theirs in _OUTSIDE}
    for layer in range(spec.layers):
        block = f"layers.{layer}." if in_memory else f"encoder.layer.{layer}."
        found |= {block + theirs[in_memory]: ours[f"blocks.{layer}.{name}"] for name, *theirs in _IN_BLOCK}
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            parts = np.split(ours[f"blocks.{layer}.attention.qkv.{kind}"], 3)
            found |= {f"{block}{names[in_memory]}.{kind}": part for names, part in zip(_QKV, parts, strict=True)}
    state = {prefix + name: array for name, array in found.items()}
    return state | {theirs: ours[name] for name, theirs in _HEADS if name in ours and prefix}
