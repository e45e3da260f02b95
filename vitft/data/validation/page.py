"""An HTML report of the findings, with the images."""

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import Source
from vitft.data.validation.check import KINDS, Finding
from vitft.io.atomic import write_text
from vitft.io.console import safe

MAX_SHOWN = 100  # findings of each kind
_THUMB = 128  # pixels

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h2 { margin: 2.2rem 0 .2rem; font-size: 1.1rem; } h2 small { font-weight: normal; opacity: .7; }
ul { list-style: none; padding: 0; display: grid; gap: 1rem; }
ul { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
li { overflow-wrap: anywhere; font-size: .85rem; }
img, .none { display: block; height: 128px; max-width: 100%; object-fit: contain; border-radius: 4px; }
.none { background: #8883; text-align: center; line-height: 128px; }
li span { opacity: .7; display: block; }
.error { color: #c22; } .warning { color: #a60; }
"""


def write_report(findings: Sequence[Finding], source: Source, file: Path) -> None:
    """Write the report: findings by kind, each with its image if there is one. Raises OSError."""
    rows = _find_rows({(finding.split, finding.path) for finding in findings}, source)
    body = [f"<h1>{escape(safe(source.name))}</h1>"]
    if not findings:
        body.append("<p>No problems found.</p>")
    for kind, group in groupby(findings, lambda finding: finding.kind):
        severity, meaning = KINDS[kind]
        of_kind = list(group)
        more = f", the first {MAX_SHOWN} of them" if len(of_kind) > MAX_SHOWN else ""
        body.append(
            f'<h2><span class="{severity}">{kind}</span> {len(of_kind):,}{more} <small>{meaning}</small></h2><ul>'
        )
        for finding in of_kind[:MAX_SHOWN]:
            place, detail = escape(safe(finding.place)), escape(safe(finding.detail))
            body.append(f"<li>{_thumbnail(finding, rows, source)}{place}<span>{detail}</span></li>")
        body.append("</ul>")
    head = f'<meta charset="utf-8"><title>{escape(safe(source.name))}: data check</title><style>{_STYLE}</style>'
    write_text(file, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n')


def _find_rows(wanted: set[tuple[str, str]], source: Source) -> dict[tuple[str, str], int]:
    """The row of each wanted image, by split and name."""
    return {
        key: row
        for split, rows in source.splits.items()
        for row, name in enumerate(sample_names(rows, np.arange(len(rows))))
        if (key := (str(split), name)) in wanted
    }


def _thumbnail(finding: Finding, rows: dict[tuple[str, str], int], source: Source) -> str:
    row = rows.get((finding.split, finding.path))
    if row is None:
        return ""
    try:
        pixels = decode(encoded(source.splits[finding.split][row]["image"]))
    except BadImage:
        return '<div class="none">no image</div>'
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMB, _THUMB))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}">'
