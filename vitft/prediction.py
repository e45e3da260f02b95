"""Files, folders and globs to rows of (path, label, score)."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitft import console
from vitft.checkpoint import find_model
from vitft.data.augment import fit, normalize, workers
from vitft.data.folders import scan, told
from vitft.data.images import MAX_PIXELS, BadImage, decode
from vitft.errors import DataError, ModelError
from vitft.hardware import find_device, threads
from vitft.models import Scoring, load_trained
from vitft.paths import expanded

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """An image's classes, best first, each with its probability; or why it could not be read.

    Of a checkpoint for several labels an image, or for one, each probability stands by itself.
    """

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in JSON."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "top": [{"label": label, "score": score} for label, score in self.top]}


def predict(
    paths: Sequence[str | Path] | str | Path, checkpoint: str | Path, *, top_k: int = 3, device: str = "auto",
    max_pixels: int = MAX_PIXELS, value_range: str | None = None,
) -> list[Prediction]:  # fmt: skip
    """Classify images, in the order given; an unreadable one gets a row with its error.

    `paths` are files, folders (every image below them) and globs. Raises VitftError for a checkpoint
    that cannot be used or whose scores are no numbers, or when no image is found at all.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    found = list(find_images(given))
    where = find_model(expanded(checkpoint))
    loaded = load_trained(where if where.is_dir() else str(checkpoint))
    how = loaded.preprocess.ranged(value_range)
    device = find_device(device)
    model = loaded.model.to(device)

    def read(name: str) -> torch.Tensor | str:
        path = expanded(name)
        try:  # fitted at once, so that a batch of photos never lies in memory at full size
            if not path.exists() and glob.has_magic(name):
                return "matches no file"
            return fit(torch.from_numpy(decode(path, max_pixels, value_range=how.value_range))[None], how)
        except BadImage as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    rows: list[Prediction] = []
    for start in range(0, len(found), _BATCH):
        part = found[start : start + _BATCH]
        results = list(workers().map(read, part))
        images = [image for image in results if isinstance(image, torch.Tensor)]
        pixels = normalize(torch.cat(images).to(device), how) if images else None
        scores = torch.empty(0, 1) if pixels is None else _scores(model, pixels, loaded.scoring)
        if not scores.isfinite().all():
            raise ModelError(
                f"{checkpoint}: its scores are no numbers, so its weights are broken; use another checkpoint."
            )
        tops = _top(scores, top_k)
        for name, result in zip(part, results, strict=True):
            if isinstance(result, str):
                rows.append(Prediction(name, error=result))
            else:
                top = tuple((loaded.labels[index], score) for index, score in next(tops))
                rows.append(Prediction(name, top))
    return rows


def _scores(model: Any, pixels: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    with torch.no_grad(), threads():
        logits: torch.Tensor = model(pixel_values=pixels).logits.float()
    return logits.softmax(dim=1) if scoring == "softmax" else logits.sigmoid() if scoring == "sigmoid" else logits


def _top(scores: torch.Tensor, top_k: int) -> Iterator[list[tuple[int, float]]]:
    best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        yield list(zip(index, value, strict=True))


def find_images(given: Sequence[str | Path]) -> Iterator[str]:
    """The image files behind files, folders and globs, in order, each as it was written; what is no image is told.

    What is not there, or matches nothing, stays as it is, to get its own row. Raises DataError if
    folders are all that was given and they hold no image.
    """
    count = 0
    for word in map(str, given):
        path = expanded(word)
        found = [word]
        if path.is_dir():
            tree = scan(path).tree
            found = [str(Path(file)) for file in tree.files()]
            plain, pictures = told(tree.passed(), tree.path)
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
