"""Where a ViT looks: what the class token takes from each patch, per layer and head, and through all layers."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitft.errors import UsageError
from vitft.explain.trace import Trace
from vitft.io.fonts import drawable
from vitft.scratch.tensors import Array
from vitft.spec import ViTSpec

_CELL, _GAP, _MARGIN = 112, 6, 18  # pixels
_PAPER, _INK, _FAINT = "#ffffff", "#1c1c1f", "#74747c"


def weights(found: Trace) -> Array:
    """What every token takes from every token: (layers, heads, N, N), rows sum to 1."""
    return np.stack([found.by_numpy[f"block.{layer}.attention.softmax"][0] for layer in _layers(found)])


def shares(found: Trace) -> Array:
    """What the class token takes from each patch: (layers, heads, rows, columns), each head's sum at most 1."""
    return _pooled(weights(found), found.spec)


def _pooled(taken: Array, spec: ViTSpec) -> Array:
    """Of what tokens take, (..., N, N), the patches' part of the token that the head reads (of a mean: their mean)."""
    own = taken[..., 0, :] if spec.pooling == "cls" else taken[..., spec.prefix_tokens :, :].mean(axis=-2)
    patches: Array = own[..., spec.prefix_tokens :]
    return patches.reshape(*taken.shape[:-2], *spec.grid)


def rollout(found: Trace) -> Array:
    """Attention through all layers: (rows, columns), sum 1 (Abnar & Zuidema 2020, section 3).

    A block passes on half of a token as it is and half as the mean head mixed it; the product of these
    over all blocks says how much of each patch reaches the class token.
    """
    tokens = found.spec.tokens
    passed = np.eye(tokens)
    for heads in weights(found).astype(np.float64):
        mixed = heads.mean(axis=0)
        passed = (0.5 * mixed + 0.5 * np.eye(tokens)) @ passed
    patches = _pooled(passed, found.spec)
    patches /= patches.sum()
    return patches


def _layers(found: Trace) -> range:
    return range(1, found.spec.layers + 1)


def draw(found: Trace, folder: Path) -> list[Path]:
    """Write `layer-L-head-H.png` for all, `rollout.png`, and all of them on `attention.png`.

    Each is the image, lit where the attention is; the brightest patch of each picture is its largest share.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--attention {folder}: cannot be made: {error.strerror or error}; choose another.") from error
    heat = shares(found)
    written = []
    for layer, of_layer in enumerate(heat, 1):
        for head, of_head in enumerate(of_layer, 1):
            written.append(folder / f"layer-{layer:02d}-head-{head:02d}.png")
            overlay(found, of_head, 224).save(written[-1])
    written.append(folder / "rollout.png")
    overlay(found, rollout(found), 448).save(written[-1])
    written.append(folder / "attention.png")
    contact_sheet(found, heat).save(written[-1])
    return written


def overlay(found: Trace, heat: Array, side: int) -> Image.Image:
    """The image (side pixels wide), darkened where no attention falls, tinted where it does."""
    height = round(side * found.spec.image_height / found.spec.image_width)
    picture = Image.fromarray(found.pixels).resize((side, height), Image.Resampling.BICUBIC)
    scaled = Image.fromarray((255 * heat / max(heat.max(), 1e-12)).astype(np.uint8))
    mask = np.asarray(scaled.resize((side, height), Image.Resampling.NEAREST), np.float32)[..., None] / 255
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    lit = 0.35 * grey * (1 - mask) + mask * (0.55 * np.asarray(picture, np.float32) + 0.45 * np.array([255, 176, 32]))
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def contact_sheet(found: Trace, heat: Array) -> Image.Image:
    """A row for each layer, a column for each head; the image and the rollout above them."""
    layers, heads = heat.shape[:2]
    left, top = _MARGIN + 62, _MARGIN + 2 * _CELL + 66
    width = max(left + heads * (_CELL + _GAP) + _MARGIN, left + 5 * _CELL)
    sheet = Image.new("RGB", (width, top + layers * (_CELL + _GAP) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    label, score = found.scores[0]
    big = 2 * _CELL
    plain = Image.fromarray(found.pixels).resize((big, big), Image.Resampling.BICUBIC)
    sheet.paste(plain, (left, _MARGIN))
    sheet.paste(overlay(found, rollout(found), big).resize((big, big)), (left + big + _GAP, _MARGIN))
    said = f"{label}, {100 * score:.1f} %"
    pen.text((left, _MARGIN + big + 6), *_written(said, f"{100 * score:.1f} %", 14), anchor="lt")
    pen.text((left + big + _GAP, _MARGIN + big + 6), *_written("attention rollout, all layers", "", 14), anchor="lt")
    for head in range(heads):
        x = left + head * (_CELL + _GAP) + _CELL // 2
        pen.text((x, top - 18), *_written(f"head {head + 1}", "", 12, _FAINT), anchor="mt")
    for layer in range(layers):
        y = top + layer * (_CELL + _GAP)
        pen.text((left - 10, y + _CELL // 2), *_written(f"layer {layer + 1}", "", 12, _FAINT), anchor="rm")
        for head in range(heads):
            sheet.paste(
                overlay(found, heat[layer, head], _CELL).resize((_CELL, _CELL)), (left + head * (_CELL + _GAP), y)
            )
    return sheet


def _written(text: str, otherwise: str, size: int, ink: str = _INK) -> tuple[str, str, ImageFont.FreeTypeFont]:
    text, file = drawable(text, otherwise)
    return text, ink, ImageFont.truetype(file, size)
