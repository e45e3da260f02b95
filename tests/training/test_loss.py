"""The training loss, against the formulas of the papers in float64, and against torch, scikit-learn and timm."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from tests.training.test_trainer import assert_same_weights, config, interrupted
from vitft import TrainConfig, resume, train
from vitft.checkpoints import checkpoint as ckpt
from vitft.config.recipe import load_config
from vitft.errors import UsageError
from vitft.evaluation.runs import list_runs
from vitft.hardware.device import make_accelerator
from vitft.models.head_init import fit_head
from vitft.training.cost.dry_run import plan
from vitft.training.cost.estimate import Cost
from vitft.training.loss import class_balance, head_loss, pinned_weights, read_weights, summed_loss
from vitft.training.setup import absolute, advise, prepare
from vitft.training.step import Learner

NAMES = ("ant", "bee", "cat", "dog")
LABELS = torch.tensor([0] * 40 + [1] * 12 + [2] * 7 + [3])  # of the training images
FILE_WEIGHTS = {"dog": 4, "ant": 1, "bee": 0.5, "cat": 2.5}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.parse(changes)


def batch(mixed: bool = False, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and class indices, or the probabilities of mixes of two classes."""
    drawn = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(count, len(NAMES), generator=drawn)
    one, other = (torch.randint(len(NAMES), (count,), generator=drawn) for _ in range(2))
    if not mixed:
        return logits, one
    share = torch.rand(count, 1, generator=drawn)
    return logits, share * F.one_hot(one, len(NAMES)) + (1 - share) * F.one_hot(other, len(NAMES))


def loss_of(logits: torch.Tensor, targets: torch.Tensor, **changes: Any) -> torch.Tensor:
    chosen = settings(**changes)
    return summed_loss(logits, targets, chosen, class_balance(chosen, LABELS, NAMES))


def formula(logits: torch.Tensor, targets: torch.Tensor, **changes: Any) -> float:
    """The sum over images of sum_c q_c w_c [(1 - eps) f_c + eps mean(f)], f_c = -(1 - p_c)^gamma log p_c."""
    counts = np.bincount(LABELS.numpy())
    z = logits.double().numpy() + changes.get("logit_adjustment", 0.0) * np.log(counts / counts.sum())
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    q = np.eye(len(NAMES))[targets.numpy()] if targets.ndim == 1 else targets.double().numpy()
    f = -((1 - p) ** changes.get("focal_loss", 0.0)) * np.log(p)
    eps = changes.get("label_smoothing", 0.0)
    w = {None: np.ones(len(NAMES)), "balanced": counts.sum() / (len(NAMES) * counts)}.get(changes.get("class_weights"))
    if w is None:
        w = np.array([FILE_WEIGHTS[name] for name in NAMES])
        w = w * len(LABELS) / w[LABELS.numpy()].sum()
    return float((q * w * ((1 - eps) * f + eps * f.mean(axis=1, keepdims=True))).sum())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_weights": "balanced"},
        {"class_weights": json.dumps(FILE_WEIGHTS)},
        {"logit_adjustment": 1.5},
        {"focal_loss": 2.0},
        {"focal_loss": 0.5, "class_weights": "balanced"},
        {"focal_loss": 2.0, "logit_adjustment": 1.0, "class_weights": json.dumps(FILE_WEIGHTS)},
    ],
)
def test_the_loss_is_that_of_the_papers(changes: dict[str, Any], label_smoothing: float, mixed: bool) -> None:
    changes = changes | {"label_smoothing": label_smoothing}
    logits, targets = batch(mixed)
    assert loss_of(logits, targets, **changes).item() == pytest.approx(formula(logits, targets, **changes), rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_count_as_in_torch(mixed: bool) -> None:
    logits, targets = batch(mixed)
    counts = np.bincount(LABELS.numpy())
    weight = torch.tensor(compute_class_weight("balanced", classes=np.arange(4), y=LABELS.numpy())).float()
    assert weight.numpy() == pytest.approx(len(LABELS) / (4 * counts))
    theirs = F.cross_entropy(logits, targets, weight=weight, reduction="sum")
    assert loss_of(logits, targets, class_weights="balanced").item() == pytest.approx(theirs.item(), rel=1e-5)


def test_smoothed_and_mixed_targets_count_as_in_timm() -> None:
    losses = pytest.importorskip("timm.loss")
    logits, targets = batch()
    theirs = losses.LabelSmoothingCrossEntropy(0.2)(logits, targets)
    for balance in ({}, {"focal_loss": 1e-9}):  # torch's own function, and ours
        ours = loss_of(logits, targets, label_smoothing=0.2, **balance) / len(logits)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    logits, targets = batch(mixed=True)
    theirs = losses.SoftTargetCrossEntropy()(logits, targets)
    assert loss_of(logits, targets, focal_loss=1e-9).item() / len(logits) == pytest.approx(theirs.item(), rel=1e-5)


def test_certain_answers_leave_gradients_finite() -> None:
    """Their factor is 0 to the power of gamma, whose derivative is infinite below a gamma of 1."""
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 200.0, 0.0, 0.0]], requires_grad=True)
    loss_of(logits, torch.tensor([0, 0]), focal_loss=0.5).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 0] == pytest.approx(-1.0)


@pytest.mark.parametrize("weights", ["balanced", json.dumps(FILE_WEIGHTS)])
@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_weights_have_a_mean_of_1_over_the_images_seen(weights: str, sampling: str) -> None:
    if weights == sampling == "balanced":
        with pytest.raises(UsageError, match="would each make up for unequal classes"):
            settings(class_weights=weights, sampling=sampling)
        return
    found = class_balance(settings(class_weights=weights, sampling=sampling), LABELS, NAMES).weights
    assert found is not None
    seen = found[LABELS] if sampling == "uniform" else found
    assert seen.mean().item() == pytest.approx(1.0)
    if weights != "balanced":
        assert (found / found[0]).tolist() == pytest.approx([FILE_WEIGHTS[name] for name in NAMES])


def test_a_class_without_images_has_finite_weights_and_priors() -> None:
    names = (*NAMES, "elk")
    weights = class_balance(settings(class_weights="balanced"), LABELS, names).weights
    adjustment = class_balance(settings(logit_adjustment=1), LABELS, names).adjustment
    assert weights is not None
    assert adjustment is not None
    assert weights[LABELS].mean().item() == pytest.approx(1.0)
    assert weights[4] == weights[3]  # as if it had one image
    assert adjustment[4] == adjustment[3]


@pytest.mark.parametrize("changes", [{"class_weights": "balanced"}, {"sampling": "balanced"}, {"logit_adjustment": 1}])
def test_a_head_is_fitted_by_the_loss_of_the_run(changes: dict[str, Any]) -> None:
    """Of two classes that overlap, 180 images to 20, the rare one is found about as often as the other."""
    drawn = torch.Generator().manual_seed(0)
    labels = (torch.arange(200) % 10 == 0).long()
    features = torch.randn(200, 4, generator=drawn) + labels[:, None]
    recall = []
    for chosen in (settings(), settings(**changes | {"label_smoothing": 0.5, "focal_loss": 3})):
        fit = fit_head(features, labels, 2, head_loss(chosen, labels, ("many", "few")))
        right = (features @ fit.weight.T + fit.bias).argmax(dim=1) == labels
        recall.append((right[labels == 0].float().mean().item(), right[labels == 1].float().mean().item()))
    (many, few), (many_then, few_then) = recall
    assert many > 0.95
    assert few < 0.7
    assert abs(many_then - few_then) < 0.2 < many - few


def test_the_head_of_a_run_is_fitted_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("vitft.training.step.fit_head", lambda *given_: given.extend(given_) or fit_head(*given_))
    settings = {"from_scratch": False, "val_fraction": 0, "max_eval_samples": 10, "sampling": "balanced"}
    prepared = prepare(config(**settings, **dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))))
    Learner(make_accelerator(prepared.config), prepared.decode()).get_ready(start_head=True)
    _, labels, classes, mean_loss = given
    logits = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(0))
    theirs = F.cross_entropy(logits, labels, weight=len(labels) / (classes * labels.bincount()))
    assert mean_loss(logits, labels).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_with_balanced_sampling_and_weights_of_a_file_a_head_counts_both() -> None:
    both = settings(class_weights=json.dumps(FILE_WEIGHTS), sampling="balanced")
    logits, counts = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0)), LABELS.bincount()
    weight = torch.tensor([FILE_WEIGHTS[name] for name in NAMES]) / counts
    theirs = F.cross_entropy(logits, LABELS, weight=weight.float())
    assert head_loss(both, LABELS, NAMES)(logits, LABELS).item() == pytest.approx(theirs.item(), rel=1e-5)


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat: 1", r"class_weights \S+: it is not JSON; use balanced, or a JSON file"),
        ("[1, 2, 3, 4]", r"it is not a JSON object; use balanced"),
        ('{"ant": 1, "bee": 1, "cat": 1}', r"lacks dog; give every class a weight"),
        ('{"ant": 1, "bee": 1, "cats": 1, "dog": 1}', r"cats is not a class; did you mean cat\?"),
        ('{"xylophone": 1}', r"xylophone is not a class; the classes are ant, bee, cat and 1 more"),
        ('{"ant": 0, "bee": 1, "cat": 1, "dog": 1}', r"weight of ant should be a number from 1e-6 to 1e6, got 0"),
        ('{"ant": NaN, "bee": 1, "cat": 1, "dog": 1}', r"weight of ant should be a number .*, got nan"),
        ('{"ant": "x", "bee": 1, "cat": 1, "dog": 1}', r"weight of ant should be a number .*, got 'x'"),
        ("[" * 100_000, r"it is not JSON"),
    ],
)
def test_a_file_of_weights_that_is_no_use_gets_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "weights.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_weights(str(file), NAMES)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"nowhere\.json: No such file or directory; use balanced, or a JSON file"):
        read_weights("nowhere.json", NAMES)


def test_weights_are_kept_without_their_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(FILE_WEIGHTS))
    kept = pinned_weights(settings(class_weights=str(file)), NAMES)
    file.unlink()
    assert kept is not None
    assert read_weights(kept, NAMES) == FILE_WEIGHTS
    assert pinned_weights(settings(class_weights="balanced"), NAMES) == "balanced"
    assert settings(class_weights="none").class_weights is None  # undoes a recipe's


# -- in a run -------------------------------------------------------------------------------------


def test_a_run_with_weights_and_balanced_sampling_resumes_bit_for_bit_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({str(digit): 1 + digit for digit in range(10)}))
    chosen = config(class_weights=str(file), sampling="balanced", focal_loss=1.0, augment="crop", val_fraction=0)
    whole = train(chosen, output=tmp_path / "whole")
    interrupted(chosen.model_copy(update={"save_every": 2}), tmp_path / "cut", 3, monkeypatch)
    file.unlink()
    assert_same_weights(whole.run / "last", resume(tmp_path / "cut").run / "last")
    plain = train(chosen.model_copy(update={"class_weights": None}), output=tmp_path / "plain")
    with pytest.raises(AssertionError):
        assert_same_weights(whole.run / "last", plain.run / "last")


def test_a_run_with_weights_of_many_classes_resumes_and_is_a_recipe(tmp_path: Path) -> None:
    run = train(config(max_steps=1), output=tmp_path / "run").run
    many = json.dumps({f"{'a class with a long name':>60} {number}": 1.5 for number in range(2000)})
    ckpt.write_config(run, ckpt.read_config(run).model_copy(update={"class_weights": many}))
    assert (run / "config.yaml").stat().st_size > 100_000
    assert ckpt.read_config(run).class_weights == many
    assert load_config(str(run / "config.yaml"), {}).class_weights == many
    (listed,) = list_runs(tmp_path)
    assert listed.state == "finished"
    assert absolute(ckpt.read_config(run)).class_weights == many, "too long for the name of a file"


@pytest.fixture
def unequal(tmp_path: Path) -> TrainConfig:
    """Settings of a run on 44 images of one class and 4 of another."""
    for label, count in (("many", 44), ("few", 4)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (5 * number, count, 0)).save(tmp_path / "data" / label / f"{number}.png")
    return config(dataset=str(tmp_path / "data"), val_fraction=0, max_train_samples=None, epochs=1)


ADVICE = (
    "train: 44 images of many, 4 of few; the model will prefer the frequent classes. To count all classes alike: "
    "--logit-adjustment 1, with --best-by balanced-accuracy"
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"best_by": "macro-f1"}, True),
        ({"focal_loss": 2.0}, True),  # no remedy for that
        ({"logit_adjustment": 0.5}, False),
        ({"sampling": "balanced"}, False),
        ({"class_weights": "balanced"}, False),
    ],
)
def test_unequal_classes_are_told_with_a_remedy(
    unequal: TrainConfig, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: bool
) -> None:
    prepared = prepare(unequal.model_copy(update=changes))
    assert capsys.readouterr().err == ""
    advise(prepared)
    said = capsys.readouterr().err.replace("\n", " ")
    assert ("--logit-adjustment 1" in said) == told
    assert (ADVICE in said) == (told and "best_by" not in changes)
    equal = replace(prepared, splits={"train": prepared.splits["train"].select(np.arange(48) < 12, ("few", "many"))})
    advise(equal)
    assert capsys.readouterr().err == ""


def test_a_dry_run_and_a_run_tell_it_and_a_rate_that_is_far_off(
    unequal: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitft.training.cost.dry_run.cost", lambda prepared: Cost(0.5, 0.0, 0.25))
    far = unequal.model_copy(update={"lr": 2e-5})
    for begin in (plan, lambda chosen: train(chosen, output=tmp_path / "run")):
        begin(far)
        said = capsys.readouterr().err.replace("\n", " ")
        assert said.count(ADVICE) == 1
        assert said.count("--lr 2e-05 is unusually low: one 50th of the usual rate for new weights with adamw") >= 1
    resume(tmp_path / "run")
    assert ADVICE not in capsys.readouterr().err.replace("\n", " ")
