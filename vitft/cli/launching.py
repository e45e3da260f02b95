"""The command that hands another one to a cluster: launch."""
# ruff: noqa: E501  (one line per option)

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vitft.cli.arguments import TRAIN_SETTINGS
from vitft.cli.options import overrides_of
from vitft.cli.sweeping import read_plan
from vitft.cli.usage import in_one_line, is_usage_error
from vitft.errors import UsageError
from vitft.io import console
from vitft.io.paths import expanded

RESOURCES = "Resources"


def launch(
    ctx: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND", help="A command of vitft and its arguments: train, eval, predict, sweep, ...", show_default=False)] = None,
    *,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a job of SLURM.")] = False,
    nodes: Annotated[int, typer.Option(min=1, metavar="<int>", help="Machines.", rich_help_panel=RESOURCES)] = 1,
    gpus_per_node: Annotated[str, typer.Option(metavar="[TYPE:]N", help="GPUs of each, with a process for each; 0: CPUs.", rich_help_panel=RESOURCES)] = "1",
    cpus_per_task: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="CPUs of each process; default: the cluster's, often 1.", rich_help_panel=RESOURCES)] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 90 (minutes), 4:00:00 or 2-12 (days-hours). When it is up, what saves as it goes (train, sweep, predict to .csv or .jsonl) is queued again, unless --no-requeue; other jobs end.", rich_help_panel=RESOURCES)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition to submit to.", rich_help_panel=RESOURCES)] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.", rich_help_panel=RESOURCES)] = None,
    no_requeue: Annotated[bool, typer.Option("--no-requeue", help="When it is preempted or its time is up, save and end; do not queue the job again.", rich_help_panel=RESOURCES)] = False,
    notice: Annotated[int | None, typer.Option(min=1, max=65_535, metavar="SECONDS", help="How long before its time is up the job begins to save; longer for large checkpoints. Default: 120.", rich_help_panel=RESOURCES)] = None,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="Another option of sbatch: --sbatch=--qos=low. Can be repeated.", rich_help_panel=RESOURCES)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script instead of submitting it.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the script instead of submitting it.")] = None,
) -> None:  # fmt: skip
    """Run a command of vitft on a cluster, as a job that goes on where it was interrupted.

    A job that is preempted, or whose time is up, saves, is queued again, and goes on in the same folder.

    For example: [bold]vitft launch --slurm --gpus-per-node 8 --time 4:00:00 -- train --dataset photos[/]
    """
    words = command or []
    if not slurm:
        raise UsageError("launch needs --slurm, the only kind of cluster it supports.")
    if not words:
        raise UsageError("nothing to launch; add a command after --, as in: vitft launch --slurm -- train --dataset X")
    if dry_run and output is not None:
        raise UsageError("--dry-run prints the script, and --output writes it; remove one.")
    name, options = _parsed(ctx, words)
    from vitft.io.atomic import new_file
    from vitft.launching.requeued import requeued
    from vitft.launching.slurm import Resources, job_script, submit

    resources = Resources(
        nodes, gpus_per_node, cpus_per_task, time, partition, account, not no_requeue, notice, sbatch or ()
    )  # fmt: skip
    work = requeued(name, words, options)
    script = job_script(name, work, resources, Path.cwd())
    if dry_run:
        console.say_text(script)
    elif output is not None:
        file = expanded(output)
        if not file.parent.is_dir() or file.is_dir():
            raise UsageError(f"{output}: give a file in a folder that exists.")
        if file.exists():  # it may have been edited
            raise UsageError(f"{output} already exists; choose another name.")
        with new_file(file) as temporary:
            temporary.write_bytes(os.fsencode(script))
        console.note(f"submit it with: sbatch {shlex.quote(str(file))}")
    else:
        job = submit(script)
        console.say_text(f"job {job}; its output goes to slurm-{job}.out\n")


def _parsed(ctx: typer.Context, words: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of a command of vitft and the values of its options, checked as if it were run. Raises UsageError."""
    command: Any = ctx.find_root().command
    names: list[str] = []
    context, rest = None, words
    try:
        while hasattr(command, "resolve_command"):
            context = command.make_context(names[-1] if names else "vitft", rest, parent=context)
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            names.append(name)
        with command.make_context(name, rest, parent=context) as context:
            options = dict(context.params)
    except Exception as error:
        if not is_usage_error(error):
            raise
        raise UsageError(f"vitft {shlex.join(words)}: {in_one_line(error)}") from error
    if names == ["launch"]:
        raise UsageError("launch cannot be launched; give another command of vitft after --.")
    if names[0] in ("train", "sweep") and options["resume"] is None:
        read_plan(options["recipe"], overrides_of(TRAIN_SETTINGS, dict(options)), list(options.get("set_") or ()))
    return " ".join(names), options
