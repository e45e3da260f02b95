"""Models with batch norms: single images, several processes, and steps that are broken off."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetForImageClassification

from tests.families import tiny_classifier
from tests.forked import finish_two
from tests.models.test_heads import saved
from tests.training.test_trainer import assert_same_weights, config, lines, weights
from vitft import TrainConfig, evaluate, train
from vitft.checkpoints.checkpoint import read_config
from vitft.errors import Stopped
from vitft.training.cost.dry_run import plan
from vitft.training.trainer import resume

GIVEN = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {
    "from_scratch": False, "image_size": 32, "head_init": "random", "batch_size": 4, "max_train_samples": 9,
    "max_eval_samples": 20,
}  # fmt: skip


def given(family: str, folder: Path, **changes: object) -> TrainConfig:
    """The settings of a run of three steps an epoch, the last with one image, from a tiny model of this family."""
    return config(**GIVEN | {"model": str(saved(tiny_classifier(family), folder / "given"))} | changes)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"batch_size": 1}])
@pytest.mark.parametrize("family", ["levit", "resnet"])
def test_a_single_image_has_no_variance(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    """The head of a LeViT, and the last stage of a ResNet for 32 pixels, have one value of each channel an image."""
    settings = given(family, tmp_path, **changes)
    assert plan(settings).size.train_s > 0
    run = train(settings, output=tmp_path / "run").run
    assert all(tensor.isfinite().all() for tensor in weights(run / "last").values())
    before, after = weights(tmp_path / "given"), weights(run / "last")
    moved = any(not torch.equal(before[name], after[name]) for name in after if "running" in name)
    assert moved == (changes.get("batch_size") != 1)


def test_two_processes_score_the_weights_that_are_saved(tmp_path: Path) -> None:
    """Each has running means of its own images of the last step; those of the first are saved."""
    settings = given("resnet", tmp_path, batch_size=8, max_train_samples=32, epochs=1)
    run = tmp_path / "run"
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.model_dump(exclude_defaults=True).items()
    ]
    both = finish_two("train", *words, "--output", str(run), log=tmp_path / "log")
    assert [code for code, _ in both] == [0, 0], both
    recorded = next(line["loss"] for line in lines(run) if line["split"] == "validation")
    assert evaluate(run / "last", split="validation").loss == pytest.approx(recorded, abs=1e-5)


def broken_off(in_pass: int, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """This training pass has a fault, after the one before it has moved the running means."""
    real, passes = ResNetForImageClassification.forward, list[int]()

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.training:
            passes.append(1)
            if len(passes) == in_pass:
                fault()
        return real(self, *arguments, **named)

    # Before it trains, a run is tried for a pass.
    monkeypatch.setattr("vitft.training.trainer.warn_if_long", lambda *given: None)
    monkeypatch.setattr("vitft.training.trainer.autotuned", lambda prepared, processes: prepared)
    monkeypatch.setattr(ResNetForImageClassification, "forward", forward)


def test_an_interrupted_step_leaves_the_running_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given("resnet", tmp_path, micro_batch_size=2, save_every=50)  # two passes a step
    whole = train(settings, output=tmp_path / "whole").run
    with monkeypatch.context() as patch:
        broken_off(4, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        with pytest.raises(Stopped, match="Ctrl-C at step 1 of 6"):
            train(settings, output=tmp_path / "run")
    assert_same_weights(whole / "last", resume(tmp_path / "run").run / "last")


def test_a_step_that_ran_out_of_memory_leaves_the_running_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given("resnet", tmp_path, micro_batch_size=3)

    def fault() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    halved = train(settings.model_copy(update={"micro_batch_size": 2}), output=tmp_path / "halved").run
    with monkeypatch.context() as patch:
        broken_off(2, fault, patch)
        run = train(settings, output=tmp_path / "run").run
    assert read_config(run).micro_batch_size == 2
    assert_same_weights(halved / "last", run / "last")
