"""metrics: against scikit-learn and by hand, offline, leaving nothing behind; what people see of them."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)

from vitft.cli.tables import metrics_report
from vitft.errors import DataError, ModelError
from vitft.evaluation.metrics import Metrics, score, wilson_interval
from vitft.evaluation.plots import plot_confusion


def scored(truth: np.ndarray, outputs: np.ndarray, labels: list[str]) -> Metrics:
    """Score (n,) true classes and (n, C) outputs, as evaluation does."""
    top = np.argsort(-outputs, axis=1)[:, : min(5, len(labels))]
    losses = np.linspace(0, 2, len(truth))
    return score(truth, top, losses, labels, split="test", split_hash="0123456789abcdef", elapsed_s=0.5)


def random_scores(count: int, labels: list[str], seed: int = 0, skill: float = 3.0) -> Metrics:
    random = np.random.default_rng(seed)
    truth = random.integers(0, len(labels), count)
    outputs = random.normal(size=(count, len(labels)))
    outputs[np.arange(count), truth] += skill
    return scored(truth, outputs, labels)


@pytest.mark.filterwarnings("ignore:A single label")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_scores_are_those_of_scikit_learn(count: int, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, count)
    outputs = random.normal(size=(count, classes))
    best = outputs.argmax(axis=1)
    every = list(range(classes))
    metrics = scored(truth, outputs, [f"c{i}" for i in every])

    # Both sides do the same few divisions in float64, so all but the last bits agree.
    assert metrics.accuracy == pytest.approx(accuracy_score(truth, best), abs=1e-12)
    assert metrics.macro_f1 == pytest.approx(f1_score(truth, best, average="macro"), abs=1e-12)
    recalls = recall_score(truth, best, labels=np.unique(truth), average="macro")
    assert metrics.balanced_accuracy == pytest.approx(recalls, abs=1e-12)
    assert metrics.loss == pytest.approx(np.linspace(0, 2, count).mean(), abs=1e-12)
    assert metrics.matrix.tolist() == confusion_matrix(truth, best, labels=every).tolist()
    if classes > 5:
        expected = top_k_accuracy_score(truth, outputs, k=5, labels=every)
        assert metrics.top5 == pytest.approx(expected, abs=1e-12)
    else:
        assert metrics.top5 == 1.0
    expected = precision_recall_fscore_support(truth, best, labels=every, zero_division=0)
    got = [(c.precision, c.recall, c.f1, c.count) for c in metrics.per_class]
    np.testing.assert_allclose(np.array(got).T, expected, atol=1e-12)


def test_a_class_that_never_occurs_is_listed_but_not_averaged() -> None:
    truth, outputs = np.array([0, 0, 1]), np.eye(3)[[0, 1, 1]]
    metrics = scored(truth, outputs, ["a", "b", "absent"])
    assert (metrics.per_class[2].f1, metrics.per_class[2].count) == (0.0, 0)
    assert "cells" not in repr(metrics)  # of many classes, they would fill pages
    assert metrics.macro_f1 == pytest.approx(2 / 3)  # Both occurring classes have F1 2/3.


def test_the_json_document_has_the_promised_names() -> None:
    metrics = random_scores(100, ["cat", "dog"])
    document = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert list(document) == [
        *(
            "accuracy",
            "accuracy_interval",
            "top5",
            "loss",
            "macro_f1",
            "balanced_accuracy",
            "count",
            "split",
            "split_hash",
        ),
        *("images_per_s", "per_class", "confusion"),
    ]
    assert list(document["per_class"][0]) == ["label", "precision", "recall", "f1", "count"]
    assert document["confusion"]["labels"] == ["cat", "dog"]
    assert sum(count for _, _, count in document["confusion"]["cells"]) == document["count"] == 100
    assert document["images_per_s"] == 200
    low, high = document["accuracy_interval"]
    assert 0 <= low < document["accuracy"] < high <= 1
    assert (document["split"], document["split_hash"]) == ("test", "0123456789abcdef")


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    metrics = scored(np.array([0, 0]), np.array([[0.0, 1.0], [1.0, 0.0]]), ["cat", "dog"])
    assert metrics.matrix.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("correct", "count", "expected"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score, without continuity correction).
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_is_the_published_one(correct: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(correct, count) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10**6), st.data())
def test_the_wilson_interval_contains_the_fraction_and_stays_within_0_and_1(count: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, count))
    low, high = wilson_interval(correct, count)
    assert 0 <= low <= correct / count + 1e-12
    assert correct / count - 1e-12 <= high <= 1
    mirrored = wilson_interval(count - correct, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_the_wilson_interval_refuses_counts_out_of_range(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match="is not a fraction"):
        wilson_interval(correct, count)


def test_an_empty_split_is_a_data_error() -> None:
    with pytest.raises(DataError, match="split test has no images"):
        scored(np.zeros(0, np.int64), np.zeros((0, 3)), ["a", "b", "c"])


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_non_finite_evaluation_loss_is_a_model_error(loss: float) -> None:
    top, losses = np.array([[0, 1], [1, 0]]), np.array([0.1, loss])
    with pytest.raises(ModelError, match="loss on test is"):
        score(np.array([0, 1]), top, losses, ["a", "b"], split="test", split_hash="0", elapsed_s=1)


@pytest.mark.parametrize(
    ("truth", "top"),
    [([0, 2], [[0, 1], [1, 0]]), ([0, -1], [[0, 1], [1, 0]]), ([0], [[0, 1], [1, 0]]), ([0, 1], [[0], [1]])],
)
def test_arrays_that_do_not_belong_together_are_refused(truth: list[int], top: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"outside|got truth"):
        score(
            np.array(truth),
            np.array(top),
            np.zeros(len(truth)),
            ["a", "b"],
            split="test",
            split_hash="0",
            elapsed_s=1.0,
        )


def test_scoring_needs_no_network_and_leaves_no_file(tmp_path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    code = (
        "import numpy as np; from vitft.evaluation.metrics import score;"
        "m = score(np.array([0, 1]), np.array([[0, 1], [0, 1]]), np.zeros(2), ['a', 'b'],"
        " split='test', split_hash='0', elapsed_s=1.0); print(m.accuracy)"
    )
    place = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(temporary)}
    offline = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=os.environ | place | offline, capture_output=True, text=True, check=True)
    assert run.stdout == "0.5\n"
    left = [path for folder in (home, temporary) for path in folder.rglob("*") if path.is_file()]
    assert left == []


def rendered(metrics: Metrics) -> str:
    console = Console(width=80, file=StringIO(), highlight=False)
    console.print(metrics_report(metrics))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 12, 13, 30, 31, 100])
def test_the_report_fits_80_columns(classes: int) -> None:
    labels = [f"{i} has a name that is longer than any column of a table" for i in range(classes)]
    text = rendered(random_scores(20_000, labels))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text  # Names are cut,
    assert not re.search(r"\d…", text)  # numbers never.
    assert "20,000 images of test [01234567]" in text


def test_the_report_names_score_interval_split_and_hash() -> None:
    truth = np.array([0] * 6 + [1] * 4)
    outputs = np.eye(2)[[0] * 6 + [1, 1, 1, 0]]
    text = rendered(scored(truth, outputs, ["cat", "[red]dog\x1b[0m"]))
    lines = text.splitlines()
    assert lines[0] == "accuracy 90.0 % (95 % interval 59.6–98.2) on 10 images of test [01234567]"
    assert lines[1] == "balanced accuracy 87.5 %, macro F1 89.0 %"
    assert lines[2] == "loss 1.0000, 20 images/s"
    assert "[red]dog\\x1b[0m" in text  # A name is neither markup nor steers the terminal.
    assert [line.split() for line in lines if line.startswith("cat")] == [
        ["cat", "85.7", "%", "100.0", "%", "92.3", "%", "6"],
        ["cat", "6", "·"],
    ]


def test_of_many_classes_the_report_shows_the_worst() -> None:
    labels = [f"c{i}" for i in range(40)]
    truth = np.repeat(np.arange(40), 4)
    outputs = np.eye(40)[truth]
    outputs[8:11] = np.eye(40)[7]  # Three of four c2 are taken for c7.
    text = rendered(scored(truth, outputs, labels))
    assert "The 10 lowest F1 of 40 classes" in text
    after_title = text.split("Most frequent confusions")[1].splitlines()
    assert [line.split() for line in after_title[1:]] == [["c2", "→", "c7", "3"]]


def test_of_20_000_classes_no_square_matrix_is_made(tmp_path: Path) -> None:
    labels = [f"c{i}" for i in range(20_000)]
    random = np.random.default_rng(0)
    truth = random.integers(0, 20_000, 3000)
    top = np.stack([np.where(random.random(3000) < 0.5, truth, (truth + 1) % 20_000), *[truth] * 4], axis=1)
    tracemalloc.start()
    metrics = score(truth, top, np.ones(3000), labels, split="test", split_hash="0" * 16, elapsed_s=1.0)
    text, document = rendered(metrics), json.dumps(metrics.to_dict())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # the matrix would be 3.2e9
    plot_confusion(metrics, tmp_path / "many.png")
    assert len(document) < 4e6
    assert json.loads(document)["confusion"]["cells"] == metrics.cells.tolist()
    assert metrics.cells[:, 2].sum() == 3000
    assert metrics.accuracy == accuracy_score(truth, top[:, 0])
    assert metrics.macro_f1 == pytest.approx(f1_score(truth, top[:, 0], average="macro"), abs=1e-12)
    assert "The 10 lowest F1 of 20,000 classes" in text
    assert re.search(r"c\d+ +→ c\d+ +\d", text)


def test_the_matrix_and_its_cells_are_the_same_numbers() -> None:
    metrics = random_scores(300, [f"c{i}" for i in range(7)])
    matrix = np.zeros((7, 7), np.int64)
    for true, predicted, count in metrics.cells:
        matrix[true, predicted] = count
    assert metrics.matrix.tolist() == matrix.tolist()
    assert metrics.cells[:, 2].min() > 0


def test_a_class_without_images_has_no_scores_in_the_table() -> None:
    text = rendered(scored(np.array([0, 0, 1]), np.eye(3)[[0, 1, 1]], ["a", "b", "absent"]))
    assert next(line.split() for line in text.splitlines() if line.startswith("absent")) == ["absent", *"–––0"]
    many = scored(np.zeros(5, np.int64), np.eye(40)[[0] * 5], [f"c{i}" for i in range(40)])
    assert "c1 " not in rendered(many)


def warned(recorder: pytest.WarningsRecorder) -> list[str]:
    """Without those of what another test left open, and is collected now."""
    return [str(warning.message) for warning in recorder if warning.category is not ResourceWarning]


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 100, 130])
def test_the_picture_of_any_size_opens(classes: int, tmp_path, recwarn) -> None:
    labels = [f"$name_{i} \\frac{{ 猫 of quite some length" for i in range(classes)]
    plot_confusion(random_scores(500, labels), tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"
        assert 400 < min(picture.size) <= max(picture.size) < 2400
    assert warned(recwarn) == []


def drawn(labels: list[str], folder: Path) -> np.ndarray:
    plot_confusion(random_scores(50, labels), folder / "plot.png")
    with Image.open(folder / "plot.png") as picture:
        return np.asarray(picture.convert("L"))


def test_a_name_in_letters_that_no_font_has_is_the_number_of_its_class(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture, fonts_here: object
) -> None:
    numbers = drawn(["ant", "class 1", "class 2"], tmp_path)
    np.testing.assert_array_equal(drawn(["ant", "猫", "柴犬 b"], tmp_path), numbers)
    assert (warned(recwarn), caplog.text) == ([], "")


def test_a_name_is_drawn_in_an_installed_font_that_has_its_letters(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
    fonts_here: Callable[[str], None],
) -> None:
    fonts_here("猫…")
    with_font, number = drawn(["ant", "猫", "犬"], tmp_path), drawn(["ant", "class 1", "犬"], tmp_path)
    assert with_font.shape != number.shape or (with_font != number).any()
    np.testing.assert_array_equal(with_font, drawn(["ant", "猫", "class 2"], tmp_path))
    assert (warned(recwarn), caplog.text) == ([], "")


def test_looking_for_a_font_that_is_not_installed_says_nothing(
    recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    from vitft.io import fonts

    assert str(fonts._file("DejaVu Sans")).endswith(".ttf")
    assert fonts._file("No Such Font") is None
    for font in fonts._INSTALLED:
        fonts._file(font)
    assert fonts.drawable("café ∞ кот", "class 1") == ("café ∞ кот", fonts._dejavu())
    assert (warned(recwarn), caplog.text) == ([], "")
