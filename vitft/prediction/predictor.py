"""Classify images: a checkpoint that is loaded once, and a stream of predictions while images are decoded ahead."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitft.attribution.maps import Map, Method, class_maps
from vitft.checkpoints.exported import document_of
from vitft.data.augment import normalize
from vitft.data.decoder import MAX_PIXELS, BadImage
from vitft.errors import ModelError, UsageError
from vitft.evaluation.loading import load_model
from vitft.evaluation.novelty import read_novelty
from vitft.evaluation.split_predictions import most_probable
from vitft.hardware.device import find_device, threads
from vitft.hardware.pools import map_ahead
from vitft.models.features import heads_input
from vitft.models.load import Scoring
from vitft.prediction.confidence import temperature_of, threshold_of
from vitft.prediction.inputs import Found, Given, find_images, read_image

BATCH = 64
_AHEAD = 2 * BATCH  # images that are decoded, or being decoded, during a forward pass


@dataclass(frozen=True)
class Prediction:
    """An image's classes, best first, with their probabilities; or the `error` why it could not be read.

    Probabilities sum to 1, unless the checkpoint scores each label separately. `unsure`: the best class is below the
    confidence that was asked for. `novelty`, if asked for, is the fraction of validation images that are less strange
    to the model; `none_of_these`: it is above what was asked for, so the image is probably of no class that the model
    has. `probabilities`, if asked for, has those of all classes, in the order of the labels.
    """

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    unsure: bool = False
    novelty: float | None = None
    none_of_these: bool = False
    probabilities: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        top = [{"label": label, "score": score} for label, score in self.top]
        said: dict[str, Any] = {"unsure": True} if self.unsure else {}
        said |= {} if self.novelty is None else {"novelty": self.novelty}
        return {"path": self.path, "top": top} | said | ({"none_of_these": True} if self.none_of_these else {})


@dataclass(frozen=True)
class Scores:
    """Of several images, the probabilities of all classes, (N, C), and if asked for the novelty, (N,)."""

    probabilities: NDArray[np.float32]
    novelty: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.probabilities)


def predict(
    paths: Sequence[str | Path] | str | Path, checkpoint: str | Path, *, top_k: int = 3, device: str = "auto",
    max_pixels: int = MAX_PIXELS, value_range: str | None = None, calibrated: bool = False,
    min_confidence: float | None = None, min_precision: float | None = None, none_of_these: float | None = None,
) -> list[Prediction]:  # fmt: skip
    """Classify image files, in the order given; an unreadable image gets a row with its error.

    Args:
        paths: files, folders (with every image below them) and globs.
        checkpoint: a run (its best checkpoint is taken), one of its checkpoints, or a Transformers folder or hub id.
        top_k: classes per image.
        device: auto, cpu, cuda or mps.
        max_pixels: images with more pixels get an error.
        value_range: black and white of images with more than 8 bits, as `0:4095`; by default the checkpoint's.
        calibrated: divide logits by the temperature that the run fitted on its validation images.
        min_confidence: below this probability of the best class, a prediction is `unsure`.
        min_precision: the same, with the confidence from which on this fraction of validation images is right.
        none_of_these: above this novelty, such as 0.99, an image is `none_of_these`.

    Raises:
        VitftError: the checkpoint cannot be used, its scores are not finite, or there is no image at all.
    """
    predictor = Predictor(
        checkpoint, device=device, max_pixels=max_pixels, value_range=value_range, calibrated=calibrated,
        min_confidence=min_confidence, min_precision=min_precision, none_of_these=none_of_these,
    )  # fmt: skip
    return predictor(paths, top_k=top_k)


class Predictor:
    """A checkpoint that is loaded once, to classify images.

    >>> predictor = Predictor("runs/digits-vit-micro-1")
    >>> predictor("docs/digits", top_k=1)[0].top

    `labels` are its classes, in the order of the logits; `preprocess` is how an image becomes the model's input.
    `threshold` is the confidence below which a prediction is unsure, and `none_of_these` the novelty above which an
    image is of none of the classes, if they were asked for. `document` is what an exported file says of itself. Several
    threads may use one predictor, but not for `maps` and novelty, which look into the model while it computes.
    """

    def __init__(
        self, checkpoint: str | Path, *, device: str = "auto", max_pixels: int = MAX_PIXELS,
        value_range: str | None = None, calibrated: bool = False, min_confidence: float | None = None,
        min_precision: float | None = None, none_of_these: float | None = None,
    ) -> None:  # fmt: skip
        """Load a checkpoint; the arguments are those of `predict`. Raises VitftError."""
        if min_confidence is not None and min_precision is not None:
            raise UsageError("min_confidence and min_precision both set the confidence to decide at; remove one.")
        self.checkpoint, self.max_pixels = checkpoint, max_pixels
        loaded = load_model(checkpoint)
        self.document = document_of(loaded.model)
        self.labels, self.preprocess = loaded.labels, loaded.preprocess.with_value_range(value_range)
        self._scoring: Scoring = loaded.scoring
        self._temperature = temperature_of(checkpoint, self.document) if calibrated else 1.0
        self.threshold = min_confidence
        if min_precision is not None:
            self.threshold = threshold_of(checkpoint, self.document, min_precision, calibrated=calibrated)
        self.none_of_these = none_of_these
        self._novelty = None if none_of_these is None else read_novelty(checkpoint)
        self._device = find_device(device)
        self._model = loaded.model.to(self._device)

    def __call__(self, images: Given | Sequence[Given], *, top_k: int = 3) -> list[Prediction]:
        """Classify one image or several, in the order given, with `top_k` classes each, best first.

        An image is a path (also a folder or a glob), the bytes of an image file, a PIL image, a uint8 array (H, W) or
        (H, W, 3), or a tensor (C, H, W) as in torchvision, uint8 or float from 0 to 1. Arrays (B, H, W, 3) and tensors
        (B, C, H, W) are batches. An unreadable image gets a row with its error. Raises DataError if there is no image
        at all, and ModelError if scores are not finite.
        """
        single = isinstance(images, str | Path | bytes | Image.Image | np.ndarray | torch.Tensor)
        return list(self.stream([images] if single else images, top_k=top_k))  # type: ignore[list-item,arg-type]

    def stream(
        self, images: Iterable[Given], *, top_k: int = 3, probabilities: bool = False
    ) -> Iterator[Prediction]:  # fmt: skip
        """Classify any number of images, also of an endless iterable; predictions come in order, a batch at a time.

        Images are decoded ahead of the forward pass, a few batches of them, so memory does not grow with their number.
        With `probabilities`, each prediction has those of all classes. Raises what calling the predictor raises.
        """
        return self.stream_found(find_images(images), top_k=top_k, probabilities=probabilities)

    def stream_found(
        self, images: Iterable[Found], *, top_k: int = 3, probabilities: bool = False
    ) -> Iterator[Prediction]:  # fmt: skip
        """`stream` for what `find_images` found."""
        decoded = map_ahead(self._read, images, _AHEAD)
        done = 0
        while part := list(islice(decoded, BATCH)):
            yield from self._predict(part, done, top_k, probabilities)
            done += len(part)

    def read(self, image: str | Path | bytes | Image.Image) -> torch.Tensor:
        """Decode and resize an image: uint8 (height, width, 3), as `score` takes them. Raises DataError."""
        result = read_image(str(image) if isinstance(image, Path) else image, self.preprocess, self.max_pixels)
        if isinstance(result, str):
            raise BadImage(result)
        return result[0]

    def score(self, pixels: torch.Tensor) -> Scores:
        """The probabilities of images that `read` gave, stacked: uint8 (N, height, width, 3); and their novelty.

        One forward pass. Raises ModelError if scores are not finite.
        """
        inputs = normalize(pixels.to(self._device), self.preprocess)
        with ExitStack() as held:
            read = [] if self._novelty is None else held.enter_context(heads_input(self._model))
            held.enter_context(torch.no_grad())
            held.enter_context(threads())
            logits: torch.Tensor = self._model(pixel_values=inputs).logits.float()
        probabilities = _probabilities(logits / self._temperature, self._scoring)
        if not probabilities.isfinite().all():
            raise ModelError(
                f"{self.checkpoint}: its scores are not finite, so its weights are corrupt; use another checkpoint."
            )
        novelty = None
        if self._novelty is not None:
            strangeness = self._novelty.strangeness(read[0].float().cpu().numpy(), logits.cpu().numpy())
            novelty = self._novelty.rank(strangeness)
        return Scores(probabilities.cpu().numpy(), novelty)

    def prediction(self, path: str, scores: Scores, place: int, top_k: int) -> Prediction:
        """What is said of one of several scored images."""
        probabilities = scores.probabilities[place]
        best = most_probable(torch.from_numpy(probabilities), min(top_k, len(self.labels))).tolist()
        top = tuple((self.labels[label], float(probabilities[label])) for label in best)
        unsure = self.threshold is not None and top[0][1] < self.threshold
        novelty = None if scores.novelty is None else float(scores.novelty[place])
        none = novelty is not None and self.none_of_these is not None and novelty > self.none_of_these
        return Prediction(path, top, unsure=unsure, novelty=novelty, none_of_these=none, probabilities=probabilities)

    def maps(self, pixels: torch.Tensor, classes: Sequence[int], by: Method | None = None) -> list[Map]:
        """What speaks for a class in each image, by place: (rows, columns), high where much does.

        Args:
            pixels: images that `read` gave, stacked: uint8 (N, height, width, 3).
            classes: of each image, the class, as a place in `labels`.
            by: attention (Chefer et al. 2021) or occlusion (Zeiler & Fergus 2014); by default attention if it can be.

        Raises:
            ModelError: by attention, but the model does not have it between all patches.
            UsageError: by attention, but the model is an exported file.
        """
        if by == "attention" and self.document is not None:
            raise UsageError("attention: an exported file does not give it; use occlusion, or the run it is from.")
        inputs = normalize(pixels.to(self._device), self.preprocess)
        with threads():
            maps, _ = class_maps(self._model, inputs, torch.tensor(classes), by)
        return maps

    def _read(self, found: Found) -> tuple[str | None, torch.Tensor | str]:
        """An image's name, if it is a file, and its pixels or why it cannot be read."""
        return found if isinstance(found, str) else None, read_image(found, self.preprocess, self.max_pixels)

    def _predict(
        self, part: list[tuple[str | None, torch.Tensor | str]], first: int, top_k: int, keep: bool
    ) -> Iterator[Prediction]:  # fmt: skip
        """Predictions of a batch, whose images are numbered from `first` on."""
        pixels = [result for _, result in part if isinstance(result, torch.Tensor)]
        scores = self.score(torch.cat(pixels)) if pixels else Scores(np.empty((0, len(self.labels)), np.float32))
        places = count()
        for number, (name, result) in enumerate(part, first):
            path = f"image {number}" if name is None else name
            if isinstance(result, str):
                yield Prediction(path, error=result)
                continue
            found = self.prediction(path, scores, next(places), top_k)
            yield found if keep else replace(found, probabilities=None)


def _probabilities(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    return logits.softmax(dim=1) if scoring == "softmax" else logits.sigmoid() if scoring == "sigmoid" else logits
