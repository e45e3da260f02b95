"""The start of a new head from the features of the backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from tests.conftest import tiny_model
from tests.families import tiny_classifier
from vitft import TrainConfig, resume, train
from vitft.errors import UsageError
from vitft.hardware.device import make_accelerator
from vitft.models import head_init
from vitft.models.head_init import fit_head, images_for_head, starts_from_features, write_head
from vitft.models.load import BUNDLED, load_trained
from vitft.models.logistic import STRENGTHS, regress
from vitft.training.cost import dry_run
from vitft.training.cost.estimate import Cost
from vitft.training.setup import prepare
from vitft.training.step import Learner

SMALL = {
    "dataset": "digits", "model": BUNDLED, "image_size": 28, "max_train_samples": 200, "max_eval_samples": 100,
    "batch_size": 50, "device": "cpu", "precision": "fp32", "threads": 1, "log_every": 1, "compile": "off",
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**(SMALL | changes))


def clusters(count: int, classes: int = 3, width: int = 6, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=drawn)
    labels = torch.randint(classes, (count,), generator=drawn)
    noise = torch.randn(count, width, generator=drawn)
    return (centers[labels] + spread * noise) * torch.logspace(-2, 2, width) + 5.0, labels


@pytest.mark.parametrize("count", [300, 6])  # more images than features, and fewer
@pytest.mark.parametrize("strength", [STRENGTHS[0], STRENGTHS[-1]])
def test_the_regression_is_that_of_scikit_learn(strength: float, count: int) -> None:
    features, labels = clusters(count)
    features = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    ours = regress(features, labels, 3, strength)
    constant = np.pad(features.numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    theirs = LogisticRegression(C=1 / (len(labels) * strength), fit_intercept=False, tol=1e-8, max_iter=1000)
    theirs.fit(constant, labels.numpy())
    assert np.abs(ours.numpy() - theirs.coef_).max() < 1e-2 * np.abs(theirs.coef_).max()


def test_features_of_one_direction_alone_are_fitted_too() -> None:
    """Their curvature has no Cholesky factor in float32."""
    drawn = torch.Generator().manual_seed(0)
    features = torch.randn(300, 1, generator=drawn) @ torch.randn(1, 64, generator=drawn) * 100
    fitted = regress(features, (features[:, 0] > 0).long(), 2, 1e-6)
    said = (features @ fitted[:, :-1].T + fitted[:, -1]).argmax(dim=1)
    assert (said == (features[:, 0] > 0)).float().mean() > 0.99


def test_the_fit_applies_to_the_features_as_they_are() -> None:
    """It was made on standardized features."""
    features, labels = clusters(400, spread=0.1)
    fit = fit_head(features, labels, 3)
    logits = features @ fit.weight.T + fit.bias
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.99
    assert fit.accuracy is not None
    assert fit.accuracy > 0.99
    assert fit.held_out == 80


def test_the_strength_is_the_one_with_the_lowest_loss_on_images_held_out() -> None:
    features, labels = clusters(400, spread=0.1)
    easy = fit_head(features, labels, 3)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    noise = fit_head(features, shuffled, 3)
    assert noise.strength == STRENGTHS[0]  # features that say nothing
    assert easy.strength == STRENGTHS[-1]
    assert noise.accuracy is not None
    assert noise.accuracy < 0.55


def test_few_images_constant_features_and_empty_classes_give_finite_weights() -> None:
    features, labels = clusters(20)
    features[:, 2] = 7.0
    fit = fit_head(features, labels, 5)
    assert (fit.accuracy, fit.held_out) == (None, 0)
    assert fit.weight.shape == (5, 6)
    assert fit.weight.isfinite().all()
    assert fit.bias.isfinite().all()
    predicted = (features @ fit.weight.T + fit.bias).argmax(dim=1)
    assert set(predicted.tolist()) <= set(labels.tolist())


def test_how_many_images_are_used() -> None:
    assert images_for_head(4_000, 10, 8_000) == 4_000
    assert images_for_head(4_000, 10, 64) == 64  # a short run: the pass would take longer than the run
    assert images_for_head(50_000, 10, 100_000) == 10_000
    assert images_for_head(50_000, 1_000, 100_000) == 20_000


def test_which_runs_start_from_features() -> None:
    model = tiny_model("vit")
    assert starts_from_features(config(), model, new_head=True)
    assert starts_from_features(config(head_init="features"), model, new_head=True)
    assert not starts_from_features(config(head_init="random"), model, new_head=True)
    many = tiny_model("vit", num_labels=1001)
    assert not starts_from_features(config(), many, new_head=True)
    assert starts_from_features(config(head_init="features"), many, new_head=True)
    assert not starts_from_features(config(), model, new_head=False)
    assert not starts_from_features(config(from_scratch=True), model, new_head=True)
    assert not starts_from_features(config(), tiny_classifier("levit"), new_head=True)  # two layers
    with pytest.raises(UsageError, match="not one linear layer"):
        starts_from_features(config(head_init="features"), tiny_classifier("levit"), new_head=True)
    with pytest.raises(UsageError, match="pretrained backbone"):
        config(head_init="features", from_scratch=True)


def test_the_estimate_counts_the_pass_for_the_head() -> None:
    each = Cost(image_s=3.0, step_s=0.0, evaluate_image_s=1.0)
    fitted, random = (
        dry_run.size_of(prepare(config(head_init=how, epochs=2, val_fraction=0.0)), each).train_s
        for how in ("auto", "random")
    )
    assert fitted - random == 200


def test_a_head_without_biases_is_written() -> None:
    model = tiny_model("vit")
    model.classifier = nn.Linear(model.classifier.in_features, 3, bias=False)
    features = torch.randn(60, model.classifier.in_features)
    write_head(model, fit_head(features, torch.arange(60) % 3, 3), lambda tensor: tensor)
    assert model.classifier.weight.isfinite().all()


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_the_head_of_the_first_step_is_the_fit(freeze: str) -> None:
    prepared = prepare(config(freeze=freeze, epochs=9))
    learner = Learner(make_accelerator(prepared.config), prepared.decode())
    assert (learner.probe is not None) == (freeze == "backbone")
    before = {name: tensor.clone() for name, tensor in learner.unwrapped.state_dict().items()}
    learner.get_ready()
    assert torch.equal(learner.unwrapped.classifier.weight, before["classifier.weight"])  # not unless asked
    learner.get_ready(start_head=True)
    changed = {name for name, tensor in learner.unwrapped.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    right, count = 0.0, 0
    for step in range(learner.steps_per_epoch):
        _, correct, _ = learner.step(step)
        right, count = right + float(correct), count + learner.images(step)
    assert right / count > 0.5  # by chance 0.1


def test_it_is_better_than_a_random_head(tmp_path: Path) -> None:
    fitted, random = (
        train(config(head_init=how, epochs=1), output=tmp_path / how).scores["test"] for how in ("auto", "random")
    )
    assert fitted.accuracy > random.accuracy + 0.2
    assert fitted.loss < random.loss


def test_a_resumed_run_keeps_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(epochs=2, save_every=2), output=tmp_path / "whole").run
    real = Learner.step

    def stops(self: Learner, step: int) -> Any:
        if step == 3:
            raise RuntimeError("killed")
        return real(self, step)

    monkeypatch.setattr(Learner, "step", stops)
    with pytest.raises(RuntimeError, match="killed"):
        train(config(epochs=2, save_every=2), output=tmp_path / "cut")
    monkeypatch.setattr(Learner, "step", real)
    monkeypatch.setattr(head_init, "fit_head", lambda *given: pytest.fail("it was fitted again"))
    resume(tmp_path / "cut")
    one, other = (load_file(run / "last" / "model.safetensors") for run in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_trained(whole / "last").labels == tuple(map(str, range(10)))
