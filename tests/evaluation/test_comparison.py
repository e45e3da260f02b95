"""Comparing runs: the tests against their definitions and simulations, and what is refused."""

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import bootstrap
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from tests.evaluation.test_results import config
from vitft import DataError, ModelError, UsageError, compare, train
from vitft.cli.app import app
from vitft.cli.tables import comparison_report
from vitft.evaluation import comparison
from vitft.evaluation.comparison import bootstrap_f1, macro_f1, mcnemar, paired_difference
from vitft.evaluation.results import predictions_file, read_results


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 2), (30, 12), (0, 8)])
def test_mcnemar_is_the_tail_of_fair_coins(gained: int, lost: int) -> None:
    n, most = gained + lost, max(gained, lost)
    tail = sum(comb(n, k) for k in range(most, n + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_equally_good_runs_are_called_different_about_as_often_as_promised() -> None:
    """1,000 pairs of classifiers that are right on 80 % of 4,000 images, half of the time on the same ones."""
    rng = np.random.default_rng(0)
    called = inside = 0
    for _ in range(1000):
        both = rng.random(4000) < 0.5
        one, other = rng.random((2, 4000)) < 0.8
        other = np.where(both, one, other)
        gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
        called += mcnemar(gained, lost) < 0.05
        found = paired_difference(gained, lost, 4000)
        inside += found.low <= 0 <= found.high
    assert 30 <= called <= 70
    assert 930 <= inside <= 970


def test_the_interval_of_a_difference_holds_for_few_images() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        one, other = rng.random(40) < 0.9, rng.random(40) < 0.8
        found = paired_difference(int((one & ~other).sum()), int((other & ~one).sum()), 40)
        inside += found.low <= 0.1 <= found.high
    assert inside >= 0.93 * 2000


def answers(seed: int, count: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of images and two classifiers' answers, of which the first is right more often."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(5, count, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    one, other = (np.where(rng.random(count) < p, truth, rng.integers(0, 5, count)) for p in (0.8, 0.7))
    return truth, one, other


def test_macro_f1_is_scikit_learns() -> None:
    truth, one, _ = answers(0)
    assert macro_f1(truth, one) == pytest.approx(f1_score(truth, one, average="macro"))


def test_the_bootstrap_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so many draws that the ends of two intervals are within an eighth of their standard error."""
    monkeypatch.setattr(comparison, "RESAMPLES", 20_000)
    truth, one, other = answers(2, 200)

    def f1(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Its own definition, of each draw (R, n)."""
        scores = []
        for label in range(5):
            both = ((truth == label) & (predicted == label)).sum(axis=-1)
            scores.append(2 * both / ((truth == label).sum(axis=-1) + (predicted == label).sum(axis=-1)))
        return np.mean(scores, axis=0)

    theirs = bootstrap(
        (truth, one, other), lambda t, a, b, axis: f1(t, a) - f1(t, b), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, batch=1000, rng=np.random.default_rng(3),
    )  # fmt: skip
    found = bootstrap_f1(truth, one, other)
    assert found.value == pytest.approx(f1_score(truth, one, average="macro") - f1_score(truth, other, average="macro"))
    ends, within = (theirs.confidence_interval.low, theirs.confidence_interval.high), theirs.standard_error / 8
    assert (found.low, found.high) == pytest.approx(ends, abs=within)
    assert bootstrap_f1(truth, one, one).value == 0


@pytest.mark.slow
def test_equally_good_runs_have_an_interval_of_macro_f1_around_0_about_as_often_as_promised() -> None:
    """1,000 pairs that are right on 84 % of 2,000 images of five unequal classes, half of the answers in common."""
    rng = np.random.default_rng(0)
    called = apart = 0
    for number in range(1000):
        truth = rng.choice(5, 2000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
        one, other = (np.where(rng.random(2000) < 0.8, truth, rng.integers(0, 5, 2000)) for _ in range(2))
        other = np.where(rng.random(2000) < 0.5, one, other)
        found = bootstrap_f1(truth, one, other, seed=number)
        apart += not found.low <= 0 <= found.high
        right, also = one == truth, other == truth
        called += mcnemar(int((right & ~also).sum()), int((also & ~right).sum())) < 0.05
    print(f"called different: {called / 10} % by McNemar, {apart / 10} % by macro F1")  # noqa: T201
    assert 30 <= called <= 70
    assert 30 <= apart <= 70


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of one run, a worse one, and one with other images."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "a": {}, "b": {"seed": 1}, "worse": {"lr": 1e-5}, "other": {"split_seed": 1},
    }  # fmt: skip
    common = {"max_eval_samples": 200, "max_train_samples": 200, "epochs": 6, "lr": 5e-3}
    return {
        name: train(config(**common | change), output=folder / name).run for name, change in changes.items()
    }  # fmt: skip


def test_a_worse_run_is_called_worse_and_where(runs: dict[str, Path]) -> None:
    found = compare([runs["a"], runs["worse"], runs["b"]])
    worse, seed = found.others
    a, b = (read_results(runs[name]).predictions("test") for name in ("a", "worse"))
    right, other = a.predicted == a.truth, b.predicted == b.truth
    assert (worse.gained, worse.lost) == ((other & ~right).sum(), (right & ~other).sum())
    assert worse.difference.value == pytest.approx(other.mean() - right.mean())
    assert worse.p < 0.05
    assert worse.difference.high < 0
    for label, change in worse.recalls.items():
        of = a.truth == a.labels.index(label)
        assert change == pytest.approx(other[of].mean() - right[of].mean())
    assert found.settings == {"lr": [5e-3, 1e-5, 5e-3], "seed": [0, 0, 1]}
    assert [group[0] for group in found.groups] == [(str(runs["a"]), str(runs["b"])), (str(runs["worse"]),)]
    accuracies = [found.accuracy, seed.accuracy]
    assert found.groups[0][1:] == pytest.approx((np.mean(accuracies), np.std(accuracies, ddof=1)))


def test_the_table_says_it_in_words(runs: dict[str, Path]) -> None:
    console = Console(width=100, record=True, force_terminal=False)
    console.print(comparison_report(compare([runs["a"], runs["worse"], runs["b"]])))
    text = " ".join(console.export_text().split())
    assert "worse: worse;" in text
    assert "recall, most changed:" in text
    assert "2 seeds," in text
    assert "p is of each comparison alone" in text


def test_what_cannot_be_compared_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"was scored on other test images than|was scored on other validation images"):
        compare([runs["a"], runs["other"]], split="validation")
    with pytest.raises(UsageError, match="at least two"):
        compare([runs["a"]])
    with pytest.raises(UsageError, match="given twice"):
        compare([runs["a"], runs["a"]])
    with pytest.raises(ModelError, match="no run folder"):
        compare([runs["a"], tmp_path])
    with pytest.raises(UsageError, match="was scored on validation, test"):
        compare([runs["a"], runs["b"]], split="train")
    kept = predictions_file(runs["b"], "test").rename(tmp_path / "kept.parquet")
    with pytest.raises(ModelError, match=r"no predictions-test\.parquet"):
        compare([runs["a"], runs["b"]])
    kept.rename(predictions_file(runs["b"], "test"))


def test_the_command(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ["compare", str(runs["a"]), str(runs["b"])]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "images gained" in done.stdout
    document = json.loads(CliRunner().invoke(app, [*words, "--json", "--plot", str(tmp_path / "curves.png")]).stdout)
    assert (tmp_path / "curves.png").is_file()
    assert document["split"] == "test"
    assert document["others"][0]["run"] == str(runs["b"])
    assert CliRunner().invoke(app, words[:2]).exit_code == 2
