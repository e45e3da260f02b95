"""Where the model looked: what spoke for its answer in its surest mistakes, and where it was least certain."""

from itertools import chain, zip_longest
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

LOOKS = 48  # images
_COST = 24 * 86e6 * 196  # weights times patches: that of 24 images and a ViT-B/16 at 224 pixels


def add_looks(found: Gallery, rows: Dataset, run: Path) -> None:
    """Give some images a picture `look`: what spoke for the answer, bright on what the model was shown.

    The mistakes that the model is surest of and the images that it is least certain of, in turn: fewer of them for
    larger models, and none where patches do not all attend to each other, for occlusion would take minutes. Then
    `found.no_looks` says why.
    """
    pairs = zip_longest(found.sure, found.unsure)
    wanted = [number for number in dict.fromkeys(chain.from_iterable(pairs)) if number is not None]
    if not wanted:
        return
    try:
        loaded = load_model(run)
    except ModelError as error:
        found.no_looks = str(error).rstrip(".")
        return
    try:
        if (patch := patch_size(loaded.model)) is None:
            found.no_looks = _NO_PATCHES
            return
        device = find_device("auto")
        model, how = loaded.model.to(device), loaded.preprocess
        patches = how.height * how.width / (patch[0] * patch[1])
        count = min(LOOKS, int(_COST / (sum(weight.numel() for weight in model.parameters()) * patches)))
        if count == 0:
            found.no_looks = "the model is so large that a map of one image would take too long"
        for number in wanted[:count]:
            image = found.images[number]
            pixels = read_image(rows[found.rows[number]]["image"], how, MAX_PIXELS)
            if isinstance(pixels, str) or image["said"] >= len(loaded.labels):
                continue
            with threads():
                inputs = normalize(pixels.to(device), how)
                (weights,), _ = class_maps(model, inputs, torch.tensor([image["said"]]), by="attention")
            image["look"] = jpeg_url(overlay(pixels[0].numpy(), weights, SIDE))
    except ModelError:
        found.no_looks = _NO_PATCHES


_NO_PATCHES = (
    "in this architecture patches do not all attend to each other, and hiding parts of each image takes minutes"
)
