"""Where the model looked: what spoke for its answer in the mistakes that it is surest of."""

from pathlib import Path

import torch
from datasets import Dataset

from vitft.attribution.gradient_attention import patch_size
from vitft.attribution.maps import class_maps, overlay
from vitft.data.augment import normalize
from vitft.data.decoder import MAX_PIXELS
from vitft.data.thumbnail import jpeg_url
from vitft.errors import ModelError
from vitft.evaluation.loading import load_model
from vitft.hardware.device import find_device, threads
from vitft.prediction.inputs import read_image
from vitft.reporting.pictures import SIDE, Gallery

LOOKS = 24  # images
_COST = LOOKS * 86e6 * 196  # weights times patches: so many images and a ViT-B/16 at 224 pixels


def add_looks(found: Gallery, rows: Dataset, run: Path) -> None:
    """Give the first mistakes a picture `look`: what spoke for the answer, bright on what the model was shown.

    Fewer images for larger models, and none where patches do not all attend to each other: occlusion would take
    minutes.
    """
    if not found.sure:
        return
    try:
        loaded = load_model(run)
        if (patch := patch_size(loaded.model)) is None:
            return
        device = find_device("auto")
        model, how = loaded.model.to(device), loaded.preprocess
        patches = how.height * how.width / (patch[0] * patch[1])
        count = min(LOOKS, int(_COST / (sum(weight.numel() for weight in model.parameters()) * patches)))
        for number in found.sure[:count]:
            image = found.images[number]
            pixels = read_image(rows[found.rows[number]]["image"], how, MAX_PIXELS)
            if isinstance(pixels, str) or image["said"] >= len(loaded.labels):
                continue
            with threads():
                inputs = normalize(pixels.to(device), how)
                (weights,), _ = class_maps(model, inputs, torch.tensor([image["said"]]), by="attention")
            image["look"] = jpeg_url(overlay(pixels[0].numpy(), weights, SIDE))
    except ModelError:
        return
