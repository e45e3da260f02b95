"""The loop: what a step does, what a run leaves behind, and when it stops."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import vitft.training.step
from vitft import TrainConfig, evaluate, train
from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.metadata import read_card, sha256, sha256_of
from vitft.cli.app import app
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import Batch, EvalLoader, TrainLoader
from vitft.errors import DataError, ModelError, Stopped, TrainingError, UsageError
from vitft.hardware.device import make_accelerator
from vitft.training import loop
from vitft.training.optim import lr_at, make_optimizer
from vitft.training.setup import prepare
from vitft.training.step import Learner
from vitft.training.trainer import resume

# 64 training images in batches of 24: two whole batches and a tail of 16.
TINY = {
    "dataset": "digits", "model": "vit-micro", "from_scratch": True, "patch_size": 14, "width": 16, "layers": 1,
    "heads": 2, "mlp": 32, "max_train_samples": 64, "max_eval_samples": 50, "batch_size": 24, "epochs": 2,
    "lr": 3e-3, "device": "cpu", "precision": "fp32", "log_every": 1,
}  # fmt: skip


AUGMENTED = {"augment": "trivial", "color_jitter": 0.3, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0}


def config(**changes: object) -> TrainConfig:
    return TrainConfig.parse(TINY | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def plain_loop(settings: TrainConfig) -> tuple[dict[str, torch.Tensor], list[tuple[float, float, float]]]:
    """The same training as one reads it in a textbook: the whole batch's mean loss, step by step.

    Its weights, and of each step the loss, the accuracy and the gradient's norm.
    """
    prepared = prepare(settings)
    store, labels = prepared.decode().stores["train"]
    loader = TrainLoader(
        store, labels, prepared.loaded.preprocess, augmentation=Augmentation.of(settings), classes=10,
        batch_size=settings.batch_size, device=torch.device("cpu"),
    )  # fmt: skip
    model = prepared.loaded.model.train()
    optimizer = make_optimizer(model, settings)
    total = int(settings.epochs * loader.steps_per_epoch)
    steps = []
    for step in range(total):
        batch = loader.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, settings, total_steps=total, steps_per_epoch=loader.steps_per_epoch)
        logits = model(pixel_values=batch.pixels).logits
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=settings.label_smoothing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), (logits.argmax(1) == batch.labels).float().mean().item(), norm.item()))
    return dict(model.state_dict()), steps


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        AUGMENTED
        | {"label_smoothing": 0.2, "optimizer": "sgd", "clip_norm": 0, "schedule": "step", "warmup": 0.3, "lr": 0.1},
    ],
)
def test_training_matches_a_plain_loop_for_any_micro_batch(
    tmp_path: Path, micro_batch_size: int | None, changes: dict[str, object]
) -> None:
    settings = config(micro_batch_size=micro_batch_size, val_fraction=0, **changes)
    result = train(settings, output=tmp_path / "run")
    expected, steps = plain_loop(settings)
    model = __import__("transformers").ViTForImageClassification.from_pretrained(result.checkpoint)
    for name, value in model.state_dict().items():
        # Sums in another order; Adam divides small gradients by small numbers.
        assert torch.allclose(value, expected[name], atol=2e-5), name
    written = [line for line in lines(result.run) if line["split"] == "train"]
    assert [line["step"] for line in written] == list(range(1, len(steps) + 1))
    for line, step in zip(written, steps, strict=True):
        assert (line["loss"], line["accuracy"], line["grad_norm"]) == pytest.approx(step, abs=1e-4)


def test_the_loss_of_a_tail_is_its_own_mean(tmp_path: Path) -> None:
    """A mean over 24 places for 16 images would be a third too small."""
    result = train(config(val_fraction=0, lr=1e-9), output=tmp_path / "run")
    losses = [line["loss"] for line in lines(result.run) if line["split"] == "train"]
    assert losses[2] == pytest.approx(np.log(10), abs=0.1)


def test_the_run_folder_has_the_documented_files(tmp_path: Path) -> None:
    run = train(config(save_every=2, keep=1, keep_finished=1), output=tmp_path / "run").run
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    folder = {"config.json", "model.safetensors", "preprocessor_config.json", "vitft.json", "README.md"}
    step = "checkpoints/step-000006"
    assert names == {
        "config.yaml", "environment.json", "splits.json", "metrics.jsonl",
        "results.json", "predictions-validation.parquet", "predictions-test.parquet",
        *(f"{model}/{name}" for model in ("best", "last", step) for name in folder),
        f"{step}/optimizer.safetensors", f"{step}/state.json", f"{step}/manifest.json", "last/state.json",
        "best/novelty.safetensors",
    }  # fmt: skip
    assert TrainConfig.parse(yaml.safe_load((run / "config.yaml").read_text())).width == 16
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    splits = json.loads((run / "splits.json").read_text())["splits"]
    assert {role: split["count"] for role, split in splits.items()} == {"train": 64, "validation": 50, "test": 50}


def test_what_was_chosen_automatically_is_written_down(tmp_path: Path) -> None:
    run = train(config(device="auto", precision="auto", image_size=None), output=tmp_path / "run").run
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["device"] in ("cpu", "cuda", "mps")
    assert settings["precision"] in ("fp32", "bf16", "fp16")
    assert settings["image_size"] == 28


def test_without_validation_there_is_no_best_and_early_stopping_is_refused(tmp_path: Path) -> None:
    result = train(config(val_fraction=0), output=tmp_path / "run")
    assert result.checkpoint.name == "last"
    assert not (result.run / "best").exists()
    assert set(result.scores) == {"test"}
    with pytest.raises(UsageError, match="early_stopping needs a validation split"):
        train(config(val_fraction=0, early_stopping=1), output=tmp_path / "other")


def test_early_stopping_stops_and_the_best_is_what_is_scored(tmp_path: Path) -> None:
    result = train(config(early_stopping=2, epochs=50, lr=1e-12), output=tmp_path / "run")
    evaluated = [line for line in lines(result.run) if line["split"] == "validation"]
    # Nothing is learnt at such a rate: the first evaluation stays the best, and two more end the run.
    assert [line["step"] for line in evaluated] == [3, 6, 9]
    assert result.step == 3
    card = read_card(result.run / "best")
    assert card is not None
    assert card.scores["test"]["accuracy"] == result.scores["test"].accuracy
    last = read_card(result.run / "last")
    assert last is not None
    assert last.step == 9
    assert "test" not in last.scores
    resume(result.run)  # it stays as it is
    assert [line["step"] for line in lines(result.run) if line["split"] == "validation"] == [3, 6, 9]


# Accuracy, loss, macro-F1 and balanced accuracy of four validations.
SCORES = [(0.5, 2.0, 0.4, 0.3), (0.5, 1.9, 0.4, 0.7), (0.5, 1.8, 0.6, 0.6), (0.6, 1.85, 0.5, 0.5)]


@pytest.mark.parametrize(
    ("settings", "best", "stopped"),
    [
        ({}, 3, 9),  # of equal ones the earlier is kept, though its loss is higher
        ({"best_by": "loss"}, 9, 12),
        ({"best_by": "macro-f1"}, 9, 12),
        ({"best_by": "balanced-accuracy"}, 6, 12),
        ({"early_stopping": 4}, 12, 12),
        ({"best_by": "loss", "min_delta": 0.15}, 9, 12),  # 2.0, and 1.8 counts again
        ({"best_by": "loss", "min_delta": 0.3}, 9, 9),  # what does not count is kept if it is better
    ],
)
def test_one_metric_chooses_the_best_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], best: int, stopped: int
) -> None:
    real = loop.evaluation.measure

    def measured(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        if found.split == "test":
            return found
        accuracy, loss, macro_f1, balanced = next(scores)
        return replace(found, accuracy=accuracy, loss=loss, macro_f1=macro_f1, balanced_accuracy=balanced)

    scores = iter(SCORES)
    monkeypatch.setattr(loop.evaluation, "measure", measured)
    result = train(config(epochs=4, **{"early_stopping": 2} | settings), output=tmp_path / "run")
    state = ckpt.read_state(result.run / "last")
    assert (state.step, result.step, state.best_step) == (stopped, best, best)


def test_skipped_test_images_are_not_even_read_and_stay_held_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            file = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    whole = tmp_path / "data" / "test" / "a" / "0.png"
    picture = whole.read_bytes()
    settings = {"dataset": str(tmp_path / "data"), "batch_size": 4, "val_fraction": 0.3}
    scored = train(config(**settings), output=tmp_path / "scored")
    whole.write_bytes(b"no picture")
    skipped = train(config(**settings, skip_test=True), output=tmp_path / "run")
    assert (scored.skipped, skipped.skipped) == ((), ("test",))
    assert scored.scores.keys() - skipped.scores.keys() == {"test"}
    assert {line["split"] for line in lines(skipped.run)} == {"train", "validation"}
    assert_same_weights(scored.checkpoint, skipped.checkpoint)
    longer = resume(skipped.run, {"epochs": 3})  # its images are recognized without the pixels of those
    assert longer.skipped == ("test",)
    whole.write_bytes(picture)
    assert evaluate(scored.run).split == evaluate(skipped.run).split == "test"


def test_min_delta_without_early_stopping_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--min-delta applies only to early stopping; add --early-stopping or remove"):
        TrainConfig.parse({"min_delta": 0.1}, "flags")


def test_settings_that_an_earlier_version_did_not_have_get_defaults_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state had the best accuracy and loss; its settings none of what came later."""
    settings = config(save_every=2, epochs=3)
    whole, run = train(settings, output=tmp_path / "whole").run, tmp_path / "cut"
    interrupted(settings, run, 5, monkeypatch)
    folder = run / "checkpoints" / "step-000004"
    state = json.loads((folder / "state.json").read_text())
    old = {"step": 4, "best_step": 3, "best_accuracy": state["best_score"], "best_loss": 2.3,
           "evaluations_since_best": 0, "stopped_early": False, "scaler": None}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(old))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {"size": len(json.dumps(old)), "sha256": sha256(folder / "state.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    later = ("best_by", "min_delta", "keep_finished")
    written = yaml.safe_load((run / "config.yaml").read_text())
    text = yaml.safe_dump({name: value for name, value in written.items() if name not in later})
    (run / "config.yaml").write_text(f"{text}{ckpt._SUM}{sha256_of(text)}\n")
    assert_same_weights(whole / "last", resume(run).run / "last")
    assert_same_weights(whole / "best", run / "best")


def test_a_run_that_diverges_stops_and_says_where(tmp_path: Path) -> None:
    wild = config(optimizer="sgd", lr=100, clip_norm=0, epochs=20, save_every=1, val_fraction=0)
    with pytest.raises(TrainingError, match=r"(inf|nan) at step \d+; (the last good|no) checkpoint") as caught:
        train(wild, output=tmp_path / "run")
    assert caught.value.exit_code == 5
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_dropout_drops_and_is_the_same_on_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = __import__("transformers")
    shape = transformers.ViTConfig(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTModel(shape)
    for rate in (0.0, 0.5):
        model.config.hidden_dropout_prob = rate
        model.save_pretrained(tmp_path / f"{rate}")
    bare: dict[str, object] = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    bare |= {"from_scratch": False, "save_every": 2, "head_init": "random"}

    def trained(rate: float, name: str) -> Path:
        torch.rand(3)  # where torch's generator stands is no part of it
        return train(config(model=str(tmp_path / f"{rate}"), **bare), output=tmp_path / name).run / "last"

    dropped = trained(0.5, "dropped")
    scored = evaluate(dropped, split="validation")
    assert lines(dropped.parent)[-2]["loss"] == pytest.approx(scored.loss, abs=1e-6)  # nothing is dropped there
    assert_same_weights(dropped, trained(0.5, "again"))
    plain, key = trained(0.0, "plain"), "vit.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(weights(dropped)[key], weights(plain)[key], atol=1e-4)  # the rate alone is another
    interrupted(config(model=str(tmp_path / "0.5"), **bare), tmp_path / "cut", 5, monkeypatch)
    assert_same_weights(dropped, resume(tmp_path / "cut").run / "last")


def test_a_fine_tuned_run_can_be_trained_further_with_its_head(tmp_path: Path) -> None:
    first = train(config(epochs=6), output=tmp_path / "first")
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    again = config(model=str(first.run / "last"), from_scratch=False, **sizes, lr=1e-9)
    second = train(again, output=tmp_path / "second")
    head = weights(first.run / "last")["classifier.weight"]
    assert torch.allclose(head, weights(second.run / "last")["classifier.weight"], atol=1e-6)


def test_frozen_backbone_trains_the_head_alone(tmp_path: Path) -> None:
    first = train(config(), output=tmp_path / "first").run / "last"
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    probe = config(model=str(first), from_scratch=False, **sizes, freeze="backbone", max_steps=4)
    before, after = weights(first), weights(train(probe, output=tmp_path / "probe").run / "last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


# -- resume ---------------------------------------------------------------------------------------


class PowerCut(Exception):  # noqa: N818
    pass


def interrupted(settings: TrainConfig, run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and lose power in the middle of a step."""
    batch = TrainLoader.batch

    def until(self: TrainLoader, number: int) -> object:
        if number == step:
            raise PowerCut
        return batch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "batch", until)
        with pytest.raises(PowerCut):
            train(settings, output=run)


@pytest.mark.parametrize(
    "changes",
    [{"augment": "crop"}, AUGMENTED | {"optimizer": "sgd"}, {"ema": 0.9}],
    ids=["adamw, crops", "sgd, all augmentations", "averages"],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    settings = config(save_every=2, epochs=3, **changes)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 5, monkeypatch)
    resumed = resume(tmp_path / "cut")
    assert_same_weights(whole.run / "last", resumed.run / "last")
    assert_same_weights(whole.run / "best", resumed.run / "best")
    assert resumed.scores["test"].loss == whole.scores["test"].loss

    def story(run: Path) -> list[tuple[object, ...]]:
        return [(line["step"], line["split"], line["loss"], line["accuracy"]) for line in lines(run)]

    assert story(resumed.run) == story(whole.run)


def test_resume_refuses_a_changed_setting_and_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(config(save_every=2), run, 3, monkeypatch)
    for change in ({"lr": 1e-4}, {"batch_size": 8}, {"seed": 5}, {"epochs": 9}):
        with pytest.raises(UsageError, match=f"began with {next(iter(change))} .*start a new run") as caught:
            resume(run, change)
        assert str(next(iter(change.values()))) in str(caught.value)
    with pytest.raises(UsageError, match=r"^--keep should be greater than or equal to 1, got 0$"):
        resume(run, {"keep": 0})
    assert resume(run, {"keep": 5, "log_every": 2}).run == run


def test_resume_with_other_settings_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vitft chose for one machine may be impossible on the next."""
    run = tmp_path / "run"
    interrupted(config(save_every=2), run, 3, monkeypatch)
    chosen = {"compile": "on", "precision": "fp16", "device": "cuda"}
    ckpt.write_config(run, ckpt.read_config(run).model_copy(update=chosen))
    with pytest.raises(UsageError, match=r"^--compile compiles whole blocks, which --parallel fsdp shards"):
        resume(run, {"parallel": "fsdp", "device": "cpu", "precision": "fp32"})
    with pytest.raises(UsageError, match="precision fp16 needs a CUDA device"):
        resume(run, {"device": "cpu", "compile": "off"})
    changes = {"device": "cpu", "compile": "off", "precision": "auto", "micro_batch_size": 8}
    with pytest.raises(UsageError, match="began with precision fp16, got fp32"):
        resume(run, {"compile": "off", "precision": "fp32"})
    assert resume(run, changes).run == run
    card = read_card(run / "last")
    assert card is not None
    assert {name: getattr(card.config, name) for name in changes} == changes | {"precision": card.config.precision}


def test_resume_keeps_what_auto_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    interrupted(config(save_every=2, micro_batch_size=6), run, 3, monkeypatch)
    resume(run, {"micro_batch_size": "auto", "compile": "auto"})
    assert (ckpt.read_config(run).micro_batch_size, ckpt.read_config(run).compile) == (6, "off")


def test_a_family_without_gradient_checkpointing_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    import transformers

    small = transformers.ConvNextV2Config(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
    transformers.ConvNextV2ForImageClassification(small).save_pretrained(tmp_path / "model")
    settings = config(model=str(tmp_path / "model"), from_scratch=False, grad_checkpointing=True, image_size=32,
                      patch_size=None, width=None, layers=None, heads=None, mlp=None)  # fmt: skip
    with pytest.raises(UsageError, match=r"^grad_checkpointing: a convnextv2 has none; leave it out"):
        train(settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_of_results_is_written_again(tmp_path: Path) -> None:
    run = train(config(), output=tmp_path / "run").run
    whole = (run / "results.json").read_bytes()
    (run / "results.json").write_bytes(whole[: len(whole) // 2])
    resume(run)
    written = [json.loads(text) for text in (whole, (run / "results.json").read_bytes())]
    scores = [one["splits"]["test"]["accuracy"] for one in written]
    assert scores[0] == scores[1]


def draw(data: Path, blue: int = 200) -> Path:
    """Forty small photos of each of two classes."""
    from PIL import Image

    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True, exist_ok=True)
        for i in range(40):
            Image.new("RGB", (8, 8), (i, 2 * i, blue)).save(data / label / f"{i}.png")
    return data


@pytest.mark.parametrize("saved", [True, False])
def test_resume_refuses_data_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool) -> None:
    run, data = tmp_path / "run", draw(tmp_path / "data")
    interrupted(config(dataset=str(data), save_every=2 if saved else 99), run, 3, monkeypatch)
    draw(data, blue=100)
    with pytest.raises(DataError, match=r"the train split differs from the one the run began with: .*other pixels"):
        resume(run)


def test_resume_finds_the_same_images_in_a_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, moved = draw(tmp_path / "data"), tmp_path / "moved"
    settings = config(dataset=str(data), save_every=2)
    whole = train(settings, output=tmp_path / "whole")
    run = tmp_path / "cut"
    interrupted(settings, run, 3, monkeypatch)
    data.rename(moved)
    with pytest.raises(DataError, match=rf"{data}, the dataset of {run}, does not exist; .*--resume {run} --dataset "):
        resume(run)
    done = resume(run, {"dataset": str(moved), "keep": 1})
    assert_same_weights(whole.run / "last", done.run / "last")
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["dataset"], written["keep"]) == (str(moved), settings.keep)  # a move is for good
    for name in ("best", "last"):
        card = read_card(run / name)
        assert card is not None
        assert card.config.dataset == str(moved)


def test_a_table_and_its_images_may_move_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, moved = draw(tmp_path / "data"), tmp_path / "moved"
    rows = [f"{label}/{i}.png,{label}\n" for label in ("cat", "dog") for i in range(40)]
    (data / "table.csv").write_text("image,label\n" + "".join(rows))
    (data / "without.txt").write_text("train\tcat/3.png\n")
    places = {"dataset": "table.csv", "image_folder": ".", "exclude": "without.txt"}
    settings = config(save_every=2, **{name: str(data / place) for name, place in places.items()})
    whole = train(settings, output=tmp_path / "whole")
    run = tmp_path / "cut"
    interrupted(settings, run, 3, monkeypatch)
    data.rename(moved)
    done = resume(run, {name: str(moved / place) for name, place in places.items()})
    assert_same_weights(whole.run / "last", done.run / "last")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("fewer", "the train split .*: 1 of its 74 images are gone, the first is train/cat/7.png"),
        ("renamed", "the train split .*: 37 of its 74 images are gone, the first is train/cat/0.png"),
        ("painted", "the train split .*: the same names, but other pixels"),
    ],
)
def test_resume_says_how_other_data_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, difference: str
) -> None:
    run, data, given = tmp_path / "run", tmp_path / "data", tmp_path / "given"
    draw(data / "train")
    draw(given / "train", blue=100 if other == "painted" else 200)
    limits = {"max_train_samples": None, "max_eval_samples": None}
    interrupted(config(dataset=str(data), save_every=2, **limits), run, 3, monkeypatch)
    before = (run / "config.yaml").read_text(), (run / "splits.json").read_text()
    if other == "fewer":
        (given / "train" / "cat" / "7.png").unlink()
    if other == "renamed":
        for file in (given / "train" / "cat").iterdir():
            file.rename(file.with_name(f"b{file.name}"))
    with pytest.raises(DataError, match=difference) as caught:
        resume(run, {"dataset": str(given)})
    assert f"start a new run from its weights: vitft train --dataset {given} --model {run}" in str(caught.value)
    assert ((run / "config.yaml").read_text(), (run / "splits.json").read_text()) == before


def test_resume_refuses_other_classes_and_folders_that_are_not_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, table = tmp_path / "run", tmp_path / "table.csv"
    draw(tmp_path)
    rows = [f"{label}/{i}.png,{label}" for label in ("cat", "dog") for i in range(40)]
    table.write_text("\n".join(["path,label", *rows]))
    interrupted(config(dataset=str(table), save_every=2), run, 3, monkeypatch)
    table.write_text("\n".join(["path,label", *rows]).replace(",cat", ",lynx"))
    with pytest.raises(DataError, match=r"table\.csv are not those that the run began with; start a new run"):
        resume(run)
    with pytest.raises(ModelError, match=r"cat: no run folder .*give the folder of a run"):
        resume(tmp_path / "cat")


def test_resume_uses_its_own_images_after_others_were_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    data = draw(tmp_path / "data" / "train").parent
    settings = config(dataset=str(data), save_every=2, max_train_samples=None, max_eval_samples=None)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 3, monkeypatch)
    for i in range(8):  # among the others, by name
        Image.new("RGB", (8, 8), (9, 9, i)).save(data / "train" / "cat" / f"{i}-new.png")
    draw(data / "test")
    resume(tmp_path / "cut")
    assert_same_weights(whole.run / "last", tmp_path / "cut" / "last")
    said = capsys.readouterr().err
    assert "8 images of train are new: in no split of" in said
    assert "80 images of test are new" in said


def test_resume_skips_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(save_every=2, epochs=3)
    whole = train(settings, output=tmp_path / "whole")
    run = tmp_path / "cut"
    interrupted(settings, run, 5, monkeypatch)
    newest = run / "checkpoints" / "step-000004" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resume(run)
    said = capsys.readouterr().err
    assert "passed over step-000004: model.safetensors does not match its checksum" in said
    assert f"resuming {run} at step 2 of 9, from step-000002\n" in said
    assert_same_weights(whole.run / "last", run / "last")


def test_a_run_without_a_checkpoint_starts_over_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(save_every=100)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 2, monkeypatch)
    assert_same_weights(whole.run / "last", resume(tmp_path / "cut").run / "last")
    assert lines(tmp_path / "cut")[0]["step"] == 1


@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_resume_does_not_need_what_the_run_began_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    start = train(config(), output=tmp_path / "start").run / "last"
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    settings = config(model=str(start), from_scratch=False, **sizes, save_every=2)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 3, monkeypatch)
    shutil.rmtree(start) if what == "gone" else (start / "model.safetensors").write_bytes(b"torn")
    assert_same_weights(whole.run / "last", resume(tmp_path / "cut").run / "last")


def test_before_its_first_save_a_run_needs_what_it_began_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = train(config(), output=tmp_path / "start").run / "last"
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    interrupted(config(model=str(start), from_scratch=False, **sizes, save_every=5), tmp_path / "cut", 3, monkeypatch)
    shutil.rmtree(start)
    with pytest.raises(ModelError, match=r"began from, is gone, and the run had saved nothing; start a new run"):
        resume(tmp_path / "cut")


def test_resuming_a_finished_run_reports_it_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(config(), output=tmp_path / "run")
    capsys.readouterr()
    again = resume(done.run)
    assert again.scores["test"].accuracy == done.scores["test"].accuracy
    assert again.step == done.step
    assert capsys.readouterr().err == (
        f"{done.run} is finished, at step 6 of 6; to train longer: vitft train --resume {done.run} --epochs 4; "
        f"or start a new run from its weights: vitft train --dataset digits --model {done.run / 'last'} "
        "--max-train-samples 64 --max-eval-samples 50\n"
    )


@pytest.mark.parametrize(
    ("length", "words", "steps"),
    [
        ({"epochs": 1, "max_steps": 9}, ["--epochs", "2"], 6),
        ({"epochs": 3, "max_steps": 2}, ["--max-steps", "4"], 4),
        ({"epochs": 1, "max_steps": 3}, ["--epochs", "2", "--max-steps", "6"], 6),
        ({"epochs": 0.1}, ["--epochs", "0.4"], 2),  # 0.2 of 3 steps would be one step, too
    ],
)
def test_the_command_that_is_suggested_trains_longer(
    length: dict[str, float], words: list[str], steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(config(max_eval_samples=10, **length), output=tmp_path / "run").run
    capsys.readouterr()
    resume(run)
    command = shlex.split(capsys.readouterr().err.partition("to train longer: vitft ")[2].partition(";")[0])
    assert command == ["train", "--resume", str(run), *words]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert max(int(str(line["step"])) for line in lines(run)) == steps


def test_a_finished_run_keeps_step_checkpoints_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, there = ckpt.save_step, list[int]()

    def save_step(run: Path, *given: Any) -> Path:
        folder = save(run, *given)
        there.append(len(ckpt.step_folders(run)))
        return folder

    monkeypatch.setattr(ckpt, "save_step", save_step)
    runs = [train(config(save_every=2, keep_finished=keep), output=tmp_path / str(keep)).run for keep in (0, 1, 9)]
    assert there == [1, 2, 2] * 3  # --keep is 2, at any time
    kept = [[folder.name for folder in ckpt.step_folders(run)] for run in runs]
    assert kept == [[], ["step-000006"], ["step-000006", "step-000004"]]
    before = {file.relative_to(runs[0]) for file in runs[0].rglob("*")}
    resume(runs[0])
    assert {file.relative_to(runs[0]) for file in runs[0].rglob("*")} == before


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("longer", [{"epochs": 4}, {"max_steps": 8}], ids=["epochs", "steps"])
def test_a_finished_run_can_be_made_longer(
    tmp_path: Path, keep: int, longer: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = {"max_steps": 6, "epochs": 9} if "max_steps" in longer else {}
    run = train(config(keep_finished=keep, **limit), output=tmp_path / "run").run
    first = weights(run / "last")
    result = resume(run, longer)
    said = capsys.readouterr().err
    total = 12 if "epochs" in longer else 8
    assert f"resuming {run} at step 6 of {total}, from {'step-000006' if keep else 'last'}" in said
    assert ("the optimizer starts with new moments" in said) == (not keep)
    assert [line["step"] for line in lines(run) if line["split"] == "train"] == list(range(1, total + 1))
    assert ckpt.read_state(run / "last").step == total
    assert not torch.equal(first["classifier.weight"], weights(run / "last")["classifier.weight"])
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: written[name] for name in longer} == longer
    assert resume(run).scores["test"].loss == result.scores["test"].loss
    with pytest.raises(UsageError, match="it would not be the same run any more"):
        resume(run, dict.fromkeys(longer, 1))


def test_a_finished_run_without_its_last_weights_does_not_begin_again_over_its_best(tmp_path: Path) -> None:
    run = train(config(max_steps=4), output=tmp_path / "run").run
    shutil.rmtree(run / "last")
    there = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ModelError, match=f"last/, .* is gone; to train its best weights: .*--model {run / 'best'} "):
        resume(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == there
    shutil.rmtree(run / "best")
    with pytest.raises(ModelError, match=r"is gone; start a new run\."):
        resume(run)


def test_a_finished_run_that_would_not_be_longer_is_refused(tmp_path: Path) -> None:
    run = train(config(max_steps=4), output=tmp_path / "run").run
    with pytest.raises(UsageError, match="finished at step 4, and a total of 4 steps is no more; set more"):
        resume(run, {"epochs": 5})
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 2.0


def test_a_run_that_was_stopped_early_can_be_made_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: TrainLoader, step: int) -> None:
        raise PowerCut

    run = train(config(early_stopping=2, epochs=50, lr=1e-12), output=tmp_path / "run").run
    assert ckpt.read_state(run / "last").step == 9
    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "batch", cut)
        with pytest.raises(PowerCut):
            resume(run, {"epochs": 60})
    resume(run)  # it is to be longer, still
    assert ckpt.read_state(run / "last").step == 15  # two more evaluations, in vain


# -- stopping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lr": 1e-12}], ids=["the last may be best", "the first is best"])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_signal_interrupts_validation_and_the_final_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int, settings: dict[str, object]
) -> None:
    """A run scores at steps 3 and 6, and at its end; the signal comes after the first of five batches."""
    read: list[int] = []

    def batches(self: EvalLoader) -> Iterator[Batch]:
        read.append(0)
        for batch in real(self):
            read[-1] += 1
            yield batch
            if len(read) == which:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("vitft.evaluation.evaluation.BATCH", 10)
    whole = train(config(save_every=4, **settings), output=tmp_path / "whole").run
    real = EvalLoader.__iter__
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(EvalLoader, "__iter__", batches)
        with pytest.raises(Stopped, match=rf"at step {min(6, 3 * which)} of 6") as caught:
            train(config(save_every=4, **settings), output=run)
    assert caught.value.exit_code == 143
    assert read == [5] * (which - 1) + [1]
    assert ckpt.read_state(run / "last").step == min(6, 3 * which)
    resume(run)
    for name in ("best", "last"):
        assert_same_weights(whole / name, run / name)
    assert [(line["step"], line["split"], line["loss"]) for line in lines(run)] == [
        (line["step"], line["split"], line["loss"]) for line in lines(whole)
    ]
    assert sorted(file.relative_to(run) for file in run.rglob("*")) == sorted(
        file.relative_to(whole) for file in whole.rglob("*")
    )


def test_signals_are_handled_within_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[torch.Tensor] = []
    monkeypatch.setattr(vitft.training.step, "_let_signals_in", heard.append)
    prepared = prepare(config())
    made = Learner(make_accelerator(prepared.config), prepared.decode())
    made.step(0)
    assert {id(one) for one in heard} == {id(one) for one in made.unwrapped.parameters()}


def test_a_signal_interrupts_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(save_every=50, micro_batch_size=12)  # two passes a step
    whole = train(settings, output=tmp_path / "whole").run
    real, passes = ViTForImageClassification.forward, []

    def signalled(self: Any, *given: Any, **named: Any) -> Any:
        if self.training:
            passes.append(1)
        if len(passes) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *given, **named)

    run = tmp_path / "run"
    # Before it trains, a run is tried for a pass.
    with monkeypatch.context() as patch:
        patch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
        patch.setattr("vitft.training.trainer.autotuned", lambda prepared, processes: prepared)
        patch.setattr(ViTForImageClassification, "forward", signalled)
        with pytest.raises(Stopped, match=r"Ctrl-C at step 2 of 6; everything is saved"):
            train(settings, output=run)
    assert len(passes) == 5
    assert [line["step"] for line in lines(run)] == [1, 2]
    resume(run)
    assert_same_weights(whole / "last", run / "last")


def test_a_signal_before_anything_is_saved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the features of a frozen backbone are computed."""
    start = train(config(), output=tmp_path / "start").run / "last"
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    settings = config(model=str(start), from_scratch=False, **sizes, freeze="backbone", epochs=4)
    real, read = TrainLoader.unaugmented, []

    def unaugmented(self: TrainLoader, chunks: Any, **which: bool) -> Any:
        for pixels in real(self, chunks, **which):
            read.append(len(pixels))
            os.kill(os.getpid(), signal.SIGINT)
            yield pixels

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "unaugmented", unaugmented)
        with pytest.raises(Stopped, match="at step 0 of 12; there is nothing to save yet"):
            train(settings, output=tmp_path / "run")
    assert read == [24]
    assert_same_weights(resume(tmp_path / "run").run / "last", train(settings, output=tmp_path / "whole").run / "last")


def test_a_folder_that_is_taken_is_refused_before_any_work(tmp_path: Path) -> None:
    run = train(config(max_steps=1), output=tmp_path / "run").run
    with pytest.raises(UsageError, match="run"):
        train(config(dataset=str(tmp_path / "nowhere")), output=run)


def test_the_bar_moves_with_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("vitft.io.console.TrainingProgress.advance", lambda self, step: seen.append(step))
    train(config(max_steps=5, log_every=9), output=tmp_path / "run")
    assert sorted({*seen}) == [1, 2, 3, 4, 5]


def test_scores_compare_equal_apart_from_their_speed() -> None:
    """All processes have to decide alike whether the best weights are those at hand."""
    slow, fast = ({"validation": {"accuracy": 0.5, "images_per_s": rate}} for rate in (1.0, 2.0))
    assert loop._alike(slow, fast)
    assert not loop._alike(slow, {"validation": {"accuracy": 0.6, "images_per_s": 1.0}})


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(config(tracker="tensorboard"), output=tmp_path / "run").run
    written = [file for file in run.rglob("events.out.tfevents.*") if "hparams" not in str(file)]
    sent = EventAccumulator(str(written[0].parent), size_guidance={"scalars": 0})
    sent.Reload()
    losses = {
        split: {one.step: one.value for one in sent.Scalars(f"{split}/loss")} for split in ("train", "validation")
    }
    for line in lines(run):
        if line["split"] in losses:
            assert losses[line["split"]].pop(line["step"]) == pytest.approx(line["loss"], rel=1e-6)
    assert losses == {"train": {}, "validation": {}}


def test_a_score_belongs_to_the_weights_beside_it(tmp_path: Path) -> None:
    """A checkpoint between two evaluations has not been scored."""
    run = train(config(save_every=2, keep=9, keep_finished=9, epochs=2), output=tmp_path / "run").run
    scored = {folder.name: bool(read_card(folder).scores) for folder in (run / "checkpoints").iterdir()}  # type: ignore[union-attr]
    assert scored == {"step-000002": False, "step-000004": False, "step-000006": True}


def test_weights_that_are_best_and_last_have_their_scores_in_both(tmp_path: Path) -> None:
    run = train(config(max_steps=1), output=tmp_path / "run").run
    best, last = (read_card(run / name) for name in ("best", "last"))
    assert best is not None
    assert last is not None
    assert best.scores.keys() == {"validation", "test"}
    assert last.scores == best.scores


def test_a_bad_image_costs_no_earlier_run(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i, 2 * i, 200)).save(tmp_path / "data" / label / f"{i}.png")
    done = train(config(val_fraction=0), output=tmp_path / "run")
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/1\.png"):
        train(config(dataset=str(tmp_path / "data"), val_fraction=0), output=done.run, overwrite=True)
    assert (done.run / "last" / "model.safetensors").is_file()


def test_the_bundled_digits_are_not_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    run = train(config(max_steps=1), output=tmp_path / "run").run
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"] == "digits"


def test_gradient_checkpointing_changes_only_the_memory(tmp_path: Path) -> None:
    kept, again = (
        train(config(layers=2, grad_checkpointing=on), output=tmp_path / str(on)).run for on in (False, True)
    )  # fmt: skip
    assert_same_weights(kept / "last", again / "last")


def test_checkpointed_activations_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from vitft.models.load import checkpoint_activations, load_for_training

    seen = []
    model = load_for_training(config(layers=3), ["a", "b"]).model.train()
    forward = transformers.models.vit.modeling_vit.ViTAttention.forward
    monkeypatch.setattr(
        transformers.models.vit.modeling_vit.ViTAttention, "forward",
        lambda self, *given, **named: seen.append(1) or forward(self, *given, **named),
    )  # fmt: skip
    checkpoint_activations(model)
    model(pixel_values=torch.zeros(1, 3, 28, 28)).logits.sum().backward()
    assert len(seen) == 6


def test_a_run_of_an_earlier_version_resumes_to_the_same_result(tmp_path: Path) -> None:
    """It was killed after step 5 of 9; `end.safetensors` has the weights of an uninterrupted run of that version.

    On the machine that made it, they are the same bits. Elsewhere kernels round differently, which moves a weight much
    less than other samples, crops or learning rates do: the step of a weight is up to 0.003.
    """
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "corpus" / "old-runs" / "crops", run)
    expected = load_file(run / "end.safetensors")
    assert resume(run).step >= 2
    actual = weights(run / "last")
    assert actual.keys() == expected.keys()
    assert max(float((actual[name] - expected[name]).abs().max()) for name in expected) < 3e-4


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_ends_the_processes_of_its_loader(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[TrainLoader] = []
    monkeypatch.setattr(TrainLoader, "close", lambda self: closed.append(self))
    if fails:
        monkeypatch.setattr(vitft.training.step.Learner, "step", lambda self, step: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(config(max_steps=1), output=tmp_path / "run")
    assert len(closed) == 1
