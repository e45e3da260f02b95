"""Doubtful labels: planted errors among real digits."""

import json
import shutil
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vitft import DataError, TrainConfig, UsageError, doubt, open_dataset
from vitft.cli import tables
from vitft.cli.app import app
from vitft.probing.doubt import Doubt

MODEL = {"model": "vit-micro", "image_size": 20}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Digits in folders, of which every twelfth lies in a wrong one, and the names of those."""
    folder, rng, wrong = tmp_path_factory.mktemp("planted"), np.random.default_rng(0), set()
    for number, row in enumerate(open_dataset("digits").splits["train"].select(range(600))):
        label = int(row["label"])
        if number % 12 == 0:
            label = (label + int(rng.integers(1, 10))) % 10
            wrong.add(f"{label}/{number}.png")
        (folder / str(label)).mkdir(exist_ok=True)
        Image.open(BytesIO(row["image"]["bytes"])).save(folder / str(label) / f"{number}.png")
    return folder, wrong


def test_planted_errors_are_found_and_what_they_are(planted: tuple[Path, set[str]]) -> None:
    folder, wrong = planted
    result = doubt(TrainConfig(dataset=str(folder), **MODEL))
    listed = {one.image for one in result.doubts}
    assert len(listed & wrong) >= 0.7 * len(wrong)
    assert len(listed & wrong) >= 0.7 * len(listed)
    assert result.rate == pytest.approx(1 / 12, abs=0.03)
    probabilities = [one.probability for one in result.doubts]
    assert probabilities == sorted(probabilities, reverse=True)
    digits = [int(row["label"]) for row in open_dataset("digits").splits["train"].select(range(600))]
    right = [one.suggested == str(digits[int(Path(one.image).stem)]) for one in result.doubts if one.image in wrong]
    assert np.mean(right) > 0.8
    assert all(one.label == one.image.split("/")[0] != one.suggested for one in result.doubts)
    assert doubt(TrainConfig(dataset=str(folder), **MODEL), from_probability=1.0).doubts == ()


def test_only_training_images_are_read(planted: tuple[Path, set[str]], tmp_path: Path) -> None:
    shutil.copytree(planted[0], tmp_path / "photos" / "train")
    for label in "01":
        (tmp_path / "photos" / "val" / label).mkdir(parents=True)
        (tmp_path / "photos" / "val" / label / "x.png").write_bytes(b"no image")
    assert doubt(TrainConfig(dataset=str(tmp_path / "photos"), **MODEL)).images == 600


def test_the_command_writes_pictures_and_a_list_that_training_leaves_out(
    planted: tuple[Path, set[str]], tmp_path: Path
) -> None:
    folder, _ = planted
    words = ["data", "doubt", str(folder), "--model", "vit-micro", "--image-size", "20", "--folds", "5"]
    page, lines = tmp_path / "page.html", tmp_path / "out.txt"
    done = CliRunner().invoke(app, [*words, "--html", str(page), "--quarantine", str(lines)])
    assert done.exit_code == 0, done.output
    assert "looks like" in done.stdout
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    count = len(document["doubts"])
    assert page.read_text().count("<img") == count
    assert len(lines.read_text().splitlines()) == count
    left = open_dataset(str(folder))
    exclude = ["train", "--dataset", str(folder), "--exclude", str(lines), "--model", "vit-micro", "--dry-run"]
    assert sum(map(len, left.splits.values())) == 600
    planned = CliRunner().invoke(app, [*exclude, "--val-fraction", "0"])
    assert f"{600 - count} images of train" in planned.stdout, planned.output


def test_a_list_keeps_what_was_in_the_lists_before(
    planted: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wrong = planted
    monkeypatch.chdir(tmp_path)
    excluded, kept = (f"train\t{image}" for image in sorted(wrong)[:2])
    words = ["data", "doubt", str(folder), "--model", "vit-micro", "--image-size", "20", "--folds", "2"]
    Path("mine.txt").write_text(excluded)
    Path("other.txt").write_text(f"{kept}\n")
    for given, target, first in (("mine.txt", "mine.txt", [excluded]), ("mine.txt", "other.txt", [excluded, kept])):
        done = CliRunner().invoke(app, [*words, "--exclude", given, "--quarantine", target])
        assert done.exit_code == 0, done.output
        lines = Path(target).read_text().splitlines()
        assert lines[: len(first)] == first
        assert len(lines) == len(set(lines)) > len(first) + 5
        said = f"{len(lines)} images to leave out ({len(first)} listed before): vitft train --dataset {folder}"
        assert f"{said} --exclude {target}\n" in done.stderr
        Path("mine.txt").write_text(excluded)


@pytest.mark.parametrize("flag", ["--html", "--quarantine"])
@pytest.mark.parametrize("file", ["nowhere/file", "photos", ""])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, file: str
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitft.probing.doubt.doubt", lambda *given, **more: pytest.fail("did the work"))
    done = CliRunner().invoke(app, ["data", "doubt", "digits", flag, file])
    assert (done.exit_code, "give a file in a folder that exists" in done.stderr) == (2, True), done.output


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UsageError, match="remove from_scratch"):
        doubt(TrainConfig(dataset="digits", from_scratch=True, **MODEL))
    few = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8), i) for i in range(12)], "label": [0, 1] * 6})
    few = few.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(DataError, match="--folds 10 needs at least 20 images, got 12; give at most --folds 6"):
        doubt(TrainConfig(**MODEL), dataset=few)
    with pytest.raises(DataError, match="--folds 7 needs at least 14 images, got 12; give at most --folds 6"):
        doubt(TrainConfig(**MODEL), dataset=few, folds=7)
    doubt(TrainConfig(**MODEL), dataset=few, folds=6)
    with pytest.raises(DataError, match="needs at least 4 images, got 3; add images"):
        doubt(TrainConfig(**MODEL), dataset=few.select([0, 1, 2]), folds=2)


@pytest.mark.parametrize(
    ("probabilities", "said"),
    [
        ([0.01] * 23, "of the 23 listed, probably none is wrong;"),
        ([0.6, 0.5], "of the 2 listed, about 1 is wrong;"),
        ([0.9, 0.8], "of the 2 listed, about 2 are wrong;"),
    ],
)
def test_the_last_line_does_not_contradict_itself(probabilities: list[float], said: str) -> None:
    doubts = [Doubt("train", f"{i}.png", i, "cat", "dog", one) for i, one in enumerate(probabilities)]
    shown = StringIO()
    result = SimpleNamespace(rate=0.01, accuracy=0.872, images=100, doubts=doubts)
    Console(file=shown, width=100).print(tables.doubt_report(result))
    assert said in shown.getvalue()
    assert "about 1.0 % of 100 labels are wrong; the classifiers agree with 87.2 % of all labels" in shown.getvalue()
