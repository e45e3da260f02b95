"""Sweeps: the trials, what is kept of them, and that none is lost or trained twice."""

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import tests.training.test_trainer
from vitft import DataError, ModelError, TrainConfig, TrainingError, UsageError, resume_sweep, sweep, train
from vitft.cli.app import app
from vitft.cli.tables import sweep_report
from vitft.config.recipe import load_config
from vitft.data.loader import TrainLoader
from vitft.errors import as_flag
from vitft.evaluation.metrics import Score
from vitft.io.atomic import lock_folder
from vitft.sweeping import sweep as sweeping
from vitft.sweeping.space import read_space
from vitft.sweeping.study import Handle, Study
from vitft.training.loop import Result

TINY = tests.training.test_trainer.TINY | {"batch_size": 32, "epochs": 1}


def config(**changes: object) -> TrainConfig:
    return TrainConfig.parse(TINY | changes)


def story(result: Any) -> list[Any]:
    """What a sweep found, without the times."""
    found = []
    for one in result.trials:
        scores = [{k: v for k, v in score.summary().items() if k != "images_per_s"} for score in one.scores]
        found.append((one.number, one.settings, one.state, one.reason, scores))
    return found


def scored(accuracy: float) -> Score:
    values = {"accuracy_interval": (0.3, 0.5), "macro_f1": 0.3, "balanced_accuracy": 0.2, "loss": 1.5, "top5": 1.0}
    return Score(accuracy=accuracy, count=10, split="validation", split_hash="", images_per_s=1.0, **values)


class Killed(BaseException):
    """Like a loss of power, nothing handles it."""


@contextmanager
def killed_in(batch_number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lose power at the n-th batch."""
    taken, batch = [0], TrainLoader.batch

    def until(self: TrainLoader, step: int) -> Any:
        taken[0] += 1
        if taken[0] == batch_number:
            raise Killed
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "batch", until)
        with pytest.raises(Killed):
            yield


def test_every_combination_is_tried_and_the_best_becomes_a_recipe(tmp_path: Path) -> None:
    result = sweep(config(), {"layer_decay": "0.5,1", "lr": [1e-4, 3e-3]}, output=tmp_path / "sweep")
    settings = [one.settings for one in result.trials]
    assert settings[0] == {"layer_decay": 1.0, "lr": 3e-3}, "the settings as given are the first trial"
    assert result.base == 1
    assert sorted((one["layer_decay"], one["lr"]) for one in settings) == [
        (0.5, 1e-4), (0.5, 3e-3), (1.0, 1e-4), (1.0, 3e-3),
    ]  # fmt: skip
    assert [one.state for one in result.trials] == ["complete"] * 4
    accuracies = [one.scores[0].accuracy for one in result.trials]
    assert result.best.scores[0].accuracy == max(accuracies)
    assert result.best.number == 1 + accuracies.index(max(accuracies))
    again = train(load_config(str(result.recipe), {}), output=tmp_path / "again")
    assert again.scores["validation"].loss == result.best.scores[0].loss
    assert "test" in again.scores
    header = result.recipe.read_text()
    assert f"{100 * max(accuracies):.2f} %" in header
    assert f"on {result.best.scores[0].count} validation images" in header


def test_a_sweep_of_files_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, first in (("a", 1), ("b", 2)):
        weights = {str(digit): first + digit for digit in range(10)}
        (tmp_path / f"{name}.json").write_text(json.dumps(weights))
    monkeypatch.chdir(tmp_path)
    with killed_in(1, monkeypatch):
        sweep(config(class_weights="a.json"), {"class_weights": "a.json,b.json"}, output=tmp_path / "sweep")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = resume_sweep(tmp_path / "sweep")
    assert [one.state for one in result.trials] == ["complete"] * 2
    assert [one.settings["class_weights"] for one in result.trials] == [str(tmp_path / f"{n}.json") for n in "ab"]
    assert load_config(str(result.recipe), {}).class_weights == result.best.settings["class_weights"]


def test_test_images_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = sweep(config(), {"augment": "none,flip"}, output=tmp_path / "sweep")
    seen = [json.loads(line) for file in tmp_path.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    assert {line["split"] for line in seen} == {"train", "validation"}
    for file in tmp_path.rglob("splits.json"):
        splits = json.loads(file.read_text())["splits"]
        assert "pixels" in splits["validation"]
        assert "pixels" not in splits["test"], "decoded"
    assert "skip_test" not in yaml.safe_load(result.recipe.read_text())


@pytest.mark.parametrize("name", ["what?", "50%25 #1", "{x}"])
def test_all_of_a_sweep_is_in_its_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Study(Path(name), {}, config(), total=1)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "study.db").is_file()


def test_the_model_below_an_adapter_is_removed_too(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = TrainConfig(
        dataset="digits", model="vit-micro", lora_rank=2, max_steps=1, max_train_samples=50, max_eval_samples=50,
        device="cpu", threads=1, compile="off", reference_images=0,
    )  # fmt: skip
    result = sweep(settings, {"lr": "1e-6,3e-3"}, output=tmp_path / "sweep")
    kept = {file.relative_to(result.folder / "trials").parts[0] for file in result.folder.rglob("*.safetensors")}
    assert kept == {str(result.best.number)}
    assert (result.folder / "trials" / str(result.best.number) / "seed-0" / "base").is_dir()


def test_only_the_best_trial_keeps_its_weights(tmp_path: Path) -> None:
    result = sweep(config(), {"lr": "1e-6,3e-3"}, output=tmp_path / "sweep")
    kept = {file.relative_to(result.folder / "trials").parts[0] for file in result.folder.rglob("model.safetensors")}
    assert kept == {str(result.best.number)}
    assert len(list(result.folder.rglob("config.yaml"))) == 2


def test_seeds_repeat_a_run_and_their_mean_is_compared(tmp_path: Path) -> None:
    alone = [train(config(seed=seed), output=tmp_path / str(seed)).scores["validation"] for seed in (5, 6, 7)]
    result = sweep(config(seed=5), seeds=3, output=tmp_path / "sweep")
    (only,) = result.trials
    assert [score.loss for score in only.scores] == [score.loss for score in alone]
    accuracies = [score.accuracy for score in alone]
    found = result.to_dict()["trials"][0]
    assert found["mean"] == pytest.approx(statistics.mean(accuracies))
    assert found["spread"] == pytest.approx(statistics.stdev(accuracies))


@pytest.mark.parametrize("batch_number", [4, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_a_killed_sweep_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_number: int
) -> None:
    # Two runs of four batches for each trial, and a range: later trials depend on earlier ones.
    vary, settings = {"lr": "1e-4..1e-2"}, config(epochs=2, save_every=1)
    whole = sweep(settings, vary, trials=2, seeds=2, output=tmp_path / "whole")
    with killed_in(batch_number, monkeypatch):
        sweep(settings, vary, trials=2, seeds=2, output=tmp_path / "cut")
    resumed = resume_sweep(tmp_path / "cut")
    assert story(resumed) == story(whole)
    assert story(resume_sweep(tmp_path / "cut")) == story(whole), "nothing is left to do"


def test_two_processes_never_work_on_one_trial(tmp_path: Path) -> None:
    settings = config()
    space = read_space({"lr": "1e-4,1e-3,1e-2"}, TINY)
    one, other = (Study(tmp_path, space, settings, total=3) for _ in range(2))
    with one.claimed() as first, other.claimed() as second, one.claimed() as third:
        assert [trial.number for trial in (first, second, third)] == [1, 2, 3]
        with other.claimed() as none:
            assert none is None, "all are taken"
    with other.claimed() as interrupted:  # as if the first process had been killed
        assert (interrupted.number, interrupted.settings) == (first.number, first.settings)


def test_a_run_below_the_median_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The settings as given have the first trial; the others follow in an order that the seed gives.
    vary = {"lr": "3e-3,1e-8,4e-3,5e-3,6e-3,7e-3"}
    result = sweep(config(epochs=4, eval_every=2, seed=2), vary, output=tmp_path / "sweep")
    lowest = next(one for one in result.trials if one.settings["lr"] == 1e-8)
    assert lowest.number > 4, "pruning begins after four trials"
    assert lowest.state == "pruned"
    run = result.folder / "trials" / str(lowest.number) / "seed-2"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < 8, "of the steps"
    assert lowest.reason == f"below the median after {max(steps) / 8:.0%} of the steps"
    assert all(one.state == "complete" for one in result.trials[:4])


def test_a_trial_that_is_killed_before_it_is_pruned_is_still_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sweeping.Plan(TINY | {"lr": 1e-3}, {"lr": "1e-3,1e-4"}, trials=2, seeds=2)
    study = Study(tmp_path, plan.space, plan.base, plan.trials)

    def killed(self: Handle) -> None:
        raise Killed

    def trained(*_: Any, callbacks: list[Any], **__: Any) -> Result:
        callbacks[0].trial._trial.set_user_attr("pruned_at", 0.5)
        return Result(tmp_path, tmp_path, 1, {"validation": scored(0.4)})

    monkeypatch.setattr(sweeping, "train", trained)
    with monkeypatch.context() as patch:
        patch.setattr(Handle, "prune", killed)
        with pytest.raises(Killed):
            sweeping._try_one(study, plan, tmp_path)
    sweeping._try_one(study, plan, tmp_path)
    assert [(one.state, len(one.scores)) for one in study.trials()] == [("pruned", 1)]


def test_the_time_of_a_trial_is_that_of_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before an interruption, which the run itself counts, and of runs that fail."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(sweeping.time, "monotonic", lambda: next(clock))
    plan = sweeping.Plan(TINY | {"lr": 1e-3}, {"lr": "1e-3,1e-4"}, trials=2, seeds=2)
    study = Study(tmp_path, plan.space, plan.base, plan.trials)

    def trained(settings: TrainConfig, **_: Any) -> Result:
        if settings.seed == 1:
            raise TrainingError("loss is not finite.")
        return Result(tmp_path, tmp_path, 1, {"validation": scored(0.4)}, seconds={"training": 100.0, "other": 1.0})

    monkeypatch.setattr(sweeping, "train", trained)
    sweeping._try_one(study, plan, tmp_path)
    (only,) = study.trials()
    assert (only.state, only.seconds) == ("failed", 111.0)


def test_a_trial_that_fails_is_listed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: TrainConfig, **rest: Any) -> Result:
        if settings.lr == 5e-3:
            raise TrainingError("loss is not finite at step 2.")
        if settings.lr == 6e-3:
            raise TrainingError("out of memory.")
        return train(settings, **rest)

    monkeypatch.setattr(sweeping, "train", fails)
    result = sweep(config(), {"lr": "3e-3,5e-3,6e-3"}, output=tmp_path / "sweep")
    reasons = {one.settings["lr"]: (one.state, one.reason) for one in result.trials}
    assert reasons == {
        3e-3: ("complete", ""), 5e-3: ("failed", "loss is not finite at step 2"), 6e-3: ("failed", "out of memory"),
    }  # fmt: skip
    with pytest.raises(TrainingError, match="all 2 trials failed; the first: loss is not finite"):
        sweep(config(lr=5e-3), {"lr": "5e-3,6e-3"}, output=tmp_path / "none")


def test_settings_that_contradict_each_other_fail_their_trial_alone(tmp_path: Path) -> None:
    vary = {"early_stopping": [1, None], "min_delta": [0.0, 0.01]}
    result = sweep(config(early_stopping=1), vary, output=tmp_path / "sweep")
    states = {(one.settings["early_stopping"], one.settings["min_delta"]): one for one in result.trials}
    assert {values: one.state for values, one in states.items()} == {
        (1, 0.0): "complete", (1, 0.01): "complete", (None, 0.0): "complete", (None, 0.01): "failed",
    }  # fmt: skip
    assert "applies only to early stopping" in states[None, 0.01].reason
    with pytest.raises(UsageError, match="applies only to adamw"):  # with any value of the others
        sweep(config(betas="0.9,0.99"), {"optimizer": "adamw,sgd"}, output=tmp_path / "other")


@pytest.mark.parametrize("sizes", ["28,29,42", "29,28,42"])
def test_an_impossible_trial_is_named_and_the_others_are_tried(tmp_path: Path, sizes: str) -> None:
    """Also if it is the first: 29 pixels are no whole number of patches."""
    result = sweep(config(), {"image_size": sizes}, output=tmp_path / "sweep")
    states = {one.settings["image_size"]: one.state for one in result.trials}
    assert states == {28: "complete", 29: "failed", 42: "complete"}
    shown = Console(width=200, record=True, force_terminal=False)
    shown.print(sweep_report(result))
    assert "patch" in next(line for line in shown.export_text().splitlines() if " 29 " in line)
    assert story(resume_sweep(tmp_path / "sweep")) == story(result)


@pytest.mark.parametrize("kind", [UsageError, ModelError, DataError])
def test_a_failed_trial_does_not_stop_the_sweep_from_going_on(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fails(settings: TrainConfig, **rest: Any) -> Result:
        tried.append(settings.lr)
        if settings.lr in (3e-3, 6e-3):
            raise kind(f"{settings.lr} is impossible.")
        return train(settings, **rest)

    monkeypatch.setattr(sweeping, "train", fails)
    vary = {"lr": "3e-3,5e-3,6e-3"}
    with pytest.raises(kind, match=r"0\.003 is impossible"):  # the settings as given: those of all
        sweep(config(), vary, output=tmp_path / "sweep")
    assert tried == [3e-3]
    result = resume_sweep(tmp_path / "sweep")
    assert sorted(tried) == [3e-3, 5e-3, 6e-3], "none twice"
    assert {one.settings["lr"]: (one.state, one.reason) for one in result.trials} == {
        3e-3: ("failed", "0.003 is impossible"), 5e-3: ("complete", ""), 6e-3: ("failed", "0.006 is impossible"),
    }  # fmt: skip


def test_what_is_wrong_with_all_trials_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(settings: TrainConfig, **_rest: Any) -> Result:
        tried.append((settings.layer_decay, settings.lr))
        raise ModelError("no such model.")

    monkeypatch.setattr(sweeping, "train", fails)
    with pytest.raises(ModelError, match="no such model"):
        sweep(config(), {"layer_decay": "0.5,0.6", "lr": "1e-4,1e-3"}, output=tmp_path / "sweep")
    assert any(a != c and b != d for a, b in tried for c, d in tried), "no value of theirs is to blame"
    assert len(tried) < 4


def test_a_trial_completed_meanwhile_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process looks for the best trial, another completes a better one."""
    settings, listed = config(), Study.trials
    study, other = (Study(tmp_path, read_space({"lr": "1e-4,1e-3"}, TINY), settings, total=2) for _ in range(2))
    kept = [tmp_path / "trials" / str(number) / "seed-0" / "best" for number in (1, 2)]
    for folder in kept:
        folder.mkdir(parents=True)
    with study.claimed() as worse, other.claimed() as better:

        def complete(trial: Any, accuracy: float) -> None:
            trial.record(0, scored(accuracy), 1.0)
            trial.complete(accuracy)

        def then(self: Study) -> Any:
            found = listed(self)
            if not any(one.state == "complete" and one.number == better.number for one in found):
                complete(better, 0.9)
            return found

        complete(worse, 0.4)
        monkeypatch.setattr(Study, "trials", then)
        sweeping._keep_best(study, "accuracy")
        assert [folder.is_dir() for folder in kept] == [True, True]
        sweeping._keep_best(study, "accuracy")
        assert [folder.is_dir() for folder in kept] == [False, True]


def test_one_process_at_a_time_removes_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, held = sweeping.remove_folder, []

    def asks(folder: Path) -> None:
        with lock_folder(tmp_path / "sweep") as free:
            held.append(not free)
        remove(folder)

    monkeypatch.setattr(sweeping, "remove_folder", asks)
    sweep(config(), {"lr": "1e-6,3e-3"}, output=tmp_path / "sweep")
    assert held
    assert all(held)


def test_a_sweep_can_become_longer(tmp_path: Path) -> None:
    first = sweep(config(), {"lr": "1e-4..1e-2"}, trials=2, output=tmp_path / "sweep")
    longer = resume_sweep(tmp_path / "sweep", trials=3)
    assert story(longer)[:2] == story(first)
    assert len(longer.trials) == longer.planned == 3
    with pytest.raises(UsageError, match="has 3; give at least as many"):
        resume_sweep(tmp_path / "sweep", trials=2)


def test_what_cannot_begin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nothing to try"):
        sweep(config(), output=tmp_path / "a")
    with pytest.raises(UsageError, match="no validation images"):
        sweep(config(val_fraction=0), {"lr": "1e-4,1e-3"}, output=tmp_path / "b")
    with pytest.raises(UsageError, match="no dataset"):
        sweep(TrainConfig(), {"lr": "1e-4,1e-3"}, output=tmp_path / "c")
    with pytest.raises(ModelError, match="no folder of a sweep"):
        resume_sweep(tmp_path)
    with pytest.raises(UsageError, match=r"is not empty; choose another, or go on with it: vitft sweep --resume"):
        sweep(config(), {"lr": "1e-4,1e-3"}, output=tmp_path / "b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="each trial trains in one process"):
        sweep(config(), {"lr": "1e-4,1e-3"}, output=tmp_path / "d")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vitft\[sweep\]'"):
        sweep(config(), {"lr": "1e-4,1e-3"}, output=tmp_path / "e")


def test_the_table_has_the_best_first_and_says_when_it_may_be_luck(tmp_path: Path) -> None:
    result = sweep(config(), {"lr": "1e-6,2e-3,3e-3"}, seeds=2, output=tmp_path / "sweep")
    console = Console(width=80, record=True, force_terminal=False)
    console.print(sweep_report(result))
    text = console.export_text()
    rows = [line.split() for line in text.splitlines() if "–" in line]
    ranked = sorted(result.trials, key=lambda one: -sum(score.accuracy for score in one.scores))
    assert [row[0] for row in rows] == [str(one.number) for one in ranked]
    assert "which chose the best of 3" in " ".join(text.split())
    given = next(one for one in result.trials if one.number == result.base)
    low, _ = sweeping.interval(result.best)
    expected = given.number != result.best.number and sweeping.mean(given, "accuracy") >= low
    assert ("cannot tell them apart" in " ".join(text.split())) == result.undecided == expected


@pytest.mark.parametrize(("by", "sign"), [("accuracy", 1), ("macro-f1", 1), ("balanced-accuracy", 1), ("loss", -1)])
def test_scores_are_compared_by_the_metric_of_the_run(by: str, sign: int) -> None:
    values = {"accuracy": 0.4, "macro_f1": 0.3, "balanced_accuracy": 0.2, "loss": 1.5}
    score = Score(accuracy_interval=(0.3, 0.5), top5=1.0, count=10, split="validation", split_hash="", images_per_s=1.0, **values)  # fmt: skip  # noqa: E501
    assert score.by(by) == sign * values[by.replace("-", "_")]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dataset", "digits", "--set", "lr"], 2, "--set lr: give a setting and its values, as lr=1e-5..1e-3"),
        (["--dataset", "digits", "--set", "lr=1,2", "--set", "lr=3,4"], 2, "--set lr: is given twice"),
        (["--dataset", "digits", "--set", "lrr=1,2"], 2, "did you mean lr"),
        (["--set", "lr=1,2"], 2, "no dataset; add --dataset"),
        (["pretrain-vit-micro", "--set", "layers=2,x"], 2, "--layers should be a valid integer"),
        (["nothing", "--set", "lr=1,2"], 2, "recipe nothing: neither a file nor a known recipe"),
        ([".", "--set", "lr=1,2"], 2, "a folder of images is a dataset: --dataset ."),
        (["--resume", "elsewhere"], 4, "elsewhere: no folder of a sweep"),
        (["--resume", "elsewhere", "--lr", "1"], 2, "only --trials can change"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["sweep", *words])
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if "loading" not in line]) == 1


def test_the_command_prints_the_table_and_the_next_command(tmp_path: Path) -> None:
    flags = [word for name, value in TINY.items() if value is not True for word in (as_flag(name), str(value))]
    words = ["sweep", *flags, "--from-scratch", "--set", "lr=1e-4,3e-3", "--output", str(tmp_path / "sweep")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"next: vitft train --recipe {tmp_path / 'sweep' / 'best.yaml'}" in result.stdout
    again = CliRunner().invoke(app, ["sweep", "--resume", str(tmp_path / "sweep"), "--json"])
    document = json.loads(again.stdout)
    assert [one["settings"]["lr"] for one in document["trials"]] == [3e-3, 1e-4]
    assert document["best"] in (1, 2)
