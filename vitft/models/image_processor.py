"""Read a checkpoint's image processor as a `Preprocess`. Every key is either supported or refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from vitft.data.augment import RESAMPLE, Preprocess, parse_value_range, preprocess_images
from vitft.errors import ModelError, first_line
from vitft.io import console
from vitft.models.classifiers import TIMM
from vitft.models.resize import input_channels, input_size

FILE = "preprocessor_config.json"  # or, since Transformers 5, "image_processor" in processor_config.json
_RELATED = {"dinov2_with_registers": "dinov2"}  # families that use the processor of another family
_IMAGENET_NORMALIZED = (
    "convnext", "convnextv2", "cvt", "deit", "dinov2", "dinov2_with_registers", "focalnet", "hiera", "regnet",
    "resnet", "swin", "swinv2", "vit_msn",
)  # fmt: skip
"""Families whose published checkpoints use the ImageNet mean and std, unlike their processor's defaults."""


def read_processor(name_or_path: str, hf_config: Any, **options: Any) -> Preprocess:
    """The preprocessing of a folder or hub repository; if it has none, the default of its architecture.

    `hf_config` is the model's configuration; `options` go to Transformers' loaders (revision, local_files_only).
    Raises ModelError if it cannot be read, or for an unsupported key.
    """
    try:
        channels = input_channels(hf_config)
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {error}") from error
    try:
        if find_processor_file(name_or_path, **options) is None:
            if hf_config.model_type == TIMM:
                return _of_timm(getattr(hf_config, "pretrained_cfg", None) or {}, channels)
            preprocess = to_preprocess(_default_processor(hf_config, name_or_path), channels)
            size = input_size(hf_config)
            return preprocess if size is None else preprocess.with_size(*size)
        if hf_config.model_type == TIMM:
            # Transformers would take pretrained_cfg, which has no value_range.
            options["image_processor_filename"] = FILE
        processor = transformers.AutoImageProcessor.from_pretrained(
            name_or_path, config=hf_config, backend="pil", trust_remote_code=False, **options
        )
        return to_preprocess(processor, channels)
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {_named(hf_config)}: {error}") from error
    except Exception as error:  # unexpected values can raise anything
        raise ModelError(f"{name_or_path}: {_named(hf_config)} is invalid: {first_line(error)}.") from error


def _named(hf_config: Any) -> str:
    """Where the preprocessing of a model stands, for messages."""
    return f"{FILE}, or pretrained_cfg in its config.json," if hf_config.model_type == TIMM else FILE


def _of_timm(given: dict[str, Any], channels: int) -> Preprocess:
    """The preprocessing in `pretrained_cfg` of a timm checkpoint's config.json, as timm's evaluation does it.

    The shorter side becomes the input size divided by `crop_pct`, or both sides with `crop_mode` `squash`; the center
    is cropped. What is missing has timm's defaults. Raises ModelError for what timm does in another way.
    """
    _, height, width = map(int, given.get("input_size") or (channels, 224, 224))
    within = tuple(math.floor(side / (given.get("crop_pct") or 0.875)) for side in (height, width))
    mode, resample = given.get("crop_mode") or "center", given.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ModelError(f"crop_mode {mode} with input_size {height} x {width} is not supported; use squash.")
    if resample not in RESAMPLE.values():
        raise ModelError(f"interpolation {resample} is not supported; use one of {', '.join(RESAMPLE.values())}.")
    mean, std = (_channels(given.get(name) or default, channels, name)
                 for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)))  # fmt: skip
    squashes = mode == "squash"
    preprocess = Preprocess(
        height, width, mean, std, resample,
        shortest_edge=None if squashes else within[0], before_crop=(within[0], within[1]) if squashes else None,
    )  # fmt: skip
    preprocess.check()
    return preprocess


def find_processor_file(name_or_path: str, **options: Any) -> Path | None:
    """The image processor's file in a folder or hub repository; None if there is none.

    Raises ValueError for a file that is not JSON.
    """
    for name in (FILE, transformers.utils.PROCESSOR_NAME):
        file = transformers.utils.cached_file(
            name_or_path, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not options.get("local_files_only"), **options,
        )  # fmt: skip
        if file is not None:
            document = json.loads(Path(file).read_text(encoding="utf-8"))
            if name == FILE or "image_processor" in document:
                return Path(file)
    return None


def _default_processor(hf_config: Any, name_or_path: str) -> Any:
    """The default image processor of an architecture in Transformers, with a warning."""
    family = hf_config.model_type
    related = _RELATED.get(family)
    backends = IMAGE_PROCESSOR_MAPPING.get(transformers.CONFIG_MAPPING[related] if related else type(hf_config), {})
    if backends.get("pil") is None:
        raise ModelError(f"missing, and Transformers has no default for {family}; add one of a ViTImageProcessor.")
    imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    processor = backends["pil"](**imagenet if family in _IMAGENET_NORMALIZED else {})
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (processor.image_mean, processor.image_std))
    console.warn(f"{name_or_path} has no {FILE}: using the default of {family}, with mean {mean} and std {std}")
    return processor


def to_preprocess(processor: Any, channels: int = 3) -> Preprocess:
    """Translate a Transformers image processor (PIL backend) to a Preprocess.

    The special keys of each class are translated, then the result is compared on two images, which catches anything
    else that a processor does in any version of Transformers. Raises ModelError for an unsupported key.
    """
    kind = type(processor).__name__.removesuffix("Pil")
    size, crop = _sizes(processor, "size"), _sizes(processor, "crop_size")
    crops = bool(processor.do_center_crop) and kind != "SegformerImageProcessor"  # it ignores do_center_crop
    edge = size.get("shortest_edge")
    if kind == "ConvNextImageProcessor" and processor.do_resize and edge:
        if crops:
            raise ModelError("do_center_crop with crop_pct is not supported; remove it.")
        if edge < 384:  # the authors' evaluation; larger inputs are resized without a crop
            size, crop, crops = {"shortest_edge": int(edge / processor.crop_pct)}, {"height": edge, "width": edge}, True
        else:
            size = {"height": edge, "width": edge}
    elif kind == "PoolFormerImageProcessor" and processor.crop_pct is not None:
        if edge is None and size.get("height") != size.get("width"):
            raise ModelError(f"crop_pct with size {size} is not supported; use shortest_edge.")
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
            f"{_describe(processor, kind)} gives images of different shapes, or is not supported; "
            "use a size with height and width, or shortest_edge with do_center_crop and crop_size."
        )
    flips = kind.startswith("MobileViT") and bool(processor.do_flip_channel_order)
    normalizes = bool(processor.do_normalize) and not kind.startswith("MobileViT")  # it never normalizes
    mean, std = (_channels(getattr(processor, f"image_{name}"), channels, name) if normalizes else (default,) * channels
                 for name, default in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
    if getattr(processor, "rescale_offset", None) and processor.do_rescale:
        mean = tuple(value + 1 for value in mean)  # x * factor - 1, then minus the mean
    if kind == "EfficientNetImageProcessor" and processor.include_top:
        twice = _channels(processor.image_std, channels, "std")  # it divides by std a second time
        std = tuple(value * factor for value, factor in zip(std, twice, strict=True))
    resample = int(processor.resample) if processor.resample is not None else 2
    if resample not in RESAMPLE:
        raise ModelError(f"resample {resample} is not supported; use one of {', '.join(map(str, sorted(RESAMPLE)))}.")
    preprocess = Preprocess(
        height=box["height"],
        width=box["width"],
        mean=mean,
        std=std,
        resample=RESAMPLE[resample],
        rescale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        shortest_edge=size.get("shortest_edge"),
        before_crop=(size["height"], size["width"]) if crops and "height" in size else None,
        value_range=parse_value_range(getattr(processor, "value_range", None)),
        resizes=bool(size),
        flips_channels=flips,
    )
    preprocess.check()
    if channels == 3:  # for grayscale, Transformers' result depends on the mode of the image file
        _compare(preprocess, processor, kind)
    return preprocess


def _compare(preprocess: Preprocess, processor: Any, kind: str) -> None:
    """Raise ModelError unless both give the same result for a wide and a tall image."""
    for height, width in ((41, 67), (59, 38)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        try:
            theirs = torch.as_tensor(processor(Image.fromarray(image), return_tensors="pt")["pixel_values"])
        except KeyError:
            theirs = torch.empty(0)
        ours = preprocess_images([torch.from_numpy(image)], preprocess)
        # Compared in units of uint8 pixel values; the tolerance is for different rounding of sums.
        scale = torch.tensor(preprocess.std)[:, None, None] / preprocess.rescale
        if ours.shape != theirs.shape or ((ours - theirs).abs() * scale).max() > 0.01:
            raise ModelError(f"{kind} does more than resize, crop, rescale and normalize; use a ViTImageProcessor.")


def _sizes(processor: Any, name: str) -> dict[str, int]:
    """A size of a processor as a dict, such as {"height": 224, "width": 224}, without unset entries."""
    size = getattr(processor, name, None)
    return {} if size is None else {key: int(value) for key, value in dict(size).items() if value is not None}


def _channels(value: Any, channels: int, name: str) -> tuple[float, ...]:
    """A mean or std per channel; for a grayscale model, three values are averaged."""
    values = tuple(value) if isinstance(value, list | tuple | np.ndarray) else (value,) * channels
    if len(values) == 3 and channels == 1 and all(isinstance(value, int | float) for value in values):
        values = (sum(values) / 3,)
    if len(values) != channels:
        raise ModelError(f"image_{name} {values} is invalid; use {channels} finite numbers.")
    return values


def _describe(processor: Any, kind: str) -> str:
    """The resizing keys of a processor, in words."""
    texts = [kind]
    for name in ("do_resize", "size", "do_center_crop", "crop_size"):
        if (value := getattr(processor, name, None)) is not None:
            texts.append(f"{name} {value if isinstance(value, bool) else _sizes(processor, name)}")
    return f"{texts[0]} with {', '.join(texts[1:])}"
