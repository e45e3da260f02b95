"""The images that a report shows, as small as its size allows."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from vitft.data.color import Range
from vitft.data.decoder import MAX_PIXELS, BadImage
from vitft.data.sources.identity import sample_names
from vitft.data.splits import Split
from vitft.data.thumbnail import data_url
from vitft.evaluation.label_noise import LabelNoise
from vitft.evaluation.split_predictions import Predictions
from vitft.hardware.pools import map_ahead
from vitft.io.console import safe
from vitft.randomness import permutation

BYTES = 3_500_000  # of all pictures
SURE, DOUBTFUL, UNSURE, EXAMPLES, OF_A_CELL = 48, 48, 24, 2, 12  # images of each kind
EXAMPLE_CLASSES = 40  # up to so many classes have examples
CROSSED = 30  # up to so many classes, the confusion matrix is a table
SIDE = 112  # pixels
_AHEAD = 16  # images read before they are asked for


@dataclass
class Gallery:
    """Images with what they are and what the model said, and which of them to show where, by position in `images`.

    `doubtful` are those whose label may be wrong, and `training` examples of what the model was trained on.
    `cells` are those of the confusion matrix, `i,j` for class i that was taken for j. `max_pixels` and `value_range`
    say how images are decoded.
    """

    max_pixels: int = MAX_PIXELS
    value_range: Range | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    sure: list[int] = field(default_factory=list)
    doubtful: list[int] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    training: list[int] = field(default_factory=list)
    cells: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    unreadable: int = 0
    rows: list[int] = field(default_factory=list)  # of each image, its row in the dataset's split
    used: int = 0  # bytes
    no_looks: str = ""  # why no image has a map of where the model looked

    def add(self, rows: Dataset, wanted: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[int | None]:
        """Add the images of these rows as long as there is room; yield the number of each, None if it is unreadable."""

        def picture(row: int) -> str | None:
            try:
                return data_url(rows[row]["image"], SIDE, self.max_pixels, self.value_range)
            except BadImage:
                return None

        with closing(map_ahead(picture, wanted, _AHEAD)) as urls:
            for done, (row, url) in enumerate(zip(wanted, urls, strict=True), 1):
                progress(done, len(wanted))
                if url is None:
                    self.unreadable += 1
                    yield None
                    continue
                if self.used + len(url) > BYTES:
                    return
                self.used += len(url)
                self.rows.append(row)
                self.images.append({"src": url})
                yield len(self.images) - 1


def add_training(found: Gallery, rows: Dataset, split: Split, truth: NDArray[np.int64], classes: int) -> None:
    """Add some random training images of each class: `truth` has the classes of the split's images as in the report."""
    if classes > EXAMPLE_CLASSES:
        return
    order = permutation(0, "examples", 0, len(truth))
    order = order[truth[order] < classes]
    places = sorted(
        _first_of_each(truth[order].tolist(), order.tolist(), EXAMPLES), key=lambda place: int(truth[place])
    )
    names, wanted = sample_names(rows, split.rows[places]), split.rows[places].tolist()
    for place, name, number in zip(places, names, found.add(rows, wanted, lambda done, count: None), strict=False):
        if number is not None:
            found.images[number] |= {"name": safe(name), "truth": int(truth[place])}
            found.training.append(number)


def add_scored(
    found: Gallery, predictions: Predictions, noise: LabelNoise | None, places: Sequence[int | None], rows: Dataset,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Add scored images: the surest mistakes first, doubtful labels, the least certain, examples, other mistakes.

    `noise` says whose label may be wrong. `places` has the row of each image in `rows`; None for one that is gone.
    """
    number_of: dict[int, int] = {}
    doubts = [] if noise is None else noise.places()[:DOUBTFUL]
    row_of = {place: row for place, row in enumerate(places) if row is not None}
    wanted = [place for place in dict.fromkeys(_in_order(predictions, doubts)) if place in row_of]
    # It ends early where there is no more room.
    for place, number in zip(wanted, found.add(rows, [row_of[one] for one in wanted], progress), strict=False):
        if number is None:
            continue
        number_of[place] = number
        truth, said = int(predictions.truth[place]), int(predictions.predicted[place])
        sure = round(float(predictions.confidence[place]), 4)
        found.images[number] |= {"name": safe(predictions.name(place)), "truth": truth, "said": said, "sure": sure}
    for place in predictions.mistakes().tolist():
        if place in number_of:
            found.cells[f"{predictions.truth[place]},{predictions.predicted[place]}"].append(number_of[place])
            if len(found.sure) < SURE:
                found.sure.append(number_of[place])
    for place in _right(predictions, OF_A_CELL):
        if place in number_of:
            found.cells[f"{predictions.truth[place]},{predictions.truth[place]}"].append(number_of[place])
    for place in doubts:
        if noise is not None and place in number_of:
            found.doubtful.append(number_of[place])
            likely, wrong = int(noise.likely[place]), round(float(noise.wrong[place]), 4)
            found.images[number_of[place]] |= {"likely": likely, "wrong": wrong}
    found.unsure = [number_of[place] for place in _unsure(predictions) if place in number_of]
    found.examples = [number_of[place] for place in _examples(predictions) if place in number_of]


def _in_order(predictions: Predictions, doubts: Sequence[int]) -> Iterable[int]:
    mistakes = predictions.mistakes().tolist()
    yield from mistakes[:SURE]
    yield from doubts
    yield from _unsure(predictions)
    yield from _examples(predictions)
    cells = zip(predictions.truth[mistakes].tolist(), predictions.predicted[mistakes].tolist(), strict=True)
    yield from _first_of_each(cells, mistakes, OF_A_CELL)
    if len(predictions.labels) <= CROSSED:
        yield from _right(predictions, OF_A_CELL)


def _unsure(predictions: Predictions) -> list[int]:
    """The images whose two most probable classes are the closest."""
    if predictions.probabilities.shape[1] < 2:
        return []
    best = np.partition(predictions.probabilities, -2, axis=1)
    gap = best[:, -1] - best[:, -2]
    places: list[int] = np.argsort(gap, kind="stable")[:UNSURE].tolist()
    return places


def _examples(predictions: Predictions) -> list[int]:
    """The surest right images of each class, class by class."""
    if len(predictions.labels) > EXAMPLE_CLASSES:
        return []
    return sorted(_right(predictions, EXAMPLES), key=lambda place: int(predictions.truth[place]))


def _right(predictions: Predictions, most: int) -> list[int]:
    """The surest right images, at most so many of each class."""
    right = np.flatnonzero(predictions.predicted == predictions.truth)
    right = right[np.argsort(-predictions.confidence[right], kind="stable")]
    return list(_first_of_each(predictions.truth[right].tolist(), right.tolist(), most))


def _first_of_each(kinds: Iterable[Hashable], places: Iterable[int], most: int) -> Iterator[int]:
    """The first `most` places of each kind."""
    counts: Counter[Hashable] = Counter()
    for kind, place in zip(kinds, places, strict=True):
        counts[kind] += 1
        if counts[kind] <= most:
            yield place
