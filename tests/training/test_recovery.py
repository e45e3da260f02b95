"""When training itself breaks: no number for a loss, no room in memory. The plan changes, and is written down."""

import dataclasses
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from tests.training.test_trainer import assert_same_weights, config, interrupted, lines
from vitft import train
from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.metadata import read_card
from vitft.errors import ModelError, TrainingError
from vitft.training import loop
from vitft.training.step import Learner
from vitft.training.trainer import resume


def broken(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any, int], bool]) -> None:
    """Make the loss of some steps no number."""
    real = Learner.step

    def step(self: Any, number: int) -> Any:
        loss, correct, norm = real(self, number)
        return (loss * float("nan") if when(self.config, number) else loss), correct, norm

    monkeypatch.setattr(Learner, "step", step)


def test_a_non_finite_loss_rolls_back_and_halves_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, lambda settings, step: settings.lr > 1e-3 and step == 4)
    result = train(config(on_nan="rollback", save_every=2, log_every=1, val_fraction=0), output=tmp_path / "run")
    settings = yaml.safe_load((result.run / "config.yaml").read_text())
    assert settings["lr"] == config().lr / 4
    steps = [line["step"] for line in lines(result.run) if line["split"] == "train"]
    assert steps == list(range(1, result.step + 1))
    said = capsys.readouterr().err
    assert (
        "the loss or its gradient is nan at step 5; going back to step-000004, and continuing with --lr 0.0015" in said
    )
    # It got no further, so what it began from may be at fault.
    assert (
        "the loss or its gradient is nan at step 5; going back to step-000002, and continuing with --lr 0.00075" in said
    )


def test_a_rollback_that_does_not_help_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda settings, step: step == 4)
    with pytest.raises(TrainingError, match=r"nan at step 5; there is none before step 2 to go back to. Try a lower"):
        train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == config().lr / 2**2
    assert ckpt.newest_intact(tmp_path / "run")[0] is not None  # what it went back to last is still there


def test_a_run_that_gets_further_each_time_rolls_back_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = config().lr
    broken(monkeypatch, lambda settings, step: (settings.lr, step) in ((rate, 2), (rate / 2, 4)))
    train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    said = capsys.readouterr().err
    assert "nan at step 3; going back to step-000002" in said
    assert "nan at step 5; going back to step-000004" in said


def test_a_non_finite_validation_loss_rolls_the_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loop.evaluation.measure

    def measured(model: Any, *given: Any, **named: Any) -> Any:
        if given[2].name == "validation" and len(scored) == 1:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))
        scored.append(given[2].name)
        return real(model, *given, **named)

    scored: list[str] = []
    monkeypatch.setattr(loop.evaluation, "measure", measured)
    result = train(config(on_nan="rollback", save_every=2), output=tmp_path / "run")
    assert (
        "loss on validation is nan: the weights or inputs are not finite numbers at step 6; going back to step-000004"
        in (capsys.readouterr().err)
    )
    assert scored == ["validation", "validation", "validation", "test"]
    assert result.scores["test"].loss > 0
    assert yaml.safe_load((result.run / "config.yaml").read_text())["lr"] == config().lr / 2


def test_without_rollback_a_non_finite_validation_loss_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: Any, **named: Any) -> Any:
        raise ModelError("loss on validation is nan")

    monkeypatch.setattr(loop.evaluation, "measure", measured)
    with pytest.raises(
        TrainingError, match=r"loss on validation is nan at step 3; the last good checkpoint is .*step-000002"
    ):
        train(config(save_every=2), output=tmp_path / "run")


def test_non_finite_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Learner.step

    def step(self: Any, number: int) -> Any:
        found = real(self, number)
        if number == 3:
            with torch.no_grad():
                self.unwrapped.classifier.weight[0, 0] = float("inf")
        return found

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(
        TrainingError, match=r"weights are not finite at step 4; the last good checkpoint is .*step-000002"
    ):
        train(config(save_every=2, keep=1, val_fraction=0), output=tmp_path / "run")
    assert [folder.name for folder in ckpt.step_folders(tmp_path / "run")] == ["step-000002"]


@pytest.mark.parametrize("file", ["model.safetensors", ckpt.OPTIMIZER])
def test_rollback_skips_a_checkpoint_with_non_finite_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version may have saved it."""
    real = ckpt.find_damage

    def spoilt(folder: Path) -> str | None:
        if folder.name == "step-000004":
            tensors = load_file(folder / file)
            next(iter(tensors.values())).view(-1)[0] = float("nan")
            save_file(tensors, folder / file)
            return None
        return real(folder)

    broken(monkeypatch, lambda settings, step: settings.lr > 2e-3 and step == 4)
    monkeypatch.setattr(ckpt, "find_damage", spoilt)
    train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    assert "going back to step-000002" in capsys.readouterr().err


def test_after_a_rollback_the_earlier_best_has_to_be_beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best/ was written at step 3; the run goes back to step 2, and is never as good again."""
    real, scored = loop.evaluation.measure, []

    def measured(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        if found.split == "validation":
            scored.append(found)
            return dataclasses.replace(found, accuracy=0.9 if len(scored) == 1 else 0.5)
        return found

    monkeypatch.setattr(loop.evaluation, "measure", measured)
    broken(monkeypatch, lambda settings, step: settings.lr == config().lr and step == 3)
    result = train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    assert len(scored) == 4  # at step 3, and again, at step 6, and the best for its results
    card = read_card(result.run / "best")
    assert card is not None
    assert (result.step, card.step, card.scores["validation"]["accuracy"]) == (3, 3, 0.9)
    assert result.scores["validation"].accuracy == 0.9


def test_a_rollback_frees_the_memory_of_the_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = loop.Run.__init__

    def begin(self: Any, accelerator: Any, decoded: Any, *given: Any, **named: Any) -> None:
        alive.append(sum(one() is not None for one in held))
        real(self, accelerator, decoded, *given, **named)
        pixels = [store for store, _ in decoded.stores.values()]
        held.extend(map(weakref.ref, (self, decoded, decoded.loaded.model, self.learner.optimizer, *pixels)))

    monkeypatch.setattr(loop.Run, "__init__", begin)
    rate = config().lr
    broken(monkeypatch, lambda settings, step: settings.lr > rate / 3 and step == 4)
    train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    assert alive == [0, 0, 0]
    interrupted(config(save_every=2, on_nan="rollback"), tmp_path / "cut", 3, monkeypatch)
    held.clear()
    alive.clear()
    resume(tmp_path / "cut")  # it fails at step 5, and goes back twice
    assert alive == [0, 0, 0]


def test_a_run_stopped_where_it_diverged_is_not_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(settings: Any, step: int) -> bool:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step == 1

    broken(monkeypatch, stopped)
    said = r"^the loss or its gradient is nan at step 2\. Try a lower --lr or more --warmup\.$"
    with pytest.raises(TrainingError, match=said):
        train(config(on_nan="rollback", save_every=1), output=tmp_path / "run")
    assert ckpt.read_config(tmp_path / "run").lr == config().lr


def test_without_a_checkpoint_to_roll_back_to_a_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda settings, step: step == 1)
    with pytest.raises(TrainingError, match="no checkpoint was saved before it"):
        train(config(on_nan="rollback", log_every=1), output=tmp_path / "run")


def test_out_of_memory_halves_the_micro_batch_and_not_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = transformers.ViTForImageClassification.forward

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if self.training and len(named["pixel_values"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **named)

    settings = config(val_fraction=0)
    expected = train(settings.model_copy(update={"micro_batch_size": 6}), output=tmp_path / "expected")
    monkeypatch.setattr(transformers.ViTForImageClassification, "forward", forward)
    monkeypatch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
    result = train(settings, output=tmp_path / "run")
    assert yaml.safe_load((result.run / "config.yaml").read_text())["micro_batch_size"] == 6
    assert "out of memory at step 1: 24 images at a time do not fit; from now on 12. The batch stays 24." in (
        said := capsys.readouterr().err
    )
    assert "12 images at a time do not fit; from now on 6." in said
    # The first step was broken off twice, and left nothing: the run is the one with parts of 6.
    assert (result.checkpoint / "model.safetensors").read_bytes() == (
        expected.checkpoint / "model.safetensors"
    ).read_bytes()


def test_memory_that_not_even_one_image_fits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, number: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "step", never)
    said = r"^out of memory on cpu; try --grad-checkpointing, a smaller model or --image-size\.$"
    with pytest.raises(TrainingError, match=said):  # a micro-batch of 1 cannot be halved
        train(config(), output=tmp_path / "run")
    assert ckpt.read_config(tmp_path / "run").micro_batch_size == 1


def test_an_optimizer_that_runs_out_of_memory_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have updated some of the weights, or allocated some of its moments."""
    asked = []

    def step(self: Any, closure: Any = None) -> None:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
    said = r"^out of memory on cpu; try a smaller model or --image-size\.$"
    with pytest.raises(TrainingError, match=said) as caught:
        train(config(), output=tmp_path / "run")
    assert caught.value.exit_code == 5
    assert len(asked) == 1
    assert ckpt.read_config(tmp_path / "run").micro_batch_size is None


def evaluating_at_most(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Have forward passes of more images than that run out of memory, where nothing is trained."""
    real = transformers.ViTForImageClassification.forward

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if not self.training and len(named["pixel_values"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **named)

    monkeypatch.setattr(transformers.ViTForImageClassification, "forward", forward)


def test_an_evaluation_out_of_memory_takes_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(max_train_samples=60, head_init="random", from_scratch=True)
    expected = train(settings, output=tmp_path / "expected")
    images = expected.scores["validation"].count
    assert images > 3
    monkeypatch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
    monkeypatch.setattr("vitft.training.loop.run_novelty", lambda *given: None)
    evaluating_at_most(monkeypatch, 2)
    result = train(settings, output=tmp_path / "run")
    assert result.scores["validation"].accuracy == expected.scores["validation"].accuracy
    said = capsys.readouterr().err
    assert "out of memory: evaluating 2 images at a time from now on" in said
    assert said.count("images at a time from now on") == 5  # 64 to 2, and then not again


def test_an_evaluation_that_does_not_fit_at_all_loses_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(head_init="random", from_scratch=True)
    whole = train(settings, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
        evaluating_at_most(patch, 0)
        with pytest.raises(TrainingError, match=r"^out of memory on cpu; try a smaller model or --image-size\.$"):
            train(settings, output=tmp_path / "run")
    newest, _ = ckpt.newest_intact(tmp_path / "run")
    assert newest is not None
    assert ckpt.step_of(newest) > 0
    assert_same_weights(whole.run / "last", resume(tmp_path / "run").run / "last")
