"""At the end of a run: what its model knows, so that it can say of an image that it is none of its classes."""

import numpy as np
import torch
from accelerate.utils import gather_object

from vitft.data.loader import EvalLoader
from vitft.evaluation.evaluation import BATCH
from vitft.evaluation.novelty import FEWEST, Novelty, fit_novelty
from vitft.io import console
from vitft.models.features import backbone
from vitft.randomness import permutation
from vitft.training.linear_probe import FeatureLoader, read_features
from vitft.training.setup import Decoded
from vitft.training.step import Learner, Watched


def run_novelty(learner: Learner, decoded: Decoded, watched: Watched) -> Novelty | None:
    """Fit the distance to at most `reference_images` training images, and compare it with all validation images.

    Takes a forward pass over both, in float32 as in prediction, unless a linear probe has these features already;
    `watched`: see StopSignals. None if the setting is 0,
    and for fewer than 50 validation images, which would not tell what is strange.
    """
    config, accelerator = learner.config, learner.accelerator
    if config.reference_images == 0 or "validation" not in decoded.stores:
        return None
    store, truth = decoded.stores["validation"]
    if len(store) < FEWEST:
        return None
    images, probe = learner.images_loader, learner.probe if config.precision == "fp32" else None
    chosen = permutation(config.seed, "reference", 0, len(images.labels))[: config.reference_images]
    learner.unwrapped.eval()
    read = backbone(learner.unwrapped, config.device, "fp32")
    with console.working("comparing with what it knows") as shown:
        progress, gather = watched(shown, gather_object)
        if probe is not None and isinstance(learner.loader, FeatureLoader):
            known = learner.loader.unmirrored[torch.from_numpy(chosen)]
        else:
            known = read_features(images, read, config, chosen, mirror=False, gather=gather, progress=progress)
        loader = EvalLoader(
            store, truth, decoded.loaded.preprocess, batch_size=BATCH, device=accelerator.device,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        if probe is not None:
            parts = [batch.pixels.cpu() for batch in probe.scoring("validation", loader, progress)]
        else:
            parts = []
            for number, batch in enumerate(loader, 1):
                parts.append(read(batch.pixels).cpu())
                progress(number, len(loader))
        held_out = torch.cat(gather(parts))
    labels = images.labels.cpu().numpy().astype(np.int64)
    return fit_novelty(known.numpy(), labels[chosen], held_out.numpy())
