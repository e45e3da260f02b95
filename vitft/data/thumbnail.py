"""An image of a dataset as a small picture inside a page."""

import io
from base64 import b64encode
from typing import Any

from PIL import Image

from vitft.data.color import Range
from vitft.data.decoder import MAX_PIXELS, decode, encoded


def data_url(image: Any, side: int, max_pixels: int = MAX_PIXELS, value_range: Range | None = None) -> str:
    """The address of a JPEG of an image column's cell, at most `side` pixels wide and high. Raises BadImage.

    `max_pixels` and `value_range` are those of `decode`.
    """
    small = Image.fromarray(decode(encoded(image), max_pixels, value_range=value_range))
    small.thumbnail((side, side))
    return jpeg_url(small)


def jpeg_url(picture: Image.Image) -> str:
    """The address of a picture inside a page, as a JPEG."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"
