"""Cropping, flipping and resizing a batch by matrix products matches the threaded version and Pillow."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from vitft.data.augment import Preprocess, augment, augment_by_matmul, resize
from vitft.data.augmentation.settings import Augmentation
from vitft.data.resample import RADIUS, crop_and_resize, filter_weights

sides = st.tuples(st.integers(1, 60), st.integers(1, 60))


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("resample", RADIUS)
@settings(max_examples=60)
@given(old=sides, new=sides, part=st.tuples(*[st.floats(0, 1)] * 4), seed=st.integers(0, 99))
def test_cropping_and_resizing_matches_pillow(
    resample: Any, old: tuple[int, int], new: tuple[int, int], part: tuple[float, ...], seed: int
) -> None:
    """Within 1.6 of 255: Pillow rounds after each of its two passes, and bicubic weights amplify the first error."""
    image = noise(1, *old, seed)
    height, width = (1 + int(fraction * (most - 1)) for fraction, most in zip(part[:2], old, strict=True))
    top, left = int(part[2] * (old[0] - height)), int(part[3] * (old[1] - width))
    box = torch.tensor([[top, left, height, width]])
    filter_ = Image.Resampling[resample.upper()]
    piece = Image.fromarray(image[0, top : top + height, left : left + width].numpy())
    # Columns first. If the height shrinks, Pillow may resize rows first, and then it clips other overshoot.
    expected = np.asarray(piece.resize((new[1], height), filter_).resize((new[1], new[0]), filter_)).astype(float)
    for flip in (False, True):
        actual = crop_and_resize(image, box, torch.tensor([flip]), *new, resample)
        assert actual.shape == (1, 3, *new)
        pixels = actual[0].permute(1, 2, 0).numpy()
        assert np.abs((pixels[:, ::-1] if flip else pixels) - expected).max() <= 1.6


@pytest.mark.parametrize("resample", RADIUS)
def test_weights_sum_to_one_and_stay_inside_the_box(resample: str) -> None:
    weights = filter_weights(20, torch.tensor([3, 0]), torch.tensor([9, 20]), 7, resample)
    assert weights.sum(dim=2).numpy() == pytest.approx(1.0)
    assert not weights[0, :, :3].any()
    assert not weights[0, :, 12:].any()
    assert weights[1].any(dim=0).all()


@pytest.mark.parametrize("kind", ["none", "flip", "crop", "trivial"])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(24, 24), Preprocess(20, 30, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4), resample="bicubic"),
        Preprocess(24, 24, mean=(0.5,), std=(0.25,)), Preprocess(24, 24, flips_channels=True),
        Preprocess(24, 24, resample="lanczos"), Preprocess(24, 24, resample="hamming"),
    ],
    ids=["square", "bicubic", "gray", "blue first", "lanczos", "hamming"],
)  # fmt: skip
def test_matmul_augmentation_matches_the_threaded_version(kind: str, preprocess: Preprocess) -> None:
    images, index = noise(16, 16, 19), np.arange(16) * 7
    by_matmul, by_threads = (
        make(images, preprocess, Augmentation(kind, 3), 2, index).float() for make in (augment_by_matmul, augment)
    )
    assert by_matmul.shape == by_threads.shape
    step = preprocess.rescale / min(preprocess.std)  # model input per 1/255
    assert (by_matmul - by_threads).abs().max() <= 1.6 * step


@pytest.mark.parametrize("resample", ["lanczos", "hamming"])
def test_a_gpu_resizes_by_filters_that_torch_does_not_have(resample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(3, 20, 50)  # taller afterwards: Pillow resizes columns first, too
    expected = resize(images, 24, 36, resample)
    monkeypatch.setattr("vitft.data.augment.many_launches_cost", lambda device: True)
    monkeypatch.setattr("vitft.data.augment.pillow_resize", None)
    assert (resize(images, 24, 36, resample).int() - expected.int()).abs().max() <= 2


def test_the_number_of_operations_does_not_depend_on_the_batch_size() -> None:
    counts = []
    for count in (4, 4, 32):  # the first also makes constants, once for all
        images, index = noise(count, 16, 16), np.arange(count)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            augment_by_matmul(images, Preprocess(24, 24), Augmentation("crop", 0), 0, index)
        counts.append(Counter(event.name for event in trace.events()))
    assert counts[1] == counts[2]
