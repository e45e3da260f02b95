"""Operations on batches are Pillow's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from vitft.data.augmentation.operations import BLENDS, MAPS, OPERATIONS, TABLES, apply

FILL = torch.tensor([10, 200, 90], dtype=torch.uint8)


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise, steps, dark, flat and two-colored images: what equalizing and stretching have to tell apart."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3))
    images[1::5] = images[1::5] // 64 * 64
    images[2::5] = images[2::5] // 9 + 40
    images[3::5] = images[3::5, :1, :1]
    images[4::5] = np.where(images[4::5] < 20, 250, 3)
    return torch.from_numpy(images.astype(np.uint8))


COLORS: dict[str, tuple[tuple[float, float], Callable[[Image.Image, float], Image.Image]]] = {
    "brightness": ((0, 2), lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "contrast": ((0, 2), lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "color": ((0, 2), lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "sharpness": ((0, 2), lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    "posterize": ((1, 8), lambda image, bits: ImageOps.posterize(image, int(bits))),
    "solarize": ((0, 256), lambda image, threshold: ImageOps.solarize(image, threshold)),
    "autocontrast": ((0, 0), lambda image, _: ImageOps.autocontrast(image)),
    "equalize": ((0, 0), lambda image, _: ImageOps.equalize(image)),
}


def in_pixels(name: str, strength: float, height: int, width: int) -> Callable[[Image.Image], Image.Image]:
    """The geometric operation as AutoAugment's code writes it for Pillow."""
    matrix = {
        "shear_x": (1, strength, 0, 0, 1, 0), "shear_y": (1, 0, 0, strength, 1, 0),
        "translate_x": (1, 0, strength * width, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, strength * height),
    }.get(name)  # fmt: skip
    how, fill = Image.Resampling.BILINEAR, tuple(FILL.tolist())
    if matrix is None:
        return lambda image: image.rotate(strength, how, fillcolor=fill)
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=fill)


def test_every_operation_has_a_reference() -> None:
    assert set(COLORS) == {*TABLES, *BLENDS}
    assert len(OPERATIONS) == 13


@pytest.mark.parametrize("name", COLORS)
@settings(deadline=None, max_examples=12)
@given(
    parts=st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5), height=st.integers(1, 40),
    width=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_colors_are_pillows_to_the_bit(name: str, parts: list[float], height: int, width: int, seed: int) -> None:
    (low, high), reference = COLORS[name]
    strengths = low + (high - low) * np.array(parts, np.float32).astype(float)
    if name == "posterize":
        strengths = np.floor(strengths)
    images = pictures(5, height, width, seed)
    actual = apply(images, np.full(5, name), strengths, FILL)
    assert actual.dtype == torch.uint8
    for image, strength, got in zip(images.numpy(), strengths, actual.numpy(), strict=True):
        expected = np.asarray(reference(Image.fromarray(image), float(np.float32(strength))))
        assert np.array_equal(got, expected), (name, strength)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_geometry_is_pillows_to_one_gray_level(name: str, size: tuple[int, int]) -> None:
    """But for rotations, where places on the very border of the image may fall either way."""
    largest = {"rotate": 135.0, "translate_x": 0.4, "translate_y": 0.4}.get(name, 0.99)
    strengths = np.linspace(-largest, largest, 12) + 0.0123
    images = pictures(12, *size)
    actual = apply(images, np.full(12, name), strengths, FILL)
    for image, strength, got in zip(images.numpy(), strengths, actual.numpy(), strict=True):
        expected = np.asarray(in_pixels(name, strength, *size)(Image.fromarray(image)))
        differs = np.abs(got.astype(int) - expected).max(axis=2) > 1
        assert differs.mean() <= 0.002, strength
        assert (got != image).any() or (image == image[0, 0]).all()


def test_each_image_has_its_own_operation() -> None:
    """In one call as in calls of their own, whatever the others are; identity changes nothing."""
    names = np.array(["identity", *OPERATIONS] * 2)
    strengths = np.where(np.char.equal(names, "posterize"), 3.0, 0.3) * np.where(np.arange(len(names)) < 14, 1, 2)
    images = pictures(len(names), 16, 12, seed=5)
    before = images.clone()
    together = apply(images, names, strengths, FILL)
    assert torch.equal(images, before)
    for place in range(len(names)):
        alone = apply(images[place : place + 1], names[place : place + 1], strengths[place : place + 1], FILL)
        assert torch.equal(together[place], alone[0]), names[place]
    assert torch.equal(together[0], images[0])
    assert torch.equal(together[14], images[14])
