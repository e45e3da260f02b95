"""The arithmetic of spec.py against Transformers, torch's FLOP counter, autograd and convolution."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitft.errors import ModelError, UsageError
from vitft.spec import PRESETS, ViTSpec, peak_activation_bytes, preset, spec_from_config, stages, total, training_flops

TINY = replace(ViTSpec.square(12, 4, 24, 2, 3, 40, 5), image_width=20)
"""Not square, so that swapping rows and columns is noticed."""


def config_of(spec: ViTSpec, kind: str = "vit") -> Any:
    from transformers import DeiTConfig, ViTConfig

    return {"vit": ViTConfig, "deit": DeiTConfig}[kind](
        image_size=[spec.image_height, spec.image_width],
        patch_size=[spec.patch_height, spec.patch_width],
        num_channels=spec.channels,
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        num_hidden_layers=spec.layers,
        intermediate_size=spec.mlp,
        num_labels=spec.classes,
        qkv_bias=spec.qkv_bias,
        attn_implementation="eager",
    )


def model_of(spec: ViTSpec, device: str = "meta") -> Any:
    import torch
    from transformers import DeiTForImageClassification, ViTForImageClassification

    kind = "deit" if spec.prefix_tokens == 2 else "vit"
    classes = {"vit": ViTForImageClassification, "deit": DeiTForImageClassification}
    with torch.device(device):
        return classes[kind](config_of(spec, kind))


def images_of(spec: ViTSpec, batch_size: int, device: str = "meta") -> Any:
    import torch

    return torch.zeros(batch_size, spec.channels, spec.image_height, spec.image_width, device=device)


@pytest.mark.parametrize(
    "spec",
    [
        PRESETS["vit-micro"],
        replace(PRESETS["vit-tiny"], classes=37),
        PRESETS["vit-small-patch14-224"],
        PRESETS["vit-base-patch32-224"],
        PRESETS["vit-huge"],
        replace(TINY, channels=1, qkv_bias=False),
        replace(TINY, prefix_tokens=2),
    ],
)
def test_parameters_equal_transformers(spec: ViTSpec) -> None:
    expected = sum(parameter.numel() for parameter in model_of(spec).parameters())

    assert total(spec).parameters == expected


@pytest.mark.parametrize("spec", [TINY, replace(TINY, prefix_tokens=2), PRESETS["vit-base"]])
def test_flops_equal_those_of_the_flop_counter(spec: ViTSpec) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, images = model_of(spec), images_of(spec, 3)
    with FlopCounterMode(display=False) as forward:
        model(images)

    assert total(spec, 3).flops == forward.get_total_flops()


def test_training_costs_three_forward_passes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # With the gradient of the images, which the convention includes.
    model, images = model_of(TINY), images_of(TINY, 2).requires_grad_()
    with FlopCounterMode(display=False) as step:
        model(images).logits.sum().backward()

    assert training_flops(TINY, 2) == step.get_total_flops()


def saved_bytes(forward: Any, parameters: list[Any]) -> int:
    """Bytes of the distinct tensors that autograd saves, without weights and the norms' two numbers per token."""
    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.shape[-1] != 1 and tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("spec", [TINY, replace(TINY, prefix_tokens=2, layers=1)])
def test_activation_bytes_equal_those_saved_by_autograd(spec: ViTSpec) -> None:
    model, images = model_of(spec, "cpu").train(), images_of(spec, 2, "cpu")

    expected = saved_bytes(lambda: model(images).logits, list(model.parameters()))

    assert total(spec, 2).activation_bytes == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "relu"}, {"activation": "gelu_tanh"}, {"norm": "post"}, {"positions": "sinusoidal_2d"},
        {"final_norm": False}, {"pooling": "mean"}, {"pooling": "mean", "final_norm": False},
        {"pooling": "mean", "final_norm": False, "norm": "post"},
        {"pooling": "mean", "prefix_tokens": 0, "layers": 1, "pre_logits": 7},
    ],
)  # fmt: skip
def test_activation_bytes_of_the_other_architectures_of_the_textbook(changed: dict[str, Any]) -> None:
    from vitft.scratch.torch_vit import TorchViT

    spec = replace(TINY, **changed)
    model, images = TorchViT(spec), images_of(spec, 2, "cpu")

    assert total(spec, 2).activation_bytes == saved_bytes(lambda: model(images), list(model.parameters()))


def test_costs_of_mean_pooling_and_pre_logits_equal_torch() -> None:
    import torch

    spec = replace(TINY, pooling="mean", prefix_tokens=0, pre_logits=7)
    ends = [stage for stage in stages(spec, 2) if stage.name in ("norm", "pool", "pre_logits", "head")]
    norm, dense, head = torch.nn.LayerNorm(24), torch.nn.Linear(24, 7), torch.nn.Linear(7, 5)
    parameters = [*norm.parameters(), *dense.parameters(), *head.parameters()]
    tokens = torch.zeros(2, spec.tokens, spec.width)

    saved = saved_bytes(lambda: head(torch.tanh(dense(norm(tokens).mean(1)))), parameters)

    assert sum(stage.parameters for stage in ends) == sum(parameter.numel() for parameter in parameters)
    assert sum(stage.activation_bytes for stage in ends) == saved - 4 * tokens.numel()
    assert spec.tokens == 15
    assert all(stage.name != "embed.class_token" for stage in stages(spec))


def test_the_input_of_each_stage_is_the_output_of_the_one_before() -> None:
    every_stage = stages(TINY, 2)

    assert [stage.input for stage in every_stage[1:]] == [stage.output for stage in every_stage[:-1]]
    assert len({stage.name for stage in every_stage}) == len(every_stage)
    assert {stage.name: stage.output for stage in every_stage} | {
        "embed.projection": (2, 24, 3, 5),
        "embed.patches": (2, 15, 24),
        "embed.class_token": (2, 16, 24),
        "block.2.attention.qkv": (2, 3, 3, 16, 8),
        "block.2.attention.scores": (2, 3, 16, 16),
        "block.2.attention.mix": (2, 16, 24),
        "block.2.mlp.activation": (2, 16, 40),
        "pool": (2, 24),
        "head": (2, 5),
    } == {stage.name: stage.output for stage in every_stage}


def test_a_batch_multiplies_work_and_memory_but_not_parameters() -> None:
    single, batch = total(TINY), total(TINY, 7)

    assert (batch.parameters, batch.flops) == (single.parameters, 7 * single.flops)
    assert batch.activation_bytes == 7 * single.activation_bytes
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        stages(TINY, 0)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 20))
def test_patches_equal_a_convolution_or_the_error_suggests_a_size_that_fits(
    image: int, patch: int, stride: int, padding: int
) -> None:
    import torch

    other = {"image_width": 61, "patch_width": 24, "stride_width": 1}
    changes = {"image_height": image, "patch_height": patch, "stride_height": stride, "padding": padding}
    starts = range(-padding, image + padding - patch + 1, stride)
    covered = {pixel for start in starts for pixel in range(start, start + patch)}
    fits = stride <= patch and padding < patch and padding < 24 and covered >= set(range(image))
    try:
        spec = replace(TINY, **(other | changes))
    except UsageError as error:
        message = str(error)
        if match := re.search(r"^image_height .*; try (\d+)(?: or (\d+))?\.$", message):
            for size in filter(None, match.groups()):
                assert replace(TINY, **(other | changes | {"image_height": int(size)})).grid
    else:
        message = ""
        convolution = torch.nn.Conv2d(3, 24, (patch, 24), (stride, 1), padding, device="meta")
        assert stages(spec)[1].output == tuple(convolution(images_of(spec, 1)).shape)
    assert fits == (not message), message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_height": 230, "image_width": 230, "patch_height": 16, "patch_width": 16}
            | {"stride_height": 16, "stride_width": 16},
            "image_size 230 is not a multiple of patch_size 16; try 224 or 240.",
        ),
        ({"image_height": 3}, "image_height 3 is not a multiple of patch_height 4; try 4."),
        ({"image_width": 21}, "image_width 21 is not a multiple of patch_width 4; try 20 or 24."),
        (
            {"stride_height": 3},
            "image_height 12 does not fit patch_height 4, stride_height 3 and padding 0; try 10 or 13.",
        ),
        (
            {"stride_height": 5},
            "stride_height 5 is larger than patch_height 4, which skips pixels; try 4.",
        ),
        ({"padding": 4}, "padding 4 must be smaller than patch_height 4, or a patch has no pixel; try 2."),
        ({"width": 100}, "width 100 is not a multiple of heads 3; try 99 or 102."),
        ({"width": 2}, "width 2 is not a multiple of heads 3; try 3."),
        ({"pooling": "max"}, "pooling 'max' is unknown; try cls or mean."),
        (
            {"prefix_tokens": 0},
            "pooling cls needs a class token, got prefix_tokens 0; try 1, or pooling mean.",
        ),
        ({"padding": -1}, "padding must be an integer of at least 0, got -1; try 0."),
        ({"pre_logits": 0}, "pre_logits must be an integer of at least 1, got 0; try 1."),
        ({"layers": 2.5}, "layers must be an integer of at least 1, got 2.5; try 1."),
        ({"layers": True}, "layers must be an integer of at least 1, got True; try 1."),
        *(
            ({name: 0}, f"{name} must be an integer of at least 1, got 0; try 1.")
            for name, value in asdict(TINY).items()
            if type(value) is int and name not in ("padding", "prefix_tokens")
        ),
        *(
            ({name: "none"}, f"{name} 'none' is unknown; try {choices}.")
            for name, choices in {
                "positions": "learned or sinusoidal or sinusoidal_2d",
                "norm": "pre or post",
                "activation": "gelu or gelu_tanh or relu",
            }.items()
        ),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0, got -1.0; try 1e-12."),
    ],
)
def test_inconsistent_sizes_are_errors_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        replace(TINY, **changes)

    assert str(error.value) == message


def test_presets_by_name_and_the_suggestion_for_a_typo() -> None:
    assert preset("vit-base") == preset("vit-base-patch16-224")
    assert preset("vit-huge").tokens == 257
    assert prod(preset("vit-base-patch32-224").grid) == 49
    with pytest.raises(UsageError, match=r"'vit-bse'; did you mean vit-base\?"):
        preset("vit-bse")
    with pytest.raises(UsageError, match="vit-micro, vit-tiny"):
        preset("zzz")


@pytest.mark.parametrize("spec", [TINY, replace(TINY, prefix_tokens=2), replace(TINY, qkv_bias=False)])
def test_the_spec_of_a_saved_config(spec: ViTSpec, tmp_path: Path) -> None:
    kind = "deit" if spec.prefix_tokens == 2 else "vit"
    config_of(spec, kind).save_pretrained(tmp_path)

    assert spec_from_config(json.loads((tmp_path / "config.json").read_text())) == spec


def test_missing_config_keys_have_transformers_defaults() -> None:
    from transformers import ViTConfig

    defaults = ViTConfig()
    assert spec_from_config({"model_type": "vit"}) == spec_from_config(defaults.to_dict())
    assert spec_from_config({"model_type": "vit"}) == replace(preset("vit-base"), classes=defaults.num_labels)
    assert spec_from_config({"model_type": "vit", "num_labels": 7}).classes == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, "no stage table for this architecture: swin; plain ViTs"),
        ({"model_type": "dinov2"}, "no stage table for this architecture: dinov2"),
        ({}, "no stage table for this architecture: None"),
        ({"model_type": ["vit"]}, "no stage table for this architecture: "),
        ({"model_type": "vit", "hidden_act": "silu"}, "no stage table for the activation silu; gelu"),
        ({"model_type": "vit", "image_size": 230}, "unusable vit config: image_size 230 is not a multiple"),
        (
            {"model_type": "vit", "hidden_size": "768"},
            "width must be an integer of at least 1, got '768'",
        ),
        ({"model_type": "vit", "patch_size": [16]}, r"patch_height must be an integer .* got \[16\]"),
    ],
)
def test_configs_of_other_or_broken_models_are_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_from_config(config)


def test_spec_imports_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import vitft.spec; new = set(sys.modules) - before; "
        "print(sorted(name for name in new if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "['vitft', 'vitft.errors', 'vitft.spec']"


def test_peak_activation_memory_with_checkpointed_blocks() -> None:
    spec = PRESETS["vit-base"]
    plain = peak_activation_bytes(spec, 8)
    assert plain == total(spec, 8).activation_bytes
    (one_block,) = {
        sum(stage.activation_bytes for stage in stages(spec, 8) if stage.name.startswith(f"block.{number}."))
        for number in range(1, 13)
    }
    block_input = 4 * 8 * 197 * 768
    assert peak_activation_bytes(spec, 8, checkpointed=True) == plain - 12 * one_block + 12 * block_input + one_block
    assert peak_activation_bytes(spec, 8, checkpointed=True) < plain / 4
