"""A trace as one page that needs nothing else: where tokens look, and every stage, to be stepped through."""

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
from vitft.explain.attention import rollout, weights
from vitft.explain.stage import lesson
from vitft.explain.table import in_words
from vitft.explain.trace import Trace, numbers
from vitft.io.atomic import write_text
from vitft.scratch.tensors import Array

_ROWS, _COLUMNS = 128, 256  # of the picture of a stage's numbers, at most
_GAP = -128  # in the place of a number: between two heads
_CLASSES = 5  # that the page names


def write_page(found: Trace, file: Path) -> None:
    """Write the page. Raises UsageError for a path that cannot be written."""
    template = files("vitft.explain").joinpath("page.html").read_text(encoding="utf-8")
    # A "<" of a class name must not end the script that holds it.
    text = json.dumps(_document(found), allow_nan=False).replace("<", "\\u003c")
    try:
        write_text(file, template.replace(">DATA<", f">{text}<"))
    except OSError as error:
        raise UsageError(f"--html {file}: cannot be written: {error.strerror or error}; choose another.") from error


def _document(found: Trace) -> dict[str, Any]:
    spec = found.spec
    rows, columns = spec.grid
    picture = io.BytesIO()
    Image.fromarray(found.pixels).save(picture, "PNG")
    return {
        "image": "data:image/png;base64," + _text(picture.getvalue()),
        "image_name": found.path.name,
        "checkpoint": found.checkpoint,
        "told": " → ".join(in_words(spec)),
        "scores": found.scores[:_CLASSES],
        "rows": rows, "columns": columns, "prefix": spec.prefix_tokens, "layers": spec.layers, "heads": spec.heads,
        "attention": _text(gzip.compress(_packed(weights(found)), mtime=0)),
        "rollout": rollout(found).ravel().tolist(),
        "answer": "the class token" if spec.pooling == "cls" else "the mean of the patches",
        "stages": [
            numbers(found, name) | asdict(lesson(found, name)) | {"picture": _picture(name, found)}
            for name in found.by_numpy
        ],
    }  # fmt: skip


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _packed(shares: Array) -> bytes:
    """The largest share of every row, float32, then each share as so many of 255 steps of it."""
    largest: Array = shares.max(axis=-1, keepdims=True)  # above 0, for a row sums to 1
    steps = np.rint(255 * shares / largest).astype(np.uint8)
    return largest.astype("<f4").tobytes() + steps.tobytes()


def _picture(name: str, found: Trace) -> dict[str, Any]:
    """A stage's numbers as steps from −127 to 127; of a larger stage, each is the mean of those it stands for."""
    array = found.by_numpy[name][0].astype(np.float64)
    tokens = "A row is a token"
    if name == "head":
        parts, caption = [array[None]], f"A column is a class. The strongest is {found.scores[0][0]}."
    elif array.ndim == 1:
        parts, caption = [array[None]], "A column is one number."
    elif name == "image":
        parts, caption = list(array), "The picture in each of its colours."
    elif name == "embed.projection":
        parts, caption = [array.reshape(len(array), -1).T], "A row is a patch, a column one number of its token."
    elif name.endswith((".scores", ".softmax")):
        parts, caption = list(array), "A square is a head: a row asks, a column answers."
    elif name.endswith(".qkv"):
        parts = list(array.transpose(0, 2, 1, 3).reshape(3, found.spec.tokens, -1))
        caption = f"{tokens}; its queries, keys and values stand side by side."
    else:
        parts, caption = [array], f"{tokens}, a column one of its numbers."
    rows, columns = parts[0].shape
    small = [_shrunk(_shrunk(part, _ROWS).T, max(1, _COLUMNS // len(parts))).T for part in parts]
    if (each := (-(-rows // len(small[0])), -(-columns // small[0].shape[1]))) != (1, 1):
        caption += f" Of so many, each square here is the mean of up to {each[0]}×{each[1]}."
    largest = max(float(np.abs(part).max()) for part in small) or 1.0
    gap = np.full((len(small[0]), 1), _GAP)
    painted = [piece for part in small for piece in (gap, np.rint(127 * part / largest))][1:]
    steps = np.concatenate(painted, axis=1).astype(np.int8)
    height, width = steps.shape
    return {"height": height, "width": width, "largest": largest, "caption": caption, "steps": _text(steps.tobytes())}


def _shrunk(matrix: Array, most: int) -> Array:
    """At most so many rows, each the mean of the rows it stands for."""
    if len(matrix) <= most:
        return matrix
    starts = np.arange(most) * len(matrix) // most
    counts = np.diff(np.append(starts, len(matrix)))
    means: Array = np.add.reduceat(matrix, starts, axis=0) / counts[:, None]
    return means
