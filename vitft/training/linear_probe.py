"""Linear probing: compute the features of a frozen backbone once, and train the head on them.

If images are at most mirrored, a frozen backbone gives an image the same features in every epoch (with flips, one set
for the image and one for its mirror image). So a hundred epochs cost little more than one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitft.config.train import TrainConfig
from vitft.data.augment import draw_flips
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import Batch, EvalLoader, TrainLoader
from vitft.evaluation.evaluation import BATCH
from vitft.hardware.device import micro_batch, on_host, to_device
from vitft.models.features import Features, backbone
from vitft.models.heads import classifier_of, head_of


def passes(config: TrainConfig) -> int:
    """Passes over the training images that the features take: with flips, a second one for mirrored images."""
    return 2 if config.augment == "flip" else 1


def features_pay(config: TrainConfig, model: nn.Module, steps: int, images: int) -> bool:
    """Whether to train on precomputed features: if they stay the same, there is one head, and it saves passes.

    Most augmentations change the features in every epoch, and a short run sees fewer images than precomputing would.
    """
    constant = config.freeze == "backbone" and Augmentation.of(config).only_flips and len(head_of(model)) == 1
    return constant and steps * config.batch_size > passes(config) * images


class Head(nn.Module):
    """A model's classifier, with the interface of the model but features instead of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier_of(model)

    def forward(self, pixel_values: Tensor) -> Any:
        """Features (B, F) to logits (B, classes)."""
        return ImageClassifierOutput(logits=self.classifier(pixel_values))


def read_features(
    loader: TrainLoader, features: Features, config: TrainConfig, positions: NDArray[np.int64], *, mirror: bool,
    gather: Callable[[list[Tensor]], list[Tensor]], progress: Callable[[int, int], None],
) -> Tensor:  # fmt: skip
    """The features of training images without augmentation, or of their mirror images: (N, F), on the CPU.

    Each process computes a shard of them; `gather` joins lists over all processes.
    """
    mine = np.array_split(positions, loader.world)[loader.rank]
    size = min(BATCH, micro_batch(config, loader.world))
    chunks = [mine[start : start + size] for start in range(0, len(mine), size)]

    def read() -> Iterator[Tensor]:
        for number, pixels in enumerate(loader.unaugmented(chunks, mirror=mirror), 1):
            yield features(pixels)
            progress(number, len(chunks))

    parts = list(on_host(read()))
    return torch.cat(gather([torch.cat(parts)] if parts else []))


class FeatureLoader:
    """A TrainLoader with features instead of pixels."""

    def __init__(
        self, loader: TrainLoader, features: Features, config: TrainConfig,
        *, gather: Callable[[list[Tensor]], list[Tensor]],
        progress: Callable[[int, int], None] = lambda done, count: None,
    ) -> None:  # fmt: skip
        """`gather` joins lists over all processes, each of which computes the features of its shard of the images."""
        self.loader, self.clock = loader, loader.clock
        self.labels = loader.labels
        self.steps_per_epoch, self.samples, self.batch_size = loader.steps_per_epoch, loader.samples, loader.batch_size
        kinds = (False, True)[: passes(config)]
        self._kinds = []
        for kind in kinds:

            def shown(done: int, count: int, kind: int = kind) -> None:
                progress(done + count * kind, count * len(kinds))

            everything = np.arange(len(loader.store))
            self._kinds.append(
                read_features(loader, features, config, everything, mirror=kind, gather=gather, progress=shown)
            )

    @property
    def unmirrored(self) -> Tensor:
        """The features of every image as it is: (N, F)."""
        return self._kinds[0]

    def batch(self, step: int) -> Batch:
        """This process's shard of a step's batch."""
        mine = self.loader.shard(step)
        rows = torch.from_numpy(mine)
        with self.clock.part("wait"):
            read = self._kinds[0][rows]
            if len(self._kinds) == 2:
                flip = draw_flips(self.loader.seed, step // self.steps_per_epoch, self.loader.draws(step))
                read = torch.where(torch.from_numpy(flip)[:, None], self._kinds[1][rows], read)
        with self.clock.part("transfer"):
            device = self.loader.device
            return Batch(to_device(read, device), to_device(self.loader.labels[rows], device), mine)


class Probe:
    """Linear probing in a run: the head to train, and the features of each split."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.head = Head(model)
        self._model, self._config = model, config
        self._scored: dict[str, list[Batch]] = {}

    def training(
        self, loader: TrainLoader, gather: Callable[[list[Tensor]], list[Tensor]], progress: Callable[[int, int], None]
    ) -> FeatureLoader:
        """The loader with features instead of pixels. Takes a pass over the images, with flips two."""
        return FeatureLoader(loader, self._features(), self._config, gather=gather, progress=progress)

    def scoring(self, role: str, loader: EvalLoader, progress: Callable[[int, int], None]) -> list[Batch]:
        """A split's batches with features instead of pixels. Takes a pass over the images the first time."""
        if role not in self._scored:
            features, read = self._features(), []
            for number, batch in enumerate(loader, 1):
                read.append(Batch(features(batch.pixels), batch.labels, batch.index))
                progress(number, len(loader))
            self._scored[role] = read
        return self._scored[role]

    def _features(self) -> Features:
        self._model.eval()
        return backbone(self._model, self._config.device, self._config.precision)
