"""Training: batches as functions of their step, two engines that agree, weights that survive the disk."""

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
    load,
    new_engine_weights,
    pieces,
    save,
    steps_per_epoch,
)
from vitft.scratch.vit import filled, named
from vitft.scratch_runner.torch_engine import TorchEngine
from vitft.spec import ViTSpec

SPEC = ViTSpec.square(8, 4, 8, 2, 2, 12, 4, channels=3)
PLAN = Plan(
    epochs=2, batch_size=7, lr=3e-3, optimizer="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=3,
    label_smoothing=0.1, dropout=0.1, crop_border=1, flip=True, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.3),
    dtype="float64", seed=11,
)  # fmt: skip
ENGINES = {"numpy": NumpyEngine, "torch": TorchEngine}


def coloured(count: int = 40, seed: int = 0) -> Images:
    """Noisy images that are brighter in one colour, which the label names; of the last label in none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = rng.integers(0, 156, (count, 3, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[label : label + 1] += 50
    return Images(pixels, labels)


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    train = coloured()
    for step in (0, 3, 8):
        (images, labels, masks), (again, same, more) = (batch(train, step, SPEC, PLAN) for _ in range(2))
        assert np.array_equal(images, again)
        assert np.array_equal(labels, same)
        assert masks is not None
        assert more is not None
        assert all(np.array_equal(a, b) for a, b in zip(masks, more, strict=True))
        assert not np.array_equal(images, batch(train, step, SPEC, replace(PLAN, seed=12))[0])
        assert not np.array_equal(images, batch(train, step + 6, SPEC, PLAN)[0])  # the same place, an epoch later
    steps = (5, 0, 7)  # whatever was asked for before
    assert all(np.array_equal(batch(train, s, SPEC, PLAN)[1], batch(train, s, SPEC, PLAN)[1]) for s in steps)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own_and_a_smaller_last_batch() -> None:
    train = Images(np.arange(40, dtype=np.uint8).repeat(3 * 64).reshape(40, 3, 8, 8), np.arange(40))
    assert steps_per_epoch(train, PLAN) == 6
    orders = []
    for epoch in range(3):
        labels = [batch(train, 6 * epoch + number, SPEC, PLAN)[1] for number in range(6)]
        assert [len(part) for part in labels] == [7, 7, 7, 7, 7, 5]
        orders.append(np.concatenate(labels))
        assert np.array_equal(np.sort(orders[-1]), np.arange(40))
    assert len({order.tobytes() for order in orders}) == 3


def test_pixels_go_with_their_labels() -> None:
    train = Images(np.arange(40, dtype=np.uint8).repeat(3 * 64).reshape(40, 3, 8, 8), np.arange(40))
    plain = replace(PLAN, crop_border=0, flip=False, dropout=0, mean=(0,) * 3, std=(1 / 255,) * 3)
    images, labels, masks = batch(train, 2, SPEC, plain)
    assert masks is None
    assert np.allclose(images, labels[:, None, None, None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_images_and_masks_have_the_plans_dtype(dtype: Any) -> None:
    images, _, masks = batch(coloured(), 0, SPEC, replace(PLAN, dtype=dtype, dropout=0.25))
    assert masks is not None
    assert {images.dtype, *(mask.dtype for mask in masks)} == {np.dtype(dtype)}
    assert [mask.shape for mask in masks] == [(7, SPEC.tokens, SPEC.width)] * (1 + 2 * SPEC.layers)
    assert np.unique(np.concatenate(masks)) == pytest.approx([0, 1 / 0.75])
    assert {array.dtype for _, array in named(new_engine_weights(SPEC, replace(PLAN, dtype=dtype)))} == {
        np.dtype(dtype)
    }


# -- engines --------------------------------------------------------------------------------------


def test_the_engines_losses_are_each_others_for_a_hundred_steps() -> None:
    """The bar of the textbook. Rounding alone is left, in float64: 1e-9 after a hundred steps."""
    train, w = coloured(), new_engine_weights(SPEC, PLAN)
    ours, theirs = NumpyEngine(w, SPEC, PLAN), TorchEngine(w, SPEC, PLAN)
    losses = []
    for step in range(100):
        images, labels, masks = batch(train, step, SPEC, PLAN)
        lr = lr_at(step, PLAN.lr, 100, PLAN.warmup_steps, PLAN.schedule)
        (loss, correct), (same_loss, same_correct) = (e.step(images, labels, lr, masks) for e in (ours, theirs))
        assert abs(loss - same_loss) <= 1e-9, step
        assert correct == same_correct
        losses.append(loss)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])  # they have learned, not stood still
    images = batch(train, 0, SPEC, PLAN)[0]
    assert np.abs(ours.logits(images) - theirs.logits(images)).max() <= 1e-8
    for (name, array), (_, same) in zip(named(ours.weights()), named(theirs.weights()), strict=True):
        assert np.abs(array - same).max() <= 1e-8, name


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_engines_agree_with_other_optimizers(optimizer: Any) -> None:
    plan = replace(PLAN, optimizer=optimizer, momentum=0.9, lr=1e-2)
    train, w = coloured(), new_engine_weights(SPEC, plan)
    engines: list[Engine] = [NumpyEngine(w, SPEC, plan), TorchEngine(w, SPEC, plan)]
    for step in range(20):
        losses = [engine.step(*batch(train, step, SPEC, plan)[:2], 1e-2, None)[0] for engine in engines]
        assert abs(losses[0] - losses[1]) <= 1e-9


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_leaves_the_weights_it_was_given_alone(engine: str) -> None:
    w = new_engine_weights(SPEC, PLAN)
    before = {name: array.copy() for name, array in named(w)}
    made: Any = ENGINES[engine](w, SPEC, PLAN)
    made.step(*batch(coloured(), 0, SPEC, PLAN)[:2], 0.1, None)
    assert all(np.array_equal(array, before[name]) for name, array in named(w))
    changed = [name for name, array in named(made.weights()) if not np.array_equal(array, before[name])]
    assert "head.logits.weight" in changed


def test_numpys_training_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads share each batch: neither their number nor their pace may show."""
    monkeypatch.setattr("vitft.scratch.train.PIECE", 2 * 192)  # four pieces a batch
    plan = replace(PLAN, dtype="float32")

    def weights() -> bytes:
        engine = NumpyEngine(new_engine_weights(SPEC, plan), SPEC, plan)
        fit(engine, coloured(), coloured(9, seed=1), SPEC, plan)
        return b"".join(array.tobytes() for _, array in named(engine.weights()))

    assert len({weights() for _ in range(3)}) == 1


@pytest.mark.parametrize(("count", "largest"), [(1, 1), (2, 1), (3, 960), (50, 960), (51, 961)])
def test_pieces_hold_every_image_once_and_no_more_than_a_cache_does(
    monkeypatch: pytest.MonkeyPatch, count: int, largest: int
) -> None:
    monkeypatch.setattr("vitft.scratch.train.PIECE", largest)
    parts = [list(range(count))[piece] for piece in pieces(count, SPEC)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) == min(count, max(1, largest // 192))  # 3 x 8 x 8 pixels are the largest stage


def test_pieces_change_a_step_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    train = coloured()

    def stepped() -> tuple[tuple[float, int], dict[str, Any], Any]:
        engine = NumpyEngine(new_engine_weights(SPEC, PLAN), SPEC, PLAN)
        images, labels, masks = batch(train, 0, SPEC, PLAN)
        told = engine.step(images, labels, PLAN.lr, masks)
        return told, dict(named(engine.weights())), engine.logits(images)

    (loss, right), weights, logits = stepped()
    monkeypatch.setattr("vitft.scratch.train.PIECE", 2 * 192)  # four pieces, the last of one image
    (piecewise, as_right), in_pieces, piece_logits = stepped()
    assert piecewise == pytest.approx(loss, rel=1e-11)
    assert as_right == right
    for name, array in weights.items():
        assert np.abs(array - in_pieces[name]).max() <= 1e-8, name  # Adam's first step divides by a gradient's size
    assert np.abs(logits - piece_logits).max() <= 1e-8


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_one_image_is_a_batch(engine: str) -> None:
    plan = replace(PLAN, batch_size=1)
    made: Any = ENGINES[engine](new_engine_weights(SPEC, plan), SPEC, plan)
    images, labels, masks = batch(coloured(), 0, SPEC, plan)
    loss, correct = made.step(images, labels, 0.01, masks)
    assert loss == pytest.approx(np.log(4))  # at first every class is as likely as any other
    assert correct in (0, 1)


# -- epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_learns_and_every_step_and_epoch_is_told(engine: str) -> None:
    plan = replace(PLAN, epochs=25, dtype="float32", lr=1e-2, dropout=0.0, crop_border=0, flip=False)
    train, test = coloured(), coloured(30, seed=1)
    made: Any = ENGINES[engine](new_engine_weights(SPEC, plan), SPEC, plan)
    steps: list[tuple[int, float, float]] = []
    told: list[Epoch] = []
    history = fit(made, train, test, SPEC, plan, lambda *step: steps.append(step), told.append)

    assert told == history
    assert [epoch.epoch for epoch in history] == list(range(1, 26))
    assert [step for step, _, _ in steps] == list(range(6 * 25))
    assert [lr for _, _, lr in steps] == [lr_at(s, 1e-2, 150, 3, "cosine") for s in range(150)]
    sizes = [7, 7, 7, 7, 7, 5]
    first = sum(loss * size for (_, loss, _), size in zip(steps[:6], sizes, strict=True)) / 40
    assert history[0].loss == pytest.approx(first)
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].accuracy >= 0.95
    assert history[-1].test_accuracy == accuracy(made, test, plan) >= 0.9
    assert history[-1].test_accuracy == np.mean(
        made.logits((test.pixels / 255 - np.array(plan.mean)[:, None, None]).astype(np.float32)
                    / np.array(plan.std, np.float32)[:, None, None]).argmax(axis=1) == test.labels
    )  # fmt: skip


def test_an_accuracy_counts_every_image_whatever_the_batch() -> None:
    engine, test = NumpyEngine(random_weights(SPEC), SPEC, PLAN), coloured(23)
    assert len({accuracy(engine, test, PLAN, batch_size) for batch_size in (1, 7, 23, 100)}) == 1


# -- weights on the disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, final_norm=False, pre_logits=5, qkv_bias=False)])
def test_weights_survive_the_disk(spec: ViTSpec, tmp_path: Path) -> None:
    w = random_weights(spec)
    save(tmp_path / "w.safetensors", w)
    again = load(tmp_path / "w.safetensors", spec)
    assert type(again) is type(w)
    for (name, array), (same_name, same) in zip(named(w), named(again), strict=True):
        assert name == same_name
        assert np.array_equal(array, same)
        assert array.dtype == same.dtype == np.float64


def test_what_does_not_fit_the_spec_is_named(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save(file, random_weights(SPEC))
    arrays = load_file(file)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.inner\.bias: wanted \(13,\), got \(12,\)"):
        load(file, replace(SPEC, mlp=13))
    with pytest.raises(ValueError, match=r"head\.pre_logits\.bias: wanted \(8,\), got None"):
        load(file, replace(SPEC, pre_logits=8))
    with pytest.raises(ValueError, match=r"extra: wanted None, got \(2,\)"):
        filled(arrays | {"extra": np.zeros(2)}, SPEC)
    save_file({name: array for name, array in arrays.items() if name != "norm.scale"}, file)
    with pytest.raises(ValueError, match=r"norm\.scale: wanted \(8,\), got None"):
        load(file, SPEC)
