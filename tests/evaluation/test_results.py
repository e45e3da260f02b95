"""What a finished run leaves: scores in full, and what it said about every image."""

import csv
import json
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.training.test_trainer import config as tiny
from vitft import ModelError, Predictor, TrainConfig, UsageError, evaluate, predict, train
from vitft.checkpoints.checkpoint import newest_intact, read_state
from vitft.checkpoints.metadata import read_card
from vitft.cli.app import app
from vitft.data.augment import normalize, resize_and_crop
from vitft.data.sources.source import open_dataset
from vitft.evaluation import evaluation
from vitft.evaluation.calibration import at_temperature, calibration, fit_temperature, threshold_for
from vitft.evaluation.loading import load_model
from vitft.evaluation.results import predictions_file, read_results, write_results
from vitft.evaluation.split_predictions import Predictions, require
from vitft.hardware.timers import Phases
from vitft.training import loop, trainer
from vitft.training.loop import Result
from vitft.training.trainer import resume


class PowerCut(BaseException):
    """Nothing handles it."""


def lost(*given: object, **named: object) -> None:
    raise PowerCut


def config(**changes: object) -> TrainConfig:
    return tiny(**{"epochs": 3} | changes)


def without_speed(summary: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in summary.items() if name != "images_per_s"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run whose rate is so high that its best checkpoint is not its last."""
    result = train(config(lr=0.3, clip_norm=0, epochs=4), output=tmp_path_factory.mktemp("done") / "run")
    assert result.step < 12
    return result


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_results_are_those_of_the_chosen_checkpoint(done: Result, split: str) -> None:
    results = read_results(done.run)
    assert (results.checkpoint, results.step, list(results.splits)) == ("best", done.step, ["validation", "test"])
    again = evaluate(done.run, split=split)
    wanted, found = without_speed(again.to_dict()), without_speed(results.splits[split])
    for name in ("loss", "calibration"):  # summed in other batches
        assert found.pop(name) == pytest.approx(wanted.pop(name), rel=1e-4)
    assert found == wanted
    predictions = results.predictions(split)
    np.testing.assert_allclose(predictions.probabilities, again.predictions.probabilities, atol=1e-5)
    assert (predictions.predicted == predictions.truth).mean() == pytest.approx(again.accuracy)


def test_each_image_has_the_probabilities_that_the_model_gives_it(done: Result) -> None:
    predictions = read_results(done.run).predictions("test")
    recorded = json.loads((done.run / "splits.json").read_text())["splits"]["test"]
    assert list(predictions.ids) == recorded["ids"]
    assert (predictions.hash, predictions.source) == (recorded["hash"], recorded["source"])
    rows = open_dataset("digits").splits[predictions.source].select(predictions.rows)
    assert [predictions.class_name(number) for number in predictions.truth] == [str(label) for label in rows["label"]]
    loaded = load_model(done.run)
    images = [
        torch.from_numpy(np.asarray(Image.open(BytesIO(image["bytes"])).convert("RGB")))[None]
        for image in rows["image"]
    ]
    pixels = torch.cat([resize_and_crop(image, loaded.preprocess) for image in images])
    with torch.inference_mode():
        expected = loaded.model(normalize(pixels, loaded.preprocess)).logits.softmax(1)
    np.testing.assert_allclose(predictions.probabilities, expected, atol=1e-5)


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with enough validation images for a temperature."""
    settings = config(max_eval_samples=200, val_fraction=0.2, epochs=12, lr=5e-3)
    return train(settings, output=tmp_path_factory.mktemp("better") / "run").run


def test_the_temperature_is_fitted_on_validation_and_kept_beside_the_weights(better: Path) -> None:
    results = read_results(better)
    temperature = fit_temperature(results.predictions("validation"))
    card = read_card(better / "best")
    assert card.temperature == pytest.approx(temperature, rel=1e-6)
    said = results.splits["test"]["calibration"]
    assert said["temperature"] == card.temperature
    assert said["error_at_temperature"] == pytest.approx(
        calibration(at_temperature(results.predictions("test"), temperature)).error, abs=1e-5
    )
    assert evaluate(better).calibration == pytest.approx(said, rel=1e-4)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten pictures of noise."""
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12), np.uint8)
        Image.fromarray(pixels).resize((28, 28)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_calibrated_predictions_are_those_at_the_temperature(better: Path, images: Path) -> None:
    temperature = read_card(better / "best").temperature
    plain, scaled = (predict(images, better, top_k=10, calibrated=on) for on in (False, True))
    for one, other in zip(plain, scaled, strict=True):
        assert [label for label, _ in one.top] == [label for label, _ in other.top]
        powers = np.array([score for _, score in one.top]) ** (1 / temperature)
        assert [score for _, score in other.top] == pytest.approx((powers / powers.sum()).tolist(), abs=1e-4)


def test_what_is_below_the_confidence_is_unsure(better: Path, images: Path) -> None:
    confidences = sorted(row.top[0][1] for row in predict(images, better))
    middle = (confidences[4] + confidences[5]) / 2
    rows = predict(images, better, min_confidence=middle)
    assert [row.unsure for row in rows] == [row.top[0][1] < middle for row in rows]
    assert sum(row.unsure for row in rows) == 5
    expected = threshold_for(read_results(better).predictions("validation"), 0.5)
    assert Predictor(better, min_precision=0.5).threshold == pytest.approx(expected.confidence)
    words = ["predict", str(images), "--checkpoint", str(better), "--min-confidence", str(middle)]
    assert CliRunner().invoke(app, words).stdout.count("unsure: ") == 5
    table = list(csv.DictReader(StringIO(CliRunner().invoke(app, [*words, "--format", "csv"]).stdout)))
    assert sum(row["unsure"] == "true" for row in table) == 5


def test_what_cannot_be_decided_is_refused(done: Result, better: Path) -> None:
    with pytest.raises(UsageError, match="both set the confidence"):
        Predictor(better, min_confidence=0.5, min_precision=0.9)
    with pytest.raises(UsageError, match="not even the surest validation images reach it"):
        Predictor(better, min_precision=1.01)
    with pytest.raises(UsageError, match="has no predictions of validation images"):
        Predictor("vit-micro", min_precision=0.9)
    with pytest.raises(UsageError, match="has no predictions of validation images"):
        Predictor(done.run / "last", min_precision=0.1)  # those of the run are of other weights
    with pytest.raises(UsageError, match="has no temperature"):
        Predictor(done.run / "last", calibrated=True)


def test_the_file_is_plain_parquet(done: Result) -> None:
    table = pq.read_table(predictions_file(done.run, "test"))
    assert table.column_names == ["id", "row", "label", "predicted", "confidence", "probabilities"]
    first = table.slice(0, 1).to_pylist()[0]
    assert first["confidence"] == max(first["probabilities"])
    assert first["predicted"] == str(int(np.argmax(first["probabilities"])))


def test_the_surest_mistake_comes_first(done: Result) -> None:
    predictions = read_results(done.run).predictions("test")
    assert predictions.name(0) == f"row {predictions.rows[0]}", "digits are no files"
    assert replace(predictions, ids=("a/b.png",) * 50).name(0) == "a/b.png"
    mistakes = predictions.mistakes()
    assert len(mistakes) == (predictions.predicted != predictions.truth).sum() > 1
    assert (np.diff(predictions.confidence[mistakes]) <= 0).all()


def test_results_are_written_again_where_they_are_missing_and_when_a_run_goes_on(tmp_path: Path) -> None:
    run = train(config(), output=tmp_path / "run").run
    before = read_results(run)
    said = before.predictions("validation").probabilities
    for file in (run / "results.json", predictions_file(run, "validation")):
        file.unlink()
    resume(run)  # as after a kill in the final evaluation: nothing of the validation is in memory
    after = read_results(run)
    assert without_speed(after.splits["validation"]) == without_speed(before.splits["validation"])
    np.testing.assert_array_equal(after.predictions("validation").probabilities, said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "measure", lost)
        with pytest.raises(PowerCut):
            resume(run, {"epochs": 4})
    assert read_results(run) is None, "of the shorter run"
    assert not predictions_file(run, "test").exists()
    assert read_results(resume(run, {"epochs": 4}).run).splits.keys() == {"validation", "test"}


def test_the_phases_of_a_run_add_up_to_its_time_also_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever it is looked at."""
    clocks: list[int] = []
    at_the_end: list[int] = []  # of each command, when it writes its results

    def phases() -> Phases:
        place = len(clocks)
        clocks.append(-1)

        def now() -> float:
            clocks[place] += 1
            return clocks[place]

        return Phases(now)

    def written(*given: Any) -> None:
        at_the_end.append(clocks[-1])
        write_results(*given)

    monkeypatch.setattr(trainer, "Phases", phases)
    monkeypatch.setattr(loop, "write_results", written)
    done = train(config(epochs=1), output=tmp_path / "run")
    seconds = read_results(done.run).seconds
    assert done.seconds == done.to_dict()["seconds"] == seconds
    assert sum(seconds.values()) == pytest.approx(at_the_end[0])
    assert min(seconds[name] for name in seconds if name not in ("data_wait", "tuning")) > 0
    saved = read_state(newest_intact(done.run)[0]).seconds
    assert 0 < sum(saved.values()) < sum(seconds.values()), "what it took until then"
    longer = resume(done.run, {"epochs": 2})
    assert sum(longer.seconds.values()) == pytest.approx(sum(saved.values()) + at_the_end[1])
    assert longer.seconds["steps"] > saved["steps"] > 0
    before = read_results(done.run).seconds
    assert sum(resume(done.run).seconds.values()) == pytest.approx(sum(before.values()) + at_the_end[2])


def test_too_many_probabilities_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LARGEST", 499)  # 50 images of 10 classes
    run = train(config(epochs=1), output=tmp_path / "run").run
    results = read_results(run)
    assert results.splits["test"]["count"] == 50
    assert results.predictions("test") is None
    with pytest.raises(UsageError, match="too many to keep every probability"):
        require(evaluate(run).predictions)
    done = CliRunner().invoke(app, ["eval", str(run), "--errors", "3"])
    assert (done.exit_code, "too many to keep every probability" in done.stderr) == (2, True)
    assert done.stdout.startswith("accuracy "), "the scores are not lost"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}"])
def test_a_file_that_is_damaged_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions-test.parquet").write_bytes(content)
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ModelError, match="no predictions that vitft wrote"):
        Predictions.read(tmp_path / "predictions-test.parquet")
    with pytest.raises(ModelError, match="cannot be read"):
        read_results(tmp_path)
