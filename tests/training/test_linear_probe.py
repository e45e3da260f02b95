"""Linear probing: a head trained on features, computed once, is the head trained with its backbone in the loop."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import tiny_model
from tests.training.test_trainer import PowerCut, assert_same_weights, config, lines, weights
from vitft import Callback, TrainConfig, evaluate, train
from vitft.data.loader import Batch
from vitft.errors import Stopped
from vitft.evaluation.novelty import FEWEST, FILE
from vitft.models.load import load_for_training
from vitft.training.cost.dry_run import plan
from vitft.training.cost.estimate import Cost
from vitft.training.linear_probe import FeatureLoader, Head, Probe, backbone, features_pay
from vitft.training.trainer import resume

BARE = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))


def result_steps(run: Path) -> int:
    return max(int(str(line["step"])) for line in lines(run))


def probe(**changes: object) -> TrainConfig:
    settings = {"from_scratch": False, "freeze": "backbone", "augment": "flip", "epochs": 3, "lr": 3e-2}
    return config(**(BARE | settings | changes))


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Images that the backbone sees."""
    seen: Counter[str] = Counter()
    forward = transformers.ViTModel.forward

    def count(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        seen["images"] += len(pixel_values) * (not pixel_values.is_meta)  # without pixels, only shapes are computed
        return forward(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(transformers.ViTModel, "forward", count)
    monkeypatch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
    return seen


@pytest.mark.parametrize("augment", ["none", "flip"])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_head_is_that_of_a_backbone_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str, micro_batch_size: int | None
) -> None:
    settings = probe(augment=augment, micro_batch_size=micro_batch_size)
    cached = train(settings, output=tmp_path / "cached")
    monkeypatch.setattr("vitft.training.step.features_pay", lambda *given: False)
    looped = train(settings, output=tmp_path / "looped")
    assert (cached.speed, looped.speed is None) == (None, False)  # a head alone says nothing about the model's speed
    for folder in ("best", "last"):
        one, other = weights(cached.run / folder), weights(looped.run / folder)
        assert one.keys() == other.keys()
        for name in one:
            # The backbone computes other batches, which rounds; Adam divides small gradients by small numbers.
            assert torch.allclose(one[name], other[name], atol=1e-5), name
    assert cached.scores["test"].accuracy == looped.scores["test"].accuracy
    for ours, theirs in zip(lines(cached.run), lines(looped.run), strict=True):
        assert (ours["step"], ours["split"], ours["accuracy"]) == (theirs["step"], theirs["split"], theirs["accuracy"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("augment", "passes", "precision"), [("none", 1, "fp32"), ("flip", 2, "fp32"), ("none", 1, "bf16")]
)
def test_many_epochs_read_each_image_once_as_is_and_once_mirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str, passes: int, precision: str
) -> None:
    seen, saved = counted(monkeypatch), []

    class Saved(Callback):
        def on_save(self, step: int, checkpoint: Path) -> None:
            saved.append(step)

    settings = probe(augment=augment, precision=precision, epochs=40, max_eval_samples=FEWEST)
    result = train(settings, output=tmp_path / "run", callbacks=[Saved()])
    assert (result.checkpoint / FILE).exists()  # what the model knows is learned from the same features
    assert saved == [result_steps(result.run)]  # an epoch takes less time than saving
    scored = sum({line["split"]: line["count"] for line in lines(result.run) if line["split"] != "train"}.values())
    assert seen["images"] == 64 * passes + scored
    assert max(line["step"] for line in lines(result.run)) == 40 * 3  # type: ignore[type-var]


def test_features_are_read_where_that_pays() -> None:
    model = load_for_training(probe(), [str(i) for i in range(10)]).model

    def pay(steps: int = 100, **changes: object) -> bool:
        return features_pay(probe(**changes), model, steps, 64)

    assert pay()
    assert not pay(augment="crop")  # no crop comes twice
    for changing in ({"augment": "trivial"}, {"mixup": 0.2}, {"cutmix": 1.0}, {"erase": 0.1}, {"color_jitter": 0.4}):
        assert not pay(**changing)
    assert not pay(freeze="none")
    # Steps of 24 images: two passes over 64 are more than five of them, one is more than two.
    assert [pay(steps) for steps in (5, 6)] == [False, True]
    assert [pay(steps, augment="none") for steps in (2, 3)] == [False, True]


def test_a_model_with_two_heads_trains_them_with_its_backbone_in_the_loop(tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "num_labels": 10}  # fmt: skip
    torch.manual_seed(0)
    teacher = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    teacher.save_pretrained(tmp_path / "deit")
    result = train(probe(model=str(tmp_path / "deit"), epochs=6), output=tmp_path / "run")
    before, after = weights(tmp_path / "deit"), weights(result.run / "last")
    assert "cls_classifier.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("deit."))


def test_an_interrupted_probe_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = probe(save_every=2)
    whole = train(settings, output=tmp_path / "whole")
    batch = FeatureLoader.batch

    def until(self: FeatureLoader, step: int) -> object:
        if step == 7:
            raise PowerCut
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureLoader, "batch", until)
        with pytest.raises(PowerCut):
            train(settings, output=tmp_path / "cut")
    resumed = resume(tmp_path / "cut")
    for folder in ("best", "last"):
        assert_same_weights(whole.run / folder, resumed.run / folder)
    assert resumed.scores["test"].loss == whole.scores["test"].loss


def test_a_signal_saves_the_best_head_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = iter([0, 0, 0, 0, 15, *[0] * 99])
    monkeypatch.setattr("vitft.io.signals.StopSignals.received", lambda self: next(signals))
    with pytest.raises(Stopped):
        train(probe(), output=tmp_path / "run")
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert resume(tmp_path / "run").step == train(probe(), output=tmp_path / "whole").step


def test_the_best_head_is_the_one_that_was_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From half of the run on the labels are wrong, so that the last head is worse than the best."""
    batch = FeatureLoader.batch

    def misled(self: FeatureLoader, step: int) -> Batch:
        given = batch(self, step)
        return given if step < 18 else Batch(given.pixels, (given.labels + 1) % 10, given.index)

    monkeypatch.setattr(FeatureLoader, "batch", misled)
    result = train(probe(epochs=12, schedule="constant"), output=tmp_path / "run")
    validations = [line for line in lines(result.run) if line["split"] == "validation"]
    best = max(validations, key=lambda line: line["accuracy"])  # type: ignore[arg-type, return-value]
    assert result.step == best["step"]
    assert evaluate(result.run / "best", split="validation").accuracy == best["accuracy"]
    assert evaluate(result.run / "best").accuracy == result.scores["test"].accuracy
    assert result.step < validations[-1]["step"]  # type: ignore[operator]
    assert best["accuracy"] > 2 * validations[-1]["accuracy"]  # type: ignore[operator]
    assert not torch.equal(*(weights(result.run / name)["classifier.weight"] for name in ("best", "last")))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Beit", "Swin", "DeiT"])
def test_features_are_what_the_classifier_of_any_architecture_reads(kind: str) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "num_labels": 3}  # fmt: skip
    if kind == "Swin":
        sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
                 "window_size": 4, "num_labels": 3}  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**sizes))
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32))
    model.eval()
    features = backbone(model, "cpu", "fp32")(pixels)
    assert not features.requires_grad
    logits = Head(model)(features).logits
    assert torch.allclose(logits, model(pixel_values=pixels).logits, atol=1e-6)
    assert logits.requires_grad


def test_features_are_made_without_dropout(tmp_path: Path) -> None:
    """With it they would be another draw of it for each image, once and for all epochs."""
    torch.manual_seed(0)
    shape = {"image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    model = transformers.ViTModel(transformers.ViTConfig(**shape))
    runs = []
    for rate in (0.0, 0.5):
        model.config.hidden_dropout_prob = rate
        model.save_pretrained(tmp_path / "model")
        runs.append(train(probe(model=str(tmp_path / "model")), output=tmp_path / f"{rate}").run)
    assert_same_weights(*(run / "last" for run in runs))
    assert [line["loss"] for line in lines(runs[0])] == [line["loss"] for line in lines(runs[1])]


def test_features_are_those_of_evaluation_whatever_the_model_did_before() -> None:
    model = tiny_model("vit", hidden_dropout_prob=0.5).train()
    features = Probe(model, probe())._features()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features(pixels), features(pixels))


def test_the_plan_of_a_probe_does_not_grow_with_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.training.cost.dry_run.cost", lambda prepared: Cost(0.5, 0.0, 0.25))

    def train_s(**changes: object) -> float:
        return plan(probe(**changes)).size.train_s

    assert train_s(epochs=3) == train_s(epochs=100) == 32.0  # 64 images, twice, at a quarter of a second
    assert train_s(epochs=3, augment="none") == 16.0
    assert train_s(epochs=1) == 48.0  # in the loop: once, at half a second, after a pass for the new head
