"""Attention maps: attention weights of each layer and head as pictures, and attention rollout over all layers."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitft.attribution import marked
from vitft.attribution.maps import overlay
from vitft.errors import UsageError
from vitft.explain.trace import Trace
from vitft.io.fonts import drawable
from vitft.scratch.tensors import Array
from vitft.spec import ViTSpec

_COMMAND = "vitft explain --attention"
_CELL, _GAP, _MARGIN = 112, 6, 18  # pixels
_BACKGROUND, _TEXT, _FAINT_TEXT = "#ffffff", "#1c1c1f", "#74747c"


def attention_weights(trace: Trace) -> Array:
    """Attention weights of all layers: (layers, heads, N, N); rows sum to 1."""
    layers = range(1, trace.spec.layers + 1)
    return np.stack([trace.by_numpy[f"block.{layer}.attention.softmax"][0] for layer in layers])


def patch_attention(trace: Trace) -> Array:
    """Attention weights on each patch of the token that the head reads: (layers, heads, rows, columns).

    With mean pooling, the mean over all patch tokens.
    """
    return _on_patches(attention_weights(trace), trace.spec)


def _on_patches(weights: Array, spec: ViTSpec) -> Array:
    """From weights (..., N, N), those of the pooled token on the patches: (..., rows, columns)."""
    pooled = weights[..., 0, :] if spec.pooling == "cls" else weights[..., spec.prefix_tokens :, :].mean(axis=-2)
    patches: Array = pooled[..., spec.prefix_tokens :]
    return patches.reshape(*weights.shape[:-2], *spec.grid)


def rollout(trace: Trace) -> Array:
    """Attention rollout through all layers: (rows, columns), sum 1 (Abnar & Zuidema 2020, section 3).

    Each block is taken as the mean of the identity, for the residual connection, and of its heads' mean attention. The
    product over all blocks estimates how much each patch contributes to the pooled token.
    """
    identity = np.eye(trace.spec.tokens)
    result = identity
    for heads in attention_weights(trace).astype(np.float64):
        result = (0.5 * heads.mean(axis=0) + 0.5 * identity) @ result
    patches = _on_patches(result, trace.spec)
    patches /= patches.sum()
    return patches


def draw_attention(trace: Trace, folder: Path) -> list[Path]:
    """Write `layer-L-head-H.png` for every head, `rollout.png`, `class-N.png`, and an overview, `attention.png`, last.

    Each picture shows the image, bright where the attention weights are high, scaled to the picture's largest weight.
    `class-N.png` is bright where the image speaks for the Nth most probable class (see `Trace.relevance`).
    Pictures that an earlier call wrote there are removed. Raises UsageError if the folder cannot be created or written
    to, and if it has another file with one of these names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--attention {folder}: cannot be created: {error.strerror or error}; choose another."
        raise UsageError(message) from error
    maps = patch_attention(trace)
    pictures = {
        f"layer-{layer:02d}-head-{head:02d}.png": overlay(trace.pixels, head_map, 224)
        for layer, layer_maps in enumerate(maps, 1)
        for head, head_map in enumerate(layer_maps, 1)
    }
    pictures |= {
        f"class-{place}.png": overlay(trace.pixels, found, 448) for place, found in enumerate(trace.relevance, 1)
    }
    pictures |= {"rollout.png": overlay(trace.pixels, rollout(trace), 448), "attention.png": contact_sheet(trace, maps)}
    for old in folder.glob("*.png"):  # of a model with more layers, heads or classes
        if old.name not in pictures and marked.is_by(old, _COMMAND):
            old.unlink()
    for name, picture in pictures.items():
        marked.save(picture, folder / name, _COMMAND)
    return [folder / name for name in pictures]


def contact_sheet(trace: Trace, maps: Array) -> Image.Image:
    """One row per layer and one column per head of maps (layers, heads, rows, columns), below image and rollout."""
    layers, heads = maps.shape[:2]
    left, top, large = _MARGIN + 62, _MARGIN + 2 * _CELL + 66, 2 * _CELL
    width = max(left + heads * (_CELL + _GAP) + _MARGIN, left + 3 * (large + _GAP) + _MARGIN)
    sheet = Image.new("RGB", (width, top + layers * (_CELL + _GAP) + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)

    def write(
        x: int, y: int, text: str, anchor: str, size: int = 12, color: str = _FAINT_TEXT, fallback: str = ""
    ) -> None:
        text, font = drawable(text, fallback)
        pen.text((x, y), text, color, ImageFont.truetype(font, size), anchor=anchor)

    label, score = trace.scores[0]
    percent = f"{100 * score:.1f} %"
    sheet.paste(Image.fromarray(trace.pixels).resize((large, large), Image.Resampling.BICUBIC), (left, _MARGIN))
    sheet.paste(overlay(trace.pixels, rollout(trace), large).resize((large, large)), (left + large + _GAP, _MARGIN))
    write(left, _MARGIN + large + 6, f"{label}, {percent}", "lt", 14, _TEXT, fallback=percent)
    write(left + large + _GAP, _MARGIN + large + 6, "attention rollout, all layers", "lt", 14, _TEXT)
    third = left + 2 * (large + _GAP)
    sheet.paste(overlay(trace.pixels, trace.relevance[0], large).resize((large, large)), (third, _MARGIN))
    write(third, _MARGIN + large + 6, f"what speaks for {label}", "lt", 14, _TEXT, fallback="what speaks for it")
    for head in range(heads):
        write(left + head * (_CELL + _GAP) + _CELL // 2, top - 18, f"head {head + 1}", "mt")
    for layer in range(layers):
        y = top + layer * (_CELL + _GAP)
        write(left - 10, y + _CELL // 2, f"layer {layer + 1}", "rm")
        for head in range(heads):
            picture = overlay(trace.pixels, maps[layer, head], _CELL).resize((_CELL, _CELL))
            sheet.paste(picture, (left + head * (_CELL + _GAP), y))
    return sheet
