"""`--none-of-these`: what a run knows is kept with it, and images of something else are marked."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.families import tiny_classifier
from vitft import Predictor, TrainConfig, UsageError, train
from vitft.checkpoints.metadata import verify
from vitft.cli.app import app
from vitft.evaluation.evaluation import read_images, reading
from vitft.evaluation.loading import load_model
from vitft.evaluation.novelty import FILE


def called(*words: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Digits, and pictures of nothing of the kind."""
    folder = tmp_path / "photos"
    shutil.copytree("docs/digits", folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "noise.png")
    Image.fromarray(np.full((16, 16, 3), (250, 40, 40), np.uint8)).save(folder / "red.png")
    return folder


def test_most_images_of_a_split_are_no_strangers_and_others_are(digits_run: Any, photos: Path) -> None:
    predictor = Predictor(digits_run.run, none_of_these=0.99)
    config, _ = reading(digits_run.run, None)
    test = read_images(digits_run.run, load_model(digits_run.run), config, split="test")
    images = [image.numpy() for image in test.store.gather(np.arange(150))]
    novelty = np.array([row.novelty for row in predictor(images)])
    assert (novelty > 0.9).mean() == pytest.approx(0.1, abs=0.08)
    assert (novelty > 0.5).mean() == pytest.approx(0.5, abs=0.15)
    rows = {Path(row.path).stem: row for row in predictor(str(photos))}
    assert {name for name, row in rows.items() if row.none_of_these} >= {"noise", "red"}
    assert rows["noise"].novelty == 1
    assert sum(row.none_of_these for row in rows.values()) <= 4
    assert Predictor(digits_run.run)(str(photos))[0].novelty is None


def test_every_output_says_it(digits_run: Any, photos: Path, tmp_path: Path) -> None:
    words = ("predict", photos, "--checkpoint", digits_run.run, "--none-of-these", 0.99)
    expected = {row.path: row for row in Predictor(digits_run.run, none_of_these=0.99)(str(photos))}
    said = json.loads(called(*words, "--json").stdout)["predictions"]
    assert {row["path"]: (row["novelty"], row.get("none_of_these", False)) for row in said} == {
        path: (row.novelty, row.none_of_these) for path, row in expected.items()
    }
    assert "none of these: " in called(*words).stdout
    for name in ("out.csv", "out.parquet"):
        assert called(*words, "--output", tmp_path / name).exit_code == 0
    with (tmp_path / "out.csv").open() as stream:
        for row in csv.DictReader(stream):
            assert float(row["novelty"]) == pytest.approx(expected[row["path"]].novelty, abs=1e-6)
            assert row["none_of_these"] == str(expected[row["path"]].none_of_these).lower()
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        assert row["novelty"] == pytest.approx(expected[row["path"]].novelty)
        assert row["none_of_these"] == expected[row["path"]].none_of_these
    assert called(*words, "--sort-into", tmp_path / "sorted").exit_code == 0
    assert {"noise.png", "red.png"} <= {file.name for file in (tmp_path / "sorted" / "none of these").iterdir()}


def test_eval_tells_strangers_from_the_split(digits_run: Any, photos: Path, tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / "noise" / "test" / ("a" if number % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = ("eval", digits_run.run, "--max-eval-samples", 60, "--strangers")
    done = called(*words, tmp_path / "noise", "--json")
    said = json.loads(done.stdout)["strangers"]
    assert (said["known"], said["strangers"], said["by_novelty"], said["found"]) == (60, 30, 1.0, 1.0)
    assert 0 <= said["mistaken"] < 0.1
    assert "30 strangers told from 60 test images: AUROC 1.000 by novelty" in called(*words, tmp_path / "noise").stdout
    same = called(*words, "digits")
    assert (same.exit_code, same.stderr.strip().splitlines()[-1]) == (
        3, "error: digits: has the class 0, as the model does; give images of other classes.")  # fmt: skip


def test_strangers_are_a_folder_of_images_without_classes(digits_run: Any, tmp_path: Path) -> None:
    words = ("eval", digits_run.run, "--max-eval-samples", 60, "--strangers")
    (tmp_path / "flat").mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    (tmp_path / "flat" / "x.png").write_bytes(b"no image")
    said = json.loads(called(*words, tmp_path / "flat", "--json").stdout)["strangers"]
    assert (said["strangers"], said["unreadable"], said["by_novelty"]) == (30, 1, 1.0)
    assert "of the others; 1 could not be read" in called(*words, tmp_path / "flat").stdout
    for file in (tmp_path / "flat").glob("[0-9]*"):
        file.unlink()
    none = called(*words, tmp_path / "flat")
    assert (none.exit_code, "none of its 1 images can be read; the first is not an image" in none.stderr) == (3, True)
    assert called(*words, tmp_path / "nowhere").exit_code == 3


def test_it_is_part_of_what_is_verified(digits_run: Any, tmp_path: Path) -> None:
    best = shutil.copytree(digits_run.run / "best", tmp_path / "best")
    verify(best)
    (best / FILE).write_bytes(b"x" + (best / FILE).read_bytes()[1:])
    done = called("predict", "docs/digits", "--checkpoint", best, "--none-of-these", 0.9)
    assert (done.exit_code, "does not match its SHA-256 checksum" in done.stderr) == (4, True)


@pytest.mark.parametrize("checkpoint", ["vit-micro", "last"])
def test_a_checkpoint_that_does_not_say_what_it_knows(checkpoint: str, digits_run: Any) -> None:
    where = digits_run.run / "last" if checkpoint == "last" else checkpoint
    with pytest.raises(UsageError, match=r"does not say what it knows.*; the best checkpoint of a run"):
        Predictor(where, none_of_these=0.99)
    done = called("eval", where, "--dataset", "digits", "--strangers", "digits", "--max-eval-samples", 10)
    assert done.exit_code == 2
    assert "does not say what it knows" in done.stderr


def test_a_head_that_reads_maps_of_one_pixel(tmp_path: Path) -> None:
    """As in a ResNet, whose head flattens them itself. Only the head is trained: with as few channels as here,
    oneDNN's backward pass of a convolution on AVX-512 corrupts memory."""
    config = TrainConfig(
        dataset="digits", max_train_samples=20, max_eval_samples=50, max_steps=1, batch_size=8, device="cpu",
        precision="fp32", skip_test=True, freeze="backbone", augment="crop",
    )  # fmt: skip
    run = train(config, model=tiny_classifier("resnet"), output=tmp_path / "run").run
    (row,) = Predictor(run, none_of_these=0.5)("docs/digits/nine.png")
    assert row.novelty is not None
