"""Crop, mirror and resize as matrix products: what threads make of one image after the other, for a batch at once."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from vitft.data.augment import Preprocess, augment, augment_by_matmul
from vitft.data.resample import RADIUS, crop_and_resize, filter_weights

sides = st.tuples(st.integers(1, 60), st.integers(1, 60))


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("resample", RADIUS)
@settings(max_examples=60)
@given(
    old=sides,
    new=sides,
    part=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(0, 99),
)
def test_a_box_is_resized_as_pillow_does(
    resample: Any, old: tuple[int, int], new: tuple[int, int], part: tuple[float, ...], seed: int
) -> None:
    """Within 1.6 of 255: Pillow rounds after each of its two passes, and bicubic weights pass the first error on."""
    image = noise(1, *old, seed)
    height, width = (1 + int(share * (most - 1)) for share, most in zip(part[:2], old, strict=True))
    top, left = int(part[2] * (old[0] - height)), int(part[3] * (old[1] - width))
    box = torch.tensor([[top, left, height, width]])
    by = Image.Resampling[resample.upper()]
    piece = Image.fromarray(image[0, top : top + height, left : left + width].numpy())
    # Columns first, as Pillow does but where rows get fewer: there it may turn round, and clips other overshoot.
    wanted = np.asarray(piece.resize((new[1], height), by).resize((new[1], new[0]), by)).astype(float)
    for flip in (False, True):
        got = crop_and_resize(image, box, torch.tensor([flip]), *new, resample)
        assert got.shape == (1, 3, *new)
        seen = got[0].permute(1, 2, 0).numpy()
        assert np.abs((seen[:, ::-1] if flip else seen) - wanted).max() <= 1.6


@pytest.mark.parametrize("resample", RADIUS)
def test_weights_keep_gray_gray_and_stay_within_the_box(resample: str) -> None:
    found = filter_weights(20, torch.tensor([3, 0]), torch.tensor([9, 20]), 7, resample)
    assert found.sum(dim=2).numpy() == pytest.approx(1.0)
    assert not found[0, :, :3].any()
    assert not found[0, :, 12:].any()
    assert found[1].any(dim=0).all()


@pytest.mark.parametrize("kind", ["none", "flip", "crop"])
@pytest.mark.parametrize(
    "how",
    [
        Preprocess(24, 24), Preprocess(20, 30, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4), resample="bicubic"),
        Preprocess(24, 24, mean=(0.5,), std=(0.25,)), Preprocess(24, 24, flips_channels=True),
    ],
    ids=["square", "bicubic", "gray", "blue first"],
)  # fmt: skip
def test_a_batch_is_what_threads_make_of_it(kind: str, how: Preprocess) -> None:
    images, index = noise(16, 16, 19), np.arange(16) * 7
    by_products, by_threads = (make(images, how, kind, 3, 2, index).float() for make in (augment_by_matmul, augment))
    assert by_products.shape == by_threads.shape
    step = how.rescale / min(how.std)  # of one in 255
    assert (by_products - by_threads).abs().max() <= 1.6 * step


def test_a_batch_of_any_size_takes_as_many_operations() -> None:
    counts = []
    for count in (4, 32):
        images, index = noise(count, 16, 16), np.arange(count)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            augment_by_matmul(images, Preprocess(24, 24), "crop", 0, 0, index)
        counts.append(Counter(event.name for event in seen.events()))
    assert counts[0] == counts[1]
