"""Preprocessing matches Pillow and Transformers, and augmentation is a function of the sample alone."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitft.config.train import LARGEST_SIDE
from vitft.data.augment import (
    RESAMPLE,
    Preprocess,
    apply_resize,
    augment,
    draw_crop_boxes,
    normalize,
    pillow_resize,
    preprocess_images,
    resize,
    resize_and_crop,
)
from vitft.data.augmentation.settings import Augmentation
from vitft.errors import ModelError
from vitft.models.image_processor import to_preprocess
from vitft.randomness import uniform

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
side = st.integers(1, 90)
seeds = st.integers(0, 2**32 - 1)


def pixels(height: int, width: int, seed: int = 0, *, contrast: bool = False) -> np.ndarray:
    """Noise; with `contrast`, only 0 and 255, the worst case for a bicubic filter."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 2 if contrast else 256, (height, width, 3))
    return (drawn * (255 if contrast else 1)).astype(np.uint8)


def by_pillow(image: np.ndarray, height: int, width: int, resample: str) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), FILTERS[resample]))


def assert_close_to_pillow(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Within 2 of 255 after two rounding passes: torch's weights have 16 bits, Pillow's 22."""
    off = np.abs(actual.numpy().astype(int) - expected.astype(int))
    assert off.max() <= 2


@pytest.mark.parametrize("resample", FILTERS)
@settings(deadline=None, max_examples=80)
@given(old=st.tuples(side, side), new=st.tuples(side, side), seed=seeds, contrast=st.booleans())
@example(old=(112, 44), new=(103, 106), seed=0, contrast=True)  # fewer rows, more columns: Pillow 13 resizes rows first
@example(old=(93, 86), new=(48, 71), seed=0, contrast=True)
def test_evaluation_resize_matches_pillow(
    resample: Any, old: tuple[int, int], new: tuple[int, int], seed: int, contrast: bool
) -> None:
    image = pixels(*old, seed, contrast=contrast)

    actual = resize_and_crop(torch.from_numpy(image)[None], Preprocess(*new, resample=resample))[0]

    assert np.array_equal(actual.numpy(), by_pillow(image, *new, resample))


@pytest.mark.parametrize("resample", FILTERS)
@settings(deadline=None, max_examples=60)
@given(old=st.tuples(side, side), new=st.tuples(side, side), seed=seeds)
def test_training_resize_matches_pillow_columns_first(
    resample: str, old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    image = pixels(*old, seed, contrast=True)

    actual = resize(torch.from_numpy(image)[None], *new, resample)[0]

    columns = by_pillow(image, old[0], new[1], resample)
    assert_close_to_pillow(actual, by_pillow(columns, *new, resample))


def test_an_image_of_the_model_size_is_unchanged() -> None:
    image = torch.from_numpy(pixels(24, 32))[None]
    assert torch.equal(resize_and_crop(image, Preprocess(24, 32, resample="bicubic")), image)


@given(
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.2, 1)] * 3),
    rescale=st.sampled_from([1 / 255, 1 / 127]),
)
@settings(deadline=None, max_examples=30)
def test_normalization_is_rescale_then_mean_then_std(mean: Any, std: Any, rescale: float) -> None:
    """Within 1e-6 of the largest value, the precision of float32."""
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)

    actual = normalize(torch.from_numpy(image), Preprocess(16, 16, mean=mean, std=std, rescale=rescale))

    expected = (image.astype(np.float64) * rescale - mean) / std
    np.testing.assert_allclose(
        actual.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-6 * max(1, abs(expected).max())
    )


def test_normalize_writes_to_the_given_buffer() -> None:
    image, memory = torch.from_numpy(pixels(8, 8))[None], torch.full((3, 8, 8, 3), 9.0)

    actual = normalize(image, Preprocess(8, 8), memory)

    assert actual.data_ptr() == memory.data_ptr()
    assert torch.equal(actual, normalize(image, Preprocess(8, 8)))
    assert (memory[1:] == 9).all()


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", [(1, 5200), (5200, 1), (2, 9000), (9001, 2)])
@pytest.mark.parametrize("crop", [(64, 48), (40, 64), (64, 70)])
def test_a_long_image_is_cropped_before_it_is_enlarged_with_the_same_result(
    resample: Any, size: tuple[int, int], crop: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = Preprocess(*crop, shortest_edge=64, resample=resample)
    image = pixels(*size, contrast=True)
    whole = by_pillow(image, *(64 * side // min(size) for side in size), resample)
    top, left = ((have - want) // 2 for have, want in zip(whole.shape, crop, strict=False))
    expected = np.zeros((*crop, 3), np.uint8)
    part = whole[max(0, top) : max(0, top) + crop[0], max(0, left) : max(0, left) + crop[1]]
    down, right = max(0, -top), max(0, -left)
    expected[down : down + part.shape[0], right : right + part.shape[1]] = part
    computed: list[int] = []

    def spy(images: torch.Tensor, height: int, width: int, *others: Any) -> torch.Tensor:
        computed.append(height * width)
        return pillow_resize(images, height, width, *others)

    monkeypatch.setattr("vitft.data.augment.pillow_resize", spy)
    resized = apply_resize(torch.from_numpy(image)[None], preprocess)

    assert np.array_equal(resize_and_crop(resized, preprocess)[0].numpy(), expected)
    assert torch.equal(apply_resize(resized, preprocess), resized)
    assert max(computed) <= max(size) * 71


def pil(family: str, **settings: Any) -> Any:
    """The family's image processor with the Pillow backend."""
    return getattr(transformers, f"{family}ImageProcessorPil")(**settings)


# -- compared with Transformers -------------------------------------------------------------------------------

BOX, EDGE, CROP = {"height": 32, "width": 24}, {"shortest_edge": 36}, {"height": 32, "width": 32}
PROCESSORS = {
    "vit": pil("ViT", size=BOX),
    "dinov2": pil("Bit", size=EDGE, crop_size=CROP),
    "crop over edge": pil("Bit", size={"shortest_edge": 27}, crop_size={"height": 32, "width": 33}),
    "crop alone": pil("Bit", do_resize=False, crop_size=CROP),
    "deit": pil("DeiT", size={"height": 36, "width": 40}, crop_size=CROP),
    "plain numbers": pil("ViT", size={"height": 16, "width": 16}, do_normalize=False, do_rescale=False, resample=3),
    "numbers of 0 to 255": pil("ViT", size=BOX, do_rescale=False, image_mean=[120, 110, 100], image_std=[50, 60, 70]),
    "one mean for all": pil("ViT", size=BOX, image_mean=0.4, image_std=0.3),
    "lists": pil("ViT", size=[32, 24]),
    "clip": pil("CLIP", size=36, crop_size=32),
    "siglip": pil("Siglip", size=BOX),
    "beit": pil("Beit", size=BOX, do_center_crop=True, crop_size=CROP, do_reduce_labels=True),
    "convnext": pil("ConvNext", size={"shortest_edge": 32}, crop_pct=0.7),
    "convnext, large": pil("ConvNext", size={"shortest_edge": 384}),
    "poolformer": pil("PoolFormer", size={"shortest_edge": 32}, crop_pct=0.8, crop_size=CROP),
    "poolformer, whole": pil("PoolFormer", size={"height": 32, "width": 32}, crop_size=CROP),
    "levit": pil("Levit", size={"shortest_edge": 32}, crop_size=CROP),
    "mobilevit": pil("MobileViT", size=EDGE, crop_size=CROP),
    "mobilevit, unflipped": pil("MobileViT", size=EDGE, crop_size=CROP, do_flip_channel_order=False),
    "efficientnet": pil("EfficientNet", size=BOX, image_std=[0.478, 0.473, 0.474]),
    "efficientnet, -1 to 1": pil("EfficientNet", size=BOX, rescale_factor=1 / 127.5, rescale_offset=True,
                                 do_normalize=False, include_top=False),
    "segformer": pil("Segformer", size=BOX, do_center_crop=True, crop_size=CROP),
    "pvt": pil("Pvt", size=BOX),
    "mobilenet": pil("MobileNetV2", size=EDGE, crop_size=CROP),
} | {name: pil("ViT", size=BOX, resample=number) for number, name in RESAMPLE.items()}  # fmt: skip


def read(document: dict[str, Any]) -> Preprocess:
    """The Preprocess of a preprocessor_config.json with this content."""
    kind = document.get("image_processor_type", "ViTImageProcessor")
    return to_preprocess(getattr(transformers, f"{kind}Pil").from_dict(document))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(20, 50), (50, 20), (100, 37), (300, 401), (32, 32), (1, 1), (37, 36), (5, 90)])
def test_preprocessing_matches_transformers(name: str, size: tuple[int, int]) -> None:
    """Within a thousandth of the step between two pixel values."""
    processor = PROCESSORS[name]
    preprocess = to_preprocess(processor)
    image = pixels(*size, contrast=True)

    actual = preprocess_images([torch.from_numpy(image)], preprocess)

    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert actual.shape == expected.shape
    steps = (actual - expected).abs() * torch.tensor(preprocess.std)[:, None, None] / preprocess.rescale
    assert steps.max() < 1e-3


def test_filters_have_pillows_numbers() -> None:
    assert {
        item.value: item.name.lower() for item in Image.Resampling if item.value < 6
    } == RESAMPLE  # Pillow 13 has more


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocess_round_trips_through_json(name: str) -> None:
    preprocess = to_preprocess(PROCESSORS[name])
    assert read(json.loads(json.dumps(preprocess.to_json()))) == preprocess


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_reads_the_written_config(name: str) -> None:
    processor = PROCESSORS[name]
    preprocess = to_preprocess(processor)
    image = Image.fromarray(pixels(70, 45))

    document = preprocess.to_json()
    again = getattr(transformers, f"{document['image_processor_type']}Pil")(**document)

    a, b = (loaded(image, return_tensors="pt")["pixel_values"] for loaded in (processor, again))
    torch.testing.assert_close(a, b, check_dtype=False)
    gray = image.convert("L")
    a, b = (again(picture, return_tensors="pt")["pixel_values"] for picture in (gray, gray.convert("RGB")))
    torch.testing.assert_close(a, b)


def test_transformers_reads_gray_images_for_a_one_channel_model() -> None:
    preprocess = Preprocess(32, 24, mean=(0.4,), std=(0.3,))
    image = Image.fromarray(pixels(70, 45)).convert("L")
    document = preprocess.to_json()
    processor = getattr(transformers, f"{document['image_processor_type']}Pil")(**document)
    expected = preprocess_images([torch.from_numpy(np.array(image.convert("RGB")))], preprocess)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], expected, check_dtype=False)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"size": 32}, Preprocess(32, 32)),
        ({}, Preprocess(224, 224)),
        ({"size": 32, "feature_extractor_type": "ViTFeatureExtractor", "resample": 3},
         Preprocess(32, 32, resample="bicubic")),
        ({"size": 36, "crop_size": 32, "do_center_crop": True}, Preprocess(32, 32, before_crop=(36, 36))),
        ({"size": 32, "crop_size": 28, "do_center_crop": False}, Preprocess(32, 32)),
        ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
         Preprocess(32, 32, shortest_edge=36)),
        ({"size": 32, "do_normalize": False}, Preprocess(32, 32, mean=(0.0,) * 3, std=(1.0,) * 3)),
    ],
)  # fmt: skip
def test_configs_of_older_versions_are_read(stored: dict[str, Any], expected: Preprocess) -> None:
    assert read(stored) == expected


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (pil("ViT", size={"shortest_edge": 32}), "size {'shortest_edge': 32} gives images of different shapes"),
        (pil("ViT", do_resize=False), "do_resize False"),
        (pil("CLIP", size={"shortest_edge": 32, "longest_edge": 64}, crop_size=32), "longest_edge"),
        (pil("ViT", size={"max_height": 32, "max_width": 64}), "max_height"),
        (pil("ViT", size=32, do_pad=True, pad_size=64), "do_pad with a pad_size"),
        (pil("ViT", size=32, resample=6), "resample 6 is not supported"),
        (pil("ViT", size=32, image_mean=[0.5, 0.5]), "image_mean"),
        (pil("ViT", size=32, image_std=[0.5, 0.0, 0.5]), "image_std"),
        (
            pil("ConvNext", size={"shortest_edge": 32}, do_center_crop=True, crop_size=24),
            "do_center_crop with crop_pct",
        ),
        (pil("PoolFormer", size={"height": 32, "width": 24}), "crop_pct with size"),
        (pil("Perceiver"), "PerceiverImageProcessor does more"),
        (pil("Donut", size=32), "DonutImageProcessor does more"),
        (pil("TextNet"), "TextNetImageProcessor with"),
        (pil("Siglip2"), "Siglip2ImageProcessor with"),
    ],
)
def test_unsupported_processor_settings_are_refused_by_name(processor: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        to_preprocess(processor)
    assert message in str(caught.value)


@pytest.mark.parametrize("largest", [1, LARGEST_SIDE])
def test_image_sides_are_bounded(largest: int) -> None:
    sides: dict[str, Any] = {"height": largest, "width": largest, "shortest_edge": largest}
    Preprocess(**sides, before_crop=(largest, largest)).check()
    wrong = largest - 1 if largest == 1 else largest + 1
    for changed in (*({name: wrong} for name in sides), {"before_crop": (9, wrong)}, {"before_crop": (wrong, 9)}):
        with pytest.raises(ModelError, match=rf"image side of {wrong} pixels; it must be 1 to {LARGEST_SIDE:,}"):
            Preprocess(**sides | changed).check()
    with pytest.raises(ModelError, match=r"image side of 2\.5 pixels"):
        Preprocess(2.5, 2).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mean": (0.5, math.nan, 0.5)}, "image_mean (0.5, nan, 0.5)"),
        ({"mean": ("0.5",)}, "image_mean ('0.5',)"),
        ({"std": (0.5, 0.5, math.inf)}, "image_std (0.5, 0.5, inf)"),
        ({"std": (0.5, 0, 0.5)}, "image_std (0.5, 0, 0.5)"),
        ({"rescale": -math.inf}, "rescale_factor (-inf,)"),
    ],
)
def test_unusable_normalization_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Preprocess(8, 8, **changed).check()
    assert str(caught.value) == f"{message} is invalid; use finite numbers{' other than 0' * ('std' in message)}."
    Preprocess(8, 8, mean=(0, 0.0, -1), rescale=1).check()


class Sharpening(transformers.ViTImageProcessorPil):
    """An image processor that this project does not know."""

    def rescale(self, image: Any, scale: float, **others: Any) -> Any:
        return super().rescale(image, scale, **others) ** 1.02


def test_a_processor_with_an_unknown_step_is_refused() -> None:
    with pytest.raises(ModelError, match="Sharpening does more than resize, crop, rescale and normalize"):
        to_preprocess(Sharpening(size=32))


def test_luminance_matches_pillow_and_leaves_gray_unchanged() -> None:
    image, preprocess = pixels(200, 150), Preprocess(200, 150, mean=(0.0,), std=(1.0,), rescale=1.0)

    actual = normalize(torch.from_numpy(image)[None], preprocess)

    assert actual.shape == (1, 1, 200, 150)
    assert np.array_equal(actual[0, 0].numpy(), np.asarray(Image.fromarray(image).convert("L")).astype(np.float32))
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(normalize(ramp, preprocess).flatten(), torch.arange(256.0))


def test_another_input_size_keeps_the_crop_margin() -> None:
    assert Preprocess(224, 224, shortest_edge=256).with_size(112) == Preprocess(112, 112, shortest_edge=128)
    assert Preprocess(224, 224, before_crop=(256, 256)).with_size(112).before_crop == (128, 128)
    assert Preprocess(224, 224).with_size(98) == Preprocess(98, 98)
    assert (Preprocess(98, 98).size_text, Preprocess(98, 112).size_text) == ("98", "98 x 112")


# -- augmentation ----------------------------------------------------------------------------------

PREPROCESS = Preprocess(16, 16)
IMAGES = torch.stack([torch.from_numpy(pixels(20, 20, seed)) for seed in range(12)])


@pytest.mark.parametrize("kind", ["none", "flip", "crop", "trivial", "rand"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, epoch=st.integers(0, 50), order=st.permutations(range(12)), count=st.integers(1, 12))
def test_augmented_pixels_depend_only_on_seed_epoch_and_index(
    kind: str, seed: int, epoch: int, order: list[int], count: int
) -> None:
    """Not on the batch, the position in it, or on whether images are in a tensor or a list."""
    index = 1000 + np.arange(12)
    how = Augmentation(kind, seed, color_jitter=0.4 if kind == "rand" else 0.0)
    whole = augment(IMAGES, PREPROCESS, how, epoch, index)
    some = np.array(order[:count])

    in_tensor = augment(IMAGES[some], PREPROCESS, how, epoch, index[some])
    in_list = augment([IMAGES[i] for i in some], PREPROCESS, how, epoch, index[some])

    assert torch.equal(in_tensor, whole[some])
    assert torch.equal(in_list, whole[some])


@pytest.mark.parametrize("kind", ["flip", "crop", "trivial", "rand"])
def test_seed_epoch_and_index_change_the_draw(kind: str) -> None:
    index = np.arange(12)
    first = augment(IMAGES, PREPROCESS, Augmentation(kind, 0), 0, index)
    others = [augment(IMAGES, PREPROCESS, Augmentation(kind, 1), 0, index),
              augment(IMAGES, PREPROCESS, Augmentation(kind, 0), 1, index),
              augment(IMAGES, PREPROCESS, Augmentation(kind, 0), 0, index + 12)]  # fmt: skip
    assert not any(torch.equal(first, other) for other in others)


def test_about_half_of_the_images_are_flipped_left_to_right() -> None:
    image = torch.from_numpy(pixels(16, 16))
    actual = augment(image.expand(400, 16, 16, 3), PREPROCESS, Augmentation("flip", 0), 0, np.arange(400))

    plain = normalize(image[None], PREPROCESS)[0]
    flipped = [torch.equal(pixels_, plain.flip(2)) for pixels_ in actual]
    assert all(is_flipped or torch.equal(pixels_, plain) for pixels_, is_flipped in zip(actual, flipped, strict=True))
    assert 160 < sum(flipped) < 240  # four standard deviations


def test_no_augmentation_matches_evaluation_preprocessing() -> None:
    """Within the step between two pixel values: training resizes by torch, evaluation by Pillow."""
    training, evaluation = (
        augment(IMAGES, PREPROCESS, Augmentation("none", 0), 0, np.arange(12)),
        preprocess_images(IMAGES, PREPROCESS),
    )
    assert (training - evaluation).abs().max() < 1.01 * PREPROCESS.rescale / PREPROCESS.std[0]


def test_training_does_not_use_slow_pillow_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resize(IMAGES, 16, 16, "bilinear")
    monkeypatch.setattr("vitft.data.augment.pillow_resize", lambda *args: pytest.fail("resized by Pillow"))
    assert torch.equal(resize_and_crop(IMAGES, PREPROCESS, exact=False), expected)
    assert torch.equal(resize_and_crop(list(IMAGES), PREPROCESS, exact=False), expected)


def test_evaluation_pixels_do_not_depend_on_the_batch() -> None:
    whole = preprocess_images(IMAGES, PREPROCESS)
    assert torch.equal(preprocess_images(list(IMAGES), PREPROCESS), whole)
    assert torch.equal(preprocess_images(IMAGES[5:6], PREPROCESS), whole[5:6])


@given(size=st.tuples(side, side), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_crops_are_inside_the_image(size: tuple[int, int], seed: int) -> None:
    boxes = draw_crop_boxes(np.tile(np.array(size), (50, 1)), seed, 0, np.arange(50))

    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


def test_crops_have_the_areas_and_aspect_ratios_of_the_paper() -> None:
    boxes = draw_crop_boxes(np.full((5000, 2), 1000), 0, 0, np.arange(5000))

    area, aspect = boxes[:, 2:].prod(axis=1) / 1e6, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.079
    assert area.max() > 0.95
    assert 0.745 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.34
    assert abs(area.mean() - 0.478) < 0.015  # it would be 0.54 if large crops could leave the image


def as_torchvision(height: int, width: int, draws: np.ndarray) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, line by line, with given draws: (10, 4) in [0, 1)."""
    ratio = (3.0 / 4.0, 4.0 / 3.0)
    for area, aspect, top, left in draws:
        target_area = height * width * (0.08 + (1.0 - 0.08) * area)
        aspect_ratio = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w]
    in_ratio = float(width) / float(height)
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w = width
        h = height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("size", [(375, 500), (100, 400), (400, 100), (90, 1000), (1000, 30), (60, 60), (7, 5)])
def test_crop_boxes_match_torchvision(size: tuple[int, int]) -> None:
    """Also if no box fits, as in an image eleven times as wide as high."""
    index = 5 + np.arange(300)
    drawn = np.stack([uniform(3, "crop", 2, index, draw) for draw in range(10)], axis=1)

    boxes = draw_crop_boxes(np.tile(np.array(size), (300, 1)), 3, 2, index)

    assert boxes.tolist() == [as_torchvision(*size, draws) for draws in drawn]


def test_every_crop_has_an_allowed_aspect_ratio() -> None:
    sizes = np.tile([[100, 400], [375, 500], [900, 60]], (500, 1))
    boxes = draw_crop_boxes(sizes, 0, 0, np.arange(1500))
    aspect = boxes[:, 3] / boxes[:, 2]
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert len({tuple(box) for box in boxes[2::3].tolist()}) > 1  # not all are the fallback box


def test_a_crop_does_not_depend_on_its_batch() -> None:
    sizes = np.tile([[100, 400], [90, 1000], [60, 60]], (20, 1))
    index = np.arange(60)
    whole = draw_crop_boxes(sizes, 1, 4, index)
    for some in (index[::-1], index[7:8], index[::7]):
        assert draw_crop_boxes(sizes[some], 1, 4, index[some]).tolist() == whole[some].tolist()


def test_a_range_that_is_not_given_leaves_the_checkpoints_own() -> None:
    own = Preprocess(8, 8).with_value_range("0:4095")
    assert own.value_range == (0, 4095)
    assert own.with_value_range(None) == own


def test_a_stored_processor_is_of_the_class_that_does_the_same() -> None:
    """Other tools take the class by this name, and its defaults for keys that a file lacks."""
    assert Preprocess(8, 8).to_json()["image_processor_type"].startswith("ViTImageProcessor")
