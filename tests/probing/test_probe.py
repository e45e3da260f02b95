"""`vitft probe`: one pass, validation images alone, and a report that fits a terminal."""

import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.forked import finish_two
from vitft import TrainConfig
from vitft.cli import probing
from vitft.cli.app import app
from vitft.errors import DataError, UsageError, as_flag
from vitft.io import console
from vitft.models.load import BUNDLED
from vitft.probing import probe as probing_module
from vitft.probing.plot import plot_few_shot
from vitft.probing.probe import ProbeResult, next_commands, probe
from vitft.training import setup
from vitft.training.cost.estimate import Cost
from vitft.training.setup import prepare

SMALL: dict[str, Any] = {
    "dataset": "digits", "model": BUNDLED, "image_size": 28, "max_train_samples": 150, "max_eval_samples": 60,
    "device": "cpu", "precision": "fp32", "threads": 1, "seed": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitft.probing.classifiers.DRAWS", 2)
        return probe(TrainConfig(**SMALL))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried out: an image takes three seconds."""
    monkeypatch.setattr("vitft.probing.probe.cost", lambda prepared, enough_s: Cost(9.0, 0.0, 3.0))
    monkeypatch.setattr("vitft.probing.probe.memory_bytes", lambda *given: None)
    monkeypatch.setattr("vitft.probing.probe.few_shot", lambda *given: [])


def vitft(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


def test_the_scores_are_of_the_validation_images_of_a_run(result: ProbeResult) -> None:
    split = prepare(TrainConfig(**SMALL)).splits["validation"]
    assert (result.metrics.split, result.metrics.split_hash) == ("validation", split.hash)
    assert result.metrics.count == len(split.rows) == 60
    assert (result.images, result.width) == (150, 64)
    assert result.metrics.accuracy == max(trial.accuracy for trial in result.logistic)
    assert result.metrics.accuracy > 0.5  # by chance 0.1
    assert [point.per_class for point in result.few_shot] == [1, 2, 5, 10]
    assert result.tuning.seconds > 0
    assert result.tuning.memory_bytes is not None


def counted(folder: str) -> None:
    """Each process writes down how many images it decoded, and how many the backbone read."""
    real, read, decode_all, decoded = probing_module.backbone, list[int](), setup.decode_all, list[int]()

    def decode(rows: Any, *given: Any, **how: Any) -> Any:
        decoded.append(len(rows))
        Path(folder, f"decoded-{os.environ['RANK']}").write_text(str(sum(decoded)))
        return decode_all(rows, *given, **how)

    setup.decode_all = decode  # type: ignore[assignment]

    def backbone(*given: Any) -> Any:
        features = real(*given)

        def count(pixels: Any) -> Any:
            read.append(len(pixels))
            Path(folder, os.environ["RANK"]).write_text(str(sum(read)))
            return features(pixels)

        return count

    probing_module.backbone = backbone
    probing_module.cost = lambda prepared, enough_s: Cost(1e-3, 1e-3, 1e-3)


def test_two_processes_share_the_images(result: ProbeResult, tmp_path: Path) -> None:
    dataset, *given = SMALL.items()
    words = [dataset[1], *(word for name, value in given for word in (as_flag(name), str(value)))]
    plot = tmp_path / "curve.png"
    (first, said), (second, silent) = finish_two(
        "probe", *words, "--json", "--plot", str(plot), log=tmp_path / "log", before=partial(counted, str(tmp_path))
    )
    assert (first, second, silent) == (0, 0, ""), (said, silent)
    assert plot.is_file()
    assert [int((tmp_path / str(rank)).read_text()) for rank in range(2)] == [105, 105]  # of 150 and 60
    assert [(tmp_path / f"decoded-{rank}").read_text() for rank in range(2)] == ["105", "105"]
    found, alone = json.JSONDecoder().raw_decode(said[said.index("{") :])[0], result.to_dict()
    for one, two in zip(alone["logistic_regression"], found["logistic_regression"], strict=True):
        assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.02)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)


def test_test_images_are_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Broken ones change nothing."""
    drawn = np.random.default_rng(0)

    def split(count: int) -> datasets.Dataset:
        labels = [number % 2 for number in range(count)]
        images = [drawn.integers(0, 100 + 155 * label, (16, 16, 3), np.uint8) for label in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
        return datasets.Dataset.from_dict({"image": [*map(Image.fromarray, images)], "label": labels}, features)

    def spoiled(rows: datasets.Dataset) -> datasets.Dataset:
        plain = rows.cast_column("image", datasets.Image(decode=False))
        return plain.map(lambda row: {"image": {"bytes": b"no image", "path": None}}, features=plain.features)

    settings = TrainConfig(**SMALL | {"dataset": None, "max_train_samples": None})
    data = {"train": split(24), "validation": split(12), "test": spoiled(split(6))}
    assert probe(settings, dataset=datasets.DatasetDict(data)).metrics.accuracy > 0.9
    assert "12 validation images say little" in " ".join(capsys.readouterr().err.split())
    data["validation"] = spoiled(data["validation"])
    with pytest.raises(DataError, match="row 0"):
        probe(settings, dataset=datasets.DatasetDict(data))


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no validation images to score by: --val-fraction 0 .*; set --val-fraction"):
        probe(TrainConfig(**SMALL | {"val_fraction": 0.0}))
    with pytest.raises(UsageError, match="new weights have no features"):
        probe(TrainConfig(**SMALL | {"from_scratch": True}))


@pytest.mark.usefixtures("no_trial")
def test_a_long_pass_says_so_and_names_a_cheaper_one(capsys: pytest.CaptureFixture[str]) -> None:
    probe(TrainConfig(**SMALL | {"max_train_samples": 150}))
    said = "reading 210 images will take about 10 min 30 s on this cpu; cheaper: --max-train-samples 100 --max"
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_next_commands_have_the_settings_that_were_given() -> None:
    config = TrainConfig.parse({"dataset": "my photos", "model": BUNDLED, "seed": 0, "allow_outside": True}, "flags")
    commands = next_commands(config)
    assert shlex.split(commands["full fine-tuning"]) == [
        "vitft", "train", "--dataset", "my photos", "--allow-outside", "--model", BUNDLED
    ]  # fmt: skip
    assert commands["linear probe"] == f"{commands['full fine-tuning']} --freeze backbone"


def test_the_report_fits_80_columns(
    result: ProbeResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    asked: list[TrainConfig] = []
    monkeypatch.setattr("vitft.probing.probe.probe", lambda config: asked.append(config) or result)
    monkeypatch.setattr(console, "out", Console(highlight=False, width=80))
    done = vitft("probe", "digits", "--model", BUNDLED, "--max-train-samples", "150", "--plot", tmp_path / "curve.png")
    assert done.exit_code == 0, done.output
    assert (asked[0].dataset, asked[0].model, asked[0].max_train_samples) == ("digits", BUNDLED, 150)
    report, commands = done.stdout.split("linear probe: ")
    lines = report.splitlines()
    assert max(map(len, lines)) <= 80
    accuracy = f"{100 * result.metrics.accuracy:.1f} %"
    assert lines[0].startswith(f"accuracy {accuracy} (95 % interval ")
    assert lines[0].endswith("on 60 validation images")
    assert lines[1].startswith(f"[{result.metrics.split_hash[:8]}] by logistic regression on 64 features from 150 ")
    rows = [line.split() for line in lines]
    assert next(row for row in rows if row[:2] == ["logistic", "regression"])[2:4] == ["penalty", "1"]
    assert next(row for row in rows if row[:2] == ["nearest", "neighbors"])[2:5] == ["k", "=", "1"]
    (best,) = [row for row in rows if row[-1:] == ["best"]]
    assert accuracy == " ".join(best[-5:-3])
    assert next(row for row in rows if row[:1] == ["all"])[1:4] == ["150", *accuracy.split()]
    assert "Most frequent confusions" in report
    assert "3 epochs of full fine-tuning here: about" in report
    assert commands.splitlines()[0].endswith("--max-train-samples 150 --model vit-micro --freeze backbone")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"


def test_json_has_everything(result: ProbeResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.probing.probe.probe", lambda config: result)
    done = vitft("probe", "digits", "--json")
    document = json.loads(done.stdout)
    assert document["validation"]["accuracy"] == result.metrics.accuracy
    assert [row["penalty"] for row in document["logistic_regression"]] == [one.setting for one in result.logistic]
    assert document["penalty"] in [row["penalty"] for row in document["logistic_regression"]]
    assert document["nearest_neighbors"][0]["neighbors"] == 1
    assert document["few_shot"][1]["mean"] == result.few_shot[1].mean
    assert document["full_tuning"]["seconds"] == result.tuning.seconds


def test_the_curve_is_drawn_through_its_points(
    result: ProbeResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.touch() or drawn.append(figure))
    plot_few_shot(result, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    line = next(line for line in axes.lines if line.get_linestyle() == "-")
    assert line.get_xdata() == pytest.approx([1, 2, 5, 10, 15])
    assert line.get_ydata() == pytest.approx(
        [100 * point.mean for point in result.few_shot] + [100 * result.metrics.accuracy]
    )


def test_a_bad_request_fails_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "loading", lambda: pytest.fail("it was loaded"))
    assert "give a .png file" in vitft("probe", "digits", "--plot", "curve.pdf").stderr
    assert "--val-fraction" in vitft("probe", "digits", "--val-fraction", "2").stderr
    assert "--lr: `vitft probe` has no such flag" in vitft("probe", "digits", "--lr", "1").stderr
