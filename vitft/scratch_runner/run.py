"""Reads a finished textbook run: its weights, and everything needed to use them."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from vitft.errors import ModelError, UsageError
from vitft.scratch.train import load
from vitft.scratch.vit import ViT
from vitft.spec import ViTSpec

WEIGHTS, SUMMARY, METRICS = "weights.safetensors", "summary.json", "metrics.jsonl"


@dataclass(frozen=True)
class Network:
    """A trained textbook network; mean and std normalize its images, channel by channel."""

    weights: ViT
    spec: ViTSpec
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_textbook_run(folder: Path) -> bool:
    """Whether a folder is a run of `vitft scratch train`, finished or not."""
    return (folder / WEIGHTS).is_file()


def read_run(folder: Path) -> Network:
    """The network of a finished run. Raises ModelError if the run is unfinished or its files are corrupt."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        spec = ViTSpec(**summary["spec"])
        weights = load(folder / WEIGHTS, spec)
        labels = tuple(summary["labels"])
        if len(labels) != spec.classes:
            raise ValueError(f"{len(labels)} labels for {spec.classes} classes")
        return Network(weights, spec, labels, tuple(summary["mean"]), tuple(summary["std"]))
    except FileNotFoundError:
        raise ModelError(f"{folder}: this textbook run has not finished; wait for it or train again.") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError, SafetensorError, UsageError) as error:
        raise ModelError(f"{folder}: corrupt textbook run ({error}); train again.") from None
