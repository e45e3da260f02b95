"""Pretrained models that are worth a try, and what the hub says about each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from huggingface_hub import ModelCard

from vitft.config.train import TrainConfig
from vitft.errors import ModelError
from vitft.io.hub_errors import answers
from vitft.io.library_logs import quiet_transformers
from vitft.models.classifiers import classifier_class
from vitft.models.load import BUNDLED, read_config
from vitft.models.resize import input_size

FAMILIES: dict[str, tuple[str, ...]] = {
    "bundled: digits, for trying things out": (BUNDLED,),
    "trained with labels": (
        "google/vit-base-patch16-224-in21k", "WinKawaks/vit-tiny-patch16-224", "WinKawaks/vit-small-patch16-224",
        "facebook/deit-tiny-patch16-224", "facebook/deit-small-patch16-224", "microsoft/swin-tiny-patch4-window7-224",
        "microsoft/swinv2-tiny-patch4-window8-256", "facebook/convnextv2-tiny-22k-224", "apple/mobilevit-small",
    ),
    "trained without labels": (
        "facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-with-registers-small",
        "facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
        "facebook/vit-mae-base", "facebook/vit-msn-small", "facebook/ijepa_vith14_1k",
        "microsoft/beit-base-patch16-224-pt22k",
    ),
    "trained with captions": (
        "google/siglip-base-patch16-224", "google/siglip2-base-patch16-224", "openai/clip-vit-base-patch32",
    ),
}  # fmt: skip
"""Models by how they were trained. The tests try a tiny, random model of each architecture, not these checkpoints."""

TRIED = (
    "The tests try a tiny, random model of each of these architectures (a training step, saving, reading again, "
    "another input size), not these checkpoints themselves; of them, only the bundled one."
)


@dataclass(frozen=True)
class Known:
    """A pretrained model: the id to type, and what its configuration and model card say, as far as they can be read.

    `parameters` counts those of the image classifier, with a head of two classes; `image_size` is in pixels.
    """

    model: str
    training: str
    architecture: str | None = None
    parameters: int | None = None
    image_size: tuple[int, int] | None = None
    license: str | None = None
    problem: str = ""


def catalog(progress: Callable[[int, int], None] = lambda done, count: None) -> list[Known]:
    """The models of `FAMILIES`, in order; without network, what is in the cache is known of each."""
    models = [(model, training) for training, names in FAMILIES.items() for model in names]
    online = answers(TrainConfig.model_fields["model"].default)
    found = []
    with quiet_transformers(), ThreadPoolExecutor(8) as threads:
        for known in threads.map(lambda one: _read(*one, online=online), models):
            found.append(known)
            progress(len(found), len(models))
    return found


def _read(model: str, training: str, *, online: bool) -> Known:
    try:
        config = read_config(model, offline=not online)
    except ModelError as error:
        return Known(model, training, problem=str(error) if online else "not in the cache, and no network")
    config.num_labels = 2
    with torch.device("meta"):  # shapes without memory
        parameters = sum(parameter.numel() for parameter in classifier_class(config)(config).parameters())
    card_license = None
    if model != BUNDLED:
        with suppress(Exception):  # no card, no network: each client of the hub has its own errors
            card_license = ModelCard.load(model).data.license
    return Known(model, training, config.model_type, parameters, input_size(config), card_license)
