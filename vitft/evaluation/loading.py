"""A trained model, found and loaded."""

from pathlib import Path

from vitft.checkpoints.checkpoint import find_model
from vitft.checkpoints.exported import exported_file, read_exported
from vitft.errors import ModelError
from vitft.io.paths import expanded
from vitft.models.load import Loaded, load_trained


def load_model(checkpoint: str | Path, *, revision: str | None = None, headless: bool = False) -> Loaded:
    """Load an image classifier in float32, in evaluation mode, on the CPU, after verifying its checksums.

    Args:
        checkpoint: a run (its best checkpoint is taken), one of its checkpoints, a Transformers folder or hub id, or
            what `vitft export` wrote: the folder, or the `.onnx`, `.xml` or `.pt2` file in it.
        revision: the commit, branch or tag of a hub id.
        headless: also load a backbone without a classification head, with an untrained one for two classes.

    Returns:
        The Transformers `model` (of an exported file, what is called like one), the `labels` of its logits, and
        `preprocess`, which turns images into its input.

    Raises:
        ModelError: there is no such checkpoint, or it cannot be used.
    """
    folder = find_model(expanded(checkpoint))
    if (file := exported_file(folder)) is not None:
        if headless:
            raise ModelError(f"{checkpoint}: is exported, so it has no features to look at; use the run it came from.")
        return read_exported(file)
    return load_trained(folder if folder.is_dir() else str(checkpoint), revision, headless=headless)
