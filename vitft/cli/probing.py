"""The commands on features: probe."""
# ruff: noqa: E501  (one line per option)

from pathlib import Path
from typing import Annotated, Any

import typer

from vitft.cli import tables
from vitft.cli.arguments import TRAIN_SETTINGS, DatasetName, Json, check_picture, loading
from vitft.cli.options import options_from
from vitft.io import console

_OF_A_PROBE = (
    "dataset_revision", "val_fraction", "max_train_samples", "max_eval_samples", "exclude", "on_bad_image", "max_pixels",
    "value_range", "cache_gb", "Reading", "model", "model_revision", "image_size", "seed", "device", "threads", "precision",
)  # fmt: skip


@options_from(TRAIN_SETTINGS, *_OF_A_PROBE)
def probe(
    dataset: DatasetName,
    plot: Annotated[Path | None, typer.Option(help="Write the few-shot curve as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Probe a pretrained model on a dataset, in one pass: what accuracy to expect, before anything is trained.

    On validation images: logistic regression and nearest neighbors on the model's features, the accuracy by the number
    of images per class, the classes that are confused most, and what full fine-tuning would cost.
    """
    check_picture(plot)
    from vitft.config.train import TrainConfig

    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    with loading():
        from vitft.probing.probe import next_commands
        from vitft.probing.probe import probe as probed

    result = probed(config)
    if plot is not None:
        from vitft.probing.plot import plot_few_shot

        plot_few_shot(result, plot)
        console.note(f"few-shot curve: {plot}")
    if json:
        console.say_json(result.to_dict())
        return
    console.say(tables.probe_report(result))
    console.say_text("".join(f"{name}: {command}\n" for name, command in next_commands(config).items()))
