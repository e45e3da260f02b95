"""Go on with a file of predictions that was left unfinished, if the images and the model are still the same."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose
from pathlib import Path

from vitft.errors import UsageError
from vitft.prediction.inputs import Found, printable
from vitft.prediction.outputs import no_formula
from vitft.prediction.predictor import Prediction, Predictor

_CLOSE = 1e-3  # another batch, or another device, rounds differently; another model says something else


@dataclass(frozen=True)
class Row:
    """What is compared of a row: texts as the format writes them."""

    path: str
    label: str
    score: float
    error: str
    classes: int
    marks: tuple[bool, bool]
    """Whether it is unsure, and of none of the classes."""


@dataclass(frozen=True)
class Done:
    """Images that have a row already, how many of them could not be read, and the others, in order."""

    count: int = 0
    unreadable: int = 0
    read: tuple[str, ...] = ()


def go_on(
    partial: Path, kind: str, columns: list[str], images: Iterator[Found], predictor: Predictor, top_k: int
) -> Done:  # fmt: skip
    """Skip the images that have a row in an unfinished .csv or .jsonl file, after cutting off a torn last row.

    The last of them that could be read is predicted again. Raises UsageError if the images, the model or the options
    are others.
    """
    end = _end_of_rows(partial, quoted=kind == "csv")
    count = unreadable = 0
    read: list[str] = []
    row: Row | None = None
    known: tuple[Row, str] | None = None
    for row in _rows(partial, end, kind, columns):
        image, count, unreadable = next(images, None), count + 1, unreadable + bool(row.error)
        if not isinstance(image, str) or _text(image, kind) != row.path:
            raise UsageError(
                f"{partial}: row {count:,} is {row.path}, but image {count:,} is now {image!s}; "
                "give the same images in the same order, or --overwrite."
            )
        if not row.error or known is None:
            known = row, image
        if not row.error:
            read.append(image)
    if known is not None:
        row, image = known
        _check_same(row, next(predictor.stream_found([image], top_k=top_k)), partial, kind)
    elif partial.stat().st_size:
        raise UsageError(f"{partial}: has no whole row to go on from; add --overwrite in place of --resume.")
    os.truncate(partial, end)
    return Done(count, unreadable, tuple(read))


def _rows(partial: Path, end: int, kind: str, columns: list[str]) -> Iterator[Row]:
    """The rows in so many bytes of the file."""
    try:
        lines = _lines(partial, end)
        yield from _csv_rows(lines, columns) if kind == "csv" else _jsonl_rows(lines)
    except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise UsageError(
            f"{partial}: its rows are not those of this command, so --resume cannot go on; give the same options, or "
            "--overwrite."
        ) from error


def _check_same(row: Row, prediction: Prediction, partial: Path, kind: str) -> None:
    """Raise UsageError unless a prediction says what the row of its image said."""
    label, score = prediction.top[0] if prediction.top else ("", 0.0)
    now = Row(
        row.path, _text(label, kind), row.score, _text(prediction.error or "", kind), len(prediction.top),
        (prediction.unsure, prediction.none_of_these),
    )  # fmt: skip
    if now != row or not isclose(score, row.score, abs_tol=_CLOSE):
        raise UsageError(
            f"{partial}: {row.path} was predicted otherwise; give the same checkpoint and options, or --overwrite."
        )


def _text(text: str, kind: str) -> str:
    return no_formula(printable(text)) if kind == "csv" else text


def _end_of_rows(file: Path, *, quoted: bool) -> int:
    """Bytes up to the end of the last whole row; a line end within quotes ends no row of a CSV."""
    end = position = quotes = 0
    with file.open("rb") as stream:
        for line in stream:
            position += len(line)
            quotes += line.count(b'"') * quoted
            if line.endswith(b"\r\n" if quoted else b"\n") and quotes % 2 == 0:
                end = position
    return end


def _lines(file: Path, end: int) -> Iterator[str]:
    with file.open("rb") as stream:
        while stream.tell() < end:
            yield stream.readline().decode()


def _csv_rows(lines: Iterator[str], columns: list[str]) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    if next(reader, columns) != columns:
        raise ValueError("other columns")
    errors = columns.index("error")
    for cells in reader:
        scores = [float(cells[place]) for place in range(2, errors, 2) if cells[place]]
        marks = dict(zip(columns[errors:], cells[errors:], strict=True))
        unsure, strange = (marks.get(name) == "true" for name in ("unsure", "none_of_these"))
        yield Row(cells[0], cells[1], scores[0] if scores else 0.0, cells[errors], len(scores), (unsure, strange))


def _jsonl_rows(lines: Iterator[str]) -> Iterator[Row]:
    for line in lines:
        row = json.loads(line)
        top = row.get("top", [])
        label, score = (top[0]["label"], float(top[0]["score"])) if top else ("", 0.0)
        marks = bool(row.get("unsure")), bool(row.get("none_of_these"))
        yield Row(row["path"], label, score, row.get("error", ""), len(top), marks)
