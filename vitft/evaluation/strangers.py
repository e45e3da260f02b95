"""How well a model tells images of another dataset from its own."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from vitft.config.train import TrainConfig
from vitft.data.loader import EvalLoader
from vitft.data.sources.source import DatasetLike, source_of
from vitft.data.store import Store, decode_all
from vitft.errors import DataError
from vitft.evaluation.evaluation import BATCH, Progress, read_images, reading
from vitft.evaluation.loading import load_model
from vitft.evaluation.novelty import Novelty, read_novelty
from vitft.hardware.device import find_device, threads
from vitft.models.features import heads_input
from vitft.models.load import Loaded
from vitft.randomness import permutation

KEPT = 0.99


@dataclass(frozen=True)
class Strangers:
    """How well strangers are told from the images of a split.

    `by_novelty` and `by_confidence` are areas under the ROC curve (AUROC): the probability that of a stranger and an
    image of the split, the stranger has the higher novelty, or the lower highest probability. `found` is the fraction
    of strangers with a novelty above 0.99, and `mistaken` that of the split's images.
    """

    split: str
    known: int
    strangers: int
    by_novelty: float
    by_confidence: float
    found: float
    mistaken: float

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def tell_strangers(
    checkpoint: str | Path, strangers: DatasetLike, *, dataset: DatasetLike | None = None, split: str | None = None,
    limit: int | None = None, device: str = "auto", progress: Progress = lambda done, count: None,
) -> Strangers:  # fmt: skip
    """Compare the images of a split with those of another dataset, whose classes must not be those of the model.

    Args:
        checkpoint: a run (its best checkpoint is taken), or one of its checkpoints.
        strangers: a dataset as for `evaluate`; its test split is taken, else validation or train.
        dataset: where the checkpoint's own dataset has moved to.
        split: of the checkpoint's dataset; by default test, else validation.
        limit: at most so many images of each.
        device: auto, cpu, cuda or mps.
        progress: called with the number of images or batches done and the total.

    Raises:
        VitftError: with one line that says what is wrong.
    """
    novelty = read_novelty(checkpoint)
    loaded = load_model(checkpoint)
    config, _ = reading(checkpoint, dataset)
    own = read_images(checkpoint, loaded, config, dataset=dataset, split=split, limit=limit, progress=progress)
    others = _decoded(strangers, loaded, config, limit, progress)
    name = find_device(device)
    loaded.model.to(name)
    known, unknown = (_scored(loaded, novelty, store, name, progress) for store in (own.store, others))
    is_stranger = np.repeat([0, 1], [len(known[0]), len(unknown[0])])
    return Strangers(
        own.split.name, len(known[0]), len(unknown[0]),
        float(roc_auc_score(is_stranger, np.concatenate([known[0], unknown[0]]))),
        float(roc_auc_score(is_stranger, -np.concatenate([known[1], unknown[1]]))),
        found=float((novelty.rank(unknown[0]) > KEPT).mean()), mistaken=float((novelty.rank(known[0]) > KEPT).mean()),
    )  # fmt: skip


def _decoded(
    strangers: DatasetLike, loaded: Loaded, config: TrainConfig, limit: int | None, progress: Progress
) -> Store:
    path = isinstance(strangers, str | Path)
    source = source_of(TrainConfig(dataset=str(strangers) if path else "digits"), None if path else strangers)
    name = next(name for name in ("test", "validation", "train", *source.splits) if name in source.splits)
    rows = source.splits[name]
    shared = sorted(set(source.labels) & set(loaded.labels))
    if shared:
        raise DataError(f"{source.name}: has the class {shared[0]}, as the model does; give images of other classes.")
    if limit is not None and limit < len(rows):
        rows = rows.select(np.sort(permutation(0, "strangers", 0, len(rows))[:limit]))
    store, _ = decode_all(
        rows, loaded.preprocess, crops=False, max_pixels=config.max_pixels, skip_bad=True, progress=progress,
        name=f"{source.name}, {name}",
    )  # fmt: skip
    return store


def _scored(
    loaded: Loaded, novelty: Novelty, store: Store, device: str, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """The strangeness and the confidence of each image: (N,), (N,)."""

    def batches() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        loader = EvalLoader(
            store, np.zeros(len(store), np.int64), loaded.preprocess, batch_size=BATCH, device=torch.device(device)
        )
        for number, batch in enumerate(loader, 1):
            with torch.no_grad(), threads(), heads_input(loaded.model) as read:
                logits = loaded.model(pixel_values=batch.pixels).logits.float()
            confidence = logits.softmax(dim=1).amax(dim=1).cpu().numpy()
            yield novelty.strangeness(read[0].float().cpu().numpy(), logits.cpu().numpy()), confidence
            progress(number, len(loader))

    strangeness, confidences = zip(*batches(), strict=True)
    return np.concatenate(strangeness), np.concatenate(confidences)
