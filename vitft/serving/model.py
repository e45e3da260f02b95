"""What a server has to know of a model."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitft import __version__
from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.metadata import read_card
from vitft.io.paths import expanded
from vitft.prediction.predictor import Prediction, Predictor

Scores = NDArray[np.float32]
"""The probabilities of an image's classes, in the order of the labels."""


@dataclass(frozen=True)
class Model:
    """A classifier: `read` decodes an image, `classify` gives the probabilities of several; `sample` is an image.

    `about` is what is known of it, as JSON values.
    """

    name: str
    labels: tuple[str, ...]
    read: Callable[[bytes], Any]
    classify: Callable[[Sequence[Any]], Sequence[Scores]]
    sample: Any
    threshold: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def prediction(self, name: str, scores: Scores, top_k: int, every: bool = False) -> dict[str, Any]:
        """An image's classes, best first, as `vitft predict --json` has them; with `every`, of all classes, too."""
        best = np.argsort(-scores, kind="stable")[:top_k]
        top = tuple((self.labels[place], float(scores[place])) for place in best)
        unsure = self.threshold is not None and top[0][1] < self.threshold
        found = Prediction(name, top, unsure=unsure).to_dict()
        return found | ({"probabilities": [float(score) for score in scores]} if every else {})


def open_model(checkpoint: str | Path, **options: Any) -> Model:
    """Load a run, a checkpoint, a model folder or a hub id, with the options of `Predictor`. Raises VitftError."""
    predictor = Predictor(checkpoint, **options)

    def classify(images: Sequence[torch.Tensor]) -> Sequence[Scores]:
        return list(predictor.probabilities(torch.stack(list(images))))

    size = predictor.preprocess
    about = {
        "image_size": [size.height, size.width], "labels": list(predictor.labels), "threshold": predictor.threshold,
        "calibrated": bool(options.get("calibrated", False)), **_recorded(checkpoint),
        "versions": {"vitft": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    encoded = BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    sample = predictor.read(encoded.getvalue())
    return Model(name_of(checkpoint), predictor.labels, predictor.read, classify, sample, predictor.threshold, about)


def name_of(checkpoint: str | Path) -> str:
    """What a model is called: by its run, or its folder; never with the folders above it."""
    path = expanded(checkpoint)
    if not path.exists():
        return str(checkpoint)  # a hub id
    path = path.resolve()
    folder = run_of(path) or (path if path.is_dir() else path.parent)
    return (Path(folder.name) / path.relative_to(folder)).as_posix()


def _recorded(checkpoint: str | Path) -> dict[str, Any]:
    """What vitft wrote down when it saved the checkpoint: steps, and the score of each split."""
    folder = find_model(expanded(checkpoint))
    card = read_card(folder) if folder.is_dir() else None
    if card is None:
        return {}
    names = ("accuracy", "accuracy_interval", "count", "split_hash")
    scores = {split: {name: score[name] for name in names} for split, score in card.scores.items()}
    return {"step": card.step, "scores": scores}
