"""A trace as one self-contained HTML page: attention of every token, and every stage step by step."""

import gzip
import io
import json
from base64 import b64encode
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitft.errors import UsageError
from vitft.explain.attention import attention_weights, rollout
from vitft.explain.lens import lens
from vitft.explain.stage import lesson
from vitft.explain.table import summary
from vitft.explain.trace import CLASSES, Trace, statistics
from vitft.io.atomic import write_text
from vitft.io.pages import shared_style
from vitft.scratch.tensors import Array

_ROWS, _COLUMNS = 128, 256  # largest size of the picture of a stage
_SEPARATOR = -128  # marks the column between two heads
_SAID = 3  # classes after each block


def write_page(trace: Trace, file: Path) -> None:
    """Write the page. Raises UsageError if the file cannot be written."""
    template = files("vitft.explain").joinpath("page.html").read_text(encoding="utf-8")
    # A "<" in a class name must not end the script element that holds the data.
    text = json.dumps(_document(trace), allow_nan=False).replace("<", "\\u003c")
    page = template.replace("/* pages.css */", shared_style()).replace(">DATA<", f">{text}<")
    try:
        write_text(file, page)
    except OSError as error:
        raise UsageError(f"--html {file}: cannot be written: {error.strerror or error}; choose another.") from error


def _document(trace: Trace) -> dict[str, Any]:
    spec = trace.spec
    rows, columns = spec.grid
    image = io.BytesIO()
    Image.fromarray(trace.pixels).save(image, "PNG")
    return {
        "image": "data:image/png;base64," + _base64(image.getvalue()),
        "image_name": trace.path.name,
        "checkpoint": trace.checkpoint,
        "summary": " → ".join(summary(spec)),
        "scores": trace.scores[:CLASSES],
        "rows": rows, "columns": columns, "prefix": spec.prefix_tokens, "layers": spec.layers, "heads": spec.heads,
        "attention": _base64(gzip.compress(_quantized(attention_weights(trace)), mtime=0)),
        "rollout": rollout(trace).ravel().tolist(),
        "relevance": [found.ravel().tolist() for found in trace.relevance],
        "lens": _lens(trace),
        "pooled": "the class token" if spec.pooling == "cls" else "the mean of the patch tokens",
        "stages": [
            statistics(trace, name) | asdict(lesson(trace, name)) | {"picture": _picture(name, trace)}
            for name in trace.by_numpy
        ],
    }  # fmt: skip


def _lens(trace: Trace) -> dict[str, Any]:
    """What the head would say by depth: the first classes of what it reads, and the best one of each token."""
    found = lens(trace)
    first = np.argsort(-found.pooled, axis=1)[:, :_SAID]
    used = {label: place for place, label in enumerate(np.unique(found.best).tolist())}
    return {
        "pooled": [
            [(trace.labels[label], float(row[label])) for label in best.tolist()]
            for row, best in zip(found.pooled, first, strict=True)
        ],
        "labels": [trace.labels[label] for label in used],
        "best": [[used[label] for label in row] for row in found.best.tolist()],
        "sure": found.sure.round(3).tolist(),
    }


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _quantized(weights: Array) -> bytes:
    """Attention weights in 8 bits: the maximum of every row in float32, then each weight as n / 255 of that, uint8."""
    largest: Array = weights.max(axis=-1, keepdims=True)  # above 0, because rows sum to 1
    steps = np.rint(255 * weights / largest).astype(np.uint8)
    return largest.astype("<f4").tobytes() + steps.tobytes()


def _picture(name: str, trace: Trace) -> dict[str, Any]:
    """The numbers of a stage as a picture in steps from −127 to 127; a large stage is averaged down."""
    array = trace.by_numpy[name][0].astype(np.float64)
    if name == "head":
        panels, caption = [array[None]], f"Each column is a class. The strongest is {trace.scores[0][0]}."
    elif array.ndim == 1:
        panels, caption = [array[None]], "Each column is one number."
    elif name == "image":
        panels, caption = list(array), "The color channels of the image."
    elif name == "embed.projection":
        panels, caption = [array.reshape(len(array), -1).T], "Each row is a patch, each column a number of its token."
    elif name.endswith((".scores", ".softmax")):
        panels, caption = list(array), "Each square is a head: rows are queries, columns are keys."
    elif name.endswith(".qkv"):
        panels = list(array.transpose(0, 2, 1, 3).reshape(3, trace.spec.tokens, -1))
        caption = "Each row is a token, with its queries, keys and values side by side."
    else:
        panels, caption = [array], "Each row is a token, each column one of its numbers."
    rows, columns = panels[0].shape
    small = [_averaged(_averaged(panel, _ROWS).T, max(1, _COLUMNS // len(panels))).T for panel in panels]
    if (cell := (-(-rows // len(small[0])), -(-columns // small[0].shape[1]))) != (1, 1):
        caption += f" To fit, each cell is the mean of up to {cell[0]}×{cell[1]} numbers."
    largest = max(float(np.abs(panel).max()) for panel in small) or 1.0
    separator = np.full((len(small[0]), 1), _SEPARATOR)
    parts = [part for panel in small for part in (separator, np.rint(127 * panel / largest))][1:]
    steps = np.concatenate(parts, axis=1).astype(np.int8)
    height, width = steps.shape
    return {"height": height, "width": width, "largest": largest, "caption": caption, "steps": _base64(steps.tobytes())}


def _averaged(matrix: Array, max_rows: int) -> Array:
    """The matrix with at most `max_rows` rows, each the mean of neighboring rows."""
    if len(matrix) <= max_rows:
        return matrix
    starts = np.arange(max_rows) * len(matrix) // max_rows
    counts = np.diff(np.append(starts, len(matrix)))
    means: Array = np.add.reduceat(matrix, starts, axis=0) / counts[:, None]
    return means
