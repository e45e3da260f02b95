"""Each architecture from a checkpoint to a trained one: load, step, save, reload, features, another input size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from tests.families import FAMILIES, tiny_classifier
from tests.models.test_classifiers import MADE_HERE
from tests.models.test_heads import marked, saved
from vitft import TrainConfig
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.errors import ModelError
from vitft.hardware.device import make_accelerator
from vitft.models.features import backbone
from vitft.models.heads import classifier_of, head_of, in_head
from vitft.models.load import load_for_training, load_trained
from vitft.models.resize import input_size, resize_model
from vitft.training.setup import prepare
from vitft.training.step import Learner

FIXED = {"levit", "hiera", "pvt"}
"""Whose positions cannot be resized."""
UNUSED = {"clip", "dinov2", "dinov2_with_registers", "dinov3_vit", "metaclip_2", "siglip"}
"""Who has weights that the logits do not depend on."""


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_model_is_trained_saved_and_read_again(family: str, tmp_path: Path) -> None:
    """One step changes the weights. Saved as by `train`, plain Transformers reads the same logits.

    The input of the head is the features.
    """
    given = tiny_classifier(family, num_labels=3)
    folder = saved(given, tmp_path / "given")
    side = (input_size(given.config) or (32, 32))[0]
    config = TrainConfig(
        dataset="digits", model=str(folder), image_size=side, max_train_samples=8, val_fraction=0, max_eval_samples=2,
        batch_size=4, max_steps=1, optimizer="sgd", lr=1e-3, head_init="random", device="cpu", precision="fp32",
    )  # fmt: skip
    prepared = prepare(config)
    learner = Learner(make_accelerator(prepared.config), prepared.decode())
    model = learner.unwrapped
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learner.step(0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {in_head(model, name) for name in changed} == {True, False}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    how, labels = prepared.loaded.preprocess, prepared.loaded.labels
    save_model(tmp_path / "trained", model.eval(), how, Card(config, labels, 1, 0.0, {}, {}))
    read = load_trained(tmp_path / "trained").model
    pixels = torch.randn(2, 3, how.height, how.width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
        torch.testing.assert_close(read(pixel_values=pixels).logits, logits)  # by another implementation of attention
        model.load_state_dict(read.state_dict())
        assert torch.equal(model(pixel_values=pixels).logits, logits)
        if family not in MADE_HERE:
            plain = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "trained").eval()
            assert torch.equal(plain(pixel_values=pixels).logits, read(pixel_values=pixels).logits)
        features = backbone(read, "cpu", "fp32")(pixels)
        assert features.shape[0] == 2
        if len(head_of(read)) == 1 and family != "perceiver":  # else the logits are a mean of two, or a query's
            torch.testing.assert_close(classifier_of(read)(features).reshape(logits.shape), logits)


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_all_that_is_trained_gets_a_gradient(family: str, tmp_path: Path) -> None:
    """Several processes would wait for the gradient of what the logits do not depend on."""
    given = tiny_classifier(family)
    side = (input_size(given.config) or (32, 32))[0]
    config = TrainConfig(model=str(saved(given, tmp_path / "given")), image_size=side)
    model = load_for_training(config, ["ant", "bee", "cat"]).model.train()
    model(pixel_values=torch.randn(2, 3, side, side)).logits.square().sum().backward()
    by_name = {name: (one.requires_grad, one.grad is not None) for name, one in model.named_parameters()}
    assert {name for name, (trained, reached) in by_name.items() if trained != reached} == set()
    unused = {name for name, (trained, _) in by_name.items() if not trained}
    assert bool(unused) == (family in UNUSED)


def reshaped(model: Any, other: Any) -> set[str]:
    theirs = other.state_dict()
    return {name for name, tensor in model.state_dict().items() if tensor.shape != theirs[name].shape}


def assert_same_apart_from_positions(model: Any, other: Any) -> None:
    differing = reshaped(model, other)
    assert all("position" in name for name in differing), differing
    ours, theirs = ({k: v for k, v in one.state_dict().items() if k not in differing} for one in (model, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_model_reads_another_input_size(family: str, tmp_path: Path) -> None:
    """Positions are resized, and nothing else; what is then saved is read at that size."""
    model = tiny_classifier(family, num_labels=3)
    side = 2 * (input_size(model.config) or (32, 32))[0]
    if family in FIXED:
        with pytest.raises(ModelError, match=rf"image_size {side}: .*; use {side // 2}\."):
            resize_model(model, side)
        return
    resized = resize_model(model, side).eval()
    assert_same_apart_from_positions(resized, model)
    if positions := reshaped(resized, model):
        back = resize_model(resized, side // 2)
        for name in positions:  # there and back is a blur: random tables keep 0.96 and more
            there = torch.cosine_similarity(*(one.state_dict()[name].flatten() for one in (back, model)), dim=0)
            assert there > 0.9, name
    read = load_trained(saved(resized, tmp_path)).model
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = resized(pixel_values=pixels).logits
        assert logits.shape == (2, 3)
        assert torch.isfinite(logits).all()
        assert torch.equal(read(pixel_values=pixels).logits, logits)
    assert input_size(read.config) in (None, (side, side))
