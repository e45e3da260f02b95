"""Classify image files, folders, arrays and tensors."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.metadata import read_card
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.data.decoder import MAX_PIXELS, BadImage, decode, encoded
from vitft.data.sources.folders import Listing, describe_others
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation.calibration import FEWEST, at_temperature, threshold_for
from vitft.evaluation.loading import load_model
from vitft.evaluation.results import read_results
from vitft.hardware.device import find_device, threads
from vitft.hardware.pools import map_in_threads
from vitft.io import console
from vitft.io.paths import expanded
from vitft.models.load import Scoring

_BATCH = 64
Given = str | Path | Image.Image | NDArray[Any] | torch.Tensor
"""What can be classified: see `Predictor.__call__`."""


@dataclass(frozen=True)
class Prediction:
    """An image's classes, best first, with their probabilities; or the `error` why it could not be read.

    Probabilities sum to 1, unless the checkpoint scores each label separately. `unsure`: the best class is below the
    confidence that was asked for.
    """

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    unsure: bool = False

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
    given = [paths] if isinstance(paths, str | Path) else paths
    found = list(find_images(given))
    predictor = Predictor(
        checkpoint, device=device, max_pixels=max_pixels, value_range=value_range, calibrated=calibrated,
        min_confidence=min_confidence, min_precision=min_precision,
    )  # fmt: skip
    return predictor._rows(found, top_k=top_k)


class Predictor:
    """A checkpoint that is loaded once, to classify images.

    >>> predictor = Predictor("runs/digits-vit-micro-1")
    >>> predictor("docs/digits", top_k=1)[0].top

    `labels` are its classes, in the order of the logits; `preprocess` is how an image becomes the model's input.
    `threshold` is the confidence below which a prediction is unsure, if one was asked for.
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

        An image is a path (also a folder or a glob), a PIL image, a uint8 array (H, W) or (H, W, 3), or a tensor
        (C, H, W) as in torchvision, uint8 or float from 0 to 1. Arrays (B, H, W, 3) and tensors (B, C, H, W) are
        batches. An unreadable image gets a row with its error. Raises DataError for folders without images, and
        ModelError if scores are not finite.
        """
        single = isinstance(images, str | Path | Image.Image | np.ndarray | torch.Tensor)
        return self._rows(list(_each([images] if single else images)), top_k=top_k)  # type: ignore[list-item,arg-type]

    def _rows(self, images: "Sequence[str | Image.Image | DataError]", *, top_k: int = 3) -> list[Prediction]:
        rows: list[Prediction] = []
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            results = list(map_in_threads(lambda image: read_image(image, self.preprocess, self.max_pixels), part))
            read = [image for image in results if isinstance(image, torch.Tensor)]
            pixels = normalize(torch.cat(read).to(self._device), self.preprocess) if read else None
            scores = (
                torch.empty(0, 1) if pixels is None else _scores(self._model, pixels, self._scoring, self._temperature)
            )
            if not scores.isfinite().all():
                raise ModelError(
                    f"{self.checkpoint}: its scores are not finite, so its weights are corrupt; use another checkpoint."
                )
            tops = _top(scores, top_k)
            for place, (given, result) in enumerate(zip(part, results, strict=True), start):
                name = given if isinstance(given, str) else f"image {place}"
                if isinstance(result, str):
                    rows.append(Prediction(name, error=result))
                else:
                    top = tuple((self.labels[index], score) for index, score in next(tops))
                    rows.append(Prediction(name, top, unsure=self.threshold is not None and top[0][1] < self.threshold))
        return rows


def temperature_of(checkpoint: str | Path) -> float:
    """The temperature that a checkpoint was given on validation images. Raises UsageError if it has none."""
    folder = find_model(expanded(checkpoint))
    card = read_card(folder) if folder.is_dir() else None
    if card is None or card.temperature is None:
        why = f"the best checkpoint of a run with {FEWEST} validation images or more has one"
        raise UsageError(f"calibrated: {checkpoint} has no temperature; {why}.")
    return card.temperature


def threshold_of(checkpoint: str | Path, precision: float, temperature: float) -> float:
    """The confidence from which on so many of a run's validation images are right; says how many those are.

    Raises UsageError if there are no validation images of the checkpoint, or no confidence is enough.
    """
    folder = find_model(expanded(checkpoint))
    run, card = run_of(folder), read_card(folder) if folder.is_dir() else None
    results = None if run is None else read_results(run)
    said = None
    if results is not None and card is not None and card.step == results.step and "validation" in results.splits:
        said = results.predictions("validation")
    if said is None:
        raise UsageError(f"min_precision: {checkpoint} has no predictions of validation images to choose by.")
    said = said if temperature == 1.0 else at_temperature(said, temperature)
    found = threshold_for(said, precision)
    if found is None:
        raise UsageError(f"min_precision {precision:g}: not even the surest validation images reach it; ask for less.")
    console.note(
        f"deciding from a confidence of {found.confidence:.4f} on: that is {console.percent(found.coverage)} of "
        f"{len(said.truth):,} validation images, of which {console.percent(found.accuracy)} are right"
    )
    return found.confidence


def read_image(given: Any, preprocess: Preprocess, max_pixels: int) -> torch.Tensor | str:
    """The resized image, (1, H, W, 3), or the reason why it cannot be read.

    `given` is a path, a PIL image, a dataset's cell ({"bytes", "path"}), or a DataError for what is no image.
    """
    if isinstance(given, DataError):
        return str(given)
    try:
        if isinstance(given, str) and not expanded(given).exists() and glob.has_magic(given):
            return "matches no file"
        source = encoded(given) if isinstance(given, dict) else expanded(given) if isinstance(given, str) else given
        pixels = decode(source, max_pixels, value_range=preprocess.value_range)
        # Resized at once, so that a batch of photos is never in memory at full size.
        return resize_and_crop(torch.from_numpy(pixels)[None], preprocess)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _each(images: Sequence[Given]) -> Iterator[str | Image.Image | DataError]:
    """Every image: files by name, others as PIL images, or a DataError for what is not an image."""
    for given in images:
        if isinstance(given, str | Path):
            yield from find_images([given])
        elif isinstance(given, Image.Image):
            yield given
        else:
            array = _channels_last(given) if isinstance(given, torch.Tensor) else given
            yield from map(_pictured, array if array.ndim == 4 else array[None])


def _channels_last(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = (tensor * 255).round().clamp(0, 255).to(torch.uint8)
    return tensor.movedim(-3, -1).numpy() if tensor.ndim >= 3 else tensor.numpy()


def _pictured(array: NDArray[Any]) -> Image.Image | DataError:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        shape = " x ".join(map(str, array.shape))
        return DataError(f"is an array of {array.dtype}, {shape}; give uint8 (height, width) or (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(array.reshape(array.shape[:2]) if channels == 1 else array))


def _scores(model: Any, pixels: torch.Tensor, scoring: Scoring, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad(), threads():
        logits: torch.Tensor = model(pixel_values=pixels).logits.float() / temperature
    return logits.softmax(dim=1) if scoring == "softmax" else logits.sigmoid() if scoring == "sigmoid" else logits


def _top(scores: torch.Tensor, top_k: int) -> Iterator[list[tuple[int, float]]]:
    best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield list(zip(index, value, strict=True))


def find_images(given: Sequence[str | Path]) -> Iterator[str]:
    """The image files behind files, folders and globs, in order; files in folders that are not images are reported.

    A missing file, or a glob without matches, is kept, to get a row with its error. Raises DataError if only folders
    were given, and there is no image in them.
    """
    count = 0
    for word in map(str, given):
        path = expanded(word)
        found = [word]
        if path.is_dir():
            tree = Listing(path).tree
            found = [str(Path(file)) for file in tree.files()]
            plain, pictures = describe_others(tree.other_files(), tree.path)
            for sentence in plain:
                console.note(f"{word}: {sentence}")
            for sentence in pictures:
                console.warn(f"{word}: {sentence}")
        elif not path.exists() and glob.has_magic(word):
            names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob wants relative ones)
            found = [name for name in names if Path(name).is_file()] or [word]
        count += len(found)
        yield from found
    if count == 0:
        raise DataError(f"no image found in {', '.join(map(str, given))}; give image files, folders or globs.")
