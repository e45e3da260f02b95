"""A trained model, found and loaded."""

from pathlib import Path

from vitft.checkpoints.checkpoint import find_model
from vitft.io.paths import expanded
from vitft.models.load import Loaded, load_trained


def load_model(checkpoint: str | Path, *, revision: str | None = None, headless: bool = False) -> Loaded:
    """Load an image classifier in float32, in evaluation mode, on the CPU, after verifying its checksums.

    Args:
        checkpoint: a run (its best checkpoint is taken), one of its checkpoints, or a Transformers folder or hub id.
        revision: the commit, branch or tag of a hub id.
        headless: also load a backbone without a classification head, with an untrained one for two classes.

    Returns:
        The Transformers `model`, the `labels` of its logits, and `preprocess`, which turns images into its input.

    Raises:
        ModelError: there is no such checkpoint, or it cannot be used.
    """
    folder = find_model(expanded(checkpoint))
    return load_trained(folder if folder.is_dir() else str(checkpoint), revision, headless=headless)
