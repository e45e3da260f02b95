"""All terminal output. Nothing else in the package prints.

Results go to standard output; progress, notes and errors go to standard error, so that `--json` and pipes stay clean.
With several processes, only the main one prints.

Notes and warnings are records of the logger `vitft` (INFO and WARNING).
`logging.getLogger("vitft").setLevel(logging.WARNING)` turns off notes and progress bars.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape

_main_process = os.environ.get("RANK", "0") == "0"
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
out = Console(highlight=False, soft_wrap=False, width=_width, quiet=not _main_process)
err = Console(highlight=False, stderr=True, quiet=not _main_process)
_working: Any = None  # the active progress bar of `working`
_FIRST_SPEAKS_S = 5.0  # it may start later than the others; torchrun ends these a tenth of a second after it
SAY_AFTER_S, SAY_EVERY_S = 0.8, 10.0  # without a terminal: seconds to the first line, and between lines


def say(renderable: RenderableType = "") -> None:
    """Print a result: text, a table, a panel."""
    out.print(renderable, soft_wrap=isinstance(renderable, str))


def say_json(document: Any) -> None:
    """Print a JSON document to standard output, without color or wrapping."""
    if _main_process:
        _put(json_text(document, indent=2) + "\n")


def json_text(document: Any, indent: int | None = None) -> str:
    """Serialize a JSON document; unprintable characters, such as lone surrogates, are escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say_text(text: str) -> None:
    """Print text without markup or wrapping; control characters are escaped only on a terminal."""
    if _main_process:
        _put(safe(text.replace("\r\n", "\n")) if out.is_terminal else text)


def _put(text: str) -> None:
    """Print text, escaping characters that the output encoding does not have."""
    if os.linesep == "\r\n":  # Windows, which makes \r\n of each \n
        text = text.replace("\r\n", "\n")
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)  # a pipe's reader may wait


def note(message: str) -> None:
    """Log one line of information; plain text, not markup."""
    log.info("%s", safe(without_secrets(message)))


def warn(message: str) -> None:
    """Log one line that the user should act on; plain text, not markup."""
    log.warning("%s", safe(without_secrets(message)))


@contextmanager
def warnings_once() -> Iterator[None]:
    """While entered, no warning is repeated."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = record.levelno < logging.WARNING or message not in said
        said.add(message)
        return new

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


class _Terminal(logging.Handler):
    """Prints the records of `log` to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; a terminal wraps it between words, but not if it has a command, so that it can be copied."""
        message, prefix = record.getMessage(), "[yellow]warning:[/] " if record.levelno >= logging.WARNING else ""
        err.print(f"{prefix}{escape(message)}", soft_wrap=not err.is_terminal or "vitft " in message)


log = logging.getLogger("vitft")
log.propagate = False  # like Transformers: otherwise, with a configured root logger, lines would appear twice
log.setLevel(logging.INFO)
log.addHandler(_Terminal())


def _shows_progress() -> bool:
    """Whether a progress bar can be shown and is wanted."""
    return err.is_terminal and not err.quiet and log.isEnabledFor(logging.INFO)


def fail(message: str, *, of_all: bool = False) -> None:
    """Print an error as one line; plain text, not markup.

    Every process can print errors, unless it is `of_all`, which the main one prints. But what ended the first one of
    this machine is printed by that one alone: the others wait, while torchrun ends them.
    """
    if of_all and not _main_process:
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_FIRST_SPEAKS_S)
    line = safe(without_secrets(" ".join(message.split())))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(line)}")


def traceback() -> None:
    """Print the traceback of the error being handled."""
    err.print_exception(width=110)


def without_secrets(text: str) -> str:
    """Mask passwords, tokens and signatures in URLs, and the hub's tokens: messages end up in logs and reports."""
    text = re.sub(r"(//|\w:/)[^/@\s]+@", r"\1***@", text)  # a URL that was made a path has one slash
    text = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]+", r"\1?***", text)
    text = re.sub(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s'\"]+", r"\1***", text)
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_***", text)


def safe(text: str) -> str:
    """Escape control characters, so that names from files cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def percent(fraction: float, digits: int = 1) -> str:
    """0.9731 -> 97.3 %."""
    return f"{100 * fraction:.{digits}f} %"


def brief(value: Any) -> str:
    """A setting's value: 2e-05, none."""
    return "none" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str) -> str:
    """1, image -> 1 image; 2_000, class -> 2,000 classes."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """4 -> 4 s, 184 -> 3 min 4 s, 7300 -> 2 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """2_500_000 bytes -> 2.5 MB."""
    for name in ("B", "kB", "MB", "GB"):
        text = f"{count:.{0 if name == 'B' else 1}f}"
        if float(text) < 1000:
            return f"{text} {name}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def working(task_name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show progress of a task within a second; yields a function to call with the count so far and the total, if known.

    On a terminal, this is a transient progress bar; otherwise a line if the task takes longer, and one more every ten
    seconds. Can be nested: the inner task gets its own bar below.
    """
    global _working
    if not _shows_progress():
        with _log_progress(task_name) as progress:
            yield progress
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    outer = _working
    bar = outer or Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[place]}"),
        TimeElapsedColumn(), console=err, transient=True, redirect_stdout=False,  # results are not for `err`
    )  # fmt: skip
    task = bar.add_task(task_name, total=None, place="")
    with nullcontext() if outer else bar:
        _working = bar
        try:
            yield lambda done, count: bar.update(
                task, completed=done, total=count, place=f"{done:,}" if count is None else f"{done:,}/{count:,}"
            )
        finally:
            _working = outer
            bar.remove_task(task)


@contextmanager
def _log_progress(task_name: str) -> Iterator[Callable[[int, int | None], None]]:
    """`working` without a terminal."""
    logged = time.monotonic()

    def progress(done: int, count: int | None) -> None:
        nonlocal logged
        if time.monotonic() - logged > SAY_EVERY_S and (count is None or done < count):
            logged = time.monotonic()
            note(f"{task_name}: {done:,} so far" if count is None else f"{task_name}: {done:,} of {count:,}")

    timer = threading.Timer(SAY_AFTER_S, lambda: note(f"{task_name} ..."))
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()


class TrainingProgress:
    """Training progress: a bar on a terminal, plain lines otherwise, nothing on other processes."""

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.first, self.step, self.total, self.per_epoch = step, step, total_steps, steps_per_epoch
        self._started = self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[place]}")
        )
        self._numbers = Text("", "dim")
        self._live = Live(Group(self._bar, self._numbers), console=err, transient=True, refresh_per_second=4)
        self._shown = _shows_progress()
        self._task = self._bar.add_task("train", total=total_steps, completed=step, place="")

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a finished step."""
        self.step = step
        place = f"step {step}/{self.total} · epoch {step / self.per_epoch:.2f} · left {duration(self._left_s())}"
        self._bar.update(self._task, completed=step, place=place)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show one line of training metrics."""
        self.advance(line["step"])
        numbers = (
            f"loss {line['loss']:.3f} · accuracy {percent(line['accuracy'])} · lr {line['lr']:.1e} · "
            f"{line['images_per_s']:.0f} images/s · waiting for data {percent(line['data_wait'], 0)}"
        )
        self._numbers.plain = numbers
        due = time.monotonic() - self._logged > SAY_EVERY_S or self.step == self.total
        if not self._shown and due:
            self._logged = time.monotonic()
            place = f"step {self.step}/{self.total} · epoch {line['epoch']:.2f}"
            note(f"{place} · {numbers} · left {duration(self._left_s())}")

    def evaluated(self, metrics: Any, better: bool) -> None:
        """Log the result of a validation."""
        images = counted(metrics.count, "image")
        note(
            f"step {self.step}  {metrics.split}: accuracy {percent(metrics.accuracy, 2)} on {images}, "
            f"loss {metrics.loss:.4f}{'  (best so far)' if better else ''}"
        )

    @contextmanager
    def evaluating(self, split: str) -> Iterator[Callable[[int, int], None]]:
        """Show progress while a split is scored; yields a function to call with the batches done and their total."""
        task = self._bar.add_task(split, total=None, place="")
        try:
            yield lambda done, count: self._bar.update(task, completed=done, total=count)
        finally:
            self._bar.remove_task(task)

    def _left_s(self) -> float:
        done = max(1, self.step - self.first)
        return (time.monotonic() - self._started) / done * (self.total - self.step)


def interval(split: str, accuracy: float, bounds: tuple[float, float], count: int) -> str:
    """An accuracy with its split and its 95 % interval, on one line."""
    (low, high), images = bounds, counted(count, "image")
    return f"{split} accuracy {percent(accuracy, 2)} (95 % interval {100 * low:.2f}–{100 * high:.2f}, {images})"
