"""Predictions as CSV, JSON lines and parquet, written while they come: a file is whole, absent, or called partial."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vitft.errors import UsageError
from vitft.io import console
from vitft.io.paths import partial_name
from vitft.prediction.inputs import printable
from vitft.prediction.predictor import Prediction

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_ROW_GROUP, _NUMBERS = 4096, 2**22  # predictions, and probabilities, that are written to a parquet file at once


@dataclass(frozen=True)
class Layout:
    """What a row holds: so many classes, whether it is unsure, its novelty, and the probabilities of all `labels`."""

    top_k: int
    unsure: bool = False
    labels: tuple[str, ...] = ()
    probabilities: bool = False
    novelty: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of a table, without the probabilities."""
        best = [f"{name}_{place}" for place in range(1, self.top_k + 1) for name in ("label", "score")]
        return ["path", *best, "error"] + ["unsure"] * self.unsure + ["novelty", "none_of_these"] * self.novelty


class Writer(Protocol):
    """Takes predictions in order, a batch at a time."""

    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some more."""


class Csv:
    """A row per image: its path, each class with its probability, best first, the error, and what was asked for."""

    def __init__(self, put: Callable[[str], None], layout: Layout, *, appends: bool = False) -> None:
        self._put, self._layout, self._started = put, layout, appends

    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some more; the header comes with the first."""
        text = io.StringIO()
        writer = csv.writer(text)
        if not self._started:
            writer.writerow(self._layout.columns)
            self._started = True
        for row in rows:
            cells = [cell for label, score in row.top for cell in (label, f"{score:.6f}")]
            texts = [row.path, *cells, *[""] * (2 * self._layout.top_k - len(cells)), row.error or ""]
            extra = [str(row.unsure).lower()] if self._layout.unsure else []
            if self._layout.novelty:
                extra += ["" if row.novelty is None else f"{row.novelty:.6f}", str(row.none_of_these).lower()]
            writer.writerow([*map(no_formula, texts), *extra])
        self._put(text.getvalue())


class Jsonl:
    """A JSON document per image and line: `Prediction.to_dict`."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put

    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some more."""
        self._put("".join(console.json_text(row.to_dict()) + "\n" for row in rows))


class Parquet:
    """The columns of the CSV, and if asked for `probabilities`: of all classes, whose names are in the metadata."""

    def __init__(self, file: Path, layout: Layout) -> None:
        kinds = dict.fromkeys(("unsure", "none_of_these"), pa.bool_()) | {"novelty": pa.float32()}
        kinds |= {f"score_{place}": pa.float32() for place in range(1, layout.top_k + 1)}
        fields = [(name, kinds.get(name, pa.string())) for name in layout.columns]
        if layout.probabilities:
            fields.append(("probabilities", pa.list_(pa.float32(), len(layout.labels))))
        about = json.dumps({"labels": [*map(printable, layout.labels)]})
        self._schema = pa.schema(fields, metadata={"vitft": about})
        self._group = min(_ROW_GROUP, 1 + _NUMBERS // len(layout.labels)) if layout.probabilities else _ROW_GROUP
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[Prediction] = []

    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some more, once they are enough for a group of rows."""
        self._held += rows
        if len(self._held) >= self._group:
            self._write_group()

    def close(self) -> None:
        """Write what is still held, and the end of the file."""
        if self._held:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        rows, self._held = self._held, []
        self._writer.write_table(pa.Table.from_pylist([*map(_record, rows)], self._schema))


def _record(row: Prediction) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "path": printable(row.path), "unsure": row.unsure, "novelty": row.novelty, "none_of_these": row.none_of_these,
        "probabilities": row.probabilities,
    }  # fmt: skip
    for place, (label, score) in enumerate(row.top, 1):
        cells |= {f"label_{place}": printable(label), f"score_{place}": score}
    return cells | {"error": row.error and printable(row.error)}


def no_formula(cell: str) -> str:
    """The cell, with an apostrophe before what a spreadsheet would run as a formula (OWASP, CSV Injection).

    Numbers stay numbers. The other formats change nothing.
    """
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def text_writer(kind: str, put: Callable[[str], None], layout: Layout, *, appends: bool = False) -> Writer:
    """A writer of csv or jsonl, which gives its text to `put`, a batch at a time."""
    return Csv(put, layout, appends=appends) if kind == "csv" else Jsonl(put)


# -- files ------------------------------------------------------------------------------------------


def format_of(file: Path, wanted: str | None = None) -> str:
    """The format of a file: the one that is wanted, or by its suffix. Raises UsageError if they differ or say none."""
    known = SUFFIXES.get(file.suffix.lower())
    if known is None and wanted not in SUFFIXES.values():
        raise UsageError(f"{file}: give a .csv, .jsonl or .parquet file, or say the --format.")
    if known is not None and wanted not in (None, known):
        raise UsageError(f"{file}: its suffix does not fit --format {wanted}; change one.")
    return known or str(wanted)


def check_output(file: Path, kind: str, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raise UsageError unless a file may be written."""
    partial = partial_name(file)
    if kind == "parquet" and resume:
        raise UsageError("--resume goes on with csv and jsonl; a parquet file cannot be appended to.")
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise UsageError(f"{file}: give a file in a folder that exists.")
    if file.exists() and not overwrite and not resume:
        raise UsageError(f"{file}: the file exists; choose another, or add --overwrite to replace it.")
    if partial.exists() and not overwrite and not resume:
        onward = "" if kind == "parquet" else "add --resume to go on, or "
        raise UsageError(f"{partial} is of a run that did not end; {onward}add --overwrite to start again.")


@contextmanager
def output_file(file: Path, kind: str, layout: Layout, *, appends: bool = False) -> Iterator[Writer]:
    """Yield a writer of a file, which has its partial name until exit, and keeps it after an error.

    Rows reach the file a batch at a time, of parquet a group at a time. A partial parquet file can be read too, but not
    after a kill.
    """
    partial, counted = partial_name(file), _Counted()
    try:
        with _parquet(partial, layout) if kind == "parquet" else _text(partial, kind, layout, appends) as writer:
            counted.writer = writer
            counted.writes = False
            yield counted
            counted.writes = True
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException as error:
        onward = "" if kind == "parquet" else "; --resume goes on there"
        if counted.rows or appends:
            console.note(f"what was predicted so far is in {partial}{onward}")
        else:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and counted.writes:
            raise UsageError(f"{file}: cannot be written: {error.strerror or error}.") from error
        raise


class _Counted:
    """A writer, how many rows it was given, and whether it `writes`, rather than waits for the next ones."""

    def __init__(self) -> None:
        self.writer: Writer | None = None
        self.rows, self.writes = 0, True

    def write(self, rows: Sequence[Prediction]) -> None:
        """Write some more."""
        assert self.writer is not None
        self.rows += len(rows)
        self.writes = True
        self.writer.write(rows)
        self.writes = False


@contextmanager
def _parquet(file: Path, layout: Layout) -> Iterator[Writer]:
    with closing(Parquet(file, layout)) as writer:
        yield writer


@contextmanager
def _text(file: Path, kind: str, layout: Layout, appends: bool) -> Iterator[Writer]:
    with file.open("ab" if appends else "wb") as stream:

        def put(text: str) -> None:
            stream.write(text.encode("utf-8", "backslashreplace"))
            stream.flush()

        yield text_writer(kind, put, layout, appends=appends)
