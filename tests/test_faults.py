"""When training itself breaks: no number for a loss, no room in memory. The plan changes, and is written down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests.test_trainer import config, lines
from vitft import train
from vitft.errors import TrainingError
from vitft.learner import Learner


def broken(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any, int], bool]) -> None:
    """Make the loss of some steps no number."""
    real = Learner.step

    def step(self: Any, number: int) -> Any:
        loss, correct, norm = real(self, number)
        return (loss * float("nan") if when(self.config, number) else loss), correct, norm

    monkeypatch.setattr(Learner, "step", step)


def test_a_loss_that_is_no_number_takes_the_run_back_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, lambda settings, step: settings.lr > 1e-3 and step == 4)
    result = train(config(on_nan="rollback", save_every=2, log_every=1, val_fraction=0), output=tmp_path / "run")
    settings = yaml.safe_load((result.run / "config.yaml").read_text())
    assert settings["lr"] == config().lr / 4
    steps = [line["step"] for line in lines(result.run) if line["split"] == "train"]
    assert steps == list(range(1, result.step + 1))
    said = capsys.readouterr().err
    assert "the loss or its gradient is nan at step 5; the last good step is step-000004" in said
    assert "going on from there at --lr 0.0015" in said
    assert "going on from there at --lr 0.00075" in said


def test_a_rollback_that_does_not_help_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda settings, step: step == 4)
    with pytest.raises(TrainingError, match="the loss or its gradient is nan at step 5"):
        train(config(on_nan="rollback", save_every=2, log_every=1), output=tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == config().lr / 2**5


def test_with_nothing_to_go_back_to_a_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda settings, step: step == 1)
    with pytest.raises(TrainingError, match="no checkpoint was saved before it"):
        train(config(on_nan="rollback", log_every=1), output=tmp_path / "run")


def test_out_of_memory_halves_the_parts_and_not_the_batch(
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
    monkeypatch.setattr("vitft.trainer.warn_if_long", lambda *given: None)
    result = train(settings, output=tmp_path / "run")
    assert yaml.safe_load((result.run / "config.yaml").read_text())["micro_batch_size"] == 6
    assert "out of memory at step 1: 24 images at a time do not fit; from here on 12. The batch stays 24." in (
        said := capsys.readouterr().err
    )
    assert "12 images at a time do not fit; from here on 6." in said
    # The first step was broken off twice, and left nothing: the run is the one with parts of 6.
    assert (result.checkpoint / "model.safetensors").read_bytes() == (
        expected.checkpoint / "model.safetensors"
    ).read_bytes()


def test_memory_that_not_even_one_image_fits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, number: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "step", never)
    with pytest.raises(TrainingError, match="out of memory on cpu"):
        train(config(), output=tmp_path / "run")
