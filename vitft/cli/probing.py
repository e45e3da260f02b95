"""The commands on features: probe and embed."""
# ruff: noqa: E501  (one line per option)

from pathlib import Path
from typing import Annotated, Any

import typer

from vitft.cli import tables
from vitft.cli.arguments import TRAIN_SETTINGS, DatasetName, Json, check_picture, loading
from vitft.cli.options import options_from
from vitft.errors import DataError
from vitft.io import console

_OF_A_PROBE = (
    "dataset_revision", "val_fraction", "max_train_samples", "max_eval_samples", "exclude", "on_bad_image", "max_pixels",
    "value_range", "cache_gb", "Reading", "model", "model_revision", "image_size", "seed", "device", "threads", "precision",
)  # fmt: skip
_OF_FEATURES = (
    "dataset_revision", "max_pixels", "value_range", "Reading", "model_revision", "image_size", "device"
)  # fmt: skip
_LISTED = 20  # unreadable images


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


@options_from(TRAIN_SETTINGS, *_OF_FEATURES)
def embed(
    images: Annotated[list[str], typer.Argument(metavar="PATH", help="Image files, folders and globs; or one dataset, as for train.")],
    model: Annotated[str, typer.Option(help="Run folder, one of its checkpoints, or a Transformers folder or hub id.")],
    output: Annotated[Path, typer.Option(help="The .parquet file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Write the features of images to a parquet file: for search, clustering and other classifiers.

    The images of a dataset get their split and label. An unreadable image is left out and listed, and the exit code is 3.
    """
    from vitft.config.train import TrainConfig

    TrainConfig.parse(overrides, "flags")
    with loading():
        from vitft.evaluation.embedding import check_output
        from vitft.evaluation.embedding import embed as embedded

    check_output(output, overwrite=overwrite)
    with console.working("reading features") as progress:
        found = embedded(images, model, output, overwrite=overwrite, progress=progress, **overrides)
    for path, reason in found.unreadable[:_LISTED]:
        console.warn(f"not embedded: {path}: {reason}")
    if (more := len(found.unreadable) - _LISTED) > 0:
        console.warn(f"not embedded: {more:,} more, which --json lists")
    console.say_json(found.to_dict()) if json else console.say(tables.embedded_report(found))
    if bad := len(found.unreadable):
        raise DataError(f"{bad:,} of {found.images + bad:,} images could not be read, and are not in {output}.")
