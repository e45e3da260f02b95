"""Prediction agrees with Transformers' own pipeline, and gives each image a row, readable or not."""

import csv
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import tiny_model
from vitft import TrainConfig
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.cli.app import app
from vitft.data.augment import Preprocess, preprocess_images
from vitft.data.decoder import decode
from vitft.errors import DataError, ModelError, UsageError
from vitft.models.load import load_for_training
from vitft.prediction.inputs import _channels_last
from vitft.prediction.predictor import _AHEAD, BATCH, Prediction, Predictor, predict

OPAQUE = ("RGB", "L", "P", "1", "CMYK")
SIZES = (
    (64, 64),
    (20, 20),
    (300, 200),
    (90, 500),
    (40, 100),
    (110, 50),
    (7, 3),
    (640, 480),
    (65, 63),
    (64, 90),
)
LABELS = tuple("abcdefg")

PREPROCESSES = {
    "vit": Preprocess(64, 64),
    "bicubic": Preprocess(64, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resample="bicubic"),
    "centre crop": Preprocess(64, 64, resample="bicubic", shortest_edge=72),
    "deit": Preprocess(64, 64, resample="bicubic", before_crop=(72, 72)),
}


def assert_same_top(one: Prediction, other: Prediction) -> None:
    """The same classes with the same scores, but for rounding: it differs by an image's place in its batch."""
    assert [label for label, _ in one.top] == [label for label, _ in other.top]
    assert [score for _, score in one.top] == pytest.approx([score for _, score in other.top], abs=1e-4)


def make_checkpoint(folder: Path, how: Preprocess) -> Path:
    """A random ViT whose logits are spread, saved as a run does."""
    model = tiny_model("vit", 64, hidden_size=32, num_labels=len(LABELS))
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: i for i, label in enumerate(LABELS)}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        images = [torch.from_numpy(np.array(picture(number, 90, 70))) for number in range(100, 140)]
        logits = model(preprocess_images(images, how)).logits
        model.classifier.weight.mul_(2 / logits.std(0)[:, None])
        model.classifier.bias.copy_(-logits.mean(0) * 2 / logits.std(0))
    save_model(folder, model, how, Card(TrainConfig(), LABELS, 0, 0.0, {}, {}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "best", PREPROCESSES["vit"])


def picture(number: int, width: int, height: int) -> Image.Image:
    """Soft shapes and hard edges; no two are alike."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    edges = 120 * (random.random((height, width, 1)) < 0.1)
    return Image.fromarray((soft + edges).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def opaque(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """100 JPEG and PNG files: each mode in each size, in the formats that can hold it."""
    folder, paths = tmp_path_factory.mktemp("opaque"), []
    for number in range(100):
        mode, size = OPAQUE[number % 5], SIZES[number // 5 % 10]
        as_jpeg = mode == "CMYK" or (number // 50 and mode in ("RGB", "L"))
        path = folder / f"{number:03}-{mode}.{'jpg' if as_jpeg else 'png'}"
        picture(number, *size).convert(mode).save(path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("name", PREPROCESSES)
def test_the_pipeline_agrees_on_opaque_files(tmp_path: Path, opaque: list[Path], name: str) -> None:
    """Same first class, and probabilities within 1e-3 (seen: 1e-5): both resize by Pillow."""
    folder = make_checkpoint(tmp_path / "best", PREPROCESSES[name])
    classify = transformers.pipeline("image-classification", model=str(folder))

    ours = predict(opaque, folder, top_k=7)
    theirs = classify([str(path) for path in opaque], top_k=7)

    assert_agree(ours, theirs)
    firsts = [row.top[0] for row in ours]
    assert len({label for label, _ in firsts}) > 2  # not one answer for all, nor always a sure one
    assert 0.3 < np.mean([score for _, score in firsts]) < 0.97


def test_the_pipeline_agrees_on_decoded_alpha_and_16_bits(checkpoint: Path, tmp_path: Path) -> None:
    """Handed over decoded, because the pipeline drops alpha and clips 16 bits."""
    paths = []
    for number, (width, height) in enumerate(SIZES):
        image = picture(number, width, height)
        alpha = Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width), np.uint8))
        wide = np.asarray(image.convert("L"), np.uint16) * 257
        kinds = {"RGBA": image.copy(), "LA": image.convert("L"), "16": Image.fromarray(wide)}
        for kind, made in kinds.items():
            if kind != "16":
                made.putalpha(alpha)
            paths.append(tmp_path / f"{number}-{kind}.png")
            made.save(paths[-1])
    classify = transformers.pipeline("image-classification", model=str(checkpoint))

    theirs = classify([Image.fromarray(decode(path)) for path in paths], top_k=7)

    assert_agree(predict(paths, checkpoint, top_k=7), theirs)


def test_a_model_trains_after_another_of_its_shape_has_predicted(saved: Callable[..., Path], tmp_path: Path) -> None:
    """BEiT's index of relative positions stays in a cache of Transformers, which the backward pass reads too."""
    folder, image = saved("beit"), tmp_path / "image.png"
    picture(0, 32, 32).save(image)

    predict(image, folder)

    model = load_for_training(TrainConfig(model=str(folder)), ("ant", "bee")).model
    model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.sum().backward()
    assert model.classifier.weight.grad is not None


def assert_agree(ours: list[Prediction], theirs: list[list[dict[str, Any]]]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        scores = {one["label"]: one["score"] for one in other}
        assert mine.error is None
        assert mine.top[0][0] == other[0]["label"], mine.path
        assert max(abs(score - scores[label]) for label, score in mine.top) < 1e-3, mine.path


def test_transformers_loads_a_checkpoint_without_a_word(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, verbosity = transformers.utils.logging.get_logger(), transformers.utils.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    try:
        transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
        transformers.pipeline("image-classification", model=str(checkpoint))
    finally:
        logger.removeHandler(handler)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()

    said = "\n".join([*lines, *capfd.readouterr()])
    assert not any(word in said for word in ("weights", "initialized", "MISSING", "UNEXPECTED", "mismatch")), said


def test_an_image_is_the_same_alone_and_among_others(checkpoint: Path, opaque: list[Path]) -> None:
    """To 1e-5: a matrix product may add in another order for another batch."""
    together = predict(opaque, checkpoint, top_k=7)
    for position in (0, 37, 99):
        (alone,) = predict(opaque[position], checkpoint, top_k=7)
        for label, score in alone.top:
            assert dict(together[position].top)[label] == pytest.approx(score, abs=1e-5)


# -- what is given, and what comes back ------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: b.png, a.jpg and deep/c.png, a note, and a file that is no image, bad.png."""
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.png", "a.jpg", "deep/c.png")):
        picture(number, 50, 40).save(tmp_path / name)
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths_of(rows: list[Prediction]) -> list[str]:
    return [row.path for row in rows]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["b.png", "a.jpg"], ["b.png", "a.jpg"]),
        (["a.jpg", "b.png", "a.jpg"], ["a.jpg", "b.png", "a.jpg"]),
        (["deep", "b.png"], ["deep/c.png", "b.png"]),
        (["**/*.png"], ["b.png", "bad.png", "deep/c.png"]),
        (["?.jpg", "deep/*"], ["a.jpg", "deep/c.png"]),
        (["."], ["a.jpg", "b.png", "bad.png", "deep/c.png"]),
    ],
)
def test_rows_come_in_the_order_given(folder: Path, checkpoint: Path, given: list[str], wanted: list[str]) -> None:
    assert paths_of(predict(given, checkpoint)) == wanted


def test_a_files_name_may_look_like_a_glob(folder: Path, checkpoint: Path) -> None:
    picture(9, 30, 30).save(folder / "x[1].png")
    assert paths_of(predict("x[1].png", checkpoint)) == ["x[1].png"]


def test_bad_and_missing_files_get_a_row_and_the_others_are_predicted(folder: Path, checkpoint: Path) -> None:
    bad, good, gone, text = predict(["bad.png", "b.png", "gone.png", "note.txt"], checkpoint)

    assert good.error is None
    assert len(good.top) == 3
    assert good.to_dict()["top"][0] == {"label": good.top[0][0], "score": good.top[0][1]}
    assert gone.to_dict() == {"path": "gone.png", "error": "does not exist"}
    assert all(row.error and not row.top and "\n" not in row.error for row in (bad, text))


def test_more_rows_than_a_batch_with_bad_ones_stay_in_order(folder: Path, checkpoint: Path) -> None:
    given = (["b.png", "bad.png", "a.jpg"] * 50)[:140]
    rows = predict(given, checkpoint)

    assert paths_of(rows) == given
    assert len({row.top[0][0] for row in rows if row.path == "b.png"}) == 1
    assert all((row.error is not None) == (row.path == "bad.png") for row in rows)


def test_probabilities_fall_and_sum_to_one(folder: Path, checkpoint: Path) -> None:
    (row,) = predict("b.png", checkpoint, top_k=100)
    scores = [score for _, score in row.top]
    assert {label for label, _ in row.top} == set(LABELS)
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("given", [[], ["empty"]])
def test_no_image_at_all_is_an_error(folder: Path, checkpoint: Path, given: list[str]) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no image found"):
        predict(given, checkpoint)


def test_too_many_pixels_is_a_row(folder: Path, checkpoint: Path) -> None:
    (row,) = predict("b.png", checkpoint, max_pixels=100)
    assert "over --max-pixels 100" in str(row.error)


def test_a_run_without_the_checkpoint_that_was_asked_for_names_those_it_has(digits_run: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    picture(0, 9, 9).save(tmp_path / "x.png")
    with pytest.raises(ModelError, match="no checkpoint yet"):
        predict(tmp_path / "x.png", run)
    shutil.copytree(digits_run.run / "last", run / "last")
    with pytest.raises(ModelError, match=r"no such checkpoint; this run has last\.$"):
        predict(tmp_path / "x.png", run / "best")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(folder: Path, checkpoint: Path) -> Callable[..., Any]:
    return lambda *words: CliRunner().invoke(app, ["predict", *words, "--checkpoint", str(checkpoint)])


def test_json_is_one_document_and_nothing_else(command: Callable[..., Any]) -> None:
    done = command("b.png", "deep", "--json", "--top-k", "2")

    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert list(document) == ["predictions"]
    assert [row["path"] for row in document["predictions"]] == ["b.png", "deep/c.png"]
    for row in document["predictions"]:
        assert list(row) == ["path", "top"]
        assert [list(one) for one in row["top"]] == [["label", "score"]] * 2


def test_a_bad_file_makes_it_exit_code_3_after_all_are_predicted(command: Callable[..., Any]) -> None:
    done = command("bad.png", "b.png", "gone.png", "--json")

    assert done.exit_code == 3
    rows = json.loads(done.stdout)["predictions"]
    assert [sorted(row) for row in rows] == [["error", "path"], ["path", "top"], ["error", "path"]]
    assert "2 of 3 images could not be read; the first is bad.png" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_table_has_image_class_and_probability(command: Callable[..., Any], checkpoint: Path) -> None:
    done = command("b.png", "bad.png")

    assert done.exit_code == 3
    label, score = predict("b.png", checkpoint)[0].top[0]
    row = next(line for line in done.stdout.splitlines() if "b.png" in line)
    assert f"{100 * score:.1f} %" in done.stdout
    assert label in row
    assert "bad.png" in done.stdout


def test_jsonl_is_a_row_a_line(command: Callable[..., Any]) -> None:
    done = command("b.png", "bad.png", "--format", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == ["b.png", "bad.png"]
    assert "error" in rows[1]


def test_csv_has_a_column_for_each_place_however_many_classes_there_are(command: Callable[..., Any]) -> None:
    done = command("b.png", "bad.png", "--format", "csv", "--top-k", "9")

    head, good, bad = csv.reader(io.StringIO(done.stdout))
    assert head[:3] == ["path", "label_1", "score_1"]
    assert head[-1] == "error"
    assert len(good) == len(bad) == len(head)
    assert {good[i] for i in range(1, 15, 2)} == set(LABELS)
    assert sum(float(good[i]) for i in range(2, 15, 2)) == pytest.approx(1, abs=1e-4)
    assert good[-1] == ""
    assert bad[1:-1] == [""] * (len(head) - 2)
    assert bad[-1]


def test_a_checkpoint_that_is_not_there_is_exit_code_4(folder: Path) -> None:
    done = CliRunner().invoke(app, ["predict", "b.png", "--checkpoint", "./absent"])
    assert done.exit_code == 4
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_format_names_the_nearest(command: Callable[..., Any]) -> None:
    done = command("b.png", "--format", "jsnl")
    assert done.exit_code == 2
    assert "did you mean jsonl" in done.stderr


def test_value_range_is_stored_with_the_model_and_set_by_a_flag(tmp_path: Path) -> None:
    """12 bits in 16 are what their 8 upper bits are, where the checkpoint was trained with that range."""
    deep = (np.random.default_rng(0).integers(0, 256, (64, 64)) * 4095 / 255).round().astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.round(deep / 4095 * 255).astype(np.uint8)).save(tmp_path / "plain.png")
    both = [tmp_path / "deep.png", tmp_path / "plain.png"]
    ranged = make_checkpoint(tmp_path / "ranged", replace(PREPROCESSES["vit"], value_range=(0.0, 4095.0)))
    deep_row, plain_row = predict(both, ranged)
    assert_same_top(deep_row, plain_row)
    transformers.pipeline("image-classification", model=str(ranged))  # it passes over the key
    plain = make_checkpoint(tmp_path / "plain", PREPROCESSES["vit"])
    first, second = predict(both, plain)
    assert abs(first.top[0][1] - second.top[0][1]) > 1e-3
    assert_same_top(*predict(both, plain, value_range="0:4095"))
    for wrong in ("4095", "1:0", "a:b", "0:inf"):
        with pytest.raises(UsageError, match=f"--value-range {wrong}: should be two numbers"):
            predict(both, plain, value_range=wrong)


# -- a predictor ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("predictor")
    random = np.random.default_rng(5)
    files = [folder / f"{name}.png" for name in "abc"]
    for file in files:
        Image.fromarray(random.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(file)
    return make_checkpoint(folder / "model", PREPROCESSES["vit"]), files


@pytest.mark.parametrize(
    "given",
    [
        lambda images: images,
        lambda images: [Path(image.filename).read_bytes() for image in images],
        lambda images: [np.asarray(image) for image in images],
        lambda images: np.stack([np.asarray(image) for image in images]),
        lambda images: [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images],
        lambda images: torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255,
    ],
    ids=["PIL", "encoded", "arrays", "a batch of arrays", "tensors", "a batch of floats"],
)
def test_images_in_memory_are_what_their_files_are(photographs: tuple[Path, list[Path]], given: Any) -> None:
    checkpoint, files = photographs
    predictor = Predictor(checkpoint)
    wanted = predict(list(map(str, files)), checkpoint)
    got = predictor(given([Image.open(file) for file in files]))
    for one, other in zip(got, wanted, strict=True):
        assert_same_top(one, other)
    assert [row.path for row in got] == ["image 0", "image 1", "image 2"]
    assert [row.path for row in predictor(files)] == [row.path for row in wanted]
    assert_same_top(predictor(files[1], top_k=1)[0], replace(wanted[1], top=wanted[1].top[:1]))
    assert predictor.labels == LABELS


def test_gray_images_in_memory(photographs: tuple[Path, list[Path]]) -> None:
    predictor = Predictor(photographs[0])
    gray = Image.open(photographs[1][0]).convert("L")
    array = np.asarray(gray)
    (wanted,) = predictor(gray)
    for given in (array, array[:, :, None], torch.from_numpy(array.copy())[None], array[None, :, :, None]):
        assert_same_top(*predictor(given), wanted)


def test_files_that_are_not_images_get_a_row_with_the_error(photographs: tuple[Path, list[Path]]) -> None:
    checkpoint, files = photographs
    channels_first = np.zeros((3, 40, 50), np.uint8)
    rows = Predictor(checkpoint)(
        [np.zeros((4, 4, 3)), channels_first, files[0], files[0].with_name("gone.png"), files[0].with_name("no*.png")]
    )
    remedy = "give uint8 (height, width) or (height, width, 3)"
    assert [row.error for row in rows] == [
        f"is an array of float64, 4 x 4 x 3; {remedy}",
        f"is an array of uint8, 3 x 40 x 50; {remedy}",
        None,
        "does not exist",
        "matches no file",
    ]


def test_float_images_become_the_uint8_pixels_they_encode() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert np.array_equal(_channels_last(pixels / 255), pixels.movedim(0, -1).numpy())


# -- a stream ---------------------------------------------------------------------------------------


def test_a_stream_has_no_end_and_is_read_a_few_batches_ahead(photographs: tuple[Path, list[Path]]) -> None:
    checkpoint, files = photographs
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield files[taken % 3]

    rows = list(islice(Predictor(checkpoint).stream(endless()), 3 * BATCH))
    assert [row.path for row in rows[:4]] == [str(files[number % 3]) for number in (1, 2, 3, 4)]
    assert 3 * BATCH <= taken <= 3 * BATCH + _AHEAD + 1


def test_a_stream_gives_all_probabilities_if_asked(photographs: tuple[Path, list[Path]]) -> None:
    predictor = Predictor(photographs[0])
    for plain, full in zip(
        predictor(photographs[1]), predictor.stream(photographs[1], probabilities=True), strict=True
    ):
        assert plain.probabilities is None
        assert full.probabilities is not None
        assert dict(full.top) == {
            LABELS[place]: float(full.probabilities[place]) for place in full.probabilities.argsort()[-3:]
        }
        assert_same_top(plain, full)


def test_images_read_in_one_place_and_scored_in_another_are_what_a_call_says(
    photographs: tuple[Path, list[Path]],
) -> None:
    """As a server does: it decodes in the threads of its requests, and scores in batches."""
    checkpoint, files = photographs
    predictor = Predictor(checkpoint)
    pixels = torch.stack([predictor.read(file.read_bytes()) for file in files])
    assert pixels.dtype == torch.uint8
    every = predictor.score(pixels).probabilities
    assert every.shape == (3, len(LABELS))
    for scores, row in zip(every, predictor(files, top_k=7), strict=True):
        assert [float(scores[LABELS.index(label)]) for label, _ in row.top] == pytest.approx(
            [p for _, p in row.top], abs=1e-5
        )
    with pytest.raises(DataError, match="not an image"):
        predictor.read(b"no image at all")
