"""Linear probing: what a frozen backbone makes of each image, once, and the head trained on that.

A frozen backbone that sees no random crops gives an image the same features in every epoch: one kind, and
another for the mirrored image where there are flips. So a hundred epochs cost little more than one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitft.config.train import TrainConfig
from vitft.data.augment import draw_flips
from vitft.data.loader import Batch, EvalLoader, TrainLoader
from vitft.evaluation.evaluation import BATCH, autocast
from vitft.hardware.device import micro_batch, to_device
from vitft.models.heads import head_of

Features = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W) to what the head reads of them, (B, F)."""


def passes(config: TrainConfig) -> int:
    """Kinds of features an image has, each of which takes a pass over the training images."""
    return 2 if config.augment == "flip" else 1


def features_pay(config: TrainConfig, model: nn.Module, steps: int, images: int) -> bool:
    """Whether a run of so many steps should read features, once, rather than `images` over and over.

    Random crops have no features that stay; a model with two heads reads two kinds at once; and a short
    run sees fewer images than the passes would.
    """
    stay = config.freeze == "backbone" and config.augment != "crop" and len(head_of(model)) == 1
    return stay and steps * config.batch_size > passes(config) * images


def classifier_of(model: nn.Module) -> nn.Module:
    """The layer that reads the features."""
    return model.get_submodule(head_of(model)[0])


class Head(nn.Module):
    """The classifier of a model, called as the model is, with features in the place of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier_of(model)

    def forward(self, pixel_values: Tensor) -> Any:
        """Features (B, F) to logits (B, classes)."""
        return ImageClassifierOutput(logits=self.classifier(pixel_values))


def backbone(model: nn.Module, device: str, precision: str) -> Features:
    """The model up to its classifier, whatever it pools by: float32 features, without gradients."""

    def features(pixels: Tensor) -> Tensor:
        read: list[Tensor] = []
        handle = classifier_of(model).register_forward_pre_hook(lambda _module, given: read.append(given[0]))
        try:
            with torch.no_grad(), autocast(device, precision):
                model(pixel_values=pixels)
        finally:
            handle.remove()
        return read[0].float()

    return features


class FeatureLoader:
    """What a TrainLoader is, with the features of its images in the place of their pixels."""

    def __init__(
        self, loader: TrainLoader, features: Features, config: TrainConfig,
        *, gather: Callable[[list[Tensor]], list[Tensor]],
        progress: Callable[[int, int], None] = lambda done, count: None,
    ) -> None:  # fmt: skip
        """`gather` joins lists over all processes; each computes the features of its own part of the images."""
        self.loader, self.clock = loader, loader.clock
        self.steps_per_epoch, self.samples, self.batch_size = loader.steps_per_epoch, loader.samples, loader.batch_size
        mine = np.array_split(np.arange(len(loader.store)), loader.world)[loader.rank]
        size = min(BATCH, micro_batch(config, loader.world))
        chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
        kinds = (False, True)[: passes(config)]
        self._kinds = []
        for kind in kinds:
            parts = []
            for number, chunk in enumerate(chunks, 1):
                parts.append(features(loader.unaugmented(chunk, mirror=kind)).cpu())
                progress(number + len(chunks) * kind, len(chunks) * len(kinds))
            self._kinds.append(torch.cat(gather([torch.cat(parts)] if parts else [])))

    def batch(self, step: int) -> Batch:
        """This process's share of a step."""
        mine = self.loader.shard(step)
        rows = torch.from_numpy(mine)
        with self.clock.part("wait"):
            read = self._kinds[0][rows]
            if len(self._kinds) == 2:
                flip = draw_flips(self.loader.seed, step // self.steps_per_epoch, mine)
                read = torch.where(torch.from_numpy(flip)[:, None], self._kinds[1][rows], read)
        with self.clock.part("transfer"):
            device = self.loader.device
            return Batch(to_device(read, device), to_device(self.loader.labels[rows], device), mine)


class Probe:
    """A run that trains a head on features: what it trains, and where the features come from."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.head = Head(model)
        self._model, self._config = model, config
        self._scored: dict[str, list[Batch]] = {}

    def training(
        self, loader: TrainLoader, gather: Callable[[list[Tensor]], list[Tensor]], progress: Callable[[int, int], None]
    ) -> FeatureLoader:
        """The loader, with features in the place of pixels; takes a pass over the images, with flips two."""
        return FeatureLoader(loader, self._features(), self._config, gather=gather, progress=progress)

    def scoring(self, role: str, loader: EvalLoader, progress: Callable[[int, int], None]) -> list[Batch]:
        """A split's batches, with features in the place of pixels; takes a pass over them the first time."""
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
