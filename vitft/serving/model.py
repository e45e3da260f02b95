"""What a server has to know of a model."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitft import __version__
from vitft.attribution.maps import overlay
from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.exported import Document
from vitft.checkpoints.metadata import read_card
from vitft.io.paths import expanded
from vitft.prediction.predictor import Prediction, Predictor

WIDTH = 416  # pixels of a picture of what speaks for a class


@dataclass(frozen=True)
class Model:
    """A classifier: `read` decodes an image, `classify` predicts several; `sample` is an image.

    `picture` draws what in an image speaks for a class, given by its place in the labels, as a PNG.
    `about` is what is known of it, as JSON values.
    """

    name: str
    labels: tuple[str, ...]
    read: Callable[[bytes], Any]
    classify: Callable[[Sequence[Any]], Sequence[Prediction]]
    sample: Any
    picture: Callable[[Any, int], bytes]
    about: dict[str, Any] = field(default_factory=dict)


def document(found: Prediction, name: str, top_k: int, *, every: bool = False) -> dict[str, Any]:
    """A prediction as `vitft predict --json` has it, of `top_k` classes; with `every`, all probabilities, too."""
    said = replace(found, path=name, top=found.top[:top_k]).to_dict()
    assert found.probabilities is not None
    return said | ({"probabilities": [float(score) for score in found.probabilities]} if every else {})


def open_model(checkpoint: str | Path, **options: Any) -> Model:
    """Load a run, a checkpoint, a model folder or a hub id, with the options of `Predictor`. Raises VitftError."""
    predictor = Predictor(checkpoint, **options)

    def classify(images: Sequence[torch.Tensor]) -> Sequence[Prediction]:
        scores = predictor.score(torch.stack(list(images)))
        return [predictor.prediction("", scores, place, len(predictor.labels)) for place in range(len(images))]

    def picture(image: torch.Tensor, label: int) -> bytes:
        (weights,) = predictor.maps(image[None], [label])
        return _png(overlay(image.numpy(), weights, WIDTH))

    size = predictor.preprocess
    about = {
        "image_size": [size.height, size.width], "labels": list(predictor.labels), "threshold": predictor.threshold,
        "none_of_these": predictor.none_of_these, "calibrated": bool(options.get("calibrated", False)),
        **_recorded(checkpoint, predictor.document),
        "versions": {"vitft": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    sample = predictor.read(_png(Image.new("RGB", (8, 8))))
    return Model(name_of(checkpoint), predictor.labels, predictor.read, classify, sample, picture, about)


def _png(image: Image.Image) -> bytes:
    encoded = BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def name_of(checkpoint: str | Path) -> str:
    """What a model is called: by its run, or its folder; never with the folders above it."""
    path = expanded(checkpoint)
    if not path.exists():
        return str(checkpoint)  # a hub id
    path = path.resolve()
    folder = run_of(path) or (path if path.is_dir() else path.parent)
    return (Path(folder.name) / path.relative_to(folder)).as_posix()


def _recorded(checkpoint: str | Path, document: Document | None) -> dict[str, Any]:
    """What vitft wrote down when it saved the checkpoint: steps, and the score of each split.

    Of a lone exported file, the latter alone, by its `document`.
    """
    folder = find_model(expanded(checkpoint))
    card = read_card(folder) if folder.is_dir() else None
    known = card or document
    if known is None or known.scores is None:
        return {}
    names = ("accuracy", "accuracy_interval", "count", "split_hash")
    scores = {split: {name: score[name] for name in names} for split, score in known.scores.items()}
    return {"scores": scores} | ({} if card is None or card.parts else {"step": card.step})
