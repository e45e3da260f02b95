"""A page of the images that the doctor found something about, to be looked at in a browser."""

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

SHOWN = 100  # of a kind
_SIDE = 128  # pixels

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


def write_suspects(findings: Sequence[Finding], source: Source, file: Path) -> None:
    """Write the page: by kind, each finding with its picture where there is one. Raises OSError."""
    rows = _rows({(one.split, one.path) for one in findings}, source)
    body = [f"<h1>{escape(safe(source.name))}</h1>"]
    if not findings:
        body.append("<p>Nothing was found.</p>")
    for kind, group in groupby(findings, lambda one: one.kind):
        severity, meaning = KINDS[kind]
        alike = list(group)
        more = f", the first {SHOWN} of them" if len(alike) > SHOWN else ""
        body.append(
            f'<h2><span class="{severity}">{kind}</span> {len(alike):,}{more} <small>{meaning}</small></h2><ul>'
        )
        for one in alike[:SHOWN]:
            where = escape(safe(one.place))
            body.append(f"<li>{_picture(one, rows, source)}{where}<span>{escape(safe(one.detail))}</span></li>")
        body.append("</ul>")
    head = f'<meta charset="utf-8"><title>{escape(safe(source.name))}: suspects</title><style>{_STYLE}</style>'
    write_text(file, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n')


def _rows(wanted: set[tuple[str, str]], source: Source) -> dict[tuple[str, str], int]:
    """The row of each image that has a finding."""
    found = {}
    for name, split in source.splits.items():
        for row, one in enumerate(sample_names(split, np.arange(len(split)))):
            if (place := (str(name), one)) in wanted:
                found[place] = row
    return found


def _picture(one: Finding, rows: dict[tuple[str, str], int], source: Source) -> str:
    row = rows.get((one.split, one.path))
    if row is None:
        return ""
    cell = source.splits[one.split][row]["image"]
    try:
        pixels = decode(encoded(cell))
    except BadImage:
        return '<div class="none">no picture</div>'
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{b64encode(written.getvalue()).decode()}">'
