"""Everything a person sees in a terminal. Nothing else in the package prints.

Results go to standard output; progress, notes and errors go to standard error, so that `--json` and
pipes stay clean. On several processes only the main one speaks.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape

_main_process = os.environ.get("RANK", "0") == "0"
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
out = Console(highlight=False, soft_wrap=False, width=_width, quiet=not _main_process)
err = Console(highlight=False, stderr=True, soft_wrap=True, quiet=not _main_process)


def say(renderable: RenderableType = "") -> None:
    """Print a result: text, a table, a panel."""
    out.print(renderable, soft_wrap=isinstance(renderable, str))


def say_json(document: Any) -> None:
    """Print one JSON document to standard output, as is: no colour, no wrapping."""
    if _main_process:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def say_text(text: str) -> None:
    """Print text as is, for files and pipes: no markup, no wrapping."""
    if _main_process:
        print(text, end="")


def note(message: str) -> None:
    """Print one line about what is going on; plain text, not markup."""
    err.print(escape(safe(message)))


def warn(message: str) -> None:
    """Print one line that a person should act on; plain text, not markup."""
    err.print(f"[yellow]warning:[/] {escape(safe(message))}")


def fail(message: str) -> None:
    """Print the one line of an error; plain text, not markup. Every process may speak here."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(safe(line))}")


def traceback() -> None:
    """Print the traceback of the error being handled."""
    err.print_exception(width=110)


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


LISTED_CLASSES = 30  # Up to so many classes, each has its row in the report.
CROSSED_CLASSES = 12  # Up to so many, the whole confusion matrix fits 80 columns.


def metrics_report(metrics: Any) -> RenderableType:
    """A `vitft.metrics.Metrics` as text and tables, at most 80 columns wide."""
    from rich.console import Group
    from rich.text import Text

    low, high = (100 * bound for bound in metrics.accuracy_interval)
    headline = Text.assemble(
        "accuracy ",
        (percent(metrics.accuracy), "bold"),
        f" (95 % interval {low:.1f}–{high:.1f}) on {metrics.count} images of {safe(metrics.split)}",
        (f" [{metrics.split_hash[:8]}]", "dim"),
    )
    top5 = f"top-5 {percent(metrics.top5)}, " if len(metrics.per_class) > 5 else ""  # of five, always all
    rest = Text(
        f"{top5}loss {metrics.loss:.4f}, macro F1 {percent(metrics.macro_f1)}, {metrics.images_per_s:.0f} images/s"
    )
    few = len(metrics.per_class) <= CROSSED_CLASSES
    confusion = _confusion_table(metrics) if few else _mistakes_table(metrics)
    return Group(headline, rest, "", *_class_table(metrics), "", *confusion)


def _class_table(metrics: Any) -> list[RenderableType]:
    """Precision, recall, F1 and count of every class; of many classes, of the ten with the lowest F1."""
    from rich.table import Table
    from rich.text import Text

    rows, title = metrics.per_class, []
    if len(rows) > LISTED_CLASSES:
        title = [f"The 10 lowest F1 of {len(rows)} classes (--json has them all):"]
        rows = sorted((row for row in rows if row.count), key=lambda row: row.f1)[:10]
    table = Table(box=None, pad_edge=False)
    table.add_column("class", no_wrap=True, overflow="ellipsis", max_width=36)
    for name in ("precision", "recall", "F1", "count"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        scores = (percent(score) for score in (row.precision, row.recall, row.f1))
        table.add_row(Text(safe(row.label)), *scores, str(row.count))
    return [*title, table]


def _confusion_table(metrics: Any) -> list[RenderableType]:
    """The confusion matrix; a column's head is the start of its class's name."""
    from rich.table import Table
    from rich.text import Text

    labels, matrix = metrics.confusion["labels"], metrics.confusion["matrix"]
    digits = len(str(max(map(max, matrix))))
    room = max(digits, min(14, 62 // len(labels) - 1))  # 18 of 80 for the rows' names; 1 between columns.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=min(16, 79 - len(labels) * (room + 1)))
    for label in labels:
        head = Text(safe(label), no_wrap=True, overflow="crop")
        table.add_column(head, justify="right", no_wrap=True, max_width=room)
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        cells = (Text(str(n) if n else "·", "bold" if i == j else "") for j, n in enumerate(counts))
        table.add_row(Text(safe(label)), *cells)
    return ["Confusion (rows are true classes, columns predicted ones):", table]


def _mistakes_table(metrics: Any) -> list[RenderableType]:
    """The ten most frequent confusions, as `cat → dog 34`."""
    from rich.table import Table
    from rich.text import Text

    labels, matrix = metrics.confusion["labels"], metrics.confusion["matrix"]
    cells = ((n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j)
    worst = sorted(cells, key=lambda cell: -cell[0])[:10]
    if not worst:
        return ["No image was taken for another class."]
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("true", "predicted"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=34)
    table.add_column("images", justify="right", no_wrap=True)
    for count, i, j in worst:
        table.add_row(Text(safe(labels[i])), Text(f"→ {safe(labels[j])}"), str(count))
    return ["Most frequent confusions (true → predicted, images):", table]


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """While something is counted: a function to call with the number done and in all; a bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    shown = err.is_terminal and not err.quiet
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                   console=err, transient=True, disable=not shown)  # fmt: skip
    task = bar.add_task(what, total=None)
    with bar:
        yield lambda done, count: bar.update(task, completed=done, total=count)


class TrainingProgress:
    """A run while it trains: a bar on a terminal, plain lines elsewhere, nothing on other processes."""

    _LINE_EVERY_S = 10.0

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self.first, self.step, self.total, self.per_epoch = step, step, total_steps, steps_per_epoch
        self._started = self._spoken = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[place]}")
        )
        self._numbers = Text("", "dim")
        self._live = Live(Group(self._bar, self._numbers), console=err, transient=True, refresh_per_second=4)
        self._shown = err.is_terminal and not err.quiet
        self._task = self._bar.add_task("train", total=total_steps, completed=step, place="")

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, line: Mapping[str, Any]) -> None:
        """Show one line of training metrics."""
        self.step = line["step"]
        left = duration(self._left_s())
        place = f"step {self.step}/{self.total} · epoch {line['epoch']:.2f}"
        numbers = (
            f"loss {line['loss']:.3f} · accuracy {percent(line['accuracy'])} · lr {line['lr']:.1e} · "
            f"{line['images_per_s']:.0f} images/s · waiting for data {percent(line['data_wait'], 0)}"
        )
        self._bar.update(self._task, completed=self.step, place=f"{place} · left {left}")
        self._numbers.plain = numbers
        due = time.monotonic() - self._spoken > self._LINE_EVERY_S or self.step == self.total
        if not self._shown and due:
            self._spoken = time.monotonic()
            note(f"{place} · {numbers} · left {left}")

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
        yield lambda done, count: self._bar.update(task, completed=done, total=count)
        self._bar.remove_task(task)

    def _left_s(self) -> float:
        done = max(1, self.step - self.first)
        return (time.monotonic() - self._started) / done * (self.total - self.step)


def interval(score: Mapping[str, Any]) -> str:
    """A score with its split and its 95 % interval, on one line."""
    low, high = score["accuracy_interval"]
    return (
        f"{score['split']} accuracy {percent(score['accuracy'], 2)} "
        f"(95 % interval {100 * low:.2f}–{100 * high:.2f}, {score['count']} images)"
    )


def training_report(result: Any) -> str:
    """The last lines of a run: score, checkpoint, next command."""
    lines = [interval(score) for score in result.scores.values()] or ["no split to score it on: it was not evaluated"]
    lines.append(f"{result.checkpoint.name} checkpoint: {result.checkpoint} (step {result.step})")
    return "\n".join([*lines, f"next: vitft eval {shlex.quote(str(result.run))}", ""])


def plan_report(groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> RenderableType:
    """What a run would do, before it does it: titled groups of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for number, (title, rows) in enumerate(groups):
        if number:
            table.add_row()
        table.add_row(Text(title, "bold"))
        for name, value in rows:
            table.add_row(Text(f"  {name}"), Text(safe(value)))
    return table


def data_report(described: Mapping[str, Any]) -> RenderableType:
    """A data set: splits, counts, sizes, and its classes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((safe(described["name"]), "bold"), f", {len(described['labels'])} classes")
    if described.get("revision"):
        head.append(f", commit {described['revision'][:12]}", "dim")
    splits = Table(box=None, pad_edge=False)
    for name in ("split", "images", "smallest", "median", "largest", "formats"):
        splits.add_column(name, justify="right" if name == "images" else "left")
    for split in described["splits"]:
        sizes = [f"{w}×{h}" if (wh := (split["sizes"] or {}).get(k)) and (w := wh[0]) and (h := wh[1]) else "-"
                 for k in ("smallest", "median", "largest")]  # fmt: skip
        formats = ", ".join(split["formats"]) + (f" ({split['unreadable']} unreadable)" if split["unreadable"] else "")
        splits.add_row(Text(safe(split["name"])), f"{split['count']:,}", *sizes, formats)
    classes = Table(box=None, pad_edge=False)
    classes.add_column("class", no_wrap=True, overflow="ellipsis", max_width=40)
    for split in described["splits"]:
        classes.add_column(Text(safe(split["name"])), justify="right")
    shown = described["labels"][:LISTED_CLASSES]
    for label in shown:
        counts = (str(split["classes"].get(label, 0)) for split in described["splits"])
        classes.add_row(Text(safe(label)), *counts)
    more = len(described["labels"]) - len(shown)
    return Group(head, "", splits, "", classes, *([f"... and {more} more classes (--json has all)"] if more else []))


def predictions_report(predictions: Sequence[Any]) -> RenderableType:
    """One row an image: its classes, best first, each with its probability."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("prediction", overflow="fold")
    for one in predictions:
        best = Text("  ").join(
            Text(f"{safe(label)} {percent(score)}", "bold" if place == 0 else "")
            for place, (label, score) in enumerate(one.top)
        )
        table.add_row(Text(safe(one.path)), Text(f"error: {safe(one.error)}", "red") if one.error else best)
    return table


def recipe_table(recipes: Sequence[Any]) -> RenderableType:
    """The recipes that come with vitft; the textbook's are marked, for another command takes them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for one in recipes:
        mark = "Textbook (vitft scratch train): " if one.textbook else ""
        table.add_row(Text(one.name, "bold"), Text.assemble((mark, "cyan"), one.summary))
    return table
