"""Runs that train an adapter: what they leave, and that they resume exactly."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.conftest import tiny_model
from tests.training.test_recovery import broken
from tests.training.test_trainer import assert_same_weights, config, interrupted, lines
from vitft import TrainConfig, evaluate, train
from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.metadata import verify
from vitft.errors import ModelError, UsageError
from vitft.models.lora import _adapter
from vitft.training.cost import estimate
from vitft.training.loop import Result
from vitft.training.optim import MOMENTS, parameter_groups
from vitft.training.setup import prepare
from vitft.training.trainer import resume

peft: Any = pytest.importorskip("peft")

SCRATCH = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {"from_scratch": False}


def start(folder: Path, architecture: str = "vit") -> Path:
    tiny_model(architecture, image_size=28).save_pretrained(folder)
    return folder


def adapted(model: Path, **changes: Any) -> TrainConfig:
    settings = {"model": str(model), "lora_rank": 2, "lr": 1e-2, "threads": 1, "compile": "off", "head_init": "random"}
    return config(**SCRATCH | settings | changes)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The model that a run began from, and what came of it."""
    folder = tmp_path_factory.mktemp("finished")
    origin = start(folder / "model")
    return origin, train(adapted(origin, lora_targets="all"), output=folder / "run")


def test_best_and_last_are_plain_models_beside_an_adapter_of_the_base(finished: tuple[Path, Result]) -> None:
    origin, result = finished
    before, base = load_file(origin / "model.safetensors"), load_file(result.run / "base" / "model.safetensors")
    assert {name for name in base if not torch.equal(base[name], before.get(name, torch.empty(0)))} <= {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    after = load_file(result.run / "last" / "model.safetensors")
    assert after.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert len(changed) == 2 * 6 + 2  # the weights of the layers of both blocks, and the head
    for folder in (result.run / name for name in ("base", "best", "last")):
        verify(folder)
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert not hasattr(model, "peft_config")
    assert evaluate(result.run).accuracy == result.scores["test"].accuracy
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(result.run / "base"), result.run / "last" / "adapter"
    ).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        merged = AutoModelForImageClassification.from_pretrained(result.run / "last")(pixel_values=pixels).logits
        assert (theirs(pixel_values=pixels).logits - merged).abs().max() < 1e-4


@pytest.mark.parametrize(("what", "changes"), [("gone", {}), ("changed", {"dora": True, "ema": 0.9})])
def test_a_resumed_run_ends_with_the_same_bits_without_the_model_it_began_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, changes: dict[str, Any]
) -> None:
    origin = start(tmp_path / "model")
    settings = adapted(origin, save_every=2, max_steps=4, **changes)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 3, monkeypatch)
    if what == "gone":
        shutil.rmtree(origin)
    else:
        tiny_model("vit", image_size=28, initializer_range=0.5).save_pretrained(origin)
    resumed = resume(tmp_path / "cut")
    for name in ("base", "best", "last"):
        assert_same_weights(whole.run / name, resumed.run / name)
    one, other = adapter(whole.run / "last"), adapter(resumed.run / "last")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.scores["test"].loss == whole.scores["test"].loss


def test_a_finished_run_is_trained_on_from_its_unmerged_adapter(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = shutil.copytree(finished[1].run, tmp_path / "run")
    before, base = adapter(run / "last"), load_file(run / "base" / "model.safetensors")
    longer = resume(run, {"epochs": 2.3})
    after = adapter(longer.run / "last")
    assert load_file(run / "base" / "model.safetensors").keys() == base.keys()
    assert 0 < max(float((before[name] - after[name]).abs().max()) for name in before) < 0.05  # a step's worth


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda base: shutil.rmtree(base), r"base/ is gone, without which an adapter cannot be trained further"),
        (lambda base: (base / "model.safetensors").write_bytes(b"torn"), "does not match its SHA-256 checksum"),
    ],
    ids=["gone", "torn"],
)
def test_a_base_that_is_gone_or_torn_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], error: str
) -> None:
    interrupted(adapted(start(tmp_path / "model"), save_every=2), tmp_path / "cut", 3, monkeypatch)
    damage(tmp_path / "cut" / "base")
    with pytest.raises(ModelError, match=error):
        resume(tmp_path / "cut")


def test_an_adapter_that_is_torn_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(adapted(start(tmp_path / "model"), save_every=2), tmp_path / "cut", 5, monkeypatch)
    newest, older = ckpt.step_folders(tmp_path / "cut")
    file = newest / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    found, passed = ckpt.newest_intact(tmp_path / "cut")
    assert found == older
    assert passed == [f"{newest.name}: adapter/adapter_model.safetensors does not match its checksum"]


def test_an_adapter_that_was_edited_is_named(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = shutil.copytree(finished[1].run, tmp_path / "run")
    file = run / "best" / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(ModelError, match=r"adapter_config.json: does not match its SHA-256"):
        evaluate(run)


def test_a_run_that_diverges_goes_back_to_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda settings, step: settings.lr > 5e-3 and step == 4)
    settings = adapted(start(tmp_path / "model"), on_nan="rollback", save_every=2, val_fraction=0, max_steps=5)
    result = train(settings, output=tmp_path / "run")
    assert yaml.safe_load((result.run / "config.yaml").read_text())["lr"] == 5e-3
    steps = [line["step"] for line in lines(result.run) if line["split"] == "train"]
    assert steps == list(range(1, 6))


def test_an_earlier_best_is_scored_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter is read back into the model; the merged weights could not be unmerged."""
    scores = iter([0.9, 0.1])
    monkeypatch.setattr("vitft.evaluation.metrics.Score.by", lambda metrics, name: next(scores))
    result = train(adapted(start(tmp_path / "model"), lr=0.1), output=tmp_path / "run")
    assert result.step == 3
    assert not torch.equal(
        *(adapter(result.run / name)["base_model.model.classifier.weight"] for name in ("best", "last"))
    )
    assert evaluate(result.checkpoint).loss == pytest.approx(result.scores["test"].loss, rel=1e-5)


def test_only_the_adapter_and_the_head_have_gradients_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, thin = (prepare(adapted(start(tmp_path / "model"), lora_rank=rank)) for rank in (None, 2))
    monkeypatch.setattr(estimate, "untouched", lambda prepared: nullcontext())
    monkeypatch.setattr(estimate, "_saved_bytes", lambda prepared, images: 0)
    sizes = []
    for found in (full, thin):
        needed = estimate.memory_bytes(found.with_settings(device="cuda"), 4)
        assert needed is not None
        sizes.append(needed)
    everything = sum(p.numel() for p in full.loaded.model.parameters())
    trained = sum(tensor.numel() for tensor in _adapter(thin.loaded.model).values())
    head = sum(p.numel() for p in full.loaded.model.classifier.parameters())
    assert trained == 2 * 4 * 2 * (16 + 16) + head
    each = 4 * (1 + MOMENTS["adamw"])
    assert sizes[0] - sizes[1] == each * (everything - trained) - 4 * (trained - head)


def test_without_peft_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vitft\[lora\]'") as caught:
        train(adapted(start(tmp_path / "model")), output=tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_what_saves_memory_changes_no_weight(finished: tuple[Path, Result], tmp_path: Path) -> None:
    origin, result = finished
    settings = adapted(origin, lora_targets="all", grad_checkpointing=True, micro_batch_size=9)
    mine, theirs = (adapter(run / "last") for run in (result.run, train(settings, output=tmp_path / "run").run))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


def test_layer_decay_lowers_the_rate_of_an_adapter_by_its_depth(finished: tuple[Path, Result]) -> None:
    model = prepare(adapted(finished[0])).loaded.model
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {
        names[parameter]: group["lr_factor"]
        for group in parameter_groups(model, 0.01, 0.5)
        for parameter in group["params"]
    }
    assert factors["vit.layers.0.attention.q_proj.lora_A.default.weight"] == 0.5**2
    assert factors["vit.layers.1.attention.q_proj.lora_B.default.weight"] == 0.5
    assert factors["classifier.weight"] == 1
