"""Several processes share the images: each takes every so many batches, and all see all predictions, in order."""

from collections.abc import Generator, Iterator
from itertools import chain, count, islice
from typing import Any

from vitft.hardware.processes import Processes
from vitft.prediction.inputs import Found
from vitft.prediction.predictor import BATCH, Prediction, Predictor


def batches(
    predictor: Predictor, images: Iterator[Found], processes: Processes, **how: Any
) -> Generator[list[Prediction], None, None]:  # fmt: skip
    """Predictions of all images, in order, a batch at a time; `how` is as for `Predictor.stream`."""
    rows = predictor.stream_found(chain.from_iterable(_own(images, processes)), **how)
    while any(parts := processes.gather([list(islice(rows, BATCH))])):
        yield from filter(None, parts)


def _own(images: Iterator[Found], processes: Processes) -> Iterator[list[Found]]:
    for number in count():
        batch = list(islice(images, BATCH))
        if not batch:
            return
        if number % processes.count == processes.rank:
            yield batch
