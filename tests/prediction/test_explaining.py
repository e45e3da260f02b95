"""`vitft predict --explain`: a picture for each image, of where it speaks for its best class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitft import Predictor, UsageError, export
from vitft.cli.app import app
from vitft.prediction.explaining import Explainer


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a/one.png", "b/one.png", "b/two.jpg"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(file)
    (tmp_path / "photos" / "b" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_each_image_has_a_picture_that_is_bright_where_its_map_is_high(photos: Path, tmp_path: Path) -> None:
    words = ["predict", str(photos), "--checkpoint", "vit-micro", "--explain", str(tmp_path / "why")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3, done.output  # the broken one
    pictures = sorted(file.name for file in (tmp_path / "why").iterdir())
    assert len(pictures) == 3
    assert {"one.png", "two.png"} < set(pictures)
    before = {name: (tmp_path / "why" / name).read_bytes() for name in pictures}
    CliRunner().invoke(app, words)
    assert {name: (tmp_path / "why" / name).read_bytes() for name in pictures} == before

    predictor = Predictor("vit-micro")
    pixels = predictor.read(photos / "b" / "two.jpg")
    (said,) = predictor(photos / "b" / "two.jpg")
    (weights,) = predictor.maps(pixels[None], [predictor.labels.index(said.top[0][0])])
    drawn = np.asarray(Image.open(tmp_path / "why" / "two.png").convert("L"), float)[:336]
    plain, shown = drawn[:, :336], drawn[:, 342:]
    rows, columns = weights.shape
    # Amber where the map is high, dark where it is low: the brightness of each patch, relative to the image's own.
    ratio = (shown / np.maximum(plain, 1)).reshape(rows, 336 // rows, columns, 336 // columns).mean(axis=(1, 3))
    assert np.corrcoef(ratio.ravel(), weights.ravel())[0, 1] > 0.9


def test_nothing_is_replaced_but_pictures_of_before(photos: Path, tmp_path: Path) -> None:
    one, words = photos / "a" / "one.png", ["--checkpoint", "vit-micro", "--explain"]
    before = one.read_bytes()
    for given, folder, why in (
        (one.parent, photos / "a", "is inside"), (one, photos / "a", "one.png is there already"),
        (one.parent, photos / "a" / "why", "is inside"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["predict", str(given), *words, str(folder)])
        assert (done.exit_code, why in done.stderr) == (2, True), done.output
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one.png").symlink_to(one)
    assert CliRunner().invoke(app, ["predict", str(one), *words, str(tmp_path / "links")]).exit_code == 2
    assert one.read_bytes() == before
    assert not (photos / "a" / "why").exists()


def test_going_on_writes_the_pictures_of_one_run(photos: Path, tmp_path: Path) -> None:
    """Images that have a row already keep their names, also from others that are called alike."""
    words = ["predict", str(photos / "a"), str(photos / "b" / "one.png"), "--checkpoint", "vit-micro"]
    out = tmp_path / "out.csv"
    whole = CliRunner().invoke(app, [*words, "--output", str(out), "--explain", str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output
    rows = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "one.png").write_bytes((tmp_path / "whole" / "one.png").read_bytes())
    (tmp_path / "out.partial.csv").write_bytes(b"".join(rows[:2]))
    words += ["--output", str(out), "--resume"]
    for flag in ("--explain", "--sort-into"):
        done = CliRunner().invoke(app, [*words, flag, str(tmp_path / "new")])
        assert (done.exit_code, f"{flag} {tmp_path / 'new'}: is empty" in done.stderr) == (2, True), done.output
    done = CliRunner().invoke(app, [*words, "--explain", str(tmp_path / "cut")])
    assert done.exit_code == 0, done.output
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "cut")
    )  # fmt: skip
    assert one.keys() == other.keys()
    assert len(one) == 2
    assert one["one.png"] == other["one.png"]


def test_a_name_is_cut_by_bytes(photos: Path, tmp_path: Path) -> None:
    """83 characters of three bytes are as long as a name can be."""
    for folder in ("a", "b"):
        (photos / folder / "one.png").rename(photos / folder / f"{'猫' * 83}.png")
    words = ["predict", str(photos / "a"), str(photos / "b" / f"{'猫' * 83}.png"), "--checkpoint", "vit-micro"]
    done = CliRunner().invoke(app, [*words, "--explain", str(tmp_path / "why")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "why").iterdir())) == 2


def test_a_picture_shows_the_method_that_was_asked_for(photos: Path, tmp_path: Path) -> None:
    pictures = {}
    for by in ("attention", "occlusion", None):
        folder = tmp_path / str(by)
        words = ["predict", str(photos / "a"), "--checkpoint", "vit-micro", "--explain", str(folder)]
        done = CliRunner().invoke(app, words + ([] if by is None else ["--explain-by", by]))
        assert done.exit_code == 0, done.output
        pictures[by] = (folder / "one.png").read_bytes()
    assert pictures["attention"] == pictures[None] != pictures["occlusion"]
    alone = CliRunner().invoke(app, ["predict", str(photos), "--checkpoint", "vit-micro", "--explain-by", "occlusion"])
    assert (alone.exit_code, "add --explain FOLDER" in alone.stderr) == (2, True)


def test_a_model_without_attention_says_so(photos: Path, tmp_path: Path, saved: Any) -> None:
    words = ["predict", str(photos / "a"), "--checkpoint", str(saved("swin")), "--explain", str(tmp_path / "why")]
    words += ["--output", str(tmp_path / "out.csv")]
    done = CliRunner().invoke(app, [*words, "--explain-by", "attention"])
    assert (done.exit_code, done.stderr.strip().splitlines()[-1].endswith("use occlusion.")) == (4, True)
    assert not list(tmp_path.glob("out*"))
    assert CliRunner().invoke(app, words).exit_code == 0


def test_an_exported_file_is_explained_by_occlusion(photos: Path, tmp_path: Path, saved: Any) -> None:
    export(saved("vit"), format="torch", output=tmp_path / "file")
    words = ["predict", str(photos / "a"), "--checkpoint", str(tmp_path / "file"), "--explain", str(tmp_path / "why")]
    done = CliRunner().invoke(app, [*words, "--explain-by", "attention"])
    assert (done.exit_code, "an exported file does not give it; use occlusion" in done.stderr) == (2, True)
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, f"of 1 image: {tmp_path / 'why'}" in done.stderr) == (0, True)


def test_a_folder_that_cannot_be_is_refused_before_the_work(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--explain .*: cannot be created"):
        Explainer(tmp_path / "file", Predictor("vit-micro"))
