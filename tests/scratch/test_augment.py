"""Augmentation: shapes, contents, and results that depend only on the images and the generator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitft.scratch.augment import Pixels, crop, flip, normalize


def pixels(images: int = 20, channels: int = 2, height: int = 6, width: int = 5) -> Pixels:
    """Images with all pixels between 1 and 255, so that a 0 comes from outside."""
    shape = (images, channels, height, width)
    return np.random.default_rng(9).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("augment", [flip, lambda images, rng: crop(images, 2, rng)])
def test_the_result_is_a_function_of_the_images_and_the_generator(
    augment: Callable[[Pixels, np.random.Generator], Pixels],
) -> None:
    images = pixels()
    before = images.copy()
    first, repeated, other = (augment(images, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, other)
    assert np.array_equal(images, before)
    assert (first.shape, first.dtype) == (images.shape, np.uint8)


def test_flip_mirrors_half_of_the_images_and_twice_is_the_identity() -> None:
    images = pixels(400)
    mirrored = flip(images, np.random.default_rng(0))
    changed = [not np.array_equal(a, b) for a, b in zip(images, mirrored, strict=True)]
    assert 160 < sum(changed) < 240
    for before, after, is_changed in zip(images, mirrored, changed, strict=True):
        assert np.array_equal(after, before[..., ::-1] if is_changed else before)
    assert np.array_equal(flip(mirrored, np.random.default_rng(0)), images)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_crop_shifts_the_image_and_fills_with_0(channels: int, height: int, width: int, border: int, seed: int) -> None:
    images = pixels(6, channels, height, width)
    for before, after in zip(images, crop(images, border, np.random.default_rng(seed)), strict=True):
        shifts = [(down, across) for down in range(-border, border + 1) for across in range(-border, border + 1)]
        assert any(np.array_equal(after, shifted(before, *shift)) for shift in shifts)


def shifted(image: Pixels, down: int, across: int) -> Pixels:
    """An image (C, H, W) shifted pixel by pixel."""
    result = np.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - across < width:
                result[:, row, column] = image[:, row - down, column - across]
    return result


def test_each_image_is_shifted_on_its_own_in_every_direction() -> None:
    images = np.repeat(pixels(1), 500, axis=0)
    cropped = {image.tobytes() for image in crop(images, 1, np.random.default_rng(0))}
    assert cropped == {shifted(images[0], down, across).tobytes() for down in (-1, 0, 1) for across in (-1, 0, 1)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalized_pixels_have_mean_0_and_std_1(dtype: Any) -> None:
    images = pixels(200)
    scaled = images / 255
    mean, std = tuple(scaled.mean(axis=(0, 2, 3))), tuple(scaled.std(axis=(0, 2, 3)))
    x = normalize(images, mean, std, dtype)
    assert x.dtype == dtype
    assert np.allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    assert np.allclose(x.std(axis=(0, 2, 3)), 1, atol=1e-5)
    expected = (scaled - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.allclose(x, expected, atol=1e-12 if dtype == "float64" else 1e-5)
