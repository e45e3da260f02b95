"""Everything a person sees in a terminal. Nothing else in the package prints.

Results go to standard output; progress, notes and errors go to standard error, so that `--json` and
pipes stay clean. On several processes only the main one speaks.

Notes and warnings are records of the logger `vitft` (INFO and WARNING), which shows them here:
`logging.getLogger("vitft").setLevel(logging.WARNING)` switches notes and progress bars off.
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
_working: Any = None  # the bar of what is being worked on, while there is one
SAY_AFTER_S, SAY_EVERY_S = 0.8, 10.0  # where there is no terminal to show a bar on


def say(renderable: RenderableType = "") -> None:
    """Print a result: text, a table, a panel."""
    out.print(renderable, soft_wrap=isinstance(renderable, str))


def say_json(document: Any) -> None:
    """Print one JSON document to standard output, as is: no colour, no wrapping; what is not printable is escaped."""
    if _main_process:
        _put(json_text(document, indent=2) + "\n")


def json_text(document: Any, indent: int | None = None) -> str:
    """A JSON document for a terminal, a file or a pipe: what is not printable, such as half a letter, is escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say_text(text: str) -> None:
    """Print text with no markup and no wrapping: for files and pipes as it is, and safely on a terminal."""
    if _main_process:
        _put(safe(text.replace("\r\n", "\n")) if out.is_terminal else text)


def _put(text: str) -> None:
    """Print all of it: what the output's encoding does not have, as names of files may, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="")


def note(message: str) -> None:
    """Log one line about what is going on; plain text, not markup."""
    log.info("%s", safe(masked(message)))


def warn(message: str) -> None:
    """Log one line that a person should act on; plain text, not markup."""
    log.warning("%s", safe(masked(message)))


class _Terminal(logging.Handler):
    """Shows the records of `log` on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line; a terminal breaks it between words, but never within a command, which is there to be copied."""
        message, prefix = record.getMessage(), "[yellow]warning:[/] " if record.levelno >= logging.WARNING else ""
        err.print(f"{prefix}{escape(message)}", soft_wrap=not err.is_terminal or "vitft " in message)


log = logging.getLogger("vitft")
log.propagate = False  # as Transformers does: a program that configures the root logger would print each line twice
log.setLevel(logging.INFO)
log.addHandler(_Terminal())


def _shows_progress() -> bool:
    """Whether a progress bar can be drawn, and is wanted."""
    return err.is_terminal and not err.quiet and log.isEnabledFor(logging.INFO)


def fail(message: str) -> None:
    """Print the one line of an error; plain text, not markup. Every process may speak here."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(safe(masked(line)))}")


def traceback() -> None:
    """Print the traceback of the error being handled."""
    err.print_exception(width=110)


def masked(text: str) -> str:
    """The text without the passwords and tokens of its addresses: what is said is kept in logs and reports."""
    return _TOKEN.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


_PASSWORD = re.compile(r"(\w:/{1,2})[^/\s@]+@")  # a path has one slash
_TOKEN = re.compile(r"([?&][\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s'\"]+", re.IGNORECASE)


def safe(text: str) -> str:
    """The text with control characters made visible: names from files must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def percent(fraction: float, digits: int = 1) -> str:
    """0.9731 -> 97.3 %."""
    return f"{100 * fraction:.{digits}f} %"


def duration(seconds: float) -> str:
    """4 -> 4 s, 184 -> 3 min 4 s, 7300 -> 2 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes for people: 2_500_000 -> 2.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """Say what is being done, within a second; gives a function to call with the number done and the number in all.

    On a terminal a bar, which goes when the work is done; elsewhere a line where it takes longer than that, and
    another every ten seconds. May be nested: the inner work gets a line of its own below the outer one.
    """
    global _working
    if not _shows_progress():
        with _spoken(what) as progress:
            yield progress
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    outer = _working
    bar = outer or Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[place]}"),
        TimeElapsedColumn(), console=err, transient=True,
    )  # fmt: skip
    task = bar.add_task(what, total=None, place="")
    with nullcontext() if outer else bar:
        _working = bar
        try:
            yield lambda done, count: bar.update(task, completed=done, total=count, place=f"{done:,}/{count:,}")
        finally:
            _working = outer
            bar.remove_task(task)


@contextmanager
def _spoken(what: str) -> Iterator[Callable[[int, int], None]]:
    spoken = time.monotonic()

    def begin() -> None:
        note(f"{what} ...")

    def progress(done: int, count: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > SAY_EVERY_S and done < count:
            spoken = time.monotonic()
            note(f"{what}: {done:,} of {count:,}")

    timer = threading.Timer(SAY_AFTER_S, begin)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()


class TrainingProgress:
    """A run while it trains: a bar on a terminal, plain lines elsewhere, nothing on other processes."""

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.first, self.step, self.total, self.per_epoch = step, step, total_steps, steps_per_epoch
        self._started = self._spoken = time.monotonic()
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
        """Move the bar to a step that is done."""
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
        due = time.monotonic() - self._spoken > SAY_EVERY_S or self.step == self.total
        if not self._shown and due:
            self._spoken = time.monotonic()
            place = f"step {self.step}/{self.total} · epoch {line['epoch']:.2f}"
            note(f"{place} · {numbers} · left {duration(self._left_s())}")

    def evaluated(self, metrics: Any, better: bool) -> None:
        """Say what a validation came to."""
        note(
            f"step {self.step}  {metrics.split}: accuracy {percent(metrics.accuracy, 2)} on {metrics.count} images, "
            f"loss {metrics.loss:.4f}{'  (best so far)' if better else ''}"
        )

    @contextmanager
    def evaluating(self, split: str) -> Iterator[Callable[[int, int], None]]:
        """While a split is scored: a function to call with the batches done and in all."""
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
    low, high = bounds
    return f"{split} accuracy {percent(accuracy, 2)} (95 % interval {100 * low:.2f}–{100 * high:.2f}, {count} images)"
