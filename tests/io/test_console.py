"""Terminal output: number formats, safe names, and separate streams."""

import io
import json
import re
import threading

import pytest
from rich.console import Console, RenderableType

from vitft.cli.tables import data_report
from vitft.io import console


def rendered(renderable: RenderableType, width: int = 80) -> str:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(renderable)
    return screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.4, "4 s"),
        (59.6, "1 min 0 s"),
        (184, "3 min 4 s"),
        (3599.7, "1 h 0 min"),
        (7300, "2 h 1 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_counts() -> None:
    assert [console.counted(count, "image") for count in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [console.counted(2, noun) for noun in ("class", "patch", "seed")] == ["2 classes", "2 patches", "2 seeds"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_500_000, "2.5 MB"),
        (3e12, "3.0 TB"),
        (999.6, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.0 MB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert console.size(count) == text


def test_lines_end_once_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stream makes CR LF of each line end, as Windows does."""
    written = io.BytesIO()
    monkeypatch.setattr("os.linesep", "\r\n")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="utf-8", newline="\r\n"))
    console.say_text("path,label\r\na.png,cat\r\n")
    assert written.getvalue() == b"path,label\r\na.png,cat\r\n"


def test_percent() -> None:
    assert (console.percent(0.9731), console.percent(0.98765, 2)) == ("97.3 %", "98.77 %")


def test_names_cannot_control_the_terminal() -> None:
    assert console.safe("a\x1b[31mb\rc\u202ed") == "a\\x1b[31mb\\rc\\u202ed"


def test_markup_in_a_name_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    for print_line in (console.note, console.warn, console.fail):
        print_line("file [red]x[/] and [/nonsense]")
    assert capsys.readouterr().err.count("file [red]x[/] and [/nonsense]") == 3


def test_errors_notes_and_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("n")
    console.warn("w")
    console.fail("line one\n  line two")
    captured = capsys.readouterr()

    assert captured.out == ""
    assert captured.err == "n\nwarning: w\nerror: line one line two\n"


def test_a_long_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_json_is_one_unescaped_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_json({"label": "Käfer [red]", "long": "x" * 300})
    text = capsys.readouterr().out
    assert "Käfer" in text
    assert json.loads(text) == {"label": "Käfer [red]", "long": "x" * 300}
    with pytest.raises(ValueError, match="Out of range"):
        console.say_json({"loss": float("nan")})


def test_text_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_text("[bold]" + "x" * 300 + "\n")
    assert capsys.readouterr().out == "[bold]" + "x" * 300 + "\n"


def test_a_dataset_report_fits_80_columns() -> None:
    labels = [f"a class with a rather long name, number {i}" for i in range(40)]
    split = {
        "name": "train",
        "count": 50_000,
        "looked_at": 2000,
        "classes": dict.fromkeys(labels, 1250),
        "unreadable": 1999,
        "sizes": {"smallest": (32, 32), "median": (500, 375), "largest": (4000, 3000)},
        "formats": ["JPEG", "PNG"],
    }
    described = {
        "name": "mine",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "labels": labels,
        "splits": [split, split | {"name": "test"}],
    }
    text = rendered(data_report(described))

    assert max(map(len, text.splitlines())) <= 80
    assert "mine, 40 classes, commit 0123456789ab" in text
    assert "50,000  32×32     500×375  4000×3000  JPEG, PNG" in text
    assert "... and 10 more classes (--json lists all)" in text


# -- progress -------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error, as a terminal of 80 columns."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=True, width=80, color_system=None))
    return shown


def test_without_a_terminal_a_long_task_logs_one_line_and_a_short_one_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.working("reading"):
        pass
    assert capsys.readouterr().err == ""
    logged = threading.Event()
    monkeypatch.setattr(console, "SAY_AFTER_S", 0.0)
    monkeypatch.setattr(console, "note", lambda line, note=console.note: (note(line), logged.set()))
    with console.working("reading"):
        assert logged.wait(60)
    assert capsys.readouterr().err == "reading ...\n"


def test_without_a_terminal_progress_is_logged_periodically(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.working("decoding") as progress:
        progress(1, 3000)
        monkeypatch.setattr(console, "SAY_EVERY_S", -1.0)
        progress(2000, 3000)
        progress(3000, 3000)
    assert capsys.readouterr().err == "decoding: 2,000 of 3,000\n"


def test_on_a_terminal_a_task_has_a_bar_and_a_nested_task_another(terminal: io.StringIO) -> None:
    with console.working("reading the data") as outer, console.working("decoding") as inner:
        outer(1, 4)
        inner(1500, 3000)
        console._working.refresh()
        shown = terminal.getvalue()
    assert "reading the data" in shown
    assert "1/4" in shown
    assert "1,500/3,000" in shown
    assert console._working is None


def test_the_training_bar_moves_with_each_step_and_fits_the_terminal(terminal: io.StringIO) -> None:
    line = {"step": 2, "epoch": 0.125, "loss": 2.303, "accuracy": 0.1, "lr": 1e-3, "images_per_s": 12345.6,
            "data_wait": 0.02}  # fmt: skip
    with console.TrainingProgress(0, 160_000, 8000) as bar:
        bar.update(line)
        bar.advance(3)
        bar._live.refresh()
    lines = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    assert any("step 3/160000" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_on_a_terminal_lines_wrap_between_words_and_commands_do_not_wrap(terminal: io.StringIO) -> None:
    words = "other programs may be using the processors of this machine while it trains"
    console.warn(f"{words}, {words}.")
    assert " ".join(terminal.getvalue().split()) == f"warning: {words}, {words}."
    assert max(map(len, terminal.getvalue().splitlines())) <= 80
    terminal.seek(0)
    terminal.truncate()
    command = "vitft train --resume runs/" + "a" * 90
    console.note(f"go on with: {command}")
    assert command in terminal.getvalue()
