"""Reports of textbook training: the last lines of a run, and the tables of the scalar ViT, at most 80 columns wide."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from vitft.io import console
from vitft.scratch.scalar_vit import PATTERNS, TINY, Image, Prediction, Report, train
from vitft.spec import total

_SHADES = " ░▒▓█"
_TOKENS = ("itself", "upper left", "upper right", "lower left", "lower right")


def run_report(run: Path, summary: dict[str, Any]) -> str:
    """The last lines of a run: score, time, and the command to repeat it with the other engine."""
    other = "torch" if summary["engine"] == "numpy" else "numpy"
    score = summary["score"]
    recipe = shlex.quote(str(run / "config.yaml"))
    return (
        f"{console.interval(score['split'], score['accuracy'], score['accuracy_interval'], score['count'])}\n"
        f"trained in {console.duration(summary['elapsed_s'])}; run: {run}\n"
        f"next: vitft scratch train {recipe} --engine {other}\n"
    )


def train_scalar(seed: int | None = None) -> Report:
    """Train the scalar ViT, by default with the seed of the chapter."""
    return train() if seed is None else train(seed)


def scalar_document(report: Report) -> dict[str, Any]:
    """The results of training the scalar ViT, JSON-ready."""
    maps = {name: report.attention(name) for name in PATTERNS}
    return {
        "parameters": total(TINY).parameters,
        "elapsed_s": round(report.elapsed_s, 2),
        "losses": report.losses,
        "accuracy": report.accuracy,
        "correct": report.correct,
        "count": len(report.predictions),
        "class_accuracy": report.class_accuracy,
        "confusion": {"labels": list(PATTERNS), "matrix": report.confusion},
        "attention": {name: {"heads": rows[:-1], "mean": rows[-1]} for name, rows in maps.items()},
        "predictions": [asdict(sample) for sample in report.predictions],
    }


def scalar_tables(report: Report) -> RenderableType:
    """The results of training the scalar ViT, as text and tables."""
    head = Text.assemble(
        f"A ViT of {total(TINY).parameters} single numbers, trained for {len(report.losses)} steps in "
        f"{console.duration(report.elapsed_s)}.\n",
        f"loss {report.losses[0]:.4f} at the first step, {report.losses[-1]:.4f} at the last\n",
        "test accuracy ",
        (console.percent(report.accuracy), "bold"),
        f" ({report.correct} of {len(report.predictions)} images)",
    )
    correct = [sample for sample in report.predictions if sample.label == sample.predicted]
    firsts = [next(s for s in correct if s.label == name) for name in PATTERNS if report.class_accuracy[name]]
    mistakes = [sample for sample in report.predictions if sample.label != sample.predicted][: len(PATTERNS)]
    return Group(
        head,
        "\nConfusion matrix of the test images (rows: true, columns: predicted):",
        _confusion(report),
        "\nThe first correct prediction of each class, with its probability:",
        _samples(firsts),
        *(("\nThe first mistakes (true → predicted):", _samples(mistakes)) if mistakes else ()),
        "\nAttention of the class token to itself and to each patch (mean over a class):",
        _attention(report),
    )


def _confusion(report: Report) -> Table:
    numbers = (Column(name, justify="right") for name in (*PATTERNS, "accuracy"))
    table = Table("class", *numbers, box=None, pad_edge=False)
    for i, (name, counts) in enumerate(zip(PATTERNS, report.confusion, strict=True)):
        cells = (Text(str(n) if n else "·", "bold" if i == j else "") for j, n in enumerate(counts))
        table.add_row(name, *cells, console.percent(report.class_accuracy[name]))
    return table


def _samples(samples: Sequence[Prediction]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row(*(_as_characters(sample.image) for sample in samples))
    table.add_row(*(f"{sample.label} → {sample.predicted}" for sample in samples))
    table.add_row(*(console.percent(sample.confidence) for sample in samples))
    return table


def _as_characters(image: Image) -> Text:
    """Two characters per pixel, which make it about square."""
    (rows,) = image
    steps = len(_SHADES) - 1
    return Text("\n".join("".join(2 * _SHADES[round((pixel + 1) / 2 * steps)] for pixel in row) for row in rows))


def _attention(report: Report) -> Table:
    numbers = (Column(name, justify="right") for name in _TOKENS)
    table = Table("class", "head", *numbers, box=None, pad_edge=False)
    for pattern in PATTERNS:
        for number, weights in enumerate(report.attention(pattern), 1):
            mean = number > TINY.heads
            cells = (Text(console.percent(weight), "bold" if mean else "") for weight in weights)
            table.add_row(pattern if number == 1 else "", "mean" if mean else str(number), *cells)
    return table
