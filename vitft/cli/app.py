"""The command line. A command parses its options, calls the package, and shows the result.

Imports are inside the commands, so that `vitft --help` needs neither torch nor Transformers.
"""
# ruff: noqa: E501  (one line per option)

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitft.cli import (
    exporting,
    launching,
    learning,
    predicting,
    probing,
    publishing,
    scoring,
    serving,
    sweeping,
    tables,
)
from vitft.cli.arguments import (
    TRAIN_SETTINGS,
    DatasetName,
    Device,
    Json,
    given,
    loading,
    recipe_names,
    to_write,
)
from vitft.cli.group import Group
from vitft.cli.options import options_from
from vitft.errors import DataError, TrainingError, UsageError, VitftError, as_flag
from vitft.io import console
from vitft.io.paths import expanded

_OPENING = ("dataset_revision", "max_pixels", "value_range", "Reading")  # settings of the commands on datasets
app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip
recipes_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="List, show and copy recipes, each a file with the settings of an experiment."
)
runs_app = typer.Typer(cls=Group, no_args_is_help=True, help="What was trained here.")
models_app = typer.Typer(cls=Group, no_args_is_help=True, help="Pretrained models to start from.")
scratch_app = typer.Typer(cls=Group, no_args_is_help=True, help="Train the textbook's ViTs, from first principles.")
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Inspect a dataset, or pack it.")
cache_app = typer.Typer(cls=Group, no_args_is_help=True, help="The cache of decoded photos and streamed shards.")
data_app.add_typer(cache_app, name="cache")
_TRAIN, _FIRST, _USE, _LEARN = "Train", "Look first", "Use a model", "Understand"  # groups of commands in --help
app.add_typer(recipes_app, name="recipes", rich_help_panel=_TRAIN)
app.add_typer(runs_app, name="runs", rich_help_panel=_TRAIN)
app.add_typer(models_app, name="models", rich_help_panel=_FIRST)
app.add_typer(data_app, name="data", rich_help_panel=_FIRST)
app.add_typer(scratch_app, name="scratch", rich_help_panel=_LEARN)


RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", help="A recipe's name.", autocompletion=lambda: recipe_names())
]


def _version(wanted: bool) -> None:
    if wanted:
        from vitft import __version__

        console.say(f"vitft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:  # fmt: skip
    """Fine-tune Vision Transformers for image classification, and see how they work.

    Try it with no network: [bold]vitft train --dataset digits --model vit-micro[/]
    """


@app.command(rich_help_panel=_TRAIN)
@options_from(TRAIN_SETTINGS)
def train(
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or file; flags override it.", rich_help_panel="Run", autocompletion=lambda: recipe_names(textbook=False))] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default the next free number in runs/.", rich_help_panel="Run")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder if it exists.", rich_help_panel="Run")] = False,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder, with its settings.", rich_help_panel="Run")] = None,
    report: Annotated[Literal["on", "off"], typer.Option(help="Write report.html into the run folder at the end.", rich_help_panel="Run")] = "on",
    json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would do and cost, without starting it.", rich_help_panel="Run")] = False,
    devices: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="With --dry-run: also plan the run on this many devices like this one.", rich_help_panel="Run")] = None,
    link_gbps: Annotated[float | None, typer.Option(min=0.001, metavar="<float>", help="With --devices: gigabits a second that each can send to the next. Default: 100.", rich_help_panel="Run")] = None,
    hourly_price: Annotated[float | None, typer.Option(min=0, metavar="<float>", help="With --devices: what one device costs an hour.", rich_help_panel="Run")] = None,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Fine-tune a ViT on a dataset.

    A recipe overrides the defaults, and flags override the recipe.
    """
    if devices is not None and not dry_run:
        several = f"torchrun --nproc-per-node {devices} -m vitft train ..."
        raise UsageError(f"--devices plans a run; add --dry-run. To train on several: {several}")
    if devices is None and (hourly_price is not None or link_gbps is not None):
        flag = "--link-gbps" if hourly_price is None else "--hourly-price"
        raise UsageError(f"{flag} applies only to a plan; add --dry-run --devices N.")
    if resume is not None:
        if recipe is not None or output is not None or overwrite or dry_run:
            raise UsageError("--resume continues a run as it is; leave out --recipe, --output, --overwrite, --dry-run.")
        with loading():
            from vitft.training import trainer

        _show(trainer.resume(resume, overrides), json, report)
        return
    from vitft.config.recipe import load_config
    from vitft.config.train import require_dataset

    config = load_config(recipe, overrides)
    require_dataset(config)  # before torch is loaded
    if dry_run and json:
        raise UsageError("--dry-run prints a table; leave out --json.")
    with loading():
        from vitft.training import trainer
        from vitft.training.cost import dry_run as planning
        from vitft.training.cost.cluster import Cluster

    if dry_run:
        cluster = None if devices is None else Cluster(devices, **given(link_gbps=link_gbps, hourly_price=hourly_price))
        console.say(tables.plan_report(planning.plan(config, output, overwrite, cluster)))
    else:
        _show(trainer.train(config, output=output, overwrite=overwrite), json, report)


def _show(result: Any, json: bool, report: str) -> None:
    """Show a run's result, and write its report. What cannot be reported is a warning: the run itself is finished."""
    from vitft.reporting.report import FILE, write_report

    new = result.speed is not None or not (result.run / FILE).exists()
    if report == "on" and new and os.environ.get("RANK", "0") == "0":
        try:
            with console.working("writing the report") as progress:
                console.note(f"report: {write_report(result.run, progress=progress)}")
        except VitftError as error:
            console.warn(f"no report: {error}")
    console.say_json(result.to_dict()) if json else console.say_text(tables.training_report(result))


app.command("eval", rich_help_panel=_TRAIN)(scoring.evaluate)
app.command(rich_help_panel=_TRAIN)(scoring.report)
app.command(rich_help_panel=_TRAIN)(scoring.compare)
app.command(rich_help_panel=_TRAIN)(sweeping.sweep)
app.command(rich_help_panel=_TRAIN, context_settings={"allow_interspersed_args": False})(launching.launch)
app.command(rich_help_panel=_TRAIN)(probing.soup)
runs_app.command("ls")(scoring.list_runs)
app.command(rich_help_panel=_FIRST)(probing.probe)
data_app.command()(probing.doubt)
models_app.command("ls")(probing.list_models)
app.command(rich_help_panel=_USE)(predicting.predict)
app.command(rich_help_panel=_USE)(serving.serve)
app.command(rich_help_panel=_USE)(exporting.export)
app.command(rich_help_panel=_USE)(publishing.push)
app.command(rich_help_panel=_USE)(probing.embed)
app.command(rich_help_panel=_LEARN)(learning.learn)


@app.command(rich_help_panel=_TRAIN)
def verify_resume(
    recipe: Annotated[str, typer.Option(help="A recipe's name or file.", autocompletion=lambda: recipe_names(textbook=False))] = "smoke",
    dataset: Annotated[str | None, typer.Option(help="Overrides the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Overrides the recipe's.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Overrides the recipe's.")] = None,
    kills: Annotated[int, typer.Option(min=1, metavar="<int>", help="How often to kill the run.")] = 1,
    seed: Annotated[int, typer.Option(metavar="<int>", help="Seed of the moments to kill it at.")] = 0,
    json: Json = False,
) -> None:  # fmt: skip
    """Verify on this machine that nothing is lost: train, kill -9, resume, and compare every bit.

    Takes a little over twice as long as the run. Exit code 5 if anything differs, or if the run is too short to be killed.
    """
    from tempfile import TemporaryDirectory

    from vitft.config.recipe import load_config
    from vitft.training.verify_resume import verify_resume

    config = load_config(recipe, given(dataset=dataset, max_steps=max_steps, save_every=save_every))
    with TemporaryDirectory() as work:
        verdict = verify_resume(config, Path(work), kills=kills, seed=seed, say=console.note)
    if json:
        console.say_json(asdict(verdict) | {"repeated": verdict.repeated})
    else:
        console.say_text(tables.verdict_report(verdict, kills))
    if not verdict.equal or verdict.left:
        raise TrainingError("the resumed run differs from the uninterrupted one; please report this with the recipe.")


@app.command(rich_help_panel=_LEARN)
def explain(
    model: Annotated[str | None, typer.Option(help="Preset, local folder or hub id; default: ViT-B/16 at 224 pixels.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the image, in pixels.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Side of a patch, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of a token.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of encoder blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads per block.")] = None,
    mlp: Annotated[int | None, typer.Option(help="Hidden width of a block's MLP.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    pre_logits: Annotated[int | None, typer.Option(help="Width of a tanh layer before the head.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per batch.")] = 1,
    all_blocks: Annotated[bool, typer.Option("--all-blocks", help="List every encoder block.")] = False,
    image: Annotated[Path | None, typer.Option(help="Follow an image through a checkpoint: the numbers of every stage.", rich_help_panel="With an image")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Run, model folder or hub id; default: the bundled ViT.", rich_help_panel="With an image")] = None,
    stage: Annotated[str | None, typer.Option(help="Explain a stage (attention, block.2.mlp, head): formula, code, a worked-out number.", rich_help_panel="With an image")] = None,
    attention: Annotated[Path | None, typer.Option(help="Folder for pictures of each head's attention.", rich_help_panel="With an image")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to explore in a browser: attention, and every stage.", rich_help_panel="With an image")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Show a ViT stage by stage: shapes, parameters, FLOPs and memory, and with --image its numbers.

    Without options: a tour, from pixel to logit.
    """
    sizes = given(model=model, image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=heads,
                   mlp=mlp, classes=classes, pre_logits=pre_logits)  # fmt: skip
    outputs = given(stage=stage, attention=attention, html=html, checkpoint=checkpoint)
    if image is None and not outputs:
        from vitft.explain import table, tour

        spec = table.resolve_spec(**sizes)
        if json:
            console.say_json(table.document(spec, batch_size))
            return
        if not sizes:
            console.say(tour.tour(spec))
        console.say(table.stage_table(spec, batch_size, all_blocks))
        if not sizes:
            console.say(tour.next_steps())
        return
    if image is None:
        raise UsageError(f"{as_flag(next(iter(outputs)))} needs an image; add --image FILE.")
    of_the_table = given(**sizes, batch_size=None if batch_size == 1 else batch_size, all_blocks=all_blocks or None)
    if wrong := next(iter(of_the_table), None):
        raise UsageError(f"{as_flag(wrong)} sets sizes of the table without --image; with an image, use --checkpoint.")
    with loading():
        from vitft.explain.attention import draw_attention
        from vitft.explain.page import write_page
        from vitft.explain.stage import find_lessons, lesson_text
        from vitft.explain.trace import document, trace_image, trace_table

    trace = trace_image(image, checkpoint or "vit-micro")
    lessons = [] if stage is None else find_lessons(trace, stage)
    if json:
        result = document(trace, [lesson.stage for lesson in lessons] or None)
        for row, lesson in zip(result["stages"], lessons, strict=False):
            row["lesson"] = asdict(lesson)
        console.say_json(result)
    elif lessons:
        console.say(lesson_text(lessons))
    elif attention is None and html is None:
        console.say(trace_table(trace))
    if attention is not None:
        written = draw_attention(trace, expanded(attention))
        console.note(f"{console.counted(len(written), 'picture')} in {attention}; {written[-1].name} has all of them")
    if html is not None:
        write_page(trace, expanded(html))
        console.note(f"{html}: open it in a browser; it needs no network")


@app.command(rich_help_panel=_FIRST)
@options_from(TRAIN_SETTINGS, "Augmentation")
def bench(
    what: Annotated[Literal["data", "train", "eval"], typer.Argument(metavar="data|train|eval", help="The input pipeline, optimizer steps, or forward passes.")],
    model: Annotated[str, typer.Option(help="As for train; a preset has random weights.")] = "vit-micro",
    dataset: Annotated[str, typer.Option(help="As for train.")] = "digits",
    image_size: Annotated[int | None, typer.Option(metavar="<int>", help="Side of the input, in pixels; default: the model's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Images per step; default: as for train.")] = None,
    freeze: Annotated[str, typer.Option(metavar="<int>|none|backbone", help="For train.")] = "none",
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: the fastest precision here.")] = "auto",
    attention: Annotated[Literal["auto", "eager", "sdpa"], typer.Option(help="As for train.")] = "auto",
    compile: Annotated[Literal["auto", "on", "off"], typer.Option(help="auto: on if a trial is faster.")] = "off",
    device: Device = "auto",
    max_train_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Decode at most this many images.")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="<int>", help="Steps to time, after a warm-up.")] = 20,
    profile: Annotated[Path | None, typer.Option(metavar="FILE.json", help="For train: show the longest kernels or operators of a step, and write a Chrome trace.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Measure the speed of this machine: images/s, where the time of a step goes, and how close it is to the peak."""
    with loading():
        from vitft.training.cost.bench import bench as measured

    settings = given(
        model=model, dataset=dataset, image_size=image_size, batch_size=batch_size, freeze=freeze,
        precision=precision, attention=attention, compile=compile, device=device, max_train_samples=max_train_samples,
    )  # fmt: skip
    found = measured(what, settings | overrides, steps, profile and expanded(profile))
    console.say_json(found) if json else console.say(tables.bench_report(found))
    if profile is None:
        return
    if found["profile"]["trace"] is None:  # of which there was a warning
        raise typer.Exit(1)
    console.note(f"{profile}: open it in chrome://tracing or ui.perfetto.dev")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes that come with vitft."""
    from vitft.config.recipe import recipes

    console.say(tables.recipe_table(recipes()))


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe."""
    from vitft.config.recipe import find_recipe

    console.say_text(find_recipe(name).read_text(encoding="utf-8"))


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeName,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File or folder to copy to.")] = Path(),
) -> None:
    """Copy a recipe to edit it."""
    from vitft.config.recipe import command_for, copy_recipe, find_recipe

    copy, run = copy_recipe(name, expanded(target)), command_for(find_recipe(name))
    console.say_text(f"copied to {copy}; run it with: {run} {shlex.quote(str(copy))}\n")


@scratch_app.command("train")
@options_from("vitft.scratch_runner.config:TextbookConfig")
def scratch_train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE|scalar", help="A textbook recipe's name or file; flags override it. scalar: a ViT of single numbers, with its own task.", autocompletion=lambda: recipe_names(textbook=True))] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default the next free number in runs/.", rich_help_panel="Run")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel="Run")] = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Train a textbook network: a small ViT, by the chapters of vitft/scratch.

    Try it with no network: [bold]vitft scratch train scalar[/], or [bold]vitft scratch train --dataset digits[/]
    """
    from vitft.config.recipe import SCALAR

    if recipe == SCALAR:
        if output is not None or (others := [name for name in overrides if name != "seed"]):
            wrong = "--output" if output is not None else as_flag(others[0])
            raise UsageError(f"scalar has its own task and sizes, and writes no files; leave out {wrong}.")
        from vitft.scratch_runner.report import scalar_document, scalar_tables, train_scalar

        report = train_scalar(**overrides)
        console.say_json(scalar_document(report)) if json else console.say(scalar_tables(report))
        return
    from vitft.scratch_runner.config import load_config

    name, config = load_config(recipe, overrides)
    if config.engine == "numpy":
        # Its two threads share the work; two more of BLAS in each wait for one another (on a busy machine a step of
        # cifar10-patch4 then took 10 times as long). NumPy reads this when it is first imported: below.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vitft.scratch_runner.report import run_report
    from vitft.scratch_runner.training import train

    result = train(config, output=output, name=name)
    if json:
        console.say_json({"run": str(result.run)} | result.summary)
    else:
        console.say_text(run_report(result.run, result.summary))


@scratch_app.command("figures")
def scratch_figures(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write them.")],
) -> None:
    """Draw the figures of docs/textbook.md, one a chapter, from the chapters' own code."""
    from vitft.scratch_runner.figures import draw_figures

    try:
        written = draw_figures(expanded(folder))
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}; choose another folder.") from error
    console.note(f"{len(written)} figures in {folder}")


@data_app.command("info")
@options_from(TRAIN_SETTINGS, "dataset_revision", "max_pixels", "Reading", "Augmentation")
def data_info(
    dataset: DatasetName,
    preview: Annotated[Path | None, typer.Option(help="Write a grid of example images as a PNG; with --augment, --mixup, ..., of what the model sees.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Show a dataset's splits, classes, counts and image sizes."""
    from vitft.config.train import TrainConfig
    from vitft.data.augmentation.settings import SETTINGS, Augmentation
    from vitft.data.info import describe
    from vitft.data.sources.source import source_of

    preview = to_write(preview, ".png")
    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    changes = [name for name in SETTINGS if name in overrides]
    if changes and preview is None:
        raise UsageError(f"{as_flag(changes[0])} changes what --preview shows; add --preview FILE.png.")
    source = source_of(config)
    described = describe(source, config.max_pixels)
    console.say_json(described) if json else console.say(tables.data_report(described))
    if preview is not None:
        from vitft.data.preview import preview as draw

        draw(source, preview, augmentation=Augmentation.of(config) if changes else None)
        console.note(f"preview: {preview}")


@data_app.command("check")
@options_from(TRAIN_SETTINGS, *_OPENING)
def data_check(
    dataset: DatasetName,
    quarantine: Annotated[Path | None, typer.Option(help="Write a list of the images to leave out, for vitft train --exclude.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with the pictures, for a browser.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Check a dataset: unreadable files, duplicates, leaks between splits, labels.

    Exit code 3 if anything would stop training.
    """
    quarantine, html = to_write(quarantine), to_write(html)
    from vitft.config.train import TrainConfig, range_of

    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    with loading():
        from vitft.data.sources.identity import has_names
        from vitft.data.sources.source import source_of
        from vitft.data.validation.check import KINDS, check, document, quarantine_lines

    before = probing.listed_before(quarantine, config)
    source = source_of(config)
    how: dict[str, Any] = {"max_pixels": config.max_pixels, "value_range": range_of(config.value_range)}
    folder = expanded(dataset)
    of_files = folder.is_dir() and all(map(has_names, source.splits.values()))
    with console.working("checking") as progress:
        found = check(source, folder if of_files else None, **how, progress=progress)
    images = sum(len(split) for split in source.splits.values())
    console.say_json(document(found)) if json else console.say(tables.check_report(found, KINDS, images))
    if html is not None:
        from vitft.data.validation.page import write_report

        write_report(found, source, html, **how)
        console.note(f"report: {html}")
    if quarantine is not None:
        probing.write_quarantine(quarantine, before, quarantine_lines(found), config)
    if broken := sum(one.severity == "error" for one in found):
        raise DataError(f"{broken:,} of {images:,} images would stop training; fix, remove or exclude them.")


@data_app.command("pack")
@options_from(TRAIN_SETTINGS, *_OPENING)
def data_pack(
    dataset: DatasetName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the shards; a new folder, or one that an interrupted command began.")],
    resize: Annotated[int | None, typer.Option(min=1, max=10_000, metavar="<int>", help="Shrink images whose shorter side is longer than this. Default: copy all bit for bit.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, metavar="<int>", help="Most megabytes of images in a shard.")] = 500,
    on_bad_image: Annotated[Literal["error", "skip"], typer.Option(help="If an image cannot be read: stop, or leave it out.")] = "error",
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Pack a dataset into parquet shards: few large files, to copy or to upload.

    Their images are in random order. What they hold is read as the dataset was: vitft train --dataset FOLDER
    """
    from vitft.config.train import TrainConfig, range_of

    config = TrainConfig.parse({"dataset": dataset} | overrides, "flags")
    with loading():
        from vitft.data.packing import pack
        from vitft.data.sources.source import source_of

    source = source_of(config)
    with console.working("packing") as progress:
        packed = pack(
            source, expanded(folder), resize=resize, shard_bytes=shard_mb * 1_000_000, skip_bad=on_bad_image == "skip",
            max_pixels=config.max_pixels, value_range=range_of(config.value_range), progress=progress,
        )  # fmt: skip
    for image in packed.skipped:
        console.warn(f"left out {image.name}: {image.reason}")
    if json:
        console.say_json(packed.to_dict())
        return
    console.say_text(
        f"{console.counted(packed.images, 'image')} in {console.counted(packed.shards, 'shard')}, "
        f"{console.size(packed.size)}, in {folder}; "
        f"checksums in SHA256SUMS\nnext: vitft train --dataset {shlex.quote(str(folder))}\n"
    )


@cache_app.command("ls")
def cache_ls(json: Json = False) -> None:
    """List the cached datasets, their size, and when they were last used."""
    from vitft.data.stores import cache
    from vitft.data.streaming import blocks

    kept, streamed = cache.entries(), blocks.kept()
    if json:
        listed = [{"name": e.name, "images": e.images, "bytes": e.size, "used": e.used} for e in kept]
        parts = {"name": "streamed shards", "images": None, "bytes": streamed.size, "used": streamed.used}
        console.say_json([*listed, *([parts] if streamed.blocks else [])])
    elif kept or streamed.blocks:
        console.say(tables.cache_table(kept, cache.root().parent, streamed))
    else:
        console.say_text("the cache is empty.\n")


@cache_app.command("clear")
def cache_clear() -> None:
    """Empty the cache; runs that use it are not affected."""
    from vitft.data.stores import cache
    from vitft.data.streaming import blocks

    console.say_text(f"removed {console.size(cache.clear() + blocks.clear())}.\n")


def main() -> None:
    """Run the command line."""
    # Threads that wait for one another sleep. By default they spin for milliseconds, and where another program holds one
    # of their CPUs a step of a small model was seen to take 20 times as long. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
