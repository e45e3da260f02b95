"""Training: batches as a function of the step, two engines that agree, and saved weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.scratch.gradients import random_weights
from vitft.scratch.optim import lr_at
from vitft.scratch.train import (
    Engine,
    Epoch,
    Images,
    NumpyEngine,
    Plan,
    accuracy,
    batch,
    fit,
    initial_weights,
    load,
    micro_batches,
    save,
    steps_per_epoch,
)
from vitft.scratch.vit import from_named_arrays, named_arrays
from vitft.scratch_runner.torch_engine import TorchEngine
from vitft.spec import ViTSpec

SPEC = ViTSpec.square(8, 4, 8, 2, 2, 12, 4, channels=3)
PLAN = Plan(
    epochs=2, batch_size=7, lr=3e-3, optimizer="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=3,
    label_smoothing=0.1, dropout=0.1, crop_border=1, flip=True, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.3),
    dtype="float64", seed=11,
)  # fmt: skip
ENGINES = {"numpy": NumpyEngine, "torch": TorchEngine}


def colored_images(count: int = 40, seed: int = 0) -> Images:
    """Noisy images in which the channel of the label is brighter; for the last label none is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = rng.integers(0, 156, (count, 3, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[label : label + 1] += 50
    return Images(pixels, labels)


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    train = colored_images()
    for step in (0, 3, 8):
        (images, labels, masks), (images_2, labels_2, masks_2) = (batch(train, step, SPEC, PLAN) for _ in range(2))
        assert np.array_equal(images, images_2)
        assert np.array_equal(labels, labels_2)
        assert masks is not None
        assert masks_2 is not None
        assert all(np.array_equal(a, b) for a, b in zip(masks, masks_2, strict=True))
        assert not np.array_equal(images, batch(train, step, SPEC, replace(PLAN, seed=12))[0])
        assert not np.array_equal(images, batch(train, step + 6, SPEC, PLAN)[0])  # the same position in the next epoch
    steps = (5, 0, 7)  # whatever was requested before
    assert all(np.array_equal(batch(train, s, SPEC, PLAN)[1], batch(train, s, SPEC, PLAN)[1]) for s in steps)


def test_each_epoch_has_its_own_order_of_all_images_and_a_smaller_last_batch() -> None:
    train = Images(np.arange(40, dtype=np.uint8).repeat(3 * 64).reshape(40, 3, 8, 8), np.arange(40))
    assert steps_per_epoch(train, PLAN) == 6
    orders = []
    for epoch in range(3):
        labels = [batch(train, 6 * epoch + number, SPEC, PLAN)[1] for number in range(6)]
        assert [len(part) for part in labels] == [7, 7, 7, 7, 7, 5]
        orders.append(np.concatenate(labels))
        assert np.array_equal(np.sort(orders[-1]), np.arange(40))
    assert len({order.tobytes() for order in orders}) == 3


def test_images_match_their_labels() -> None:
    train = Images(np.arange(40, dtype=np.uint8).repeat(3 * 64).reshape(40, 3, 8, 8), np.arange(40))
    plain = replace(PLAN, crop_border=0, flip=False, dropout=0, mean=(0,) * 3, std=(1 / 255,) * 3)
    images, labels, masks = batch(train, 2, SPEC, plain)
    assert masks is None
    assert np.allclose(images, labels[:, None, None, None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_images_and_masks_have_the_dtype_of_the_plan(dtype: Any) -> None:
    images, _, masks = batch(colored_images(), 0, SPEC, replace(PLAN, dtype=dtype, dropout=0.25))
    assert masks is not None
    assert {images.dtype, *(mask.dtype for mask in masks)} == {np.dtype(dtype)}
    assert [mask.shape for mask in masks] == [(7, SPEC.tokens, SPEC.width)] * (1 + 2 * SPEC.layers)
    assert np.unique(np.concatenate(masks)) == pytest.approx([0, 1 / 0.75])
    assert {array.dtype for _, array in named_arrays(initial_weights(SPEC, replace(PLAN, dtype=dtype)))} == {
        np.dtype(dtype)
    }


# -- engines --------------------------------------------------------------------------------------


def test_both_engines_have_the_same_losses_for_a_hundred_steps() -> None:
    """In float64, rounding adds up to less than 1e-9 in a hundred steps."""
    train, w = colored_images(), initial_weights(SPEC, PLAN)
    ours, theirs = NumpyEngine(w, SPEC, PLAN), TorchEngine(w, SPEC, PLAN)
    losses = []
    for step in range(100):
        images, labels, masks = batch(train, step, SPEC, PLAN)
        lr = lr_at(step, PLAN.lr, 100, PLAN.warmup_steps, PLAN.schedule)
        (loss, correct), (torch_loss, torch_correct) = (e.step(images, labels, lr, masks) for e in (ours, theirs))
        assert abs(loss - torch_loss) <= 1e-9, step
        assert correct == torch_correct
        losses.append(loss)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])  # training makes progress
    images = batch(train, 0, SPEC, PLAN)[0]
    assert np.abs(ours.logits(images) - theirs.logits(images)).max() <= 1e-8
    for (name, array), (_, other) in zip(named_arrays(ours.weights()), named_arrays(theirs.weights()), strict=True):
        assert np.abs(array - other).max() <= 1e-8, name


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_engines_agree_with_other_optimizers(optimizer: Any) -> None:
    plan = replace(PLAN, optimizer=optimizer, momentum=0.9, lr=1e-2)
    train, w = colored_images(), initial_weights(SPEC, plan)
    engines: list[Engine] = [NumpyEngine(w, SPEC, plan), TorchEngine(w, SPEC, plan)]
    for step in range(20):
        losses = [engine.step(*batch(train, step, SPEC, plan)[:2], 1e-2, None)[0] for engine in engines]
        assert abs(losses[0] - losses[1]) <= 1e-9


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_does_not_change_the_initial_weights(engine: str) -> None:
    w = initial_weights(SPEC, PLAN)
    before = {name: array.copy() for name, array in named_arrays(w)}
    trained: Any = ENGINES[engine](w, SPEC, PLAN)
    trained.step(*batch(colored_images(), 0, SPEC, PLAN)[:2], 0.1, None)
    assert all(np.array_equal(array, before[name]) for name, array in named_arrays(w))
    changed = [name for name, array in named_arrays(trained.weights()) if not np.array_equal(array, before[name])]
    assert "head.logits.weight" in changed


def test_training_with_numpy_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result must not depend on the timing of the two threads that work on each batch."""
    monkeypatch.setattr("vitft.scratch.train.CACHE_NUMBERS", 2 * 192)  # four micro-batches per batch
    plan = replace(PLAN, dtype="float32")

    def weights() -> bytes:
        engine = NumpyEngine(initial_weights(SPEC, plan), SPEC, plan)
        fit(engine, colored_images(), colored_images(9, seed=1), SPEC, plan)
        return b"".join(array.tobytes() for _, array in named_arrays(engine.weights()))

    assert len({weights() for _ in range(3)}) == 1


@pytest.mark.parametrize(("count", "largest"), [(1, 1), (2, 1), (3, 960), (50, 960), (51, 961)])
def test_micro_batches_cover_every_image_once_and_fit_the_cache(
    monkeypatch: pytest.MonkeyPatch, count: int, largest: int
) -> None:
    monkeypatch.setattr("vitft.scratch.train.CACHE_NUMBERS", largest)
    parts = [list(range(count))[part] for part in micro_batches(count, SPEC)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) == min(count, max(1, largest // 192))  # the largest stage has 3 x 8 x 8 numbers


def test_micro_batches_change_a_step_only_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    train = colored_images()

    def one_step() -> tuple[tuple[float, int], dict[str, Any], Any]:
        engine = NumpyEngine(initial_weights(SPEC, PLAN), SPEC, PLAN)
        images, labels, masks = batch(train, 0, SPEC, PLAN)
        result = engine.step(images, labels, PLAN.lr, masks)
        return result, dict(named_arrays(engine.weights())), engine.logits(images)

    (loss, correct), weights, logits = one_step()
    monkeypatch.setattr("vitft.scratch.train.CACHE_NUMBERS", 2 * 192)  # four micro-batches, the last with one image
    (split_loss, split_correct), split_weights, split_logits = one_step()
    assert split_loss == pytest.approx(loss, rel=1e-11)
    assert split_correct == correct
    for name, array in weights.items():
        assert np.abs(array - split_weights[name]).max() <= 1e-8, (
            name
        )  # Adam's first step divides by the size of the gradient
    assert np.abs(logits - split_logits).max() <= 1e-8


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_one_image(engine: str) -> None:
    plan = replace(PLAN, batch_size=1)
    trained: Any = ENGINES[engine](initial_weights(SPEC, plan), SPEC, plan)
    images, labels, masks = batch(colored_images(), 0, SPEC, plan)
    loss, correct = trained.step(images, labels, 0.01, masks)
    assert loss == pytest.approx(np.log(4))  # at first every class is as likely as any other
    assert correct in (0, 1)


# -- epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_training_learns_and_reports_every_step_and_epoch(engine: str) -> None:
    plan = replace(PLAN, epochs=25, dtype="float32", lr=1e-2, dropout=0.0, crop_border=0, flip=False)
    train, test = colored_images(), colored_images(30, seed=1)
    trained: Any = ENGINES[engine](initial_weights(SPEC, plan), SPEC, plan)
    steps: list[tuple[int, float, float]] = []
    epochs: list[Epoch] = []
    history = fit(trained, train, test, SPEC, plan, lambda *step: steps.append(step), epochs.append)

    assert epochs == history
    assert [epoch.epoch for epoch in history] == list(range(1, 26))
    assert [step for step, _, _ in steps] == list(range(6 * 25))
    assert [lr for _, _, lr in steps] == [lr_at(s, 1e-2, 150, 3, "cosine") for s in range(150)]
    sizes = [7, 7, 7, 7, 7, 5]
    first = sum(loss * size for (_, loss, _), size in zip(steps[:6], sizes, strict=True)) / 40
    assert history[0].loss == pytest.approx(first)
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].accuracy >= 0.95
    assert history[-1].test_accuracy == accuracy(trained, test, plan) >= 0.9
    assert history[-1].test_accuracy == np.mean(
        trained.logits((test.pixels / 255 - np.array(plan.mean)[:, None, None]).astype(np.float32)
                    / np.array(plan.std, np.float32)[:, None, None]).argmax(axis=1) == test.labels
    )  # fmt: skip


def test_accuracy_does_not_depend_on_the_batch_size() -> None:
    engine, test = NumpyEngine(random_weights(SPEC), SPEC, PLAN), colored_images(23)
    assert len({accuracy(engine, test, PLAN, batch_size) for batch_size in (1, 7, 23, 100)}) == 1


# -- saved weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, final_norm=False, pre_logits=5, qkv_bias=False)])
def test_weights_can_be_saved_and_loaded(spec: ViTSpec, tmp_path: Path) -> None:
    w = random_weights(spec)
    save(tmp_path / "w.safetensors", w)
    loaded = load(tmp_path / "w.safetensors", spec)
    assert type(loaded) is type(w)
    for (name, array), (loaded_name, loaded_array) in zip(named_arrays(w), named_arrays(loaded), strict=True):
        assert name == loaded_name
        assert np.array_equal(array, loaded_array)
        assert array.dtype == loaded_array.dtype == np.float64


def test_weights_that_do_not_fit_the_spec_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save(file, random_weights(SPEC))
    arrays = load_file(file)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.inner\.bias: expected shape \(13,\), got \(12,\)"):
        load(file, replace(SPEC, mlp=13))
    with pytest.raises(ValueError, match=r"head\.pre_logits\.bias: expected shape \(8,\), got None"):
        load(file, replace(SPEC, pre_logits=8))
    with pytest.raises(ValueError, match=r"extra: expected shape None, got \(2,\)"):
        from_named_arrays(arrays | {"extra": np.zeros(2)}, SPEC)
    save_file({name: array for name, array in arrays.items() if name != "norm.scale"}, file)
    with pytest.raises(ValueError, match=r"norm\.scale: expected shape \(8,\), got None"):
        load(file, SPEC)
