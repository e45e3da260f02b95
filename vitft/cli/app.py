"""The command line: a command is a docstring, options and one call.

Rooms are imported inside commands, so that `vitft --help` needs neither torch nor transformers.
"""
# ruff: noqa: E501  (an option is a line, however long)

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitft.cli.group import Group
from vitft.cli.options import options_from
from vitft.io import console

app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip
recipes_app = typer.Typer(cls=Group, no_args_is_help=True, help="List, show and copy recipes: one experiment a file.")
scratch_app = typer.Typer(cls=Group, no_args_is_help=True, help="The textbook's networks: ViTs from first principles.")
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Look at a data set.")
cache_app = typer.Typer(cls=Group, no_args_is_help=True, help="Decoded photos that runs keep for the next one.")
data_app.add_typer(cache_app, name="cache")
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(scratch_app, name="scratch")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, metavar="<int>", help="Refuse images with more pixels than this.")
]
ValueRange = Annotated[
    str | None,
    typer.Option(
        metavar="<black:white>", help="Of images of more than 8 bits; the checkpoint's, or the format's own by default."
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="auto: a GPU if there is one.")]


def _recipe_names(incomplete: str) -> list[str]:
    from vitft.config.recipe import recipes

    return [recipe.name for recipe in recipes() if recipe.name.startswith(incomplete)]


def _fine_tuning_names(incomplete: str) -> list[str]:
    from vitft.config.recipe import recipes

    return [one.name for one in recipes() if not one.textbook and one.name.startswith(incomplete)]


def _textbook_names(incomplete: str) -> list[str]:
    from vitft.config.recipe import SCALAR, TEXTBOOK, recipes

    names = [SCALAR, *(recipe.name.removeprefix(TEXTBOOK) for recipe in recipes() if recipe.textbook)]
    return [name for name in names if name.startswith(incomplete)]


def _train_settings() -> Any:
    from vitft.config.train import TrainConfig

    return TrainConfig


def _textbook_settings() -> Any:
    from vitft.scratch_runner.config import TextbookConfig

    return TextbookConfig


RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name.", autocompletion=_recipe_names)]


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


@app.command()
@options_from(_train_settings)
def train(
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or file; flags override it.", rich_help_panel="Run", autocompletion=_fine_tuning_names)] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default the next free number in runs/.", rich_help_panel="Run")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder if it exists.", rich_help_panel="Run")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, as it was set.", rich_help_panel="Run")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would do and cost; start nothing.", rich_help_panel="Run")] = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Fine-tune a ViT on a data set.

    Settings come from the defaults, then the recipe, then the flags.
    """
    from vitft.cli import commands

    commands.train(recipe, output, overwrite, resume, dry_run, overrides)


@app.command("eval")
@options_from(_train_settings, "Reading")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Run folder, one of its checkpoints, or a Transformers folder or hub id.")],
    dataset: Annotated[str | None, typer.Option(help="The checkpoint's own data set by default.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub data set.")] = None,
    split: Annotated[str | None, typer.Option(help="test by default, else validation; train has to be asked for.")] = None,
    max_eval_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Evaluate at most this many images, stratified.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images of one forward pass.")] = 64,
    device: Device = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="As it was trained by default.")] = None,
    on_bad_image: Annotated[Literal["error", "skip"] | None, typer.Option(help="As it was trained by default.")] = None,
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    plot: Annotated[Path | None, typer.Option(help="Write the confusion matrix as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Score a checkpoint: accuracy with its interval, top-5, F1 by class, confusion matrix."""
    from vitft.cli import commands

    options = {"dataset": dataset, "dataset_revision": dataset_revision, "split": split, "device": device,
               "max_eval_samples": max_eval_samples, "batch_size": batch_size, "precision": precision,
               "on_bad_image": on_bad_image, "max_pixels": max_pixels, "value_range": value_range} | overrides  # fmt: skip
    commands.evaluate(checkpoint, options, plot, json)


@app.command()
def verify_resume(
    recipe: Annotated[str, typer.Option(help="A recipe's name or file.", autocompletion=_fine_tuning_names)] = "smoke",
    dataset: Annotated[str | None, typer.Option(help="In place of the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="In place of the recipe's.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="In place of the recipe's.")] = None,
    kills: Annotated[int, typer.Option(min=1, metavar="<int>", help="How often it is killed.")] = 1,
    seed: Annotated[int, typer.Option(metavar="<int>", help="Of the moments.")] = 0,
    json: Json = False,
) -> None:  # fmt: skip
    """Prove on this machine that nothing is lost: train, kill -9, resume, and compare every bit.

    It takes a little over twice as long as the run; exit code 5 if anything differs, or the run is too short to be killed.
    """
    from vitft.cli import commands

    settings = {"dataset": dataset, "max_steps": max_steps, "save_every": save_every}
    overrides = {name: value for name, value in settings.items() if value is not None}
    commands.verify_resume(recipe, overrides, kills, seed, json)


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Image files, folders and globs.")],
    checkpoint: Annotated[str, typer.Option(help="Run folder, one of its checkpoints, or a Transformers folder or hub id.")],
    top_k: Annotated[int, typer.Option(min=1, metavar="<int>", help="Classes to show for each image.")] = 3,
    device: Device = "auto",
    format: Annotated[Literal["table", "csv", "jsonl"], typer.Option(help="How the rows are printed.")] = "table",
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Classify images. An unreadable one gets a row of its own, and exit code 3 at the end."""
    from vitft.cli import commands

    limits = {"max_pixels": max_pixels, "value_range": value_range}
    commands.predict(paths, checkpoint, top_k, device, limits, "json" if json else format)


@app.command()
def explain(
    model: Annotated[str | None, typer.Option(help="Preset, local folder or hub id; ViT-B/16 at 224 by default.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the image in pixels.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Side of a patch in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Length of a token vector.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of encoder blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads in a block.")] = None,
    mlp: Annotated[int | None, typer.Option(help="Hidden width of a block's MLP.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    pre_logits: Annotated[int | None, typer.Option(help="Width of a tanh layer before the head.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images at a time.")] = 1,
    all_blocks: Annotated[bool, typer.Option("--all-blocks", help="List every encoder block.")] = False,
    image: Annotated[Path | None, typer.Option(help="Follow an image through a checkpoint: the numbers of every stage.", rich_help_panel="With an image")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Run, model folder or hub id; the bundled ViT by default.", rich_help_panel="With an image")] = None,
    stage: Annotated[str | None, typer.Option(help="Open a stage (attention, block.2.mlp, head): formula, code, a number worked out.", rich_help_panel="With an image")] = None,
    attention: Annotated[Path | None, typer.Option(help="Folder for pictures of where each head looks.", rich_help_panel="With an image")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page to explore in a browser: where each token looks, every stage.", rich_help_panel="With an image")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Show a ViT stage by stage: shapes, parameters, FLOPs and memory; with --image its numbers.

    Without options it is a tour, from pixel to logit.
    """
    from vitft.cli import commands

    sizes = {"model": model, "image_size": image_size, "patch_size": patch_size, "width": width, "layers": layers,
             "heads": heads, "mlp": mlp, "classes": classes, "pre_logits": pre_logits}  # fmt: skip
    given = {name: value for name, value in sizes.items() if value is not None}
    if any(wanted is not None for wanted in (image, checkpoint, stage, attention, html)):
        others = [*given, *(["batch_size"] if batch_size != 1 else []), *(["all_blocks"] if all_blocks else [])]
        commands.explain_image(image, checkpoint, stage, attention, html, json, others)
    else:
        commands.explain_sizes(given, batch_size, all_blocks, json)


@app.command()
def bench(
    what: Annotated[Literal["data", "train", "eval"], typer.Argument(metavar="data|train|eval", help="Input to the model, optimizer steps, or forward passes.")],
    model: Annotated[str, typer.Option(help="As for train; a preset's weights are random.")] = "vit-micro",
    dataset: Annotated[str, typer.Option(help="As for train.")] = "digits",
    image_size: Annotated[int | None, typer.Option(metavar="<int>", help="Side of the model's input in pixels; the model's own by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Images of one step; as for train by default.")] = None,
    augment: Annotated[Literal["none", "flip", "crop"], typer.Option(help="Of data and train.")] = "flip",
    freeze: Annotated[Literal["none", "backbone"], typer.Option(help="Of train.")] = "none",
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: what the hardware is fast at.")] = "auto",
    attention: Annotated[Literal["auto", "eager", "sdpa"], typer.Option(help="As for train.")] = "auto",
    compile: Annotated[Literal["auto", "on", "off"], typer.Option(help="auto: on where a trial of it is faster.")] = "off",
    device: Device = "auto",
    max_train_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Decode no more images than this.")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="<int>", help="Steps that are timed, after a warm-up.")] = 20,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure the speed of this machine: images/s, where a step's time goes, and how far the limit is."""
    from vitft.cli import commands

    settings = {"model": model, "dataset": dataset, "image_size": image_size, "batch_size": batch_size, "augment": augment,
                "freeze": freeze, "precision": precision, "device": device, "max_train_samples": max_train_samples,
                "attention": attention, "compile": compile}  # fmt: skip
    commands.bench(what, {name: value for name, value in settings.items() if value is not None}, steps, json)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes that come with vitft."""
    from vitft.cli.tables import recipe_table
    from vitft.config.recipe import recipes

    console.say(recipe_table(recipes()))


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
    """Copy a recipe, to change it."""
    from vitft.config.recipe import command_for, copy_recipe, find_recipe, is_textbook

    copy, run = copy_recipe(name, target), command_for(is_textbook(find_recipe(name)))
    console.say_text(f"copied to {copy}; run it with: {run} {shlex.quote(str(copy))}\n")


@scratch_app.command("train")
@options_from(_textbook_settings)
def scratch_train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE|scalar", help="A textbook recipe's name or file; flags override it. scalar: a ViT of single numbers, with a task of its own.", autocompletion=_textbook_names)] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default the next free number in runs/.", rich_help_panel="Run")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel="Run")] = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Train a textbook network: a small ViT, by the chapters of vitft/scratch.

    Try it with no network: [bold]vitft scratch train scalar[/], or [bold]vitft scratch train --dataset digits[/]
    """
    from vitft.cli import commands

    commands.scratch_train(recipe, output, json, overrides)


@scratch_app.command("figures")
def scratch_figures(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write them.")],
) -> None:
    """Draw the figures of docs/textbook.md, one a chapter, from the chapters' own code."""
    from vitft.cli import commands

    commands.scratch_figures(folder)


@data_app.command("info")
@options_from(_train_settings, "Reading")
def data_info(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Alias, hub id, folder, CSV, JSONL or parquet.")],
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub data set.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Write a grid of example images as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Show a data set's splits, classes, counts and image sizes."""
    from vitft.cli import commands

    options = {"revision": dataset_revision} | overrides
    commands.data_info(dataset, options, preview, json)


@data_app.command("check")
@options_from(_train_settings, "Reading")
def data_check(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Alias, hub id, folder, CSV, JSONL or parquet.")],
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub data set.")] = None,
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    quarantine: Annotated[Path | None, typer.Option(help="Write a list of the images to leave out, for vitft train --exclude.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the suspects' pictures.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Look for what is wrong with a data set: broken files, duplicates, leaks between splits, labels.

    Exit code 3 if anything would stop a training.
    """
    from vitft.cli import commands

    options = {"revision": dataset_revision} | overrides
    commands.data_check(dataset, options, max_pixels, value_range, quarantine, html, json)


@cache_app.command("ls")
def cache_ls(json: Json = False) -> None:
    """List what is kept: data, size, and when it was last used."""
    from vitft.cli import commands

    commands.cache_ls(json)


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove all of it; runs that use it go on undisturbed."""
    from vitft.cli import commands

    commands.cache_clear()


def main() -> None:
    """Run the command line."""
    # Threads that wait for one another sleep. By default they spin for milliseconds, and where another program holds one
    # of their CPUs a step of a small model was seen to take 20 times as long. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
