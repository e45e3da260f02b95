"""The classes of a head: those with training images, or those of --labels."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk
from typer.testing import CliRunner

from tests.training.test_trainer import assert_same_weights, interrupted
from vitft import TrainConfig, train
from vitft.checkpoints.metadata import read_card
from vitft.cli.app import app
from vitft.errors import DataError
from vitft.evaluation.evaluation import evaluate, matched
from vitft.evaluation.metrics import score
from vitft.models.load import load_trained
from vitft.prediction.predictor import predict
from vitft.training.setup import prepare
from vitft.training.trainer import resume

SMALL = {
    "model": "vit-micro", "from_scratch": True, "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2,
    "mlp": 16, "batch_size": 8, "max_steps": 4, "device": "cpu", "precision": "fp32", "threads": 1, "cache_gb": 0,
}  # fmt: skip
ONWARD = {"from_scratch": False} | dict.fromkeys(("image_size", "patch_size", "width", "layers", "heads", "mlp"))


def draw(folder: Path, counts: dict[str, int]) -> Path:
    """Write class folders of small, distinct images."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, *map(ord, str(folder) + label)]).integers(0, 256, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`bat` has images only in the test split, `emu` only in validation and test."""
    draw(tmp_path / "data/train", {"ant": 10, "cat": 10})
    draw(tmp_path / "data/validation", {"ant": 4, "cat": 4, "emu": 2})
    draw(tmp_path / "data/test", {"ant": 5, "bat": 3, "cat": 5, "emu": 1})
    return tmp_path / "data"


def config(data: Path, **changes: object) -> TrainConfig:
    return TrainConfig.parse(SMALL | {"dataset": str(data)} | changes)


def head(folder: Path) -> list[str]:
    model = load_trained(folder)
    assert model.model.classifier.weight.shape[0] == len(model.labels)
    return list(model.labels)


def listing(folder: Path, *names: str) -> str:
    file = folder / "labels.txt"
    file.write_text("\n".join([*names, ""]))
    return str(file)


def test_classes_without_training_images_are_left_out_of_the_head_with_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(config(data), output=tmp_path / "run")

    assert head(tmp_path / "run/last") == head(result.checkpoint) == ["ant", "cat"]
    warnings = [
        line for line in " ".join(capsys.readouterr().err.split()).split("warning: ") if "training image" in line
    ]
    assert len(warnings) == 1
    assert "no training image of 2 of 4 classes, left out of the head" in warnings[0]
    assert "bat, emu; 2 validation and 4 test images can therefore never be right" in warnings[0]
    recorded = json.loads((tmp_path / "run/splits.json").read_text())
    assert recorded["labels"] == ["ant", "bat", "cat", "emu"]
    assert recorded["splits"]["test"]["count"] == 14


@pytest.mark.parametrize("freeze", [False, True])
def test_images_of_such_classes_count_as_wrong_and_are_not_in_the_loss(
    data: Path, tmp_path: Path, freeze: bool
) -> None:
    settings = config(data)
    if freeze:  # validation and test are then scored from cached features
        train(settings, output=tmp_path / "first")
        settings = config(data, **ONWARD, model=str(tmp_path / "first/last"), freeze="backbone", max_steps=9)
    result = train(settings, output=tmp_path / "run")

    for role, count in (("validation", 10), ("test", 14)):
        right, losses, truth, answers = 0, [], [], []
        for label in sorted(folder.name for folder in (data / role).iterdir()):
            for image in predict([data / role / label], result.checkpoint):
                answers.append(image.top[0][0])
                truth.append(label)
                right += image.top[0][0] == label
                losses += [-np.log(share) for name, share in image.top if name == label]
        got = result.scores[role]
        assert (got.count, len(losses)) == (count, 8 if role == "validation" else 10)
        assert got.accuracy == right / count
        assert got.loss == pytest.approx(np.mean(losses), abs=1e-4)
        assert got.macro_f1 == pytest.approx(sk.f1_score(truth, answers, average="macro"))


def test_eval_gives_the_scores_of_the_run_with_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(config(data), output=tmp_path / "run")
    capsys.readouterr()
    got = evaluate(result.run)

    said = " ".join(capsys.readouterr().err.split())
    assert "4 of 14 test images are of classes that the model does not have (bat, emu): they count as wrong" in said
    for name in ("accuracy", "macro_f1", "loss", "count", "split_hash"):
        assert getattr(result.scores["test"], name) == pytest.approx(got.to_dict()[name]), name
    assert {row.label: row.count for row in got.per_class} == {"ant": 5, "cat": 5, "bat": 3, "emu": 1}
    rows = {row.label: row for row in got.per_class}
    assert rows["bat"].recall == rows["emu"].f1 == 0
    table = CliRunner().invoke(app, ["eval", str(result.run), "--json"])
    assert json.loads(table.stdout)["confusion"]["labels"] == ["ant", "cat", "bat", "emu"]
    assert "bat" in CliRunner().invoke(app, ["eval", str(result.run)]).stdout

    moved = data.rename(tmp_path / "moved")
    assert evaluate(result.run, dataset=str(moved)).confusion == got.confusion


def test_other_data_with_other_classes_is_still_refused(data: Path, tmp_path: Path) -> None:
    result = train(config(data), output=tmp_path / "run")
    other = draw(tmp_path / "other/test", {"ant": 3, "yak": 3}).parent
    with pytest.raises(DataError, match=r"the data has \[ant, yak\], .* knows \[ant, cat\]"):
        evaluate(result.run, dataset=str(other))


def test_a_label_without_images_is_not_a_mismatch() -> None:
    truth, others = matched(np.array([2, 0]), ["cat", "yak", "ant"], ["ant", "cat"], name="model")
    assert (truth.tolist(), others) == ([0, 1], ())
    truth, others = matched(np.array([1, 0]), ["cat", "yak", "ant"], ["ant", "cat"], name="model", own=True)
    assert (truth.tolist(), others) == ([2, 1], ("yak",))
    with pytest.raises(DataError, match="labels do not match"):
        matched(np.array([1, 1]), ["cat", "yak", "ant"], ["ant", "cat"], name="model", own=True)


def test_labels_can_add_classes_and_sets_their_order(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = listing(tmp_path, "emu", "cat", "  bat ", "", "ant", "zebra")
    result = train(config(data, labels=file), output=tmp_path / "run")

    assert head(result.checkpoint) == ["emu", "cat", "bat", "ant", "zebra"]
    said = " ".join(capsys.readouterr().err.split())
    assert "not among the classes of data: zebra" in said
    assert "no training image of 2 of 4 classes in the head: bat, emu" in said
    assert "never be right" not in said
    assert len(evaluate(result.run).per_class) == 5
    card = json.loads((result.checkpoint / "vitft.json").read_text())
    assert card["config"]["labels"] == "labels.txt"  # a shared checkpoint has no local paths

    Path(file).unlink()  # a saved run no longer needs it
    assert head(resume(result.run, {"max_steps": 6}).checkpoint) == ["emu", "cat", "bat", "ant", "zebra"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "labels.txt: No such file or directory; give a text file with one class name per line"),
        (b"\xff\xfe\x00cat", "labels.txt: it is not UTF-8 text; give a text file"),
        (
            b"ant\nbat\nemu\n",
            "labels.txt: lacks cat, which has training images; add every class that has, one per line",
        ),
        (b"", "labels.txt: lacks ant and 1 more, which have training images"),
        (b"ant\ncat\nant\n", "labels.txt: ant is listed twice; remove one of the lines"),
        (b"ant\r\ncat \r\nbat\r\ncat\r\n", "labels.txt: cat is listed twice"),
    ],
)
def test_an_invalid_labels_file_gets_a_one_line_error(
    data: Path, tmp_path: Path, text: bytes | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "labels.txt").write_bytes(text)
    words = ["train", "--dataset", str(data), "--model", "vit-micro", "--labels", str(tmp_path / "labels.txt")]
    ended = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "run")])
    assert ended.exit_code == 3
    assert expected in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_training_images_of_one_class_are_refused(data: Path, tmp_path: Path) -> None:
    draw(tmp_path / "one/train", {"ant": 4})
    draw(tmp_path / "one/test", {"ant": 4, "bat": 4})
    with pytest.raises(DataError, match=r"all of one class \(ant\)"):
        prepare(config(tmp_path / "one"))


def test_data_without_a_training_image_is_refused(data: Path, tmp_path: Path) -> None:
    draw(tmp_path / "tested/test", {"ant": 4, "cat": 4})
    with pytest.raises(DataError, match=r"tested: no training images; its splits are test\."):
        prepare(config(tmp_path / "tested"))
    out = tmp_path / "out.txt"
    out.write_text("".join(f"train\ttrain/{name}/{i}.png\n" for name in ("ant", "cat") for i in range(10)))
    with pytest.raises(DataError, match=r"data: no training images; its splits are train, validation, test\."):
        prepare(config(data, exclude=str(out)))


def test_a_split_without_any_class_of_the_head_is_refused(data: Path, tmp_path: Path) -> None:
    draw(tmp_path / "odd/train", {"ant": 4, "cat": 4})
    draw(tmp_path / "odd/test", {"bat": 4, "emu": 4})
    with pytest.raises(DataError, match=r"no test image has a class of the head.* --labels FILE"):
        prepare(config(tmp_path / "odd"))
    prepare(config(tmp_path / "odd", labels=listing(tmp_path, "ant", "bat", "cat", "emu")))


def test_a_resumed_run_with_such_classes_matches_an_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data, save_every=1)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 2, monkeypatch)
    resumed = resume(tmp_path / "cut")
    assert_same_weights(whole.run / "last", resumed.run / "last")
    assert resumed.scores["test"].accuracy == whole.scores["test"].accuracy


def test_a_head_with_all_classes_of_the_dataset_is_kept_by_resume_and_by_a_new_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like runs from before heads had only the trained classes."""
    every = ("ant", "bat", "cat", "emu")
    with monkeypatch.context() as before:
        before.setattr("vitft.training.setup._trained", lambda source, train: source.labels)
        interrupted(config(data, save_every=1), tmp_path / "old", 2, monkeypatch)
    result = resume(tmp_path / "old")
    assert head(result.run / "last") == list(every)
    card = read_card(result.run / "last")
    assert card is not None
    assert card.step == 4

    onward = prepare(config(data, **ONWARD, model=str(result.run / "last")))
    assert (onward.loaded.labels, onward.loaded.new_head) == (every, False)
    fewer = listing(tmp_path, "ant", "cat")
    asked = prepare(config(data, **ONWARD, model=str(result.run / "last"), labels=fewer))
    assert (asked.loaded.labels, asked.loaded.new_head) == (("ant", "cat"), True)


def test_a_new_run_keeps_the_head_of_the_trained_classes(data: Path, tmp_path: Path) -> None:
    first = train(config(data), output=tmp_path / "first").run
    onward = prepare(config(data, **ONWARD, model=str(first / "last")))
    assert (onward.loaded.labels, onward.loaded.new_head) == (("ant", "cat"), False)
    draw(data / "train", {"bat": 4})
    assert prepare(config(data, **ONWARD, model=str(first / "last"))).loaded.labels == ("ant", "bat", "cat")


def test_images_without_a_class_are_left_out_of_the_mean_loss() -> None:
    truth, top = np.array([0, 1, 2, 2]), np.array([[0, 1], [0, 1], [1, 0], [0, 1]])
    got = score(
        truth, top, np.array([1.0, 3.0, 100.0, np.nan]), ["a", "b"], ["c"], split="test", split_hash="0", elapsed_s=1.0
    )
    assert (got.loss, got.accuracy, got.top5) == (2.0, 0.25, 0.5)
    assert got.cells.tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1], [2, 1, 1]]
    with pytest.raises(ValueError, match=r"prediction outside 0\.\.1"):
        score(truth, top + 1, np.ones(4), ["a", "b"], ["c"], split="test", split_hash="0", elapsed_s=1.0)
