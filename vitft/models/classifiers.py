"""The classifier class of an architecture: that of Transformers, or one made here for backbones that have none."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitft.errors import ModelError, require_extra

TIMM = "timm_wrapper"
"""The model type of a timm checkpoint, which Transformers wraps."""

_REFUSED = {
    "imagegpt": "an imagegpt model reads colors as words, not pixels; use a ViT",
    "pp_lcnet": "a pp_lcnet model returns no logits in Transformers; use a MobileNet or a small ResNet",
    "shieldgemma2": "a shieldgemma2 model answers yes or no to a question about an image; use a SigLIP",
    "siglip2": "a siglip2 model of any aspect ratio (NaFlex) reads lists of patches, not images; "
    "use one of a fixed size, such as google/siglip2-base-patch16-224",
}
"""Why a classifier of Transformers is not used, and what to use instead."""


def check_family(family: str, where: str = "") -> None:
    """Raise ModelError, with the reason, for a model type whose classifier cannot be used, UsageError if timm misses.

    `where`: the folder or hub id, for the message.
    """
    before = f"{where}: " if where else ""
    if family in _REFUSED:
        raise ModelError(f"{before}{_REFUSED[family]}.")
    if family == TIMM:
        require_extra("timm", f"{before}a timm checkpoint", "timm")
    if family == "dinat" and find_spec("natten") is None:
        raise ModelError(f"{before}a dinat model needs NATTEN, which is not installed; use a Swin.")


def classifier_class(hf_config: Any) -> Any:
    """The class that classifies images with this configuration. Raises ModelError if there is none."""
    check_family(hf_config.model_type)
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(hf_config) in mapping:
        classes = mapping[type(hf_config)]
        classes = classes if isinstance(classes, tuple | list) else [classes]
        # The rule of AutoModelForImageClassification: a distilled DeiT keeps its two heads.
        return next((cls for cls in classes if cls.__name__ in (hf_config.architectures or ())), classes[0])
    if hf_config.model_type in _POOLED:
        kind: Any = type(hf_config)
        return _with_head(kind)
    family = hf_config.model_type
    raise ModelError(f"a {family} model cannot classify images; use a ViT, DeiT, BEiT, DINOv2, DINOv3 or Swin.")


def classifier_config(hf_config: Any) -> Any:
    """The configuration of the classifier that has the layers of this backbone.

    The encoder of a masked autoencoder (He et al. 2022) is a ViT. `model_args` of a timm checkpoint may have the
    number of classes, too, which Transformers does not expect there. Other configurations are returned as they are.
    """
    if hf_config.model_type == TIMM and hf_config.model_args:
        hf_config.model_args = {name: value for name, value in hf_config.model_args.items() if name != "num_classes"}
    if hf_config.model_type != "vit_mae":
        return hf_config
    given = hf_config.to_dict()
    shared = transformers.ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return transformers.ViTConfig(**{name: value for name, value in given.items() if name in shared})


def _class_and_patches(outputs: Any, hf_config: Any) -> Tensor:
    """Class token beside the mean patch token, as DINOv3's own linear classifiers read it: (B, 2 * hidden size)."""
    tokens = outputs.last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, 1 + hf_config.num_register_tokens :].mean(dim=1)], dim=1)


def _pooled(outputs: Any, _hf_config: Any) -> Tensor:
    pooled: Tensor = outputs.pooler_output
    return pooled


_POOLED: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[Any], int]]] = {
    "dinov3_vit": (_class_and_patches, lambda hf_config: 2 * hf_config.hidden_size),
    "dinov3_convnext": (_pooled, lambda hf_config: hf_config.hidden_sizes[-1]),
}
"""By model type: what the head reads of the backbone's outputs, and how many features that is."""


@cache
def _with_head(config_class: type) -> Any:
    """A backbone with a linear head. Its tensors keep their names, so AutoModel loads it as a backbone."""
    backbone: Any = transformers.MODEL_MAPPING[config_class]
    pool, features = _POOLED[config_class.model_type]  # type: ignore[attr-defined]

    def __init__(self: Any, config: Any) -> None:  # noqa: N807
        backbone.__init__(self, config)
        self.classifier = nn.Linear(features(config), config.num_labels)

    def forward(self: Any, pixel_values: Tensor, **options: Any) -> ImageClassifierOutput:
        outputs = backbone.forward(self, pixel_values, **options)
        return ImageClassifierOutput(logits=self.classifier(pool(outputs, self.config)))

    name = f"{backbone.__name__.removesuffix('Model')}ForImageClassification"
    return type(name, (backbone,), {"__init__": __init__, "forward": forward, "__module__": __name__})
