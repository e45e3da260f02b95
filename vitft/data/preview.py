"""Draw a contact sheet of a dataset with Pillow: one row per class."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources.source import Source, class_indices
from vitft.data.splits import find_split_name
from vitft.io.console import safe
from vitft.io.fonts import drawable
from vitft.randomness import permutation

CLASSES, IMAGES = 20, 8
_CELL, _GAP, _MARGIN = 96, 6, 20  # pixels
_PAPER, _EMPTY, _INK, _FAINT = "#ffffff", "#f1f1f3", "#1c1c1f", "#74747c"


def preview(source: Source, path: Path, seed: int = 0) -> None:
    """Draw up to 8 random images of up to 20 evenly spaced classes of the train split, and save a PNG.

    Images keep their aspect ratio; small ones are enlarged by whole factors, so their pixels stay visible. The cell of
    an unreadable image is crossed out. A class name that no available font can draw becomes `class 3`, counted from 0.
    """
    name = find_split_name(source, "train") or next(iter(source.splits))
    split = source.splits[name]
    labels = class_indices(split)
    count = len(source.labels)
    shown = np.linspace(0, count - 1, min(CLASSES, count)).round().astype(int)
    names = [_fit_text(source.labels[label], f"class {label}", 15, 240) for label in shown]
    title, title_font = _fit_text(source.name, "dataset", 19)
    classes = f"{len(shown)} of {count}" if len(shown) < count else str(count)
    note = f"{name}: {len(split):,} images; {classes} classes, up to {IMAGES} random images of each"
    note, note_font = _fit_text(note, "", 13)
    columns = min(IMAGES, int(np.bincount(labels).max()))
    left = _MARGIN + round(max(font.getlength(text) for text, font in names)) + 14
    top = _MARGIN + 56
    width = max(left + columns * (_CELL + _GAP) - _GAP, _MARGIN + round(note_font.getlength(note))) + _MARGIN
    height = top + len(shown) * (_CELL + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, title_font, anchor="lt")
    draw.text((_MARGIN, _MARGIN + 28), note, _FAINT, note_font, anchor="lt")
    for line, (label, (text, font)) in enumerate(zip(shown, names, strict=True)):
        y = top + line * (_CELL + _GAP)
        draw.text((left - 14, y + _CELL // 2), text, _INK, font, anchor="rm")
        rows = np.flatnonzero(labels == label)
        drawn = rows[permutation(seed, f"preview {source.labels[label]}", 0, len(rows))[:IMAGES]]
        for column, row in enumerate(drawn):
            x = left + column * (_CELL + _GAP)
            _draw_cell(sheet, x, y, split[int(row)]["image"])
    sheet.save(path, "PNG")


def _draw_cell(sheet: Image.Image, x: int, y: int, image: dict[str, Any]) -> None:
    draw = ImageDraw.Draw(sheet)
    box = (x, y, x + _CELL - 1, y + _CELL - 1)
    try:
        pixels = decode(encoded(image))
    except BadImage:
        draw.rectangle(box, _EMPTY)
        draw.line((x + 32, y + 32, x + 63, y + 63), _FAINT, 2)
        draw.line((x + 63, y + 32, x + 32, y + 63), _FAINT, 2)
        return
    picture = _fit(Image.fromarray(pixels))
    if picture.size != (_CELL, _CELL):
        draw.rectangle(box, _EMPTY)
    sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_CELL - picture.height) // 2))


def _fit(picture: Image.Image) -> Image.Image:
    """Resize the picture to fill a cell, with at least one pixel per side."""
    scale = _CELL / max(picture.size)
    if scale >= 2:
        factor = int(scale)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _fit_text(text: str, fallback: str, size: int, width: int | None = None) -> tuple[str, Any]:
    """The text on one line, shortened with an ellipsis to a width in pixels, and its font.

    `fallback` replaces a text that no available font can draw.
    """
    text, file = drawable(safe(" ".join(text.split())), fallback)
    font = ImageFont.truetype(file, size)
    if width is None or font.getlength(text) <= width:
        return text, font
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…", font
