"""Read a text file of rows as named columns: CSV, TSV, JSON lines, JSON, lists of paths.

Encoding, delimiter, header and comments are detected. `csv.Sniffer` is not used: it takes letters for delimiters, and
a caption with commas for a table of many columns. Here, a delimiter gives every row the same number of cells. The
encoding is not guessed from letter frequencies either: for texts as short as labels such guesses are often wrong
(charset-normalizer reads crème brûlée as Czech).
"""

import codecs
import csv
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import psutil

from vitft.data.decoder import suffixes
from vitft.data.sources.schema import Notes, role_of
from vitft.errors import DataError
from vitft.io.console import size

Cells = list[Any]
NamesFile = Callable[[str], bool]
"""Whether a cell names an existing file."""

# Usual names of columns, as `simplify` writes them, the most specific first.
IMAGE = (
    "path", "file", "filename", "filepath", "filepaths", "imagepath", "imagefile", "imagefilename", "imagename",
    "image", "images", "img", "imgpath", "imgname", "photo", "picture", "imageid", "imgid", "id", "name",
)  # fmt: skip
LABEL = (
    "label", "labels", "finelabel", "labelname", "class", "classes", "classname", "classlabel", "category",
    "categoryname", "target", "classid", "labelid", "categoryid",
)  # fmt: skip
SPLIT = ("split", "datasplit", "splits", "subset", "partition", "usage", "set", "dataset", "phase")
FOLD = ("fold", "folds", "kfold", "foldid", "cvfold", "cv")
_KNOWN = {*IMAGE, *LABEL, *SPLIT, *FOLD}
_SAMPLE_LINES = 500  # for detecting the format
_MAX_LINE = 1_000_000  # characters
_DELIMITERS = {".tsv": "\t,;|", ".txt": "\t,;| ", "": ",;\t|"}
_DELIMITER_NAMES = {"\t": "tabs", " ": "spaces"}
_MEMORY_PER_JSON_BYTE = 30  # at most
_MAX_INTERNED = 50_000  # distinct cells stored once


@dataclass
class Table:
    """Columns of equal length. Cells of text files are text, cells of JSON any value, None where there is none."""

    path: Path
    columns: dict[str, Cells]
    lines: "array[int]" = field(default_factory=lambda: array("q"))  # each row's position in the file
    unit: str = "line"

    def where(self, row: int) -> str:
        """A row's position, for error messages."""
        return f"{self.path} {self.unit} {self.lines[row]}"

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return list(self.columns)

    def __getitem__(self, name: str) -> Cells:
        """A column by name."""
        return self.columns[name]


def read_rows(path: Path, encoding: str | None, names_file: NamesFile, notes: Notes) -> Table:
    """Read a table. Raises DataError, OSError."""
    suffix = path.suffix.lower()
    encoding = encoding or _detect_encoding(path, notes)
    encoding = "utf-8-sig" if simplify(encoding) == "utf8" else encoding
    try:
        with path.open(encoding=encoding, newline="") as stream:
            if suffix in (".jsonl", ".ndjson"):
                table = _from_objects(path, _json_lines(path, stream))
            elif suffix == ".json":
                table = _from_objects(path, _json_entries(path, stream), "entry")
            else:
                table = _Delimited(path, stream, names_file, notes).table()
    except LookupError as error:
        raise DataError(f"unknown encoding {encoding!r}; use for example utf-8, utf-16, cp1252 or gbk.") from error
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{path} is not {encoding} text: {reason}; give another --encoding.") from error
    if not table.lines:
        raise DataError(f"{path} has no rows; write one line for each image, with its path and label.")
    return table


def simplify(name: str) -> str:
    """A column name without case, spaces and punctuation: `Image_ID ` is imageid."""
    return "".join(filter(str.isalnum, name.casefold()))


def shorten(text: str) -> str:
    """The start of a text, for error messages."""
    return text if len(text) <= 60 else f"{text[:56]} ..."


# -- encoding -------------------------------------------------------------------------------------

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _detect_encoding(path: Path, notes: Notes) -> str:
    """The encoding of the byte order mark; else UTF-8, UTF-16 (by its zero bytes), or Windows-1252 with a warning."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            if name != "utf-8-sig":
                notes.decide(f"the text is {name.upper()}, by its byte order mark")
            return name
    if b"\0" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        if min(even, odd) == 0 and 4 * max(even, odd) > len(head):
            notes.decide(f"the text is UTF-16 without a byte order mark: every other byte of {path.name} is zero")
            return "utf-16-le" if odd else "utf-16-be"
        raise DataError(f"{path} is not text: it has zero bytes; export it as CSV.")
    if (error := _decoding_error(path, "utf-8")) is None:
        return "utf-8-sig"
    if _decoding_error(path, "cp1252"):
        raise DataError(f"{path} is neither UTF-8 nor Windows-1252 text; save it as UTF-8, or give its --encoding.")
    start = max(error.object.rfind(b"\n", 0, error.start) + 1, error.start - 20)
    example = error.object[start : error.end + 20].split(b"\n")[0].decode("cp1252", "replace").strip()
    notes.warn(f"{path.name} is not UTF-8 and is read as Windows-1252 ({example!r}); if that is wrong, give --encoding")
    return "cp1252"


def _decoding_error(path: Path, encoding: str) -> UnicodeDecodeError | None:
    """Why a file is not text of an encoding; None if it is."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as stream:
        try:
            while chunk := stream.read(1 << 20):
                decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return error
    return None


def _lines(path: Path, stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE), ""), 1):
        if len(line) == _MAX_LINE:
            raise DataError(f"{path} line {number} is over {_MAX_LINE:,} characters long; is it a table?")
        yield line


# -- delimited text -------------------------------------------------------------------------------


class _Delimited:
    """Reads rows of cells separated by a delimiter."""

    def __init__(self, path: Path, stream: TextIO, names_file: NamesFile, notes: Notes) -> None:
        self.path, self.names_file, self.notes = path, names_file, notes
        self.lines = _lines(path, stream)
        self.comments = 0  # lines
        self.skipped = 0  # lines before the first row

    def table(self) -> Table:
        """All rows. Raises DataError for a row with more or fewer cells than the header."""
        head, comment, declared = self._head()
        delimiter = declared or self._delimiter(head)
        rows = self._rows(chain(head, self.lines), delimiter)
        line, first = next(rows, (0, []))
        names, remark = self._header(first, delimiter, comment)
        if remark:  # the first row is not the header
            rows = chain([(line, first)], rows)
        columns: list[Cells] = [[] for _ in names]
        table = Table(self.path, dict(zip(names, columns, strict=True)))
        interned: dict[str, str] = {}
        for line, cells in rows:
            if len(cells) != len(names) and not self._fits(line, cells, names):
                continue
            table.lines.append(line)
            for column, cell in zip(columns, cells, strict=False):
                column.append(interned.setdefault(cell, cell) if len(interned) < _MAX_INTERNED else cell)
        separators = _DELIMITER_NAMES.get(delimiter, f"{delimiter!r}")
        remarks = [f"{separators} between columns"] if len(names) > 1 and delimiter != "," else []
        remarks += [remark] if remark else []
        remarks += [f"{self.comments} comment lines"] if self.comments else []
        if remarks:
            self.notes.decide(f"{self.path.name}: {', '.join(remarks)}")
        return table

    def _head(self) -> tuple[list[str], str, str]:
        """The first lines after any comments; the last of these comments; the delimiter of a line `sep=`."""
        head: list[str] = []
        comment = declared = ""
        for line in self.lines:
            text = line.strip()
            if not head and text.startswith("#") and not any(suffix in text.lower() for suffix in suffixes()):
                comment, self.comments, self.skipped = text.lstrip("# "), self.comments + 1, self.skipped + 1
            elif not head and (found := re.fullmatch(r"\s*sep=([^\r\n])\s*", line, re.IGNORECASE)):
                declared, self.skipped = found[1], self.skipped + 1
            elif not head and not text:
                self.skipped += 1
            else:
                head.append(line)
                if len(head) == _SAMPLE_LINES:
                    break
        return head, comment, declared

    def _rows(self, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank, and the line where each ends."""
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            for cells in reader:
                if any(map(str.strip, cells)):
                    yield self.skipped + reader.line_num, cells
        except csv.Error as error:
            line = self.skipped + reader.line_num
            reason = f"{error}; write a quote inside a cell twice"
            if "field limit" in str(error):
                reason = f"a cell has over {csv.field_size_limit():,} characters; close the open quote"
            raise DataError(f"{self.path} line {line}: {reason}.") from error

    def _delimiter(self, head: list[str]) -> str:
        """The delimiter that gives all rows the same number of cells, more than one; else the best for the first row.

        If several do, the one whose second row names a file.
        """
        texts = [text for line in head if (text := line.strip())]
        candidates = _DELIMITERS.get(self.path.suffix.lower(), _DELIMITERS[""])
        if texts and all(self._is_path(text) for text in texts[:20]):
            return candidates[0]
        samples = {delimiter: self._sample(head, delimiter) for delimiter in candidates}

        def like_the_first(delimiter: str) -> int:
            """The number of rows with as many cells as the first one, if it has several."""
            counts = [len(cells) for cells in samples[delimiter]]
            return counts.count(counts[0]) if counts and counts[0] > 1 else 0

        consistent = [delimiter for delimiter in candidates if 0 < len(samples[delimiter]) == like_the_first(delimiter)]
        if len(consistent) > 1:
            with_file = [d for d in consistent if any(self.names_file(c.strip()) for r in samples[d][1:2] for c in r)]
            consistent = with_file or consistent
        return (consistent or [max(candidates, key=like_the_first)])[0]

    def _is_path(self, text: str) -> bool:
        return os.path.splitext(text)[1].lower() in suffixes() or self.names_file(text)  # noqa: PTH122

    def _sample(self, head: list[str], delimiter: str) -> list[list[str]]:
        """The rows of the sample, without empty cells beyond the length of the first one."""
        sample: list[list[str]] = []
        with suppress(DataError):  # the sample may end inside quotes
            for _, cells in self._rows(head, delimiter):
                while sample and len(cells) > len(sample[0]) and not cells[-1].strip():
                    cells.pop()
                sample.append(cells)
        return sample

    def _header(self, first: list[str], delimiter: str, comment: str) -> tuple[list[str], str]:
        """The column names, and a remark if they are not from the first row."""
        first = [cell.strip() for cell in first]
        is_usual = any(simplify(cell) in _KNOWN for cell in first)
        has_paths = any(os.path.splitext(cell)[1].lower() in suffixes() for cell in first)  # noqa: PTH122
        if not has_paths and (is_usual or not any(map(self.names_file, first))):
            while first and not first[-1]:
                first.pop()
            return _unique([cell or f"column {number}" for number, cell in enumerate(first, 1)]), ""
        try:
            names = next(csv.reader([comment], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:  # a comment may be anything
            names = []
        if len(names) == len(first) > 1:
            return _unique([name.strip() for name in names]), "the header is a comment"
        return [f"column {number}" for number in range(1, len(first) + 1)], "no header, the first row names a file"

    def _fits(self, line: int, cells: list[str], names: list[str]) -> bool:
        """Whether a row of another length has only extra empty cells; False for a comment. Raises DataError."""
        is_longer = len(cells) > len(names)
        if is_longer and not any(map(str.strip, cells[len(names) :])):
            return True
        if cells[0].startswith("#"):
            self.comments += 1
            return False
        remedy = "put cells that contain the delimiter in quotes" if is_longer else "fill in the missing ones"
        raise DataError(
            f"{self.path} line {line} has {len(cells)} cells, the header {len(names)} "
            f"({', '.join(names[:5])}): {shorten(' | '.join(cells))!r}; {remedy}."
        )


def _unique(names: list[str]) -> list[str]:
    """Names made unique: repeated ones get their position appended."""
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


# -- JSON -----------------------------------------------------------------------------------------

_EXPECTED = '{"path": ..., "label": ...}'


def _from_objects(path: Path, rows: Iterable[tuple[int, dict[str, Any]]], unit: str = "line") -> Table:
    table = Table(path, {}, unit=unit)
    for line, row in rows:
        for name in row:
            if name not in table.columns:
                table.columns[name] = [None] * len(table.lines)
        for name, cells in table.columns.items():
            cells.append(row.get(name))
        table.lines.append(line)
    table.columns = {name.strip(): cells for name, cells in table.columns.items()}
    return table


def _json_lines(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path, stream), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object; expected {_EXPECTED}.")
        yield number, row


def _json_entries(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries of a JSON file: a list of objects, one list for each split, or an object of path and label."""
    needed = _MEMORY_PER_JSON_BYTE * path.stat().st_size
    if needed > (total := psutil.virtual_memory().total):
        raise DataError(
            f"{path} needs up to {size(needed)} of memory, this machine has {size(total)}; write JSON lines (.jsonl)."
        )
    try:
        content = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {shorten(str(error))}; if it has JSON lines, call it .jsonl.") from error
    entries: list[Any] = []
    if isinstance(content, list):
        entries = content
    elif isinstance(content, dict) and content and all(isinstance(part, list) for part in content.values()):
        if all(map(role_of, content)):
            for split, part in content.items():
                entries += [entry | {"split": split} if isinstance(entry, dict) else entry for entry in part]
        elif len(content) == 1:
            (entries,) = content.values()
    elif isinstance(content, dict):
        entries = [{"path": name, "label": label} for name, label in content.items()]
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, list) and len(entry) == 2:
            entry = dict(zip(("path", "label"), entry, strict=True))
        if not isinstance(entry, dict):
            raise DataError(f"{path} entry {number} is not a JSON object; expected {_EXPECTED}.")
        yield number, entry
    if not entries:
        raise DataError(f"{path} is not a list of objects; expected [{_EXPECTED}, ...].")
