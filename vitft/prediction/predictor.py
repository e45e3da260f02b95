"""Classify images: a checkpoint that is loaded once, and a stream of predictions while images are decoded ahead."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitft.attribution.maps import Map, Method, class_maps
from vitft.data.augment import normalize
from vitft.data.decoder import MAX_PIXELS, BadImage
from vitft.errors import ModelError, UsageError
from vitft.evaluation.loading import load_model
from vitft.hardware.device import find_device, threads
from vitft.hardware.pools import map_ahead
from vitft.models.load import Scoring
from vitft.prediction.confidence import temperature_of, threshold_of
from vitft.prediction.inputs import Found, Given, find_images, read_image

BATCH = 64
_AHEAD = 2 * BATCH  # images that are decoded, or being decoded, during a forward pass


@dataclass(frozen=True)
class Prediction:
    """An image's classes, best first, with their probabilities; or the `error` why it could not be read.

    Probabilities sum to 1, unless the checkpoint scores each label separately. `unsure`: the best class is below the
    confidence that was asked for. `probabilities`, if asked for, has those of all classes, in the order of the labels.
    """

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    unsure: bool = False
    probabilities: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        top = [{"label": label, "score": score} for label, score in self.top]
        return {"path": self.path, "top": top} | ({"unsure": True} if self.unsure else {})


def predict(
    paths: Sequence[str | Path] | str | Path, checkpoint: str | Path, *, top_k: int = 3, device: str = "auto",
    max_pixels: int = MAX_PIXELS, value_range: str | None = None, calibrated: bool = False,
    min_confidence: float | None = None, min_precision: float | None = None,
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

    Raises:
        VitftError: the checkpoint cannot be used, its scores are not finite, or there is no image at all.
    """
    predictor = Predictor(
        checkpoint, device=device, max_pixels=max_pixels, value_range=value_range, calibrated=calibrated,
        min_confidence=min_confidence, min_precision=min_precision,
    )  # fmt: skip
    return predictor(paths, top_k=top_k)


class Predictor:
    """A checkpoint that is loaded once, to classify images.

    >>> predictor = Predictor("runs/digits-vit-micro-1")
    >>> predictor("docs/digits", top_k=1)[0].top

    `labels` are its classes, in the order of the logits; `preprocess` is how an image becomes the model's input.
    `threshold` is the confidence below which a prediction is unsure, if one was asked for. Several threads may use one
    predictor, but for `maps`, which changes how the model computes attention meanwhile.
    """

    def __init__(
        self, checkpoint: str | Path, *, device: str = "auto", max_pixels: int = MAX_PIXELS,
        value_range: str | None = None, calibrated: bool = False, min_confidence: float | None = None,
        min_precision: float | None = None,
    ) -> None:  # fmt: skip
        """Load a checkpoint; the arguments are those of `predict`. Raises VitftError."""
        if min_confidence is not None and min_precision is not None:
            raise UsageError("min_confidence and min_precision both set the confidence to decide at; remove one.")
        self.checkpoint, self.max_pixels = checkpoint, max_pixels
        loaded = load_model(checkpoint)
        self.labels, self.preprocess = loaded.labels, loaded.preprocess.with_value_range(value_range)
        self._scoring: Scoring = loaded.scoring
        self._temperature = temperature_of(checkpoint) if calibrated else 1.0
        self.threshold = min_confidence
        if min_precision is not None:
            self.threshold = threshold_of(checkpoint, min_precision, self._temperature)
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
        """Decode and resize an image: uint8 (height, width, 3), as `probabilities` takes them. Raises DataError."""
        result = read_image(str(image) if isinstance(image, Path) else image, self.preprocess, self.max_pixels)
        if isinstance(result, str):
            raise BadImage(result)
        return result[0]

    def probabilities(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """The probabilities (N, classes) of images that `read` gave, stacked: uint8 (N, height, width, 3).

        One forward pass. Raises ModelError if they are not finite.
        """
        inputs = normalize(pixels.to(self._device), self.preprocess)
        scores = _scores(self._model, inputs, self._scoring, self._temperature)
        if not scores.isfinite().all():
            raise ModelError(
                f"{self.checkpoint}: its scores are not finite, so its weights are corrupt; use another checkpoint."
            )
        found: NDArray[np.float32] = scores.cpu().numpy()
        return found

    def maps(self, pixels: torch.Tensor, classes: Sequence[int], by: Method | None = None) -> list[Map]:
        """What speaks for a class in each image, by place: (rows, columns), high where much does.

        Args:
            pixels: images that `read` gave, stacked: uint8 (N, height, width, 3).
            classes: of each image, the class, as a place in `labels`.
            by: attention (Chefer et al. 2021) or occlusion (Zeiler & Fergus 2014); by default attention if it can be.

        Raises:
            ModelError: by attention, but the model does not have it between all patches.
        """
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
        every = self.probabilities(torch.cat(pixels)) if pixels else np.empty((0, len(self.labels)), np.float32)
        best = torch.from_numpy(every).topk(min(top_k, len(self.labels)), dim=1).indices.tolist()
        scored = iter(zip(every, best, strict=True))
        for number, (name, result) in enumerate(part, first):
            path = f"image {number}" if name is None else name
            if isinstance(result, str):
                yield Prediction(path, error=result)
                continue
            scores, places = next(scored)
            top = tuple((self.labels[place], float(scores[place])) for place in places)
            unsure = self.threshold is not None and top[0][1] < self.threshold
            yield Prediction(path, top, unsure=unsure, probabilities=scores if keep else None)


def _scores(model: Any, pixels: torch.Tensor, scoring: Scoring, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad(), threads():
        logits: torch.Tensor = model(pixel_values=pixels).logits.float() / temperature
    return logits.softmax(dim=1) if scoring == "softmax" else logits.sigmoid() if scoring == "sigmoid" else logits
