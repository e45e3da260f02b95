"""A tiny model of each architecture that Transformers classifies images with."""

from typing import Any

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VIT = _SIZES | {"image_size": 32, "patch_size": 8}
_DINO = {key: value for key, value in _VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
_BEIT = _VIT | {"use_relative_position_bias": True}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_TEXT = _SIZES | {"vocab_size": 40, "max_position_embeddings": 8}
_TWO = {"vision_config": _VIT, "text_config": _TEXT}
_FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
_PYRAMID = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "mlp_ratios": [2] * 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _BEIT,
    "data2vec-vision": _BEIT,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "dinov3_vit": _VIT | {"num_register_tokens": 2},
    "dinov3_convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "siglip": _TWO,
    "clip": _TWO,
    "metaclip_2": _TWO,
    "vit_msn": _VIT,
    "ijepa": _VIT,
    "levit": {"image_size": 32, "hidden_sizes": [16, 32, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3,
              "key_dim": [8] * 3},
    "convnext": _FOUR,
    "convnextv2": _FOUR,
    "resnet": _FOUR | {"embedding_size": 8},
    "regnet": _FOUR | {"embedding_size": 8, "groups_width": 4},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "num_groups": 4},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 6 + [32],
                  "num_attention_heads": 2},
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "donut-swin": _SWIN,
    "hgnet_v2": {},
    "textnet": {},
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
    "pvt": _PYRAMID | {"image_size": 32},
    "pvt_v2": _PYRAMID | {"image_size": 32},
    "poolformer": {"hidden_sizes": [8] * 4, "depths": [1] * 4},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "cvt": {},
    "focalnet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "segformer": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8},
    "swiftformer": {"image_size": 32, "embed_dims": [8] * 4, "depths": [1] * 4},
    "hiera": {"image_size": [64, 64], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4},
    "perceiver": {"image_size": 32, "num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
                  "num_self_attention_heads": 1, "num_cross_attention_heads": 1},
}  # fmt: skip
"""Of each family, by its name in a config.json, the settings that make it tiny."""


def tiny_classifier(family: str, *, head: int = 0, **settings: Any) -> Any:
    """A classifier whose every tensor is random, running statistics too; `head`: which, where there are several."""
    import torch
    import transformers as tf

    from vitft.models.classifiers import classifier_class

    config = tf.models.auto.configuration_auto.CONFIG_MAPPING[family](**FAMILIES[family] | settings)
    mapping = tf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    found = mapping[type(config)] if type(config) in mapping else classifier_class(config)
    model = (found[head] if isinstance(found, tuple | list) else found)(config).eval()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=draw) * 0.3
                tensor.copy_(drawn.abs() + 0.5 if "var" in name or ("norm" in name and "weight" in name) else drawn)
    return model
