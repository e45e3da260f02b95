"""What is exported: from uint8 images to probabilities, preprocessing included, as one module."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vitft.checkpoints.exported import INPUT, Resizing
from vitft.data.augmentation.operations import LUMINANCE
from vitft.exporting.resize import Resize
from vitft.models.load import Loaded


class Classifier(nn.Module):
    """uint8 images (N, H, W, 3) -> probabilities (N, K): `augment.normalize`, the model, softmax.

    Images have the model's input size, or, with the resize inside, any size.
    """

    scale: Tensor
    shift: Tensor
    luminance: Tensor

    def __init__(self, loaded: Loaded, resize: Resizing = "outside") -> None:
        super().__init__()
        how = loaded.preprocess
        self.resize = Resize(how) if resize == "inside" else None
        self.model, self.gray, self.flips = loaded.model, how.channels == 1, how.flips_channels
        mean, std = torch.tensor(how.mean), torch.tensor(how.std)
        self.register_buffer("scale", how.rescale / std)
        self.register_buffer("shift", -mean / std)
        self.register_buffer("luminance", torch.tensor(LUMINANCE, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Images to probabilities."""
        pixels = images.float() if self.resize is None else self.resize(images)
        if self.gray:  # whole numbers below 2^24, so exact in float32
            pixels = (((pixels * self.luminance).sum(dim=3, keepdim=True) + 2**15) / 2**16).floor()
        elif self.flips:
            pixels = pixels.flip(3)
        pixels = (pixels * self.scale + self.shift).permute(0, 3, 1, 2)
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits.float().softmax(dim=1)


def traced(loaded: Loaded, resize: Resizing = "outside") -> torch.export.ExportedProgram:
    """The classifier as a graph of torch's operators, for any number of images."""
    module, how = Classifier(loaded, resize).eval().requires_grad_(False), loaded.preprocess
    images = torch.zeros(2, how.height, how.width, 3, dtype=torch.uint8)
    names = ("batch", "height", "width") if resize == "inside" else ("batch",)
    shapes = {place: torch.export.Dim(name, min=1) for place, name in enumerate(names)}
    with torch.no_grad(), _plain_attention(loaded.model):
        return torch.export.export(module, (images,), dynamic_shapes={INPUT: shapes}, strict=False)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Within, attention is matrix products and a softmax, which runtimes know how to fuse and to quantize."""
    before = model.config._attn_implementation
    with suppress(ValueError):  # some architectures have one only
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before is not None:
            with suppress(ValueError):
                model.set_attn_implementation(before)
