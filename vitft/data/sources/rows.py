"""A text file of rows, whatever program wrote it, as named columns: CSV, TSV, JSON lines, JSON, lists of paths.

Encoding, delimiter, header and comments are found from the file. `csv.Sniffer` is not used: it takes letters for
delimiters, and a caption with commas for a table of many columns; here a delimiter is one that gives every row the
same number of cells. Nor is the encoding guessed from letters' frequencies: of labels as short as these, such
guesses are often wrong (charset-normalizer reads crème brûlée as Czech).
"""

import codecs
import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import psutil

from vitft.data.decoder import suffixes
from vitft.data.sources.schema import Notes, role_of
from vitft.errors import DataError
from vitft.io.console import size

Cells = list[Any]
NamesFile = Callable[[str], bool]
"""Whether a cell names a file that is there."""

_SAMPLE = 500  # lines by which the form is found
_LONGEST = 1_000_000  # characters of a line
_DELIMITERS = {".tsv": "\t,;|", ".txt": "\t,;| ", "": ",;\t|"}
_DELIMITER_NAMES = {"\t": "tabs", " ": "spaces"}
_JSON_BYTES = 30  # of memory that a byte of a JSON file takes, at most


@dataclass
class Table:
    """Columns of equal length; cells of text files are text, those of JSON any value, None where there is none."""

    path: Path
    names: list[str]
    columns: list[Cells]
    lines: "array[int]" = field(default_factory=lambda: array("q"))  # of each row, where it stands in the file
    unit: str = "line"

    def where(self, row: int) -> str:
        """A row's place, for an error."""
        return f"{self.path} {self.unit} {self.lines[row]}"

    def __getitem__(self, name: str) -> Cells:
        """A column by name."""
        return self.columns[self.names.index(name)]


def read_rows(path: Path, encoding: str | None, known: Iterable[str], names_file: NamesFile, notes: Notes) -> Table:
    """Read a table. `known` are usual column names, as `plain` makes them. Raises DataError, OSError."""
    suffix = path.suffix.lower()
    encoding = encoding or _encoding(path, notes)
    encoding = "utf-8-sig" if plain(encoding) == "utf8" else encoding
    try:
        with path.open(encoding=encoding, newline="") as stream:
            if suffix in (".jsonl", ".ndjson"):
                table = _of_objects(path, _json_lines(path, stream))
            elif suffix == ".json":
                table = _of_objects(path, _json_entries(path, stream), "entry")
            else:
                table = _Delimited(path, stream, known, names_file, notes).table()
    except LookupError as error:
        raise DataError(f"encoding {encoding!r} is unknown; utf-8, utf-16, cp1252 and gbk are some.") from error
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{path} cannot be read as {encoding} text: {reason}; name another with --encoding.") from error
    if not table.lines:
        raise DataError(f"{path} has no rows; give one line an image, with its path and label.")
    return table


def plain(name: str) -> str:
    """A column's name without case, spaces and signs: `Image_ID ` is imageid."""
    return "".join(filter(str.isalnum, name.casefold()))


def in_short(text: str, length: int = 60) -> str:
    """The start of a text, for an error."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


# -- encoding -------------------------------------------------------------------------------------

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _encoding(path: Path, notes: Notes) -> str:
    """UTF-8 where it is; else what the mark at the start says, UTF-16 by its zeros, or Windows-1252, with a warning."""
    with path.open("rb") as stream:
        head = stream.read(4096)
        for mark, name in _BOMS.items():
            if head.startswith(mark):
                if name != "utf-8-sig":
                    notes.decide(f"the text is {name.upper()}, as its first bytes say")
                return name
        if b"\0" in head:
            even, odd = head[::2].count(0), head[1::2].count(0)
            if min(even, odd) == 0 and 4 * max(even, odd) > len(head):
                notes.decide(f"the text is UTF-16 without a mark: every other byte of {path.name} is zero")
                return "utf-16-le" if odd else "utf-16-be"
            raise DataError(f"{path} is no text: it holds zero bytes; export it as CSV.")
        stream.seek(0)
        utf8, cp1252 = codecs.getincrementaldecoder("utf-8")(), codecs.getincrementaldecoder("cp1252")()
        example = ""
        is_utf8 = True
        while chunk := stream.read(1 << 20):
            try:
                if is_utf8:
                    utf8.decode(chunk)
                    continue
            except UnicodeDecodeError as error:
                is_utf8 = False
                start = max(chunk.rfind(b"\n", 0, error.start) + 1, error.start - 20)
                example = chunk[start : error.end + 20].split(b"\n")[0].decode("cp1252", "replace").strip()
            try:
                cp1252.decode(chunk)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is neither UTF-8 nor Windows-1252 text; save it as UTF-8, or name its --encoding."
                ) from error
    if is_utf8:
        return "utf-8-sig"
    notes.warn(
        f"{path.name} is not UTF-8, and is read as Windows-1252: {example!r}; if that is wrong, name its --encoding"
    )
    return "cp1252"


def _lines(path: Path, stream: TextIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST:
            raise DataError(f"{path} line {number} is longer than {_LONGEST:,} characters; is it another kind of file?")
        yield line


# -- columns apart by a delimiter -----------------------------------------------------------------


class _Delimited:
    """A reader of rows of cells."""

    def __init__(self, path: Path, stream: TextIO, known: Iterable[str], names_file: NamesFile, notes: Notes) -> None:
        self.path, self.known, self.names_file, self.notes = path, set(known), names_file, notes
        self.lines = _lines(path, stream)
        self.comments = 0  # lines
        self.skipped = 0  # lines before the first row

    def table(self) -> Table:
        """All rows. Raises DataError for one with more or fewer cells than the header."""
        head, remark, told = self._head()
        delimiter = told or self._delimiter(head)
        rows = self._rows(chain(head, self.lines), delimiter)
        line, first = next(rows, (0, []))
        names, what = self._header(first, delimiter, remark)
        if what:
            rows = chain([(line, first)], rows)
        self.names = names
        table = Table(self.path, names, [[] for _ in names])
        seen: dict[str, str] = {}
        for line, cells in rows:
            if len(cells) != len(names) and not self._fits(line, cells):
                continue
            table.lines.append(line)
            for column, cell in zip(table.columns, cells, strict=False):
                column.append(seen.setdefault(cell, cell) if len(seen) < 50_000 else cell)
        apart = _DELIMITER_NAMES.get(delimiter, f"{delimiter!r}")
        form = [f"{apart} between columns"] if len(names) > 1 and delimiter != "," else []
        form += [what] if what else []
        form += [f"{self.comments} lines of comment"] if self.comments else []
        if form:
            self.notes.decide(f"{self.path.name}: {', '.join(form)}")
        return table

    def _head(self) -> tuple[list[str], str, str]:
        """The lines that tell the form, without comments before the first; the last comment; what `sep=` says."""
        head: list[str] = []
        remark = told = ""
        for line in self.lines:
            text = line.strip()
            if not head and self._is_comment(text):
                remark, self.comments, self.skipped = text.lstrip("# "), self.comments + 1, self.skipped + 1
            elif not head and text.lower().startswith("sep=") and len(text) == 5:
                told, self.skipped = text[4], self.skipped + 1
            elif not head and not text:
                self.skipped += 1
            else:
                head.append(line)
                if len(head) == _SAMPLE:
                    break
        return head, remark, told

    def _is_comment(self, text: str) -> bool:
        return text.startswith("#") and not any(suffix in text.lower() for suffix in suffixes())

    def _rows(self, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank, and the line where each ends."""
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        while True:
            try:
                for cells in reader:
                    if any(map(str.strip, cells)):
                        yield self.skipped + reader.line_num, cells
                return
            except csv.Error as error:
                line = self.skipped + reader.line_num
                reason = f"{error}; a quote within a cell is written twice"
                if "field limit" in str(error):
                    reason = f"a cell has over {csv.field_size_limit():,} characters; close the quote that is open"
                raise DataError(f"{self.path} line {line}: {reason}.") from error

    def _delimiter(self, head: list[str]) -> str:
        """The one that gives all rows the same number of cells, more than one; else that of the first row."""
        texts = [text for line in head if (text := line.strip())]
        suffix = self.path.suffix.lower()
        candidates = _DELIMITERS.get(suffix, _DELIMITERS[""])
        if texts and all(self._is_path(text) for text in texts[:20]):
            return candidates[0]
        even, first = [], []
        for delimiter in candidates:
            counts = self._counts(head, delimiter)
            if counts and counts[0] > 1:
                first.append((counts.count(counts[0]), -candidates.index(delimiter), delimiter))
                if len(set(counts)) == 1:
                    even.append(delimiter)
        if len(even) > 1:
            named = [one for one in even if any(map(self.names_file, map(str.strip, self._second(head, one))))]
            even = named or even
        return (even or [max(first)[2] if first else candidates[0]])[0]

    def _is_path(self, text: str) -> bool:
        return os.path.splitext(text)[1].lower() in suffixes() or self.names_file(text)  # noqa: PTH122

    def _counts(self, head: list[str], delimiter: str) -> list[int]:
        """Cells of each row of the sample; empty ones past the first row's end do not count."""
        counts: list[int] = []
        try:
            for _, cells in self._rows(head, delimiter):
                while counts and len(cells) > counts[0] and not cells[-1].strip():
                    cells.pop()
                counts.append(len(cells))
        except DataError:  # the sample may end within quotes
            pass
        return counts

    def _second(self, head: list[str], delimiter: str) -> list[str]:
        return next(islice(self._rows(head, delimiter), 1, 2), (0, []))[1]

    def _header(self, first: list[str], delimiter: str, remark: str) -> tuple[list[str], str]:
        """The columns' names, and where they are from if it is not the first row."""
        first = [cell.strip() for cell in first]
        usual = any(plain(cell) in self.known for cell in first)
        paths = any(os.path.splitext(cell)[1].lower() in suffixes() for cell in first)  # noqa: PTH122
        if not paths and (usual or not any(map(self.names_file, first))):
            while first and not first[-1]:
                first.pop()
            return _unique([cell or f"column {number}" for number, cell in enumerate(first, 1)]), ""
        try:
            said = next(csv.reader([remark], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:  # a comment may be anything
            said = []
        if len(said) == len(first) > 1:
            return _unique([name.strip() for name in said]), "the header is a comment"
        return [f"column {number}" for number in range(1, len(first) + 1)], "no header, the first row names a file"

    def _fits(self, line: int, cells: list[str]) -> bool:
        """Whether a row of another length is one all the same: less empty cells at its end. Raises DataError."""
        if len(cells) > len(self.names) and not any(map(str.strip, cells[len(self.names) :])):
            return True
        if cells[0].startswith("#"):
            self.comments += 1
            return False
        remedy = (
            "put a cell that holds the delimiter in quotes"
            if len(cells) > len(self.names)
            else "fill in what is missing"
        )
        raise DataError(
            f"{self.path} line {line} has {len(cells)} cells, and the first row {len(self.names)} "
            f"({', '.join(self.names[:5])}): {in_short(' | '.join(cells))!r}; {remedy}."
        )


def _unique(names: list[str]) -> list[str]:
    """Names, of which a second one like an earlier has its number behind it."""
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


# -- JSON -----------------------------------------------------------------------------------------


def _of_objects(path: Path, rows: Iterable[tuple[int, dict[str, Any]]], unit: str = "line") -> Table:
    table = Table(path, [], [], unit=unit)
    columns: dict[str, Cells] = {}
    for line, row in rows:
        for name in row:
            if name not in columns:
                columns[name] = [None] * len(table.lines)
        for name, cells in columns.items():
            cells.append(row.get(name))
        table.lines.append(line)
    table.names, table.columns = [name.strip() for name in columns], list(columns.values())
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
            raise DataError(f"{path} line {number} is no JSON object; expected " + '{"path": ..., "label": ...}.')
        yield number, row


def _json_entries(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of a JSON file: a list of objects, one list for each split, or an object of path and label."""
    needed = _JSON_BYTES * path.stat().st_size
    if needed > (there := psutil.virtual_memory().total):
        raise DataError(
            f"{path} takes up to {size(needed)} of {size(there)} of memory; write it as JSON lines (.jsonl)."
        )
    try:
        found = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {in_short(str(error))}; is it JSON lines? Then call it .jsonl.") from error
    entries: list[Any] = []
    if isinstance(found, list):
        entries = found
    elif isinstance(found, dict) and found and all(isinstance(part, list) for part in found.values()):
        if all(map(role_of, found)):
            for split, part in found.items():
                entries += [entry | {"split": split} if isinstance(entry, dict) else entry for entry in part]
        elif len(found) == 1:
            (entries,) = found.values()
    elif isinstance(found, dict):
        entries = [{"path": name, "label": label} for name, label in found.items()]
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, list) and len(entry) == 2:
            entry = dict(zip(("path", "label"), entry, strict=True))
        if not isinstance(entry, dict):
            raise DataError(f"{path} entry {number} is no JSON object; expected " + '{"path": ..., "label": ...}.')
        yield number, entry
    if not entries:
        raise DataError(f"{path} is no list of objects; expected " + '[{"path": ..., "label": ...}, ...].')
