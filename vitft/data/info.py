"""What is in a data set: splits, classes, counts, sizes, formats."""

from collections import Counter
from typing import Any

import datasets
import numpy as np

from vitft.data.decoder import BadImage, encoded, header
from vitft.data.sources.source import Source, class_indices

LOOK_AT = 2000  # images of a split whose headers are read


def describe(source: Source) -> dict[str, Any]:
    """Describe every split, JSON-ready. Sizes are [width, height] in pixels, as stored.

    Sizes and formats come from the headers of `looked_at` evenly spaced images; `unreadable` of them
    had none. Largest and smallest go by the number of pixels, the median by each side alone.
    """
    splits = [_describe_split(name, split, source.labels) for name, split in source.splits.items()]
    return {
        "name": source.name,
        "revision": source.revision,
        "decisions": list(source.decisions),
        "warnings": list(source.warnings),
        "labels": list(source.labels),
        "splits": splits,
    }


def _describe_split(name: str, split: datasets.Dataset, labels: tuple[str, ...]) -> dict[str, Any]:
    counts = np.bincount(class_indices(split), minlength=len(labels))
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), LOOK_AT)).round().astype(np.int64))
    found = [size for row in rows if (size := _header(split[int(row)]["image"])) is not None]
    sizes = np.array([(width, height) for width, height, _ in found], np.int64).reshape(-1, 2)
    area = sizes.prod(axis=1)
    return {
        "name": name,
        "count": len(split),
        "classes": {label: int(count) for label, count in zip(labels, counts, strict=True)},
        "looked_at": len(rows),
        "unreadable": len(rows) - len(found),
        "sizes": {
            "smallest": sizes[area.argmin()].tolist(),
            "largest": sizes[area.argmax()].tolist(),
            "median": np.median(sizes, axis=0).astype(np.int64).tolist(),
        }
        if found
        else None,
        "formats": dict(Counter(kind for *_, kind in found).most_common()),
    }


def _header(image: dict[str, Any]) -> tuple[int, int, str] | None:
    try:
        return header(encoded(image))
    except BadImage:
        return None
