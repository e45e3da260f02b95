"""Arguments that several commands share, and what they check before the work."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitft.errors import UsageError
from vitft.io import console
from vitft.io.paths import expanded

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

DatasetName = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="Alias, hub id, folder, CSV, JSONL, parquet or archive file, or URL of shards."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub dataset.")]
TRAIN_SETTINGS = "vitft.config.train:TrainConfig"


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def loading() -> Any:
    """Shown during imports that take seconds."""
    return console.working("loading PyTorch and Transformers")


def to_write(file: Path | None, *suffixes: str) -> Path | None:
    """The file that a command will write at its end, with `~` expanded, checked before the work. Raises UsageError."""
    if file is None:
        return None
    place = expanded(file)
    if not place.parent.is_dir() or place.is_dir() or (suffixes and place.suffix.lower() not in suffixes):
        raise UsageError(f"{file}: give a {' '.join([*suffixes[:1], 'file'])} in a folder that exists.")
    return place


def recipe_names(textbook: bool | None = None) -> list[str]:
    """The names of recipes, for completion."""
    from vitft.config.recipe import names

    return names(textbook)
