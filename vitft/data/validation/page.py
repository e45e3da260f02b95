"""An HTML report of the findings, with the images."""

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment

from vitft.data.color import Range
from vitft.data.decoder import MAX_PIXELS, BadImage
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import Source
from vitft.data.thumbnail import data_url
from vitft.data.validation.check import KINDS, Finding
from vitft.io.atomic import write_text
from vitft.io.console import safe
from vitft.io.pages import shared_style

MAX_SHOWN = 100  # findings of each kind whose pictures are shown; the others are listed
_THUMB = 128  # pixels


def write_report(
    findings: Sequence[Finding], source: Source, file: Path,
    *, max_pixels: int = MAX_PIXELS, value_range: Range | None = None,
) -> None:  # fmt: skip
    """Write the report: findings by kind, each with its image if there is one. Raises OSError.

    `max_pixels` and `value_range` say how images are decoded, as in `check`.
    """
    rows = _find_rows({(finding.split, finding.path) for finding in findings}, source)
    template = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(
        files("vitft.data.validation").joinpath("page.html").read_text(encoding="utf-8")
    )
    page = template.render(
        style=shared_style(), name=safe(source.name), kinds=KINDS, most=MAX_SHOWN, safe=safe,
        groups={kind: list(group) for kind, group in groupby(findings, lambda finding: finding.kind)},
        thumbnail=lambda finding: _thumbnail(finding, rows, source, max_pixels, value_range),
    )  # fmt: skip
    write_text(file, page)


def _find_rows(wanted: set[tuple[str, str]], source: Source) -> dict[tuple[str, str], int]:
    """The row of each wanted image, by split and name."""
    return {
        key: row
        for split, rows in source.splits.items()
        for row, name in enumerate(sample_names(rows, np.arange(len(rows))))
        if (key := (str(split), name)) in wanted
    }


def _thumbnail(
    finding: Finding, rows: dict[tuple[str, str], int], source: Source, max_pixels: int, value_range: Range | None
) -> str | None:
    """The address of a finding's picture: None if it has no image, empty if the image cannot be read."""
    row = rows.get((finding.split, finding.path))
    if row is None:
        return None
    try:
        return data_url(source.splits[finding.split][row]["image"], _THUMB, max_pixels, value_range)
    except BadImage:
        return ""
