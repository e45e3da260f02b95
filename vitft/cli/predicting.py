"""The command that classifies images, and what it writes and sorts while it goes."""
# ruff: noqa: E501  (one line per option)

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitft.cli import tables
from vitft.cli.arguments import Device, MaxPixels, ValueRange, given, loading
from vitft.errors import UsageError
from vitft.io import console
from vitft.io.paths import expanded, partial_name

OUTPUT, SORTING = "Output", "Sorting"


def predict(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="Image files, folders and globs.", show_default=False)] = None,
    *,
    checkpoint: Annotated[str | None, typer.Option(help="Run folder, one of its checkpoints, a Transformers folder or hub id, or an exported file. Default: the newest run in runs/.")] = None,
    paths_from: Annotated[str | None, typer.Option(metavar="FILE", help="Also read paths from this file, one a line or ended by NUL; - for standard input.")] = None,
    top_k: Annotated[int, typer.Option(min=1, metavar="<int>", help="Classes per image.")] = 3,
    calibrated: Annotated[bool, typer.Option("--calibrated", help="Divide logits by the temperature that the run fitted on its validation images.")] = False,
    min_confidence: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="Mark images whose best class has a lower probability as unsure.")] = None,
    min_precision: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="The same, with the confidence from which on this fraction of the validation images is right, such as 0.99.")] = None,
    none_of_these: Annotated[float | None, typer.Option(min=0, max=1, metavar="<float>", help="Mark images that are stranger to the model than this fraction of the validation images, such as 0.99, as none of its classes.")] = None,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    format: Annotated[Literal["table", "csv", "jsonl", "parquet"] | None, typer.Option(help="Default: by the suffix of --output, else a table.", rich_help_panel=OUTPUT)] = None,
    output: Annotated[Path | None, typer.Option(help="Write a .csv, .jsonl or .parquet file while it goes. Until it is whole, it is called NAME.partial.csv.", rich_help_panel=OUTPUT)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.", rich_help_panel=OUTPUT)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a partial .csv or .jsonl file.", rich_help_panel=OUTPUT)] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write those of all classes, to a .parquet file.", rich_help_panel=OUTPUT)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)] = False,
    sort_into: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Copy each image into FOLDER/CLASS/, unsure ones into FOLDER/unsure/, and so on.", rich_help_panel=SORTING)] = None,
    link: Annotated[Literal["hard", "symbolic"] | None, typer.Option(help="Link instead of copying.", rich_help_panel=SORTING)] = None,
    explain: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw for each image what spoke for its best class.", rich_help_panel=OUTPUT)] = None,
    explain_by: Annotated[Literal["attention", "occlusion"] | None, typer.Option(help="attention: its weights times gradients; occlusion: what hiding each part costs, for any model. Default: attention if the model has it.", rich_help_panel=OUTPUT)] = None,
) -> None:  # fmt: skip
    """Classify images. An unreadable image gets a row with its error, and the exit code is 3."""
    paths = paths or []
    _check(
        paths, paths_from, json=json, format=format, output=output, overwrite=overwrite, resume=resume,
        sort_into=sort_into, link=link, explain=explain, explain_by=explain_by,
    )  # fmt: skip
    with loading():
        from vitft.evaluation.runs import newest_run
        from vitft.hardware.device import find_device
        from vitft.hardware.processes import join_processes
        from vitft.prediction.explaining import Explainer
        from vitft.prediction.job import Tally, run
        from vitft.prediction.outputs import Layout, Writer
        from vitft.prediction.predictor import Predictor
        from vitft.prediction.resuming import Done, go_on
        from vitft.prediction.sharing import batches
        from vitft.prediction.sorting import Sorter, check_apart

    kind, file = ("json", None) if json else _target(format, output, overwrite=overwrite, resume=resume)
    if probabilities and kind != "parquet":
        raise UsageError("--probabilities are written to parquet; add --output FILE.parquet.")
    if file is not None and resume and file.exists() and not partial_name(file).exists():
        console.note(f"{file} is whole: nothing to resume (for other images: another --output, or --overwrite)")
        return
    for flag, folder in (("--sort-into", sort_into), ("--explain", explain)):
        if folder is not None:
            check_apart(flag, folder, paths)
    if checkpoint is None:
        checkpoint = str(newest_run())
        console.note(f"{checkpoint}, the newest run")
    processes = join_processes(find_device(device))
    processes.gather([None])  # each has looked for a partial file before the first one begins to write it
    if processes.count > 1 and paths_from == "-":
        raise UsageError("--paths-from -: several processes cannot share standard input; give a file.")
    images, total = _images(paths, paths_from)
    predictor = Predictor(
        checkpoint, device=device, calibrated=calibrated, min_confidence=min_confidence, min_precision=min_precision,
        none_of_these=none_of_these, **given(max_pixels=max_pixels, value_range=value_range),
    )  # fmt: skip
    sure = predictor.threshold is not None
    layout, done = Layout(top_k, sure, predictor.labels, probabilities, none_of_these is not None), Done()
    if file is not None and resume and partial_name(file).exists():
        done = go_on(partial_name(file), kind, layout.columns, images, predictor, top_k)
        for flag, folder in (("--sort-into", sort_into), ("--explain", explain)):
            if folder is not None and done.read:
                _check_begun(flag, expanded(folder), len(done.read))
        console.note(f"going on after {console.counted(done.count, 'image')}")
    tally, collected = Tally(done.count, done.unreadable), _Collected()
    shared = batches(predictor, images, processes, top_k=top_k, probabilities=probabilities)
    if processes.rank > 0:  # the first one writes
        run(shared, [], tally, lambda count: None)
        return
    sorter = None if sort_into is None else Sorter(sort_into, predictor.labels, link=link)
    explainer = None if explain is None else Explainer(explain, predictor, explain_by, done.read)
    beside: list[Writer] = [writer for writer in (sorter, explainer) if writer is not None]
    with _writer(kind, file, layout, collected, appends=done.count > 0) as writer, _progress(kind, file) as progress:
        run(shared, [*beside, writer], tally, lambda count: progress(count, total))
    if file is not None:
        console.note(f"{console.counted(tally.done, 'image')}: {file}")
    if sorter is not None:
        folders = ", ".join(f"{count:,} {name}" for name, count in sorter.counts.most_common())
        console.note(f"sorted into {sort_into}: {folders or 'none'}")
    if explainer is not None:
        console.note(f"what spoke for the best class of {console.counted(explainer.count, 'image')}: {explain}")
    if json:
        console.say_json({"predictions": [row.to_dict() for row in collected.rows]})
    tally.check()


def _check(paths: list[str], paths_from: str | None, **options: Any) -> None:
    """Check the combination of options, before torch is loaded. Raises UsageError."""
    if not paths and paths_from is None:
        raise UsageError("no images: give files, folders or globs, or a list of them with --paths-from.")
    if "-" in paths and not Path("-").exists():
        raise UsageError("-: to read paths from standard input, add --paths-from -")
    if options["json"] and (options["format"] or options["output"]):
        raise UsageError("--json prints one document; leave out --format and --output.")
    if options["output"] is None and (options["overwrite"] or options["resume"]):
        raise UsageError(f"--{'resume' if options['resume'] else 'overwrite'} is for a file; add --output FILE.")
    if options["overwrite"] and options["resume"]:
        raise UsageError("--resume goes on with a file, and --overwrite starts again; remove one.")
    if options["link"] and options["sort_into"] is None:
        raise UsageError("--link says how to sort; add --sort-into FOLDER.")
    if options["explain_by"] and options["explain"] is None:
        raise UsageError("--explain-by says how to explain; add --explain FOLDER.")


def _check_begun(flag: str, folder: Path, count: int) -> None:
    """Raise UsageError if nothing is in a folder, of this flag, that was to have files of so many images already."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UsageError(
            f"{flag} {folder}: is empty, and --resume leaves out the {count:,} images that have a row; give the folder of "
            f"before, no {flag}, or --overwrite in place of --resume."
        )


def _target(format: str | None, output: Path | None, *, overwrite: bool, resume: bool) -> tuple[str, Path | None]:
    """The format to write, and the file, if it is not the screen. Raises UsageError if that cannot be."""
    from vitft.prediction.outputs import check_output, format_of

    if output is None:
        if format == "parquet":
            raise UsageError("--format parquet is for a file; add --output FILE.")
        return format or "table", None
    file = expanded(output)
    if format == "table":
        raise UsageError("--format table is for the screen; leave out --output, or write csv, jsonl or parquet.")
    kind = format_of(file, format)
    check_output(file, kind, overwrite=overwrite, resume=resume)
    return kind, file


def _images(paths: list[str], paths_from: str | None) -> tuple[Iterator[Any], int | None]:
    """The images, and how many they are: unknown for a list, which is read while it goes. Raises DataError for none."""
    from vitft.prediction.inputs import find_images

    if paths_from is None:
        found = list(find_images(paths))
        return iter(found), len(found)
    images = find_images(chain(paths, _listed(paths_from)))
    first = next(images)  # before the model is loaded
    return chain([first], images), None


def _listed(file: str) -> Iterator[str]:
    from vitft.prediction.inputs import listed_paths

    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else expanded(file).open("rb") as stream:
            yield from listed_paths(stream, f"--paths-from {file}")
    except OSError as error:
        raise UsageError(f"--paths-from {file}: {error.strerror or error}; give a text file of paths.") from error


@contextmanager
def _writer(kind: str, file: Path | None, layout: Any, collected: "_Collected", *, appends: bool) -> Iterator[Any]:
    from vitft.prediction.outputs import output_file, text_writer

    if file is not None:
        with output_file(file, kind, layout, appends=appends) as writer:
            yield writer
    elif kind == "json":
        yield collected
    elif kind == "table":
        yield tables.PredictionsTable(console.say, console.out.width)
    else:
        yield text_writer(kind, console.say_text, layout)


class _Collected:
    """Predictions for one document."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def write(self, rows: Sequence[Any]) -> None:
        """Keep some more."""
        self.rows += rows


def _progress(kind: str, file: Path | None) -> Any:
    """Progress on standard error, but not between rows on the same screen."""
    if file is None and kind != "json" and console.out.is_terminal:
        return nullcontext(lambda done, count: None)
    return console.working("classifying")
