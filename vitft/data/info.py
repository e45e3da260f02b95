"""Describe a dataset: splits, classes, counts, image sizes and formats."""

from collections import Counter
from contextlib import suppress
from typing import Any

import datasets
import numpy as np

from vitft.data.decoder import MAX_PIXELS, BadImage, encoded, header
from vitft.data.sources.identity import rows_to_look_at, sample_id
from vitft.data.sources.source import Source, class_indices
from vitft.data.stores.store import naming

LOOK_AT = 2000  # images per split whose headers are read, at most


def describe(source: Source, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Describe every split, JSON-ready. Sizes are [width, height] in pixels, as stored.

    Sizes and formats come from the headers of `looked_at` evenly spaced images, of which `unreadable` have none.
    Largest and smallest are by number of pixels; the median is of each side separately. Raises UnreadableError for an
    image that cannot be read now, but may be intact.
    """
    return {
        "name": source.name,
        "revision": source.revision,
        "decisions": list(source.decisions),
        "warnings": list(source.warnings),
        "labels": list(source.labels),
        "splits": [_describe_split(name, split, source.labels, max_pixels) for name, split in source.splits.items()],
    }


def _describe_split(name: str, split: datasets.Dataset, labels: tuple[str, ...], max_pixels: int) -> dict[str, Any]:
    counts = np.bincount(class_indices(split), minlength=len(labels))
    rows = rows_to_look_at(split, LOOK_AT)
    headers = []
    for row in rows:
        with suppress(BadImage), naming(sample_id(split, row)):
            headers.append(header(encoded(split[row]["image"]), max_pixels))
    sizes: dict[str, Any] = {}
    if headers:
        sides = np.array([(width, height) for width, height, _ in headers], np.int64)
        area = sides.prod(axis=1)
        sizes = {"smallest": sides[area.argmin()], "largest": sides[area.argmax()], "median": np.median(sides, axis=0)}
    return {
        "name": name,
        "count": len(split),
        "classes": {label: int(count) for label, count in zip(labels, counts, strict=True)},
        "looked_at": len(rows),
        "unreadable": len(rows) - len(headers),
        "sizes": {name: size.astype(int).tolist() for name, size in sizes.items()} or None,
        "formats": dict(Counter(kind for *_, kind in headers).most_common()),
    }
