"""The command `predict`: lists of paths, files that are whole or partial, hostile names, signals, several processes."""

import csv
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import tiny_model
from tests.forked import finish_two
from vitft import TrainConfig
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.cli.app import app
from vitft.data.augment import Preprocess
from vitft.errors import UsageError
from vitft.evaluation.split_predictions import Predictions
from vitft.prediction import predictor
from vitft.prediction.inputs import listed_paths, printable
from vitft.prediction.outputs import check_output
from vitft.prediction.predictor import Predictor
from vitft.prediction.resuming import _end_of_rows

LABELS = ("ant", "bee", "=cat")
HOSTILE = (
    b"a,b.png", b'q"uote.png', b"'apostrophe.png", b"line\nend.png", b"carriage\rreturn.png", b"\xff\xfe.png",
    b"=1+1.png", b"-x.png", b"@sum.png", "é\u2028 \u202e.png".encode(), b"[1].png", b"*.png",
    b"%s{0}.png", b"~.png", b" space .png", b"\x1b[31mred.png", b"back\\slash.png", b"$(rm).png",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("model") / "best", tiny_model("vit")
    model.config.id2label = dict(enumerate(LABELS))
    save_model(folder, model, Preprocess(32, 32), Card(TrainConfig(), LABELS, 0, 0.0, {}, {}))
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ten images in photos/."""
    (tmp_path / "photos").mkdir()
    drawn = np.random.default_rng(0)
    for number in range(10):
        picture(drawn).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitft.prediction.sharing.BATCH", 4)
    monkeypatch.setattr(predictor, "BATCH", 4)
    return tmp_path


def picture(drawn: np.random.Generator) -> Image.Image:
    return Image.fromarray(drawn.integers(0, 256, (9, 12, 3), np.uint8))


@pytest.fixture
def command(photos: Path, model: Path) -> Callable[..., Any]:
    def run(*words: object, stdin: bytes | None = None) -> Any:
        return CliRunner().invoke(app, ["predict", "--checkpoint", str(model), *map(str, words)], input=stdin)

    return run


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of any format, as the same values."""
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    with file.open(encoding="utf-8", newline="") as stream:
        if file.suffix == ".csv":
            return [
                {name: float(cell) if name.startswith("score") and cell else cell for name, cell in row.items()}
                for row in csv.DictReader(stream)
            ]
        found = []
        for line in stream:
            row = json.loads(line)
            cells = {f"{k}_{n}": one[k] for n, one in enumerate(row.get("top", ()), 1) for k in ("label", "score")}
            found.append({"path": row["path"], **cells, "error": row.get("error")})
        return found


# -- what is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_hostile_names_survive_with_the_same_fields(command: Callable[..., Any], model: Path, suffix: str) -> None:
    folder, drawn = Path("hostile"), np.random.default_rng(0)
    folder.mkdir()
    for name in HOSTILE:
        picture(drawn).save(folder / os.fsdecode(name), "PNG")
    wanted = {row.path: row for row in Predictor(model)(folder, top_k=3)}
    assert len(wanted) == len(HOSTILE)
    out = Path(f"out{suffix}")
    done = command("hostile", "--output", out)
    assert done.exit_code == 0, done.output
    assert f"{len(HOSTILE)} images: {out}" in done.stderr
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [name if suffix == ".jsonl" else printable(name) for name in wanted]
    for row, prediction in zip(rows, wanted.values(), strict=True):
        best = [label if suffix != ".csv" else label.replace("=", "'=") for label, _ in prediction.top]
        assert [row[f"label_{place}"] for place in (1, 2, 3)] == best
        scores = [score for _, score in prediction.top]
        assert [row[f"score_{place}"] for place in (1, 2, 3)] == pytest.approx(scores, abs=1e-4)
        assert not row["error"]


def test_a_name_that_begins_as_a_formula_is_a_cell_of_text(command: Callable[..., Any]) -> None:
    """Given without a folder, so that it begins with it; after `--`, as it begins like an option."""
    names = ("=1+1.png", "-x.png", "@x.png")
    for number, name in enumerate(names):
        Path(f"photos/{number}.png").rename(name)
    done = command("--format", "csv", "--", *names)
    assert done.exit_code == 0, done.output
    assert [row[0] for row in csv.reader(io.StringIO(done.stdout))][1:] == [f"'{name}" for name in names]


def test_probabilities_of_all_classes_go_to_parquet(command: Callable[..., Any], model: Path) -> None:
    Path("photos/bad.png").write_bytes(b"no image")
    done = command("photos", "--output", "p.parquet", "--probabilities", "--top-k", 1, "--min-confidence", 1)
    assert done.exit_code == 3
    table = pq.read_table("p.parquet")
    assert table.column_names == ["path", "label_1", "score_1", "error", "unsure", "probabilities"]
    assert json.loads(table.schema.metadata[b"vitft"])["labels"] == list(LABELS)
    *good, bad = table.to_pylist()
    for row, one in zip(good, Predictor(model).stream(["photos"], probabilities=True), strict=False):
        assert row["probabilities"] == pytest.approx(one.probabilities, abs=1e-5)
        assert (row["label_1"], row["unsure"], row["error"]) == (one.top[0][0], True, None)
    assert (bad["label_1"], bad["probabilities"]) == (None, None)
    assert bad["error"]


def test_groups_of_rows_are_written_while_it_goes(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.prediction.outputs._ROW_GROUP", 4)
    assert command("photos", "--output", "p.parquet").exit_code == 0
    file = pq.ParquetFile("p.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [4, 4, 2]
    assert [row["path"] for row in rows_of(Path("p.parquet"))] == [f"photos/{number}.png" for number in range(10)]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no images"),
        (["-"], "--paths-from -"),
        (["x", "--format", "parquet"], "add --output FILE"),
        (["x", "--output", "o.txt"], "give a .csv, .jsonl or .parquet file"),
        (["x", "--output", "o.csv", "--format", "jsonl"], "does not fit --format jsonl"),
        (["x", "--output", "o.csv", "--format", "table"], "table is for the screen"),
        (["x", "--output", "gone/o.csv"], "in a folder that exists"),
        (["x", "--output", "old.csv"], "add --overwrite"),
        (["x", "--output", "o.csv", "--probabilities"], "FILE.parquet"),
        (["x", "--output", "o.parquet", "--resume"], "cannot be appended to"),
        (["x", "--resume"], "--resume is for a file"),
        (["x", "--output", "o.csv", "--resume", "--overwrite"], "remove one"),
        (["x", "--json", "--output", "o.csv"], "leave out --format and --output"),
        (["x", "--link", "hard"], "add --sort-into FOLDER"),
        (["--paths-from", "gone.txt"], "No such file"),
    ],
)
def test_options_that_do_not_go_together_are_a_line(command: Callable[..., Any], words: list[str], error: str) -> None:
    Path("old.csv").write_text("mine")
    done = command(*words)
    assert done.exit_code == 2
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert Path("old.csv").read_text() == "mine"
    assert not list(Path().glob("*partial*"))


# -- whole or partial, and on from there --------------------------------------------------------------


@pytest.fixture
def signals_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Let a signal arrive in the middle of a batch."""
    whole = Predictor.score

    def arm(batch: int, number: signal.Signals) -> None:
        count = 0

        def interrupted(self: Predictor, pixels: Any) -> Any:
            nonlocal count
            count += 1
            if count == batch:
                os.kill(os.getpid(), number)
            return whole(self, pixels)

        monkeypatch.setattr(Predictor, "score", interrupted)

    return arm


@pytest.mark.parametrize(
    ("suffix", "number", "code"),
    [(".csv", signal.SIGINT, 130), (".jsonl", signal.SIGTERM, 143), (".parquet", signal.SIGINT, 130)],
)
def test_a_signal_leaves_whole_rows_and_says_where(
    command: Callable[..., Any], signals_at: Any, suffix: str, number: signal.Signals, code: int
) -> None:
    signals_at(3, number)
    done = command("photos", "--output", f"out{suffix}")
    assert done.exit_code == code, done.output
    assert "stopped after 8 images" in done.stderr
    assert f"out.partial{suffix}" in done.stderr
    assert not Path(f"out{suffix}").exists()
    assert [row["path"] for row in rows_of(Path(f"out.partial{suffix}"))] == [f"photos/{n}.png" for n in range(8)]


def test_a_signal_before_the_first_row_leaves_no_file(command: Callable[..., Any], signals_at: Any) -> None:
    signals_at(1, signal.SIGINT)
    assert command("photos", "--output", "out.csv").exit_code == 130
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_partial_file_is_gone_on_with(
    command: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of one run; a torn one is cut off, and of those that are whole, the last is made again."""
    Path("photos/3.png").write_bytes(b"no image")
    Path("photos/2.png").rename('photos/2 "\r\n.png')
    assert command("photos", "--output", f"whole.{kind}").exit_code == 3
    content = Path(f"whole.{kind}").read_bytes()
    fifth = content.index(b"photos/5") - (kind == "jsonl") * len(b'{"path": "')
    Path(f"out.partial.{kind}").write_bytes(content[: fifth + 7])
    done = command("photos", "--output", f"out.{kind}")
    assert done.exit_code == 2
    assert "add --resume to go on" in done.stderr
    seen: list[Any] = []
    real = Predictor.stream_found
    monkeypatch.setattr(
        Predictor, "stream_found", lambda self, images, **how: real(self, (seen.append(i) or i for i in images), **how)
    )
    done = command("photos", "--output", f"out.{kind}", "--resume")
    assert done.exit_code == 3, done.output
    assert "going on after 5 images" in done.stderr
    assert "1 of 10 images could not be read" in done.stderr
    assert seen == [f"photos/{number}.png" for number in range(4, 10)]
    assert same_rows(f"out.{kind}", f"whole.{kind}")
    assert not Path(f"out.partial.{kind}").exists()
    again = command("photos", "--output", f"out.{kind}", "--resume")
    assert (again.exit_code, "nothing to resume" in again.stderr) == (0, True)


def test_a_line_end_within_a_name_ends_no_row(tmp_path: Path) -> None:
    whole = b'path,error\r\n"a ""\r\n.png",\r\n'
    (tmp_path / "x.csv").write_bytes(whole + b'"b\r\n')
    assert _end_of_rows(tmp_path / "x.csv", quoted=True) == len(whole)


def same_rows(one: str, other: str) -> bool:
    """But for rounding: the scores of an image differ by its place in a batch."""
    pairs = zip(rows_of(Path(one)), rows_of(Path(other)), strict=True)
    return all(
        a.keys() == b.keys()
        and all(a[name] == (pytest.approx(b[name], abs=1e-4) if "score" in name else b[name]) for name in a)
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda rows: rows.replace(b"photos/1.png", b"photos/x.png"), "row 2 is photos/x.png, but image 2 is now"),
        (lambda rows: rows.replace(b",0.", b",0.0"), "was predicted otherwise"),
        (lambda rows: rows.replace(b"label_3", b"label_4"), "not those of this command"),
        (lambda rows: b"a list of mine\n", "no whole row"),
        (lambda rows: rows * 2, "not those of this command"),
    ],
    ids=["other images", "another model", "other columns", "another file", "rows twice"],
)
def test_a_partial_file_of_something_else_is_left_alone(
    command: Callable[..., Any], change: Callable[[bytes], bytes], error: str
) -> None:
    assert command("photos", "--output", "whole.csv").exit_code == 0
    changed = change(Path("whole.csv").read_bytes())
    Path("out.partial.csv").write_bytes(changed)
    done = command("photos", "--output", "out.csv", "--resume")
    assert done.exit_code == 2, done.output
    assert error in done.stderr
    assert Path("out.partial.csv").read_bytes() == changed
    assert command("photos", "--output", "out.csv", "--overwrite").exit_code == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_another_model_is_told_by_an_image_that_can_be_read(
    command: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    """The last row of the partial file is of one that cannot."""
    Path("photos/9.png").write_bytes(b"no image")
    assert command("photos", "--output", f"whole.{kind}", "--min-confidence", "0.9").exit_code == 3
    shutil.copy(f"whole.{kind}", f"out.partial.{kind}")
    other = tiny_model("vit")
    with torch.no_grad():
        other.classifier.weight.neg_()
    other.config.id2label = dict(enumerate(LABELS))
    save_model(tmp_path / "other", other, Preprocess(32, 32), Card(TrainConfig(), LABELS, 0, 0.0, {}, {}))
    words = ["photos", "--output", f"out.{kind}", "--resume"]
    for changed in (["--checkpoint", tmp_path / "other", "--min-confidence", "0.9"], ["--min-confidence", "0"]):
        done = command(*words, *changed)
        assert (done.exit_code, "was predicted otherwise" in done.stderr) == (2, True), done.output
    assert command(*words, "--min-confidence", "0.9").exit_code == 3
    assert same_rows(f"out.{kind}", f"whole.{kind}")


def test_a_full_disk_is_a_line_and_keeps_the_rows(command: Callable[..., Any], monkeypatch: Any) -> None:
    from vitft.prediction import outputs

    real = outputs.Csv.write

    def full(self: Any, rows: Sequence[Any]) -> None:
        if rows[0].path == "photos/4.png":
            raise OSError(28, "No space left on device")
        real(self, rows)

    monkeypatch.setattr(outputs.Csv, "write", full)
    done = command("photos", "--output", "out.csv")
    assert done.exit_code == 2
    assert "out.csv: cannot be written: No space left on device" in done.stderr
    assert len(rows_of(Path("out.partial.csv"))) == 4


def test_a_path_that_cannot_be_one_gets_a_row(command: Callable[..., Any]) -> None:
    long = "x" * 300
    Path("list.txt").write_text(f"photos/0.png\n{long}\nphotos/1.png\n")
    done = command("--paths-from", "list.txt", "--output", "out.csv")
    assert done.exit_code == 3, done.output
    rows = rows_of(Path("out.csv"))
    assert [row["path"] for row in rows] == ["photos/0.png", long, "photos/1.png"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert command(long, "--output", "one.csv").exit_code == 3


def test_a_folder_that_cannot_be_listed_gets_a_row(command: Callable[..., Any], monkeypatch: Any) -> None:
    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vitft.prediction.inputs.Listing", refused)
    done = command("photos/0.png", "photos", "photos/1.png", "--output", "out.csv")
    assert done.exit_code == 3, done.output
    assert "photos: cannot be listed: Permission denied" in done.stderr
    assert [bool(row["error"]) for row in rows_of(Path("out.csv"))] == [False, True, False]


# -- lists of paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
        (b"a.png\r\n\r\nb.png", ["a.png", "b.png"]),
        (b"\xef\xbb\xbfa.png\n", ["a.png"]),
        (b"a\nb.png\0c\r.png\r\0", ["a\nb.png", "c\r.png\r"]),
        (b"one\0two", ["one", "two"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"RIFF.png\n", ["RIFF.png"]),
        (b"", []),
        (b"\n\n", []),
    ],
)
@pytest.mark.parametrize("block", [8, 2**16])
def test_a_list_is_of_lines_or_ended_by_nul(content: bytes, wanted: list[str], block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("vitft.prediction.inputs._BLOCK", block)
    assert list(listed_paths(io.BytesIO(content), "list")) == wanted


def test_a_list_is_read_as_far_as_its_paths_are_asked_for() -> None:
    class Endless(io.RawIOBase):
        blocks = 0

        def read1(self, size: int) -> bytes:
            self.blocks += 1
            return b"a.png\n" * 10

    stream = Endless()
    paths = listed_paths(stream, "list")
    for _ in range(15):
        assert next(paths) == "a.png"
    assert stream.blocks <= 2


def test_paths_come_from_a_file_and_from_standard_input(command: Callable[..., Any]) -> None:
    Path("list.txt").write_text("photos/7.png\ngone.png\n")
    Path("list.bin").write_bytes(b"photos/5.png\0photos/6.png\0")
    first = command("photos/1.png", "--paths-from", "list.txt", "--format", "jsonl")
    assert [json.loads(line)["path"] for line in first.stdout.splitlines()] == [
        "photos/1.png",
        "photos/7.png",
        "gone.png",
    ]
    assert first.exit_code == 3
    second = command("--paths-from", "-", "--format", "jsonl", stdin=Path("list.bin").read_bytes())
    assert [json.loads(line)["path"] for line in second.stdout.splitlines()] == ["photos/5.png", "photos/6.png"]
    empty = command("--paths-from", "-", stdin=b"")
    assert (empty.exit_code, "no image found" in empty.stderr) == (3, True)
    image = command("--paths-from", "-", stdin=Path("photos/1.png").read_bytes())
    assert (image.exit_code, "is an image, not a list of paths" in image.stderr) == (3, True)


# -- on the screen ------------------------------------------------------------------------------------


def test_a_table_has_one_head_and_its_columns_stay(command: Callable[..., Any]) -> None:
    done = command("photos")
    head, *rows = done.stdout.splitlines()
    assert len(rows) == 10  # in three batches
    assert head.split() == ["image", "prediction"]
    for row, number in zip(rows, range(10), strict=True):
        name, best, *_ = re.split(r"\s{2,}", row)
        assert name == f"photos/{number}.png"
        assert row.index(best) == head.index("prediction")


# -- two processes ------------------------------------------------------------------------------------


def test_two_processes_predict_and_evaluate_as_one_does(photos: Path, model: Path) -> None:
    """150 images are three batches, of which one process has two; their rows come in order, from the first process."""
    drawn, data = np.random.default_rng(1), photos / "data"
    for number in range(150):
        file = data / "test" / LABELS[number % 3] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(drawn).save(file)
    words = ["predict", str(data), "gone.png", "--checkpoint", str(model), "--device", "cpu", "--output"]
    (first, said), (second, silent) = finish_two(*words, str(photos / "two.jsonl"), log=photos / "log")
    assert (first, second) == (3, 0), (said, silent)
    assert said.count("1 of 151 images could not be read") == 1
    assert silent == ""
    CliRunner().invoke(app, [*words, str(photos / "one.jsonl")])
    assert same_rows("one.jsonl", "two.jsonl")
    words = ["eval", str(model), "--dataset", str(data), "--device", "cpu", "--predictions"]
    (first, said), (second, silent) = finish_two(*words, str(photos / "two.parquet"), log=photos / "log")
    assert (first, second, silent) == (0, 0, ""), (said, silent)
    assert CliRunner().invoke(app, [*words, str(photos / "one.parquet")]).exit_code == 0
    one, two = (Predictions.read(photos / f"{name}.parquet") for name in ("one", "two"))
    assert one.ids == two.ids
    assert len(one.ids) == 150
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-5)


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: give a file in a folder that exists"):
        check_output(tmp_path / "pipe", "csv", overwrite=True)
