"""The commands that look at what was trained: eval, report, compare and runs ls."""
# ruff: noqa: E501  (one line per option)

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitft.cli import tables
from vitft.cli.arguments import (
    TRAIN_SETTINGS,
    Device,
    Json,
    MaxPixels,
    Revision,
    ValueRange,
    loading,
    to_write,
)
from vitft.cli.options import options_from
from vitft.io import console


@options_from(TRAIN_SETTINGS, "Reading")
def evaluate(
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="Run folder, one of its checkpoints, or a Transformers folder or hub id. Default: the newest run in runs/.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Default: the dataset it was trained on.")] = None,
    dataset_revision: Revision = None,
    split: Annotated[str | None, typer.Option(help="Default: test, else validation.")] = None,
    max_eval_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Evaluate at most this many images, stratified.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per forward pass.")] = 64,
    device: Device = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Default: as in training if on the same kind of device, else fp32.")] = None,
    on_bad_image: Annotated[Literal["error", "skip"] | None, typer.Option(help="Default: as in training.")] = None,
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    errors: Annotated[int, typer.Option(min=0, metavar="<int>", help="List this many misclassified images, those that the model is surest of first.")] = 0,
    predictions: Annotated[Path | None, typer.Option(help="Write the probabilities of every image to this .parquet file.")] = None,
    strangers: Annotated[str | None, typer.Option(metavar="PATH", help="Also say how well the images of this folder or dataset, of other classes, are told from those of the split.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the confusion matrix as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Evaluate a checkpoint: accuracy with a 95 % interval, top-5, F1 per class, confusion matrix."""
    plot, predictions = to_write(plot, ".png"), to_write(predictions, ".parquet")
    with loading():
        from vitft.evaluation.evaluation import evaluate as score
        from vitft.evaluation.novelty import read_novelty
        from vitft.evaluation.runs import newest_run
        from vitft.evaluation.split_predictions import require
        from vitft.prediction.strangers import tell_strangers

    if checkpoint is None:
        checkpoint = str(newest_run())
        console.note(f"{checkpoint}, the newest run")
    if strangers is not None:
        read_novelty(checkpoint)  # so that what cannot be is said before the work

    def report_skipped(skipped: list[Any]) -> None:
        for one in skipped:
            console.warn(f"skipped {one.name}: {one.reason}")

    with console.working("evaluating") as progress:
        metrics = score(
            checkpoint, dataset=dataset, dataset_revision=dataset_revision, split=split, batch_size=batch_size,
            max_eval_samples=max_eval_samples, device=device, precision=precision, on_bad_image=on_bad_image,
            max_pixels=max_pixels, value_range=value_range, **overrides, progress=progress, report_skipped=report_skipped,
        )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one writes
        return
    apart = None
    if strangers is not None:
        with console.working("looking at strangers") as progress:
            apart = tell_strangers(
                checkpoint, strangers, dataset=dataset, split=split, limit=max_eval_samples, device=device,
                typed=overrides | {"dataset_revision": dataset_revision, "max_pixels": max_pixels,
                                   "on_bad_image": on_bad_image, "value_range": value_range},
                progress=progress,
            )  # fmt: skip
    said = metrics.predictions
    wrong = tables.mistakes(said, errors) if said is not None and errors else []
    if json:
        more = ({"errors": wrong} if errors else {}) | ({} if apart is None else {"strangers": apart.to_dict()})
        console.say_json(metrics.to_dict() | more)
    else:
        console.say(tables.metrics_report(metrics))
        if apart is not None:
            console.say(tables.strangers_report(apart))
        if errors and said is not None:
            console.say(tables.mistakes_report(wrong))
    if plot is not None:
        from vitft.evaluation.plots import plot_confusion

        plot_confusion(metrics, plot)
        console.note(f"confusion matrix: {plot}")
    if predictions is not None and said is not None:
        said.write(predictions)
        console.note(f"probabilities of {console.counted(len(said.ids), 'image')}: {predictions}")
    if errors or predictions is not None:
        require(said)  # only now, so that the scores are not lost


def report(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Run folder. Default: the newest run in runs/.")] = None,
    output: Annotated[Path | None, typer.Option(help="The .html file to write. Default: report.html in the run.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the dataset has moved to.")] = None,
    open: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:  # fmt: skip
    """Write a run's report: one page with its scores, curves, classes, confusions, mistakes and settings.

    The page needs nothing else, so it can be sent to others.
    """
    output = to_write(output, ".html", ".htm")
    with loading():
        from vitft.evaluation.runs import newest_run
        from vitft.reporting.report import write_report

    with console.working("reading the images") as progress:
        file = write_report(run or newest_run(), output, dataset=dataset, progress=progress)
    console.say_text(f"{file}\n")
    if open:
        import webbrowser

        webbrowser.open(file.absolute().as_uri())


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders; the others are compared with the first.")],
    split: Annotated[str | None, typer.Option(help="test or validation. Default: test, if all were scored on it.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="<int>", help="Random seed of the bootstrap.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw their losses, accuracies and learning rates as a PNG.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Compare runs on the same images: is one really better, where, and what was different?

    Paired tests: McNemar's for accuracy, a bootstrap for macro F1. Runs that were scored on other images are refused.
    """
    plot = to_write(plot, ".png")
    with loading():
        from vitft.evaluation.comparison import compare as compared
        from vitft.reporting.curves import plot_curves

    found = compared(runs, split=split, seed=seed)
    console.say_json(found.to_dict()) if json else console.say(tables.comparison_report(found))
    if plot is not None:
        plot_curves(runs, plot)
        console.note(f"curves: {plot}")


def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List runs, newest first: data, model, score, how far each came, and its size on disk."""
    with loading():
        from vitft.evaluation.runs import list_runs as found

    runs = found(folder)
    console.say_json({"runs": [one.to_dict() for one in runs]}) if json else console.say(
        tables.runs_report(runs, folder)
    )
