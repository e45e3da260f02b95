"""How a checkpoint prepares images, read as Transformers reads it; each key is honored, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from vitft.data.augment import RESAMPLE, Preprocess, parse_value_range, preprocess_images
from vitft.errors import ModelError
from vitft.io import console
from vitft.models.resize import channels_of, size_of

FILE = "preprocessor_config.json"  # or, of Transformers 5, "image_processor" in a processor_config.json
_RELATED = {"dinov2_with_registers": "dinov2"}  # families without a processor of their own, and whose they use
_IMAGENETS = (
    "convnext", "convnextv2", "cvt", "deit", "dinov2", "dinov2_with_registers", "focalnet", "hiera", "regnet",
    "resnet", "swin", "swinv2", "vit_msn",
)  # fmt: skip
"""Families whose published checkpoints are normalized by ImageNet's mean, unlike the default of their processor."""


def read_processor(where: str, stored: Any, **how: Any) -> Preprocess:
    """What the image processor in a folder or hub repository does, or where there is none, its family's own.

    `stored` is the model's configuration, `how` says at which revision to look. Raises ModelError for what
    cannot be read, and naming the key, for what cannot be done.
    """
    try:
        channels = channels_of(stored)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    try:
        if stored_processor(where, **how) is None:
            found = understood(_of_family(stored, where), channels)
            return found if (own := size_of(stored)) is None else found.with_size(*own)
        processor = transformers.AutoImageProcessor.from_pretrained(
            where, config=stored, backend="pil", trust_remote_code=False, **how
        )
        return understood(processor, channels)
    except ModelError as error:
        raise ModelError(f"{where}: {FILE}: {error}") from error
    except Exception as error:  # other values than expected fail in any way
        raise ModelError(f"{where}: {FILE} cannot be used: {_first_line(error)}.") from error


def stored_processor(where: str, **how: Any) -> Path | None:
    """The file of the image processor in a folder or hub repository, if it has one.

    Raises ValueError for a file that is not JSON.
    """
    for name in (FILE, transformers.utils.PROCESSOR_NAME):
        found = transformers.utils.cached_file(
            where, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not how.get("local_files_only"), **how,
        )  # fmt: skip
        if found is not None:
            document = json.loads(Path(found).read_text(encoding="utf-8"))
            if name == FILE or "image_processor" in document:
                return Path(found)
    return None


def _of_family(stored: Any, where: str) -> Any:
    """The processor that Transformers has for an architecture, by its own defaults."""
    like = _RELATED.get(stored.model_type)
    kinds = IMAGE_PROCESSOR_MAPPING.get(transformers.CONFIG_MAPPING[like] if like else type(stored), {})
    named = kinds.get("pil")
    if named is None:
        raise ModelError(f"not there, and Transformers has none for {stored.model_type}; add one: ViTImageProcessor's.")
    by = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    made = named(**by if stored.model_type in _IMAGENETS else {})
    console.warn(
        f"{where} has no {FILE}: images are prepared as is usual for a {stored.model_type}, "
        f"with mean {_listed(made.image_mean)} and deviation {_listed(made.image_std)}"
    )
    return made


def understood(processor: Any, channels: int = 3) -> Preprocess:
    """A Transformers image processor (of its PIL backend) as a Preprocess. Raises ModelError naming a key.

    What each class does with its own keys is translated, and proved on two images: whatever else it did, of
    this version of Transformers or another, would show there.
    """
    kind = type(processor).__name__.removesuffix("Pil")
    size, crop = _sizes(processor, "size"), _sizes(processor, "crop_size")
    crops = bool(processor.do_center_crop) and kind != "SegformerImageProcessor"  # which leaves it out
    edge = size.get("shortest_edge")
    if kind == "ConvNextImageProcessor" and processor.do_resize and edge:
        if crops:
            raise ModelError("do_center_crop beside crop_pct is not supported; leave it out.")
        if edge < 384:  # as its authors evaluate: larger inputs are warped
            size, crop, crops = {"shortest_edge": int(edge / processor.crop_pct)}, {"height": edge, "width": edge}, True
        else:
            size = {"height": edge, "width": edge}
    elif kind == "PoolFormerImageProcessor" and processor.crop_pct is not None:
        if edge is None and size.get("height") != size.get("width"):
            raise ModelError(f"crop_pct with size {size} is not supported; give its shortest_edge.")
        size = {"shortest_edge": int((edge or size["height"]) / processor.crop_pct)}
    elif kind == "LevitImageProcessor" and edge:
        size = {"shortest_edge": int(256 / 224 * edge)}
    if processor.do_resize is False or processor.do_resize is None:
        size = {}
    if getattr(processor, "do_pad", None) and _sizes(processor, "pad_size"):
        raise ModelError("do_pad with a pad_size is not supported; resize and crop to one size.")
    box = crop if crops else size
    if set(box) != {"height", "width"} or not (set(size) <= {"height", "width"} or set(size) == {"shortest_edge"}):
        raise ModelError(
            f"{_said(processor, kind)} makes images of different shapes, or in a way that is not supported; "
            "give it a size of height and width, or a shortest_edge with do_center_crop and a crop_size."
        )
    flips = kind.startswith("MobileViT") and bool(processor.do_flip_channel_order)
    normalizes = bool(processor.do_normalize) and not kind.startswith("MobileViT")  # which never does
    mean, std = (_channels(getattr(processor, f"image_{name}"), channels, name) if normalizes else (at,) * channels
                 for name, at in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
    if getattr(processor, "rescale_offset", None) and processor.do_rescale:
        mean = tuple(value + 1 for value in mean)  # x * factor - 1, and then the mean
    if kind == "EfficientNetImageProcessor" and processor.include_top:
        again = _channels(processor.image_std, channels, "std")
        std = tuple(value * own for value, own in zip(std, again, strict=True))
    number = int(processor.resample) if processor.resample is not None else 2
    if number not in RESAMPLE:
        raise ModelError(f"resample {number} is not supported; use one of {', '.join(map(str, sorted(RESAMPLE)))}.")
    found = Preprocess(
        height=box["height"],
        width=box["width"],
        mean=mean,
        std=std,
        resample=RESAMPLE[number],
        rescale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        shortest_edge=size.get("shortest_edge"),
        before_crop=(size["height"], size["width"]) if crops and "height" in size else None,
        value_range=parse_value_range(getattr(processor, "value_range", None)),
        resizes=bool(size),
        flips_channels=flips,
    )
    found.check()
    if channels == 3:  # of gray, Transformers makes what the file it reads is
        _prove(found, processor, kind)
    return found


def _prove(how: Preprocess, processor: Any, kind: str) -> None:
    """Raise ModelError unless both make the same of an image that is wide and one that is tall."""
    for height, width in ((41, 67), (59, 38)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        try:
            wanted = torch.as_tensor(processor(Image.fromarray(image), return_tensors="pt")["pixel_values"])
        except KeyError:
            wanted = torch.empty(0)
        ours = preprocess_images([torch.from_numpy(image)], how)
        # In steps between two values of a pixel: sums are rounded otherwise than here.
        steps = torch.tensor(how.std)[:, None, None] / how.rescale
        if ours.shape != wanted.shape or ((ours - wanted).abs() * steps).max() > 0.01:
            raise ModelError(f"{kind} does more than resize, crop, rescale and normalize; use a ViTImageProcessor.")


def _sizes(processor: Any, name: str) -> dict[str, int]:
    """A size of a processor as numbers by their names, without those it leaves out."""
    given = getattr(processor, name, None)
    return {} if given is None else {key: int(value) for key, value in dict(given).items() if value is not None}


def _channels(given: Any, channels: int, name: str) -> tuple[float, ...]:
    """A mean or deviation of each channel; of one channel the mean of three."""
    values = tuple(given) if isinstance(given, list | tuple | np.ndarray) else (given,) * channels
    if len(values) == 3 and channels == 1 and all(isinstance(value, int | float) for value in values):
        values = (sum(values) / 3,)
    if len(values) != channels:
        raise ModelError(f"image_{name} {values} is not usable; it takes {channels} finite numbers.")
    return values


def _said(processor: Any, kind: str) -> str:
    given = {name: getattr(processor, name, None) for name in ("do_resize", "size", "do_center_crop", "crop_size")}
    return f"{kind} with {', '.join(f'{name} {_plain(value)}' for name, value in given.items() if value is not None)}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool) else {key: side for key, side in dict(value).items() if side is not None}


def _listed(values: Any) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
