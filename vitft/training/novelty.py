"""At the end of a run: what its model knows, so that it can say of an image that it is none of its classes."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import gather_object

from vitft.data.loader import EvalLoader
from vitft.evaluation.evaluation import BATCH
from vitft.evaluation.novelty import FEWEST, Novelty, fit_novelty, reduced
from vitft.hardware.device import autocast, on_host
from vitft.io import console
from vitft.models.features import backbone, heads_input
from vitft.randomness import permutation
from vitft.training.linear_probe import FeatureLoader, read_features
from vitft.training.setup import Decoded
from vitft.training.step import Learner, Watched

_MOST = 10_000  # validation images; of these, 100 are stranger than 99 %


def run_novelty(learner: Learner, decoded: Decoded, watched: Watched) -> Novelty | None:
    """Learn from at most `reference_images` training images and 10,000 validation images.

    Takes a forward pass over both, unless a linear probe has these features already, in the precision of training
    (docs/accuracy.md compares that with float32, in which images are predicted). `watched`: see StopSignals. None if
    the setting is 0, and for fewer than 50 validation images, which would not tell what is strange.
    """
    config, accelerator = learner.config, learner.accelerator
    if config.reference_images == 0 or "validation" not in decoded.stores:
        return None
    store, truth = decoded.stores["validation"]
    if len(store) < FEWEST:
        return None
    images, probe, precision = learner.images_loader, learner.probe, config.precision
    chosen = images.sample("reference", config.reference_images)
    compared = permutation(config.seed, "compared", 0, len(store))[:_MOST] if probe is None else None
    model, device = learner.unwrapped.eval(), config.device
    with console.working("comparing with what it knows") as shown:
        progress, gather = watched(shown, gather_object)
        if probe is not None and isinstance(learner.loader, FeatureLoader):
            known = learner.loader.unmirrored[torch.from_numpy(chosen)]
        else:
            read = backbone(model, device, precision)
            known = read_features(images, read, config, chosen, mirror=False, gather=gather, progress=progress)
        loader = EvalLoader(
            store, truth, decoded.loaded.preprocess, batch_size=BATCH, device=accelerator.device,
            rank=accelerator.process_index, world=accelerator.num_processes, only=compared,
        )  # fmt: skip
        batches = loader if probe is None else probe.scoring("validation", loader, progress)
        network = model if probe is None else probe.head

        def answers() -> Iterator[torch.Tensor]:
            """Features and logits, side by side."""
            for number, batch in enumerate(batches, 1):
                with torch.no_grad(), heads_input(model) as given, autocast(device, precision):
                    logits = network(pixel_values=batch.pixels).logits
                yield torch.cat([given[0].flatten(1).float(), logits.float()], dim=1)
                progress(number, len(batches))

        classes = model.config.num_labels
        both = (block.numpy() for block in on_host(answers()))
        parts = [(block[:, :-classes].copy(), *reduced(block[:, -classes:])) for block in both]
        features, largest, energy = map(np.concatenate, zip(*gather(parts), strict=True))
    return fit_novelty(known.numpy(), features, largest, energy)
