"""What is exported: from uint8 images to probabilities, preprocessing included, as one module."""

from contextlib import suppress

import torch
from torch import Tensor, nn

from vitft.checkpoints.exported import INPUT
from vitft.data.augmentation.operations import LUMINANCE
from vitft.models.load import Loaded


class Classifier(nn.Module):
    """uint8 images (N, height, width, 3) -> probabilities (N, K): `augment.normalize`, the model, softmax."""

    scale: Tensor
    shift: Tensor
    luminance: Tensor

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        how = loaded.preprocess
        self.model, self.gray, self.flips = loaded.model, how.channels == 1, how.flips_channels
        mean, std = torch.tensor(how.mean), torch.tensor(how.std)
        self.register_buffer("scale", how.rescale / std)
        self.register_buffer("shift", -mean / std)
        self.register_buffer("luminance", torch.tensor(LUMINANCE, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Images to probabilities."""
        pixels = images.float()
        if self.gray:  # whole numbers below 2^24, so exact in float32
            pixels = (((pixels * self.luminance).sum(dim=3, keepdim=True) + 2**15) / 2**16).floor()
        elif self.flips:
            pixels = pixels.flip(3)
        pixels = (pixels * self.scale + self.shift).permute(0, 3, 1, 2)
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits.float().softmax(dim=1)


def traced(loaded: Loaded) -> torch.export.ExportedProgram:
    """The classifier as a graph of torch's operators, for batches of any size."""
    with suppress(ValueError):  # plain matrix products: what runtimes know how to fuse and quantize
        loaded.model.set_attn_implementation("eager")
    module, how = Classifier(loaded).eval().requires_grad_(False), loaded.preprocess
    images = torch.zeros(2, how.height, how.width, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes={INPUT: {0: batch}}, strict=False)
