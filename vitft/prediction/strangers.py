"""How well a model tells images of something else from those of its own dataset."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from vitft.config.train import TrainConfig
from vitft.data.augment import normalize
from vitft.data.loader import EvalLoader
from vitft.data.sources.source import DatasetLike, source_of
from vitft.errors import DataError
from vitft.evaluation.evaluation import BATCH, Progress, read_images, reading
from vitft.evaluation.loading import load_model
from vitft.evaluation.novelty import Novelty, read_novelty
from vitft.hardware.device import find_device, threads
from vitft.hardware.pools import map_ahead
from vitft.io.paths import expanded
from vitft.models.features import heads_input
from vitft.prediction.inputs import find_images, read_image
from vitft.randomness import permutation

KEPT = 0.99  # of the validation images: what is stranger counts as found


@dataclass(frozen=True)
class Strangers:
    """How well strangers are told from the images of a split.

    `by_novelty` and `by_confidence` are areas under the ROC curve (AUROC): the probability that of a stranger and an
    image of the split, the stranger has the higher novelty, or the lower highest probability. `found` is the fraction
    of strangers with a novelty above `kept`, and `mistaken` that of the split's images. `unreadable` strangers were
    left out.
    """

    split: str
    known: int
    strangers: int
    unreadable: int
    by_novelty: float
    by_confidence: float
    kept: float
    found: float
    mistaken: float

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def tell_strangers(
    checkpoint: str | Path, strangers: DatasetLike, *, dataset: DatasetLike | None = None, split: str | None = None,
    limit: int | None = None, device: str = "auto", typed: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress = lambda done, count: None,
) -> Strangers:  # fmt: skip
    """Compare the images of a split with others, which must be of none of the model's classes.

    Args:
        checkpoint: a run (its best checkpoint is taken), or one of its checkpoints.
        strangers: a folder with images anywhere below it, or a dataset as for `evaluate`, of which the test split is
            taken, else validation or train.
        dataset: where the checkpoint's own dataset has moved to.
        split: of the checkpoint's dataset; by default test, else validation.
        limit: at most so many images of each.
        device: auto, cpu, cuda or mps.
        typed: settings to read the checkpoint's dataset with, as for `reading`.
        progress: called with the number of images or batches done and the total.

    Raises:
        VitftError: with one line that says what is wrong.
    """
    novelty, loaded = read_novelty(checkpoint), load_model(checkpoint)
    config, _ = reading(checkpoint, dataset, typed)
    others = _found(strangers, loaded.labels, limit)
    own = read_images(checkpoint, loaded, config, dataset=dataset, split=split, limit=limit, progress=progress)
    name, how = find_device(device), loaded.preprocess
    model, unreadable = loaded.model.to(name), list[str]()

    def pixels() -> Iterator[torch.Tensor]:
        read, done = map_ahead(lambda one: read_image(one, how, config.max_pixels), others, 2 * BATCH), 0
        while part := list(islice(read, BATCH)):
            done += len(part)
            unreadable.extend(one for one in part if isinstance(one, str))
            if good := [one for one in part if isinstance(one, torch.Tensor)]:
                yield normalize(torch.cat(good).to(name), how)
            progress(done, len(others))

    loader = EvalLoader(own.store, own.truth, how, batch_size=BATCH, device=torch.device(name))
    known = _scored(model, novelty, (batch.pixels for batch in loader))
    unknown = _scored(model, novelty, pixels())
    if not len(unknown[0]):
        raise DataError(f"{strangers}: none of its {len(others)} images can be read; the first {unreadable[0]}.")
    is_stranger = np.repeat([0, 1], [len(known[0]), len(unknown[0])])
    return Strangers(
        own.split.name, len(known[0]), len(unknown[0]), len(unreadable),
        float(roc_auc_score(is_stranger, np.concatenate([known[0], unknown[0]]))),
        float(roc_auc_score(is_stranger, -np.concatenate([known[1], unknown[1]]))),
        KEPT, float((novelty.rank(unknown[0]) > KEPT).mean()), float((novelty.rank(known[0]) > KEPT).mean()),
    )  # fmt: skip


def _found(strangers: DatasetLike, labels: tuple[str, ...], limit: int | None) -> list[Any]:
    """The images, as `read_image` takes them."""
    path = isinstance(strangers, str | Path)
    try:
        source = source_of(TrainConfig(dataset=str(strangers)) if path else TrainConfig(), None if path else strangers)
    except DataError:  # a folder without classes, which here are of no use
        found: list[Any] = []
        if path and expanded(strangers).is_dir():
            with suppress(DataError):
                found = list(find_images([strangers]))
        if not found:
            raise
        return [found[place] for place in _sampled(len(found), limit)]
    if shared := sorted(set(source.labels) & set(labels)):
        raise DataError(f"{source.name}: has the class {shared[0]}, as the model does; give images of other classes.")
    name = next(name for name in ("test", "validation", "train", *source.splits) if name in source.splits)
    rows = source.splits[name]
    return list(rows.select(_sampled(len(rows), limit))["image"])


def _sampled(count: int, limit: int | None) -> NDArray[np.int64]:
    return np.sort(permutation(0, "strangers", 0, count)[:limit])


def _scored(
    model: Any, novelty: Novelty, batches: Iterable[torch.Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """The strangeness and the confidence of each image of batches of model input: (N,), (N,)."""
    strangeness, confidence = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for pixels in batches:
        with torch.no_grad(), threads(), heads_input(model) as read:
            logits = model(pixel_values=pixels).logits.float()
        strangeness.append(novelty.strangeness(read[0].float().cpu().numpy(), logits.cpu().numpy()))
        confidence.append(logits.softmax(dim=1).amax(dim=1).cpu().numpy())
    return np.concatenate(strangeness), np.concatenate(confidence)
