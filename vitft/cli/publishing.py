"""The command that puts a model on the hub."""
# ruff: noqa: E501  (one line per option)

from typing import Annotated

import typer

from vitft.cli import tables
from vitft.cli.arguments import Json, loading
from vitft.io import console


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub id; it is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create it for its owner alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be uploaded; needs no network.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; it is created if it does not exist. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: Annotated[str | None, typer.Option(help="For the model card, as the hub spells it, such as apache-2.0.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Upload a model to the Hugging Face hub: weights, preprocessing and a model card with its scores.

    Files of the same name get a new version; nothing is deleted. Tokens and local paths are looked for, and never uploaded.
    """
    with loading():
        from vitft.publishing.push import push as pushed

    with console.working("uploading"):
        found = pushed(run, repo, private=private, dry_run=dry_run, revision=revision, message=message, license=license)
    if json:
        console.say_json(found.to_dict())
    elif dry_run:
        console.say(tables.push_report(found))
        console.say_text(f"\n{found.card}")
    else:
        console.say_text(f"{found.url}\n")
