"""The list of runs, and the newest of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.evaluation.test_results import config
from vitft import UsageError, train
from vitft.cli.app import app
from vitft.evaluation.runs import list_runs, newest_run
from vitft.io.atomic import lock_folder
from vitft.training.loop import Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one that was killed, one that has not begun, one that is damaged, and no run."""
    folder = tmp_path_factory.mktemp("runs")
    train(config(), output=folder / "first")
    train(config(epochs=1, skip_test=True), output=folder / "second")
    killed = train(config(epochs=2, keep_finished=2), output=folder / "killed").run
    for name in ("results.json", "best", "last", "checkpoints/step-000006"):
        shutil.rmtree(killed / name) if (killed / name).is_dir() else (killed / name).unlink()
    (folder / "first" / "results.json").unlink()  # as an earlier version left it
    (folder / "new" / "checkpoints").mkdir(parents=True)
    (folder / "new" / "config.yaml").write_text((folder / "first" / "config.yaml").read_text())
    (folder / "damaged" / "checkpoints").mkdir(parents=True)
    (folder / "damaged" / "config.yaml").write_text("dataset: [")
    (folder / "else").mkdir()
    for age, name in enumerate(("damaged", "new", "killed", "second", "first")):
        for file in (folder / name).glob("*.*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    return folder


def test_every_run_is_listed_with_how_far_it_came_newest_first(folder: Path) -> None:
    runs = list_runs(folder)
    assert [one.run.name for one in runs] == ["damaged", "new", "killed", "second", "first"]
    assert [one.state for one in runs] == ["damaged", "not started", "interrupted", "finished", "finished"]
    assert [(one.step, one.total_steps) for one in runs[1:]] == [(0, None), (3, 6), (3, 3), (9, 9)]
    first, second = runs[4], runs[3]
    assert (first.dataset, first.model) == ("digits", "vit-micro")
    assert first.score.split == "test"
    assert second.score.split == "validation"
    assert first.bytes == sum(file.stat().st_size for file in first.run.rglob("*") if file.is_file())
    with lock_folder(folder / "killed"):
        assert next(one.state for one in list_runs(folder) if one.run.name == "killed") == "training"


def test_a_checkpoint_that_is_removed_meanwhile_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, scan = list_runs(folder), os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "best":
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    after = list_runs(folder)
    assert [one.state for one in after] == [one.state for one in before]
    assert sum(one.bytes for one in after) < sum(one.bytes for one in before)


def test_before_the_first_run_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["runs", "ls"])
    assert (done.exit_code, done.stdout) == (0, "no runs in runs; vitft train makes one\n")
    assert json.loads(CliRunner().invoke(app, ["runs", "ls", "--json"]).stdout) == {"runs": []}
    (tmp_path / "runs").write_text("a file")
    assert CliRunner().invoke(app, ["runs", "ls"]).exit_code == 2


def test_the_newest_run_has_a_model(folder: Path, tmp_path: Path) -> None:
    assert newest_run(folder).name == "killed"
    with pytest.raises(UsageError, match="no run with a model"):
        newest_run(tmp_path)


def test_the_commands_show_runs_and_the_worst_mistakes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(folder)
    run = CliRunner(env={"COLUMNS": "100"}).invoke
    listed = run(app, ["runs", "ls"])
    assert listed.exit_code == 0, listed.output
    for word in ("first", "not started, 0/?", "interrupted, 3/6", "finished", "digits", "vit-micro"):
        assert word in listed.stdout
    names = [one["run"] for one in json.loads(run(app, ["runs", "ls", "--json"]).stdout)["runs"]]
    assert names == [f"runs/{name}" for name in ("damaged", "new", "killed", "second", "first")]
    assert "no such folder" in run(app, ["runs", "ls", "nowhere"]).stderr
    scored = run(app, ["eval", "--errors", "3", "--predictions", "said.parquet"])
    assert scored.exit_code == 0, scored.output
    assert "runs/killed, the newest run" in scored.stderr
    assert "Misclassified, surest first:" in scored.stdout
    image = str(Path(__file__).parents[2] / "docs" / "digits" / "nine.png")
    newest, named = (run(app, ["predict", image, *words]) for words in ((), ("--checkpoint", "runs/killed")))
    assert (newest.exit_code, newest.stderr.count("runs/killed, the newest run")) == (0, 1)
    assert newest.stdout == named.stdout
    assert "newest" not in named.stderr
    assert (tmp_path / "said.parquet").is_file()
    wrong = json.loads(run(app, ["eval", "runs/first", "--errors", "3", "--json"]).stdout)["errors"]
    assert len(wrong) == 3
    assert wrong[0]["confidence"] >= wrong[1]["confidence"] >= wrong[2]["confidence"]
    assert all(one["label"] != one["predicted"] for one in wrong)
    assert "give a .parquet file" in run(app, ["eval", "runs/first", "--predictions", "said.csv"]).stderr


def test_training_can_print_its_result_as_json(tmp_path: Path) -> None:
    words = ["train", "--dataset", "digits", "--model", "vit-micro", "--max-train-samples", "40", "--max-steps", "2"]
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "run"), "--json"])
    document = json.loads(done.stdout)
    assert document["checkpoint"] == str(tmp_path / "run" / "best")
    assert document["scores"]["test"]["count"] > 300
    assert document["speed"]["images_per_s"] > 0
    assert Result.__dataclass_fields__.keys() == document.keys()
