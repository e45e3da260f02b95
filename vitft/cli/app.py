"""The command line. A command is a docstring, options, and a call into `commands`.

Imports are inside the commands, so that `vitft --help` needs neither torch nor Transformers.
"""
# ruff: noqa: E501  (one line per option)

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
recipes_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="List, show and copy recipes, each a file with the settings of an experiment."
)
scratch_app = typer.Typer(cls=Group, no_args_is_help=True, help="Train the textbook's ViTs, from first principles.")
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Inspect a dataset.")
cache_app = typer.Typer(cls=Group, no_args_is_help=True, help="The cache of decoded photos.")
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
        metavar="<black:white>",
        help="Range of images with more than 8 bits; default: the checkpoint's, else the format's.",
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="auto: a GPU if available.")]


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
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder, with its settings.", rich_help_panel="Run")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would do and cost, without starting it.", rich_help_panel="Run")] = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Fine-tune a ViT on a dataset.

    A recipe overrides the defaults, and flags override the recipe.
    """
    from vitft.cli import commands

    commands.train(recipe, output, overwrite, resume, dry_run, overrides)


@app.command("eval")
@options_from(_train_settings, "Reading")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Run folder, one of its checkpoints, or a Transformers folder or hub id.")],
    dataset: Annotated[str | None, typer.Option(help="Default: the dataset it was trained on.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: test, else validation.")] = None,
    max_eval_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Evaluate at most this many images, stratified.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="<int>", help="Images per forward pass.")] = 64,
    device: Device = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Default: as in training.")] = None,
    on_bad_image: Annotated[Literal["error", "skip"] | None, typer.Option(help="Default: as in training.")] = None,
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    plot: Annotated[Path | None, typer.Option(help="Write the confusion matrix as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Evaluate a checkpoint: accuracy with a 95 % interval, top-5, F1 per class, confusion matrix."""
    from vitft.cli import commands

    options = {"dataset": dataset, "dataset_revision": dataset_revision, "split": split, "device": device,
               "max_eval_samples": max_eval_samples, "batch_size": batch_size, "precision": precision,
               "on_bad_image": on_bad_image, "max_pixels": max_pixels, "value_range": value_range} | overrides  # fmt: skip
    commands.evaluate(checkpoint, options, plot, json)


@app.command()
def verify_resume(
    recipe: Annotated[str, typer.Option(help="A recipe's name or file.", autocompletion=_fine_tuning_names)] = "smoke",
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
    from vitft.cli import commands

    settings = {"dataset": dataset, "max_steps": max_steps, "save_every": save_every}
    overrides = {name: value for name, value in settings.items() if value is not None}
    commands.verify_resume(recipe, overrides, kills, seed, json)


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Image files, folders and globs.")],
    checkpoint: Annotated[str, typer.Option(help="Run folder, one of its checkpoints, or a Transformers folder or hub id.")],
    top_k: Annotated[int, typer.Option(min=1, metavar="<int>", help="Classes per image.")] = 3,
    device: Device = "auto",
    format: Annotated[Literal["table", "csv", "jsonl"], typer.Option(help="Output format.")] = "table",
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Classify images. An unreadable image gets a row with its error, and the exit code is 3."""
    from vitft.cli import commands

    limits = {"max_pixels": max_pixels, "value_range": value_range}
    commands.predict(paths, checkpoint, top_k, device, limits, "json" if json else format)


@app.command()
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
    what: Annotated[Literal["data", "train", "eval"], typer.Argument(metavar="data|train|eval", help="The input pipeline, optimizer steps, or forward passes.")],
    model: Annotated[str, typer.Option(help="As for train; a preset has random weights.")] = "vit-micro",
    dataset: Annotated[str, typer.Option(help="As for train.")] = "digits",
    image_size: Annotated[int | None, typer.Option(metavar="<int>", help="Side of the input, in pixels; default: the model's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Images per step; default: as for train.")] = None,
    augment: Annotated[Literal["none", "flip", "crop"], typer.Option(help="For data and train.")] = "flip",
    freeze: Annotated[Literal["none", "backbone"], typer.Option(help="For train.")] = "none",
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: the fastest precision here.")] = "auto",
    attention: Annotated[Literal["auto", "eager", "sdpa"], typer.Option(help="As for train.")] = "auto",
    compile: Annotated[Literal["auto", "on", "off"], typer.Option(help="auto: on if a trial is faster.")] = "off",
    device: Device = "auto",
    max_train_samples: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Decode at most this many images.")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="<int>", help="Steps to time, after a warm-up.")] = 20,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure the speed of this machine: images/s, where the time of a step goes, and how close it is to the peak."""
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
    """Copy a recipe to edit it."""
    from vitft.config.recipe import command_for, copy_recipe, find_recipe, is_textbook

    copy, run = copy_recipe(name, target), command_for(is_textbook(find_recipe(name)))
    console.say_text(f"copied to {copy}; run it with: {run} {shlex.quote(str(copy))}\n")


@scratch_app.command("train")
@options_from(_textbook_settings)
def scratch_train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE|scalar", help="A textbook recipe's name or file; flags override it. scalar: a ViT of single numbers, with its own task.", autocompletion=_textbook_names)] = None,
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
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub dataset.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Write a grid of example images as a PNG.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Show a dataset's splits, classes, counts and image sizes."""
    from vitft.cli import commands

    options = {"revision": dataset_revision} | overrides
    commands.data_info(dataset, options, preview, json)


@data_app.command("check")
@options_from(_train_settings, "Reading")
def data_check(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Alias, hub id, folder, CSV, JSONL or parquet.")],
    dataset_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub dataset.")] = None,
    max_pixels: MaxPixels = None,
    value_range: ValueRange = None,
    quarantine: Annotated[Path | None, typer.Option(help="Write a list of the images to leave out, for vitft train --exclude.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with the pictures, for a browser.")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Check a dataset: unreadable files, duplicates, leaks between splits, labels.

    Exit code 3 if anything would stop training.
    """
    from vitft.cli import commands

    options = {"revision": dataset_revision} | overrides
    commands.data_check(dataset, options, max_pixels, value_range, quarantine, html, json)


@cache_app.command("ls")
def cache_ls(json: Json = False) -> None:
    """List the cached datasets, their size, and when they were last used."""
    from vitft.cli import commands

    commands.cache_ls(json)


@cache_app.command("clear")
def cache_clear() -> None:
    """Empty the cache; runs that use it are not affected."""
    from vitft.cli import commands

    commands.cache_clear()


def main() -> None:
    """Run the command line."""
    # Threads that wait for one another sleep. By default they spin for milliseconds, and where another program holds one
    # of their CPUs a step of a small model was seen to take 20 times as long. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
