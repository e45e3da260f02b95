"""The moving average of the weights: its values, and that it is what a run evaluates, saves and resumes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_trainer import PowerCut, assert_same_weights, config, weights
from vitft import TrainConfig, evaluate, train
from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.metadata import read_card, sha256, write_card
from vitft.hardware.device import make_accelerator
from vitft.training import loop
from vitft.training.setup import prepare
from vitft.training.step import Learner
from vitft.training.trainer import resume


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_averages_follow_the_formula(optimizer: str) -> None:
    settings = config(ema=0.4, optimizer=optimizer)
    learner = Learner(make_accelerator(settings), prepare(settings).decode())
    expected: dict[str, np.ndarray] = {}
    for step in range(5):
        learner.step(step)
        decay = min(0.4, (1 + step) / (10 + step))
        for name, parameter in learner.unwrapped.named_parameters():
            weight = parameter.detach().double().numpy()
            expected[name] = decay * expected.get(name, weight) + (1 - decay) * weight
    raw = {name: parameter.detach().clone() for name, parameter in learner.unwrapped.named_parameters()}
    with learner.averaged():
        for name, parameter in learner.unwrapped.named_parameters():
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
            assert not torch.equal(parameter, raw[name]), name
    for name, parameter in learner.unwrapped.named_parameters():
        assert torch.equal(parameter, raw[name]), name


def test_a_run_saves_and_scores_its_averages(tmp_path: Path) -> None:
    plain, averaged = (train(config(ema=ema), output=tmp_path / str(ema)) for ema in (0.0, 0.9))
    last = "checkpoints/step-000006"
    keeping = train(config(ema=0.9, keep_finished=1), output=tmp_path / "keeping").run
    assert_same_weights(keeping / last, plain.run / "last")  # a step checkpoint has the weights themselves
    for name, value in weights(averaged.run / "last").items():
        assert not torch.equal(value, weights(plain.run / "last")[name]), name
    assert evaluate(averaged.checkpoint, device="cpu").accuracy == averaged.scores["test"].accuracy
    assert averaged.scores["test"].loss != plain.scores["test"].loss


def cut_at(method: str, settings: TrainConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a method of the run is called, at which the power goes."""

    def cut(*_given: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, method, cut)
        with pytest.raises(PowerCut):
            train(settings, output=run)


def test_a_run_that_only_lacks_its_final_score_saves_its_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(ema=0.9, val_fraction=0)
    whole = train(settings, output=tmp_path / "whole")
    cut_at("_measure", settings, tmp_path / "cut", monkeypatch)
    resumed = resume(tmp_path / "cut")
    assert_same_weights(whole.run / "last", resumed.run / "last")
    assert resumed.scores["test"].loss == whole.scores["test"].loss


def test_scores_of_averages_are_not_told_of_the_weights_themselves(tmp_path: Path) -> None:
    run = train(config(ema=0.9, save_every=2, keep=9, keep_finished=9), output=tmp_path / "run").run
    for folder in ckpt.step_folders(run):
        card = read_card(folder)
        assert card is not None
        assert card.scores == {}
        assert "Not scored at this step." in (folder / "README.md").read_text()
    for name in ("best", "last"):
        card = read_card(run / name)
        assert card is not None
        found = evaluate(run / name, split="validation", device="cpu")
        assert found.loss == pytest.approx(card.scores["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_of_averages_goes_on_from_its_last_step(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That step is the best one, too, which the scores say: its test score is that of the averages."""
    settings = config(ema=0.9, epochs=1)
    whole = train(settings, output=tmp_path / "whole")
    cut_at("_finish", settings, tmp_path / "cut", monkeypatch)
    (folder,) = ckpt.step_folders(tmp_path / "cut")
    if earlier:  # versions that had them in vitft.json, and not in the state
        card, state = read_card(folder), json.loads((folder / "state.json").read_text())
        assert card is not None
        card = replace(card, scores=state.pop("scores"))
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "vitft.json").unlink()
        write_card(folder, card)
        sums = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({n: s for n, s in sums.items() if n != "manifest.json"}))
    restored = list[object]()
    monkeypatch.setattr(loop, "restore_weights", lambda *given: restored.append(given))
    resumed = resume(tmp_path / "cut")
    assert restored == [], "the best weights are those at hand"
    assert resumed.scores["test"].loss == whole.scores["test"].loss
    for name in ("best", "last"):
        assert_same_weights(whole.run / name, resumed.run / name)
        cards = [read_card(one.run / name) for one in (whole, resumed)]
        assert [sorted(card.scores) for card in cards] == [["test", "validation"]] * 2  # type: ignore[union-attr]


def test_a_linear_probe_averages_its_head(tmp_path: Path) -> None:
    probe = {"model": "vit-micro", "from_scratch": False, "freeze": "backbone", "head_init": "random"}
    sizes = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    plain, averaged = (
        train(config(**probe, **sizes, ema=ema, epochs=4), output=tmp_path / str(ema)) for ema in (0.0, 0.9)
    )
    assert not torch.equal(*(weights(run.run / "last")["classifier.weight"] for run in (plain, averaged)))
    assert evaluate(averaged.checkpoint, device="cpu").accuracy == averaged.scores["test"].accuracy
