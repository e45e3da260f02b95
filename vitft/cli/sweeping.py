"""The command that tries out settings: sweep."""
# ruff: noqa: E501  (one line per option)

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitft.cli import tables
from vitft.cli.arguments import TRAIN_SETTINGS, Json, loading, recipe_names
from vitft.cli.options import options_from
from vitft.errors import UsageError
from vitft.io import console

if TYPE_CHECKING:
    from vitft.config.train import TrainConfig


@options_from(TRAIN_SETTINGS)
def sweep(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or file; flags override it.", autocompletion=lambda: recipe_names(textbook=False))] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUES", help="A setting to vary: a range, lr=1e-5..1e-3, or a list, layer_decay=0.6,0.75,1. Can be repeated.", rich_help_panel="Run")] = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Number of trials. Default: all combinations of lists, or 20 if a setting has a range.", rich_help_panel="Run")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Runs per trial, with different seeds; their mean is compared. Default: 1.", rich_help_panel="Run")] = None,
    output: Annotated[Path | None, typer.Option(help="New folder; by default the next free number in sweeps/.", rich_help_panel="Run")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep in this folder; several processes may do so at once.", rich_help_panel="Run")] = None,
    json: Json = False,
    *, overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Try out settings, and compare the runs on validation images: learning rates, models, augmentations, seeds.

    Test images are not read. Runs that are worse than most are stopped. The best settings become a recipe.
    """
    if resume is not None and (recipe is not None or set_ or seeds or output is not None or overrides):
        raise UsageError("--resume goes on with a sweep as it is; only --trials can change.")
    if resume is None:  # before torch is loaded
        config, vary = read_plan(recipe, overrides, set_ or [])
    with loading():
        from vitft.sweeping import sweep as sweeping

    if resume is not None:
        result = sweeping.resume_sweep(resume, trials=trials)
    else:
        result = sweeping.sweep(config, vary, trials=trials, seeds=seeds or 1, output=output)
    if json:
        console.say_json(result.to_dict())
        return
    console.say(tables.sweep_report(result))
    console.say_text(f"next: vitft train --recipe {shlex.quote(str(result.recipe))}\n")


def read_plan(recipe: str | None, overrides: dict[str, Any], set_: list[str]) -> tuple["TrainConfig", dict[str, str]]:
    """The settings of a new sweep, and as text what it varies. Raises UsageError; nothing is opened."""
    from vitft.config.recipe import load_config
    from vitft.config.train import require_dataset
    from vitft.sweeping.space import read_space

    config, vary = load_config(recipe, overrides), _pairs(set_)
    require_dataset(config)
    read_space(vary, {name: getattr(config, name) for name in config.model_fields_set})
    return config, vary


def _pairs(texts: list[str]) -> dict[str, str]:
    """`name=values` as a dictionary. Raises UsageError."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name or not values.strip():
            raise UsageError(
                f"--set {text}: give a setting and its values, as lr=1e-5..1e-3 or layer_decay=0.6,0.75,1."
            )
        if name in pairs:
            raise UsageError(f"--set {name}: is given twice; put all its values into one.")
        pairs[name] = values.strip()
    return pairs
