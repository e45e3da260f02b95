"""The images that a report shows, as small as its size allows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from vitft.data.decoder import BadImage
from vitft.data.thumbnail import data_url
from vitft.evaluation.label_noise import LabelNoise
from vitft.evaluation.split_predictions import Predictions
from vitft.hardware.pools import map_in_threads
from vitft.io.console import safe

BYTES = 3_500_000  # of all pictures
SURE, DOUBTFUL, UNSURE, EXAMPLES, OF_A_CELL = 48, 48, 24, 2, 12  # images of each kind
EXAMPLE_CLASSES = 40  # up to so many classes have examples
SIDE = 112  # pixels


@dataclass
class Gallery:
    """Images with what they are and what the model said, and which of them to show where, by position in `images`.

    `doubtful` are those whose label is probably wrong. `cells` are those of the confusion matrix, `i,j` for class i
    that was taken for j.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    sure: list[int] = field(default_factory=list)
    doubtful: list[int] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    examples: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    cells: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    unreadable: int = 0
    rows: list[int] = field(default_factory=list)  # of each image, its row in the dataset's split


def gallery(
    predictions: Predictions, noise: LabelNoise | None, places: Sequence[int | None], rows: Dataset,
    progress: Callable[[int, int], None],
) -> Gallery:  # fmt: skip
    """Collect the images: the surest mistakes first, the doubtful labels, the least certain, examples, other mistakes.

    `noise` says whose label is probably wrong. `places` has the row of each image in `rows`; None for one that is gone.
    """
    found, number_of, used = Gallery(), {}, 0
    doubts = [] if noise is None else noise.places()[:DOUBTFUL]
    wanted = [place for place in dict.fromkeys(_in_order(predictions, doubts)) if places[place] is not None]

    def picture(place: int) -> str | None:
        try:
            return data_url(rows[places[place]]["image"], SIDE)
        except BadImage:
            return None

    for done, (place, url) in enumerate(zip(wanted, map_in_threads(picture, wanted), strict=True), 1):
        progress(done, len(wanted))
        if url is None:
            found.unreadable += 1
            continue
        used += len(url)
        if used > BYTES:
            break
        number_of[place] = len(found.images)
        found.rows.append(places[place] or 0)
        truth, said = int(predictions.truth[place]), int(predictions.predicted[place])
        sure = round(float(predictions.confidence[place]), 4)
        found.images.append(
            {"src": url, "name": safe(predictions.name(place)), "truth": truth, "said": said, "sure": sure}
        )
    for place in predictions.mistakes().tolist():
        if place in number_of:
            cell = found.cells[f"{predictions.truth[place]},{predictions.predicted[place]}"]
            cell.append(number_of[place])
            if len(found.sure) < SURE:
                found.sure.append(number_of[place])
    for place in doubts:
        if noise is not None and place in number_of:
            found.doubtful.append(number_of[place])
            likely, wrong = int(noise.likely[place]), round(float(noise.wrong[place]), 4)
            found.images[number_of[place]] |= {"likely": likely, "wrong": wrong}
    found.unsure = [number_of[place] for place in _unsure(predictions) if place in number_of]
    for place in _examples(predictions):
        if place in number_of:
            found.examples[int(predictions.truth[place])].append(number_of[place])
    return found


def _in_order(predictions: Predictions, doubts: Sequence[int]) -> Iterable[int]:
    mistakes = predictions.mistakes().tolist()
    yield from mistakes[:SURE]
    yield from doubts
    yield from _unsure(predictions)
    yield from _examples(predictions)
    shown: dict[tuple[int, int], int] = defaultdict(int)
    for place in mistakes:
        cell = int(predictions.truth[place]), int(predictions.predicted[place])
        shown[cell] += 1
        if shown[cell] <= OF_A_CELL:
            yield place


def _unsure(predictions: Predictions) -> list[int]:
    """The images whose two most probable classes are the closest."""
    if predictions.probabilities.shape[1] < 2:
        return []
    best = np.partition(predictions.probabilities, -2, axis=1)
    gap = best[:, -1] - best[:, -2]
    places: list[int] = np.argsort(gap, kind="stable")[:UNSURE].tolist()
    return places


def _examples(predictions: Predictions) -> list[int]:
    """The surest right images of each class."""
    if len(predictions.labels) > EXAMPLE_CLASSES:
        return []
    right = np.flatnonzero(predictions.predicted == predictions.truth)
    right = right[np.argsort(-predictions.confidence[right], kind="stable")]
    counts: dict[int, int] = defaultdict(int)
    places = []
    for place in right.tolist():
        label = int(predictions.truth[place])
        counts[label] += 1
        if counts[label] <= EXAMPLES:
            places.append(place)
    return places
