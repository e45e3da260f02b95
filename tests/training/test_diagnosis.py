"""What is told of a run that came to nothing, or became slow."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.test_trainer import config
from vitft import TrainConfig, train
from vitft.evaluation.metrics import Metrics, score
from vitft.training.diagnosis import PaceWatch, learned_nothing


def scored(truth: list[int], taken: list[int]) -> Metrics:
    top = np.array([[label, (label + 1) % 3, (label + 2) % 3] for label in taken])
    labels = ["ant", "bee", "cat"]
    losses = np.ones(len(truth))
    return score(np.array(truth), top, losses, labels, split="test", split_hash="0", elapsed_s=1.0)


LARGE = 86_000_000  # weights


def test_predicting_a_single_class_is_reported_with_its_name() -> None:
    told = learned_nothing(scored([0, 1, 2] * 10, [1] * 30), TrainConfig(freeze="backbone", lr=2e-5), 1000, LARGE)
    assert told is not None
    assert "every image of test was predicted as bee" in told
    assert (
        "--lr 2e-05 is unusually low: one 500th of the usual rate for a head alone with adamw; try --lr 1e-2." in told
    )


def test_no_better_than_the_most_frequent_class_is_reported() -> None:
    told = learned_nothing(scored([0] * 20 + [1] * 5 + [2] * 5, [0] * 15 + [1] * 15), TrainConfig(), 1000, LARGE)
    assert told is not None
    assert "no better than predicting ant for every image" in told


@pytest.mark.parametrize(
    ("truth", "taken"),
    [
        ([0, 1, 2] * 10, [0, 1, 2] * 9 + [0, 0, 0]),  # it has learned
        ([0] * 30, [0] * 30),  # there is but one class to name
        ([0, 1, 2], [1, 1, 1]),  # too few to say
    ],
)
def test_otherwise_nothing_is_told(truth: list[int], taken: list[int]) -> None:
    assert learned_nothing(scored(truth, taken), TrainConfig(), 1000, LARGE) is None


@pytest.mark.parametrize(
    ("settings", "steps", "remedy"),
    [
        ({"freeze": "backbone", "lr": 2e-5}, 5000, "--lr 1e-2"),
        ({"freeze": "backbone", "lr": 1e-2}, 50, "more --epochs"),
        ({"from_scratch": True, "lr": 2e-5}, 5000, "--lr 1e-3"),
        ({}, 50, "more --epochs"),
        ({"lr": 1e-2}, 5000, "--lr 2e-5"),
        ({}, 5000, "vitft data check"),
    ],
)
def test_the_likely_cause_follows_from_the_settings(settings: dict[str, object], steps: int, remedy: str) -> None:
    told = learned_nothing(scored([0, 1, 2] * 10, [1] * 30), TrainConfig(**settings), steps, LARGE)
    assert told is not None
    assert remedy in told


def test_a_run_that_learned_nothing_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(lr=1e-9, max_eval_samples=60), output=tmp_path / "run")
    assert capsys.readouterr().err.count("the model has learned nothing useful") == 1


def test_a_slowdown_to_a_third_is_reported_once() -> None:
    watch = PaceWatch()
    assert [watch.slowed(pace) is not None for pace in (300.0, 120.0, 330.0, 109.0, 20.0, 300.0)] == [
        False, False, False, True, False, False,
    ]  # fmt: skip
