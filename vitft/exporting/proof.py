"""Whether an exported file predicts what the model does: both are run on the same images, and compared."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitft.checkpoints.exported import Run
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.evaluation.comparison import Difference, mcnemar, paired_difference
from vitft.evaluation.evaluation import BATCH, Progress, SplitImages
from vitft.exporting.resize import Resize
from vitft.hardware.device import threads
from vitft.models.load import Loaded

TIE = 1e-3
"""Where the two best classes are closer than this, rounding decides, and either is right. Also what float32 may do."""
NOISE = 32  # random images, where there are no others
BATCHED = 32  # images, of the speed in batches
_TURNS, _TURN_S, _PAUSE_S = 3, 0.7, 0.25  # of each speed's measurement


@dataclass(frozen=True)
class Speed:
    """Images per second of the model in torch, and of the exported file, after normalization and resizing."""

    torch: float
    file: float


@dataclass(frozen=True)
class Proof:
    """How an exported file compares with its model, on `images` images.

    `agreement` is the fraction of images with the same best class, and `untied` how many of the others had no tie (two
    best classes within 1e-3). `largest` is the largest difference of a probability, `by_network` that from the model
    on the pixels that the file's own resize gives, which are not always Pillow's. Of random noise (`split` is None),
    there is no accuracy.
    """

    split: str | None
    hash: str | None
    images: int
    agreement: float
    untied: int
    largest: float
    by_network: float
    accuracy: float | None  # of the file
    before: float | None  # of the model
    difference: Difference | None  # of the two, with its 95 % interval
    p: float | None  # of McNemar's exact test
    one: Speed
    batch: Speed


def prove(
    loaded: Loaded, run: Run, images: SplitImages | None, *, whole: bool, progress: Progress = lambda done, count: None
) -> Proof:  # fmt: skip
    """Compare a file with its model on images of a split, or on noise.

    `whole`: the file takes images as they are, one at a time, because it resizes them itself.
    """
    how = loaded.preprocess
    if images is None:
        draw = np.random.default_rng(0)
        noise = draw.integers(0, 256, (NOISE, how.height, how.width, 3), dtype=np.uint8)
        count = NOISE
    else:
        count = len(images.truth)

    def prepared(places: NDArray[np.int64]) -> torch.Tensor:
        return resize_and_crop(torch.from_numpy(noise[places]) if images is None else images.store.gather(places), how)

    def original(place: int) -> NDArray[np.uint8]:
        return noise[place] if images is None else images.original(place, how)

    model, resize = _in_torch(loaded), Resize(how)
    before, after, expected = [], [], []
    for places in np.array_split(np.arange(count), -(-count // BATCH)):
        ready = prepared(places)
        before.append(model(ready))
        expected.append(before[-1])
        if whole:
            originals = [original(place)[None] for place in places.tolist()]
            after += [run(one) for one in originals]
            pixels = torch.cat([resize(torch.from_numpy(one)) for one in originals]).to(torch.uint8)
            if not torch.equal(pixels, ready):  # tall images, from Pillow 13 on
                expected[-1] = model(pixels)
        else:
            after.append(run(ready.numpy()))
        progress(int(places[-1]) + 1, count)
    first = prepared(np.arange(min(count, BATCHED)))
    sample = first.repeat(-(-BATCHED // len(first)), 1, 1, 1)[:BATCHED].contiguous()
    one, batch = (_speeds(model, run, sample[:size]) for size in (1, BATCHED))
    joined = [np.concatenate(parts) for parts in (before, after, expected)]
    return compare(joined[0], joined[1], joined[2], images, one, batch)


def predicted(
    run: Run, images: SplitImages, how: Preprocess, *, whole: bool, progress: Progress = lambda done, count: None
) -> NDArray[np.float32]:  # fmt: skip
    """The file's probabilities for all images of a split, (n, K); `whole` as in `prove`."""
    count, found = len(images.truth), []
    for places in np.array_split(np.arange(count), -(-count // BATCH)):
        if whole:
            found += [run(images.original(place, how)[None]) for place in places.tolist()]
        else:
            found.append(run(resize_and_crop(images.store.gather(places), how).numpy()))
        progress(int(places[-1]) + 1, count)
    return np.concatenate(found)


def compare(
    before: NDArray[np.float32], after: NDArray[np.float32], expected: NDArray[np.float32], images: SplitImages | None,
    one: Speed, batch: Speed,
) -> Proof:  # fmt: skip
    """The comparison of two sets of probabilities (n, K) for the same images, of the model and of the file.

    `expected` are those of the model for the pixels that the file's resize gives.
    """
    best, predicted = before.argmax(axis=1), after.argmax(axis=1)
    top = np.sort(before, axis=1)[:, ::-1]
    tied = top[:, 0] - top[:, 1] <= TIE if before.shape[1] > 1 else np.ones(len(before), bool)
    differ = best != predicted
    largest, by_network = (float(np.abs(those.astype(np.float64) - after).max()) for those in (before, expected))
    found = Proof(
        None, None, len(before), float(1 - differ.mean()), int((differ & ~tied).sum()), largest, by_network,
        None, None, None, None, one, batch,
    )  # fmt: skip
    if images is None:
        return found
    right, was = predicted == images.truth, best == images.truth
    gained, lost = int((right & ~was).sum()), int((was & ~right).sum())
    return replace(
        found, split=images.split.name, hash=images.split.hash, accuracy=float(right.mean()), before=float(was.mean()),
        difference=paired_difference(gained, lost, len(right)), p=mcnemar(gained, lost),
    )  # fmt: skip


def _in_torch(loaded: Loaded) -> Callable[[torch.Tensor], NDArray[np.float32]]:
    """The model as it predicts in vitft: uint8 images (B, H, W, 3) to probabilities (B, K)."""

    def model(images: torch.Tensor) -> NDArray[np.float32]:
        with torch.no_grad(), threads():
            logits = loaded.model(pixel_values=normalize(images, loaded.preprocess)).logits
            found: NDArray[np.float32] = logits.float().softmax(dim=1).numpy()
        return found

    return model


def _speeds(model: Callable[[torch.Tensor], Any], run: Run, images: torch.Tensor) -> Speed:
    """Images/s of both, by the median of their times. They take turns, so that other work on the machine slows both.

    Between turns is a pause: for a while after its work, each library keeps its threads spinning.
    """
    arrays = images.numpy()
    tasks: Sequence[Callable[[], Any]] = (lambda: model(images), lambda: run(arrays))
    times: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for task, taken in zip(tasks, times, strict=True):
            time.sleep(_PAUSE_S)
            task()  # allocates, wakes threads
            until = time.perf_counter() + _TURN_S
            while True:
                started = time.perf_counter()
                task()
                taken.append((ended := time.perf_counter()) - started)
                if ended > until:
                    break
    return Speed(*(len(images) / float(np.median(taken)) for taken in times))
