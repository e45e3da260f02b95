"""Draw a contact sheet of a dataset with Pillow, one row per class: as it is, or as training sees it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitft.data.augment import Preprocess
from vitft.data.augmentation.settings import Augmentation
from vitft.data.decoder import MAX_PIXELS, BadImage, decode, encoded
from vitft.data.loader import TrainLoader
from vitft.data.sources.source import Source, class_indices
from vitft.data.splits import find_split_name
from vitft.data.stores.store import decode_all
from vitft.io.atomic import new_file
from vitft.io.console import counted, safe
from vitft.io.fonts import drawable
from vitft.randomness import permutation

CLASSES, IMAGES = 20, 8
_CELL, _GAP, _MARGIN, _CAPTION = 96, 6, 20, 15  # pixels
_PAPER, _EMPTY, _INK, _FAINT = "#ffffff", "#f1f1f3", "#1c1c1f", "#74747c"
_INPUT = 224  # pixels: the model input that is shown


@dataclass(frozen=True)
class _Cell:
    """A picture, None for one that cannot be read, and what is written below it."""

    picture: Image.Image | None
    caption: str = ""


def preview(source: Source, path: Path, seed: int = 0, augmentation: Augmentation | None = None) -> None:
    """Draw examples of up to 20 evenly spaced classes of the train split, and save a PNG.

    Up to 8 random images of each, or with `augmentation` one of each, as it is and as the model sees it in 7 epochs, at
    224 x 224 pixels. Images keep their aspect ratio; small ones are enlarged by whole factors, so their pixels stay
    visible. The cell of an unreadable image is crossed out. A class name that no available font can draw becomes
    `class 3`, counted from 0.
    """
    name = find_split_name(source, "train") or next(iter(source.splits))
    split = source.splits[name]
    labels = class_indices(split)
    count = len(source.labels)
    shown = np.linspace(0, count - 1, min(CLASSES, count)).round().astype(int)
    drawn = []
    for label in shown:
        rows = np.flatnonzero(labels == label)
        drawn.append(rows[permutation(seed, f"preview {source.labels[label]}", 0, len(rows))[:IMAGES]])
    classes = f"{len(shown)} of " if len(shown) < count else ""
    note = f"{name}: {counted(len(split), 'image')}; {classes}{counted(count, 'class')}, "
    if augmentation is None:
        note += f"up to {IMAGES} random images of each"
        heads: list[str] = []
        cells = [[_Cell(_as_it_is(split[int(row)]["image"])) for row in rows] for rows in drawn]
    else:
        note += f"an image of each, and what the model sees of it: {_in_words(augmentation)}"
        heads = ["image", *(f"epoch {number}" for number in range(1, IMAGES))]
        firsts = np.concatenate([rows[:1] for rows in drawn])
        seen = iter(_augmented(split, firsts, labels[firsts], source.labels, augmentation))
        cells = [next(seen) if len(rows) else [] for rows in drawn]
    names = [_fit_text(source.labels[label], f"class {label}", 15, 240) for label in shown]
    picture = _draw(source.name, note, heads, names, cells)
    with new_file(path) as temporary:
        picture.save(temporary, "PNG")


def _in_words(how: Augmentation) -> str:
    settings = {"color jitter": how.color_jitter, "erase": how.erase, "mixup": how.mixup, "cutmix": how.cutmix}
    return ", ".join([f"augment {how.kind}", *(f"{name} {value:g}" for name, value in settings.items() if value)])


def _augmented(
    split: datasets.Dataset, rows: NDArray[np.int64], labels: NDArray[np.int64], names: tuple[str, ...],
    how: Augmentation,
) -> list[list[_Cell]]:  # fmt: skip
    """For each of these rows, the image and the model's input in epochs, from the loader that training uses."""
    preprocess = Preprocess(_INPUT, _INPUT)
    store, skipped = decode_all(
        split.select(rows), preprocess, crops=how.kind == "crop", max_pixels=MAX_PIXELS, skip_bad=True, training=True
    )
    cells = [[_Cell(_as_it_is(split[int(row)]["image"]))] for row in rows]
    kept = np.setdiff1d(np.arange(len(rows)), [image.position for image in skipped])
    if not len(kept):
        return cells
    loader = TrainLoader(
        store, labels[kept], preprocess, augmentation=how, classes=len(names), batch_size=len(kept),
        device=torch.device("cpu"),
    )  # fmt: skip
    for epoch in range(IMAGES - 1):
        batch = loader.batch(epoch)
        scaled = (
            batch.pixels * torch.tensor(preprocess.std)[:, None, None] + torch.tensor(preprocess.mean)[:, None, None]
        )
        pixels = (255 * scaled).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for place, position in enumerate(batch.index.tolist()):
            caption = ""
            if batch.probabilities is not None:
                shares = batch.probabilities[place].clone()
                shares[labels[kept[position]]] = 0
                share, other = shares.max(dim=0)
                caption = f"{100 * share.item():.0f} % {names[int(other)]}" if share >= 0.005 else ""
            cells[kept[position]].append(_Cell(Image.fromarray(pixels[place]), caption))
    return cells


def _draw(
    title: str, note: str, heads: list[str], names: list[tuple[str, Any]], cells: list[list[_Cell]]
) -> Image.Image:  # fmt: skip
    """The sheet: a title, a note, a heading for each column, and a row of cells beside each name."""
    title, title_font = _fit_text(title, "dataset", 19)
    note, note_font = _fit_text(note, "", 13)
    columns = max(map(len, cells))
    captions = _CAPTION if any(cell.caption for row in cells for cell in row) else 0
    left = _MARGIN + round(max(font.getlength(text) for text, font in names)) + 14
    top = _MARGIN + 56 + (20 if heads else 0)
    tall = _CELL + captions + _GAP
    width = max(left + columns * (_CELL + _GAP) - _GAP, _MARGIN + round(note_font.getlength(note))) + _MARGIN
    height = top + len(cells) * tall - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, title_font, anchor="lt")
    draw.text((_MARGIN, _MARGIN + 28), note, _FAINT, note_font, anchor="lt")
    for column, head in enumerate(heads):
        text, font = _fit_text(head, "", 13, _CELL)
        draw.text((left + column * (_CELL + _GAP) + _CELL // 2, top - 8), text, _FAINT, font, anchor="ms")
    for line, ((text, font), row) in enumerate(zip(names, cells, strict=True)):
        y = top + line * tall
        draw.text((left - 14, y + _CELL // 2), text, _INK, font, anchor="rm")
        for column, cell in enumerate(row):
            x = left + column * (_CELL + _GAP)
            _draw_cell(sheet, x, y, cell.picture)
            if cell.caption:
                below, small = _fit_text(cell.caption, "", 11, _CELL)
                draw.text((x + _CELL // 2, y + _CELL + 3), below, _FAINT, small, anchor="mt")
    return sheet


def _as_it_is(image: dict[str, Any]) -> Image.Image | None:
    try:
        return Image.fromarray(decode(encoded(image)))
    except BadImage:
        return None


def _draw_cell(sheet: Image.Image, x: int, y: int, picture: Image.Image | None) -> None:
    draw = ImageDraw.Draw(sheet)
    box = (x, y, x + _CELL - 1, y + _CELL - 1)
    if picture is None:
        draw.rectangle(box, _EMPTY)
        draw.line((x + 32, y + 32, x + 63, y + 63), _FAINT, 2)
        draw.line((x + 63, y + 32, x + 32, y + 63), _FAINT, 2)
        return
    picture = _fit(picture)
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
