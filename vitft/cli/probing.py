"""The commands before and after training: models ls, probe, data doubt, embed and soup."""
# ruff: noqa: E501  (one line per option)

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitft.cli import tables
from vitft.cli.arguments import TRAIN_SETTINGS, DatasetName, Device, Json, loading, to_write
from vitft.cli.options import options_from
from vitft.errors import DataError
from vitft.io import console

if TYPE_CHECKING:
    from vitft.config.train import TrainConfig

_OF_A_PROBE = (
    "dataset_revision", "split_seed", "val_fraction", "max_train_samples", "max_eval_samples", "exclude", "on_bad_image", "max_pixels",
    "value_range", "cache_gb", "Reading", "model", "model_revision", "image_size", "seed", "device", "threads", "precision",
)  # fmt: skip
_OF_FEATURES = (
    "dataset_revision", "max_pixels", "value_range", "Reading", "model_revision", "image_size", "device"
)  # fmt: skip
_OF_DOUBT = tuple(name for name in _OF_A_PROBE if name not in ("val_fraction", "max_eval_samples"))
_LISTED = 20  # unreadable images


def list_models(json: Json = False) -> None:
    """List pretrained models that are worth a try, with parameters, input size and the license on the model card.

    Any other image classifier or backbone of Transformers can be named, too. Without network, what is in the cache is shown.
    """
    with loading():
        from vitft.models.catalog import TRIED, catalog

    with console.working("asking the hub") as progress:
        models = catalog(progress)
    if json:
        console.say_json({"models": [asdict(one) for one in models], "tried": TRIED})
    else:
        console.say(tables.models_report(models, TRIED))


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
    plot = to_write(plot, ".png")
    from vitft.config.train import TrainConfig

    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    with loading():
        from vitft.probing.probe import next_commands
        from vitft.probing.probe import probe as probed

    result = probed(config)
    if json:
        console.say_json(result.to_dict())
    else:
        console.say(tables.probe_report(result))
        console.say_text("".join(f"{name}: {command}\n" for name, command in next_commands(config).items()))
    if plot is not None and os.environ.get("RANK", "0") == "0":  # of several processes, the first one writes
        from vitft.probing.plot import plot_few_shot

        plot_few_shot(result, plot)
        console.note(f"few-shot curve: {plot}")


@options_from(TRAIN_SETTINGS, *_OF_DOUBT)
def doubt(
    dataset: DatasetName,
    from_probability: Annotated[float, typer.Option(min=0, max=1, metavar="<float>", help="List labels that are wrong with at least this probability.")] = 0.3,
    folds: Annotated[int, typer.Option(min=2, metavar="<int>", help="Parts of the images, each judged by the others.")] = 10,
    quarantine: Annotated[Path | None, typer.Option(help="Write a list of these images, for vitft train --exclude.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures, for a browser.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Find training images whose label may be wrong, by what a pretrained model sees in the others.

    One pass over the images. Look at them before you believe it: the model is not always right.
    """
    quarantine, html = to_write(quarantine), to_write(html)
    from vitft.config.train import TrainConfig, range_of

    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    with loading():
        from vitft.data.validation.page import write_report
        from vitft.probing.doubt import doubt as doubted

    before = listed_before(quarantine, config)
    result = doubted(config, folds=folds, from_probability=from_probability)
    console.say_json(result.to_dict()) if json else console.say(tables.doubt_report(result))
    if html is not None:
        write_report(
            result.findings(), result.source, html, max_pixels=config.max_pixels, value_range=range_of(config.value_range)
        )  # fmt: skip
        console.note(f"pictures: {html}")
    if quarantine is not None:
        write_quarantine(quarantine, before, result.exclusions(), config)


def listed_before(quarantine: Path | None, config: "TrainConfig") -> list[str]:
    """The lines that a list of images to leave out keeps: of --exclude, and of the file itself if it is there already.

    People edit these lists, so none of their lines is lost. Raises DataError if one cannot be read.
    """
    from vitft.data.sources.source import read_exclusions

    lines = []
    if quarantine is not None and config.exclude is not None:
        lines += read_exclusions(Path(config.exclude), "exclude")
    if quarantine is not None and quarantine.is_file():
        lines += read_exclusions(quarantine, "quarantine")
    return list(dict.fromkeys(lines))


def write_quarantine(file: Path, before: Sequence[str], found: Sequence[str], config: "TrainConfig") -> None:
    """Write a list of images to leave out, and say how to train without them."""
    from vitft.config.train import not_default, train_command
    from vitft.io.atomic import write_text

    lines = list(dict.fromkeys([*before, *found]))
    write_text(file, "".join(f"{line}\n" for line in lines))
    command = train_command(not_default(config) | {"exclude": file})
    console.note(tables.to_leave_out(len(lines), len(before), file, command))


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
        from vitft.prediction.embedding import check_output
        from vitft.prediction.embedding import embed as embedded

    check_output(output, overwrite=overwrite)
    with console.working("reading features") as progress:
        found = embedded(images, model, output, overwrite=overwrite, progress=progress, **overrides)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        return
    for path, reason in found.unreadable[:_LISTED]:
        console.warn(f"not embedded: {path}: {reason}")
    if (more := len(found.unreadable) - _LISTED) > 0:
        console.warn(f"not embedded: {more:,} more, which --json lists")
    console.say_json(found.to_dict()) if json else console.say(tables.embedded_report(found))
    if bad := len(found.unreadable):
        raise DataError(f"{bad:,} of {found.images + bad:,} images could not be read, and are not in {output}.")


def soup(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, or checkpoints in them.")],
    output: Annotated[Path, typer.Option(help="New folder for the averaged model.")],
    greedy: Annotated[bool, typer.Option("--greedy", help="Begin with the best run, and add only those that do not make it worse.")] = False,
    dataset: Annotated[str | None, typer.Option(help="Where the dataset has moved to.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Average the weights of runs that started from one model: often better than each, at the cost of one.

    The runs must have the same starting point, classes and images. Whether the soup is better is measured on validation
    images, which no run was trained on.
    """
    with loading():
        from vitft.evaluation.soup import soup as made

    with console.working("scoring on validation images") as progress:
        result = made(runs, output, greedy=greedy, dataset=dataset, device=device, progress=progress)
    best = result.parts[0]
    if sum(part.chosen for part in result.parts) == 1:
        console.warn(f"no other run made it better: the soup is its best part alone, {best.run}")
    elif result.metrics.accuracy < best.metrics.accuracy:
        console.warn(f"the soup is below its best part, {best.run}: use that, or add --greedy")
    if json:
        console.say_json(result.to_dict())
        return
    console.say(tables.soup_report(result))
    folder, data = str(result.folder), dataset or result.dataset
    console.say_text(f"next: vitft eval {shlex.quote(folder)} --dataset {shlex.quote(data)}\n")
