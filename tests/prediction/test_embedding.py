"""Features in a parquet file: those that the model's own head reads, of every readable image."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import tiny_model
from tests.forked import finish_two
from vitft import TrainConfig, embed, load_model
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.cli.app import app
from vitft.data.augment import Preprocess, preprocess_images
from vitft.data.decoder import decode
from vitft.errors import DataError, ModelError, UsageError
from vitft.prediction import embedding
from vitft.prediction.predictor import Predictor

LABELS = ("ant", "bee", "cat")


def vitft(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "best"
    save_model(folder, tiny_model("vit"), Preprocess(32, 32), Card(TrainConfig(), LABELS, 0, 0.0, {}, {}))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders: two ants and three bees, of several sizes."""
    drawn = np.random.default_rng(0)
    for number, label in enumerate(("ant", "ant", "bee", "bee", "bee")):
        file = tmp_path / "photos" / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (20 + 8 * number, 40, 3), np.uint8)).save(file)
    return tmp_path / "photos"


def stacked(file: Path) -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(file).to_pandas()["features"].tolist())


def test_the_features_are_what_the_head_reads(model: Path, photos: Path, tmp_path: Path) -> None:
    found = embed(photos, model, tmp_path / "f.parquet")
    rows = pd.read_parquet(tmp_path / "f.parquet")
    assert [*rows.columns] == [*found.columns] == ["path", "split", "row", "label", "features"]
    assert rows["label"].tolist() == ["ant", "ant", "bee", "bee", "bee"]
    assert (found.images, found.width, found.unreadable) == (5, 16, ())
    loaded = load_model(model)
    files = [Path(path) for path in rows["path"]]
    assert files == [photos / label / f"{number}.png" for number, label in enumerate(rows["label"])]
    pixels = preprocess_images([torch.from_numpy(decode(file)) for file in files], loaded.preprocess)
    with torch.no_grad():
        logits = loaded.model(pixel_values=pixels).logits
    again = loaded.model.classifier(torch.from_numpy(stacked(tmp_path / "f.parquet")))
    assert torch.allclose(again, logits, atol=1e-5)
    labels = [Predictor(model)(file, top_k=1)[0].top[0][0] for file in files]
    assert labels == [loaded.labels[index] for index in again.argmax(dim=1).tolist()]


def test_every_reader_reads_it(model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    embed(photos, model, file)
    schema = pq.read_schema(file)
    assert str(schema.field("features").type) == "list<element: float>"
    about = json.loads(schema.metadata[b"vitft"])
    assert (about["model"], about["image_size"]) == (str(model), [32, 32])
    read = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(np.array(read["features"], np.float32), stacked(file))


def test_the_images_of_a_table_are_named_by_their_files(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{number}.png,{label}\n" for number, label in ((2, "b"), (3, "a"), (4, "b")))
    (photos / "bee" / "list.csv").write_text(f"path,label\n{rows}")
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    monkeypatch.chdir(tmp_path)
    embed("photos/bee/list.csv", model, "beside.parquet")
    embed("list.csv", model, "apart.parquet", image_folder="photos/bee")
    for file in ("beside.parquet", "apart.parquet"):
        paths = pd.read_parquet(file)["path"].tolist()
        assert paths == [f"photos/bee/{number}.png" for number in (2, 3, 4)]


def test_row_groups_and_batches_change_nothing(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(photos, model, tmp_path / "whole.parquet")
    monkeypatch.setattr(embedding, "_BATCH", 2)
    monkeypatch.setattr(embedding, "_ROW_GROUP", 1)
    embed(photos, model, tmp_path / "parts.parquet")
    assert pq.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 3
    one, other = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert one.drop(columns="features").equals(other.drop(columns="features"))
    assert np.allclose(*(stacked(tmp_path / f"{name}.parquet") for name in ("whole", "parts")), atol=1e-6)


def test_two_processes_embed_as_one_does(model: Path, tmp_path: Path) -> None:
    """150 images are three chunks, of which one process has two; the rows come in order, from the first process."""
    drawn, folder = np.random.default_rng(1), tmp_path / "many"
    folder.mkdir()
    for number in range(150):
        Image.fromarray(drawn.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number:03}.png")
    (folder / "077.png").write_bytes(b"no image")
    words = ["embed", str(folder), "--model", str(model), "--device", "cpu", "--output"]
    (first, said), (second, silent) = finish_two(*words, str(tmp_path / "two.parquet"), log=tmp_path / "log")
    assert (first, second) == (3, 0), (said, silent)
    assert said.count("1 of 150 images could not be read") == 1
    assert silent == ""
    assert vitft(*words, tmp_path / "one.parquet").exit_code == 3
    one, two = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert list(one["path"]) == list(two["path"])
    assert len(one) == 149
    np.testing.assert_allclose(np.stack(one["features"]), np.stack(two["features"]), atol=1e-5)


def test_images_without_classes_and_splits_of_a_dataset(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    (photos / "bee").rename(flat)
    found = embed(flat, model, tmp_path / "flat.parquet")
    assert [*found.columns] == ["path", "features"]
    assert "without labels, because it is no dataset" in " ".join(capsys.readouterr().err.split())
    files = sorted(flat.iterdir())
    assert embed([*files], model, tmp_path / "files.parquet").images == 3
    assert embed(str(flat / "*.png"), model, tmp_path / "glob.parquet").images == 3
    assert np.array_equal(stacked(tmp_path / "files.parquet"), stacked(tmp_path / "glob.parquet"))
    given = datasets.DatasetDict({
        name: datasets.Dataset.from_dict(
            {"image": [Image.open(file) for file in files], "label": [0, 1, 1]},
            datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}),
        )
        for name in ("train", "test")
    })  # fmt: skip
    embed(given, model, tmp_path / "given.parquet")
    rows = pd.read_parquet(tmp_path / "given.parquet")
    assert rows["split"].tolist() == ["train"] * 3 + ["test"] * 3
    assert rows["row"].tolist() == [0, 1, 2] * 2
    assert np.allclose(stacked(tmp_path / "given.parquet")[3:], stacked(tmp_path / "files.parquet"), atol=1e-6)


def test_another_input_size_and_a_model_without_a_head(photos: Path, tmp_path: Path) -> None:
    whole = tiny_model("vit")
    whole.save_pretrained(tmp_path / "whole")
    whole.vit.save_pretrained(tmp_path / "headless")
    for name in ("whole", "headless"):
        embed(photos, tmp_path / name, tmp_path / f"{name}.parquet")
    assert np.array_equal(stacked(tmp_path / "whole.parquet"), stacked(tmp_path / "headless.parquet"))
    embed(photos, tmp_path / "whole", tmp_path / "larger.parquet", image_size=48)
    assert json.loads(pq.read_schema(tmp_path / "larger.parquet").metadata[b"vitft"])["image_size"] == [48, 48]
    assert not np.allclose(stacked(tmp_path / "larger.parquet"), stacked(tmp_path / "whole.parquet"), atol=1e-3)


def test_unreadable_images_are_listed_and_the_others_written(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bee" / "2.png").write_bytes(b"no image")
    done = vitft("embed", photos, tmp_path / "gone.png", "--model", model, "--output", tmp_path / "f.parquet")
    assert done.exit_code == 3
    rows = pd.read_parquet(tmp_path / "f.parquet")
    assert len(rows) == 4
    said = " ".join(done.stderr.split())
    assert f"not embedded: {photos / 'bee' / '2.png'}" in said
    assert f"not embedded: {tmp_path / 'gone.png'}" in said
    assert "error: 2 of 6 images could not be read, and are not in " in said
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first is .*gone\.png"):
        embed(tmp_path / "gone.png", model, tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_the_file_is_whole_or_absent(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    before = {*tmp_path.iterdir()}
    monkeypatch.setattr(embedding, "_BATCH", 2)
    real, calls = embedding.normalize, []

    def stops(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(embedding, "normalize", stops)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, model, tmp_path / "f.parquet")
    assert {*tmp_path.iterdir()} == before


def test_bad_requests_fail_before_the_work(model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    file.write_bytes(b"mine")
    with pytest.raises(UsageError, match="the file exists; choose another, or add --overwrite"):
        embed(photos, model, file)
    embed(photos, model, file, overwrite=True)
    assert len(pd.read_parquet(file)) == 5
    for wrong in (tmp_path / "f.csv", tmp_path / "no" / "f.parquet"):
        with pytest.raises(UsageError, match=r"give a \.parquet file in a folder that exists"):
            embed(photos, model, wrong)
    with pytest.raises(UsageError, match="--fold applies to one dataset, not to image files"):
        embed([photos, photos], model, tmp_path / "g.parquet", fold=1)
    with pytest.raises(DataError, match=r"no dataset 'digit'.*did you mean digits"):
        embed("digit", model, tmp_path / "g.parquet")
    with pytest.raises(ModelError, match="no such folder"):
        embed(photos, tmp_path / "no-model", tmp_path / "g.parquet")


def test_features_that_are_not_finite_are_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    broken = tiny_model("vit")
    with torch.no_grad():
        broken.vit.layernorm.weight.fill_(3e38)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="its features are not finite"):
        embed(photos, tmp_path / "broken", tmp_path / "f.parquet")


def test_the_command_says_its_columns(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = vitft("embed", photos, "--model", model, "--output", "f.parquet", "--image-size", "24")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "f.parquet: 5 images"
    assert [line.split()[0] for line in lines[1:]] == ["path", "split", "row", "label", "features"]
    assert lines[-1].split(maxsplit=1)[1].strip() == "list of 16 float32"
    assert max(map(len, lines[1:])) <= 80
    done = vitft("embed", photos, "--model", model, "--output", tmp_path / "g.parquet", "--json")
    document = json.loads(done.stdout)
    assert (document["images"], document["features"], document["unreadable"]) == (5, 16, [])
    assert "--image-size" in vitft("embed", photos, "--model", model, "--output", "h.parquet", "--image-size", 2).stderr


def test_a_name_that_is_not_utf_8_is_escaped(model: Path, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff.png")
    Image.new("RGB", (8, 8)).save(file, "PNG")
    embed([file], model, tmp_path / "f.parquet")
    assert pq.read_table(tmp_path / "f.parquet")["path"].to_pylist() == [f"{tmp_path}/\\udcff.png"]
