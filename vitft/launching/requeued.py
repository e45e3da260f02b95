"""How a command goes on when its job is requeued: what it is then, and how one sees that it has saved something."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitft.errors import UsageError
from vitft.io.paths import expanded, partial_name

SHARED = ("embed", "eval", "predict", "probe", "train")
"""The commands whose work several processes share."""


@dataclass(frozen=True)
class Work:
    """A command in a job, as text for a shell, in which `$run` is the folder it writes to.

    Attributes:
        command: What is run first.
        place: The folder it writes to; None if the command has no `$run`.
        again: What is run when the job is requeued; empty if that is `command`.
        begun: A file that is there once `command` has begun and `again` can go on; None if `again` can begin as well.
        saves: A pattern of the files that change when progress is saved; None if nothing is.
    """

    command: Sequence[str]
    place: str | None = None
    again: Sequence[str] = ()
    begun: str | None = None
    saves: str | None = None


def requeued(name: str, words: Sequence[str], options: Mapping[str, Any]) -> Work:
    """How a command of vitft goes on when its job is requeued.

    Args:
        name: The command, such as train.
        words: What was typed: the command and its arguments.
        options: The values of its options, by name.

    Raises:
        UsageError: if it would replace what it had saved itself, or if there is an earlier run at its place.
    """
    if name in _FOLDERS and not options.get("dry_run"):
        return _in_a_folder(name, words, options)
    if name == "predict" and options["output"] is not None and not options["overwrite"]:
        file = expanded(options["output"])
        if (options["format"] or file.suffix[1:].lower()) in ("csv", "jsonl"):
            return _in_a_file(words, file, resumes=options["resume"])
    return Work(quoted(words))


def quoted(words: Sequence[str]) -> list[str]:
    """Words as a shell reads them."""
    return [shlex.quote(word) for word in words]


@dataclass(frozen=True)
class _Folder:
    begun: str
    saves: str
    default: str


_FOLDERS = {
    "train": _Folder("config.yaml", "checkpoints/*", "runs"),
    "sweep": _Folder("sweep.yaml", "trials/*/*/checkpoints/*", "sweeps"),
}


def _in_a_folder(name: str, words: Sequence[str], options: Mapping[str, Any]) -> Work:
    """A run or a sweep: its folder must have the same name each time the job starts."""
    folder, output, resume = _FOLDERS[name], options["output"], options["resume"]
    saves = f'"$run"/{folder.saves}'
    if resume is not None:
        return Work(quoted(words), shlex.quote(str(expanded(resume))), saves=saves)
    if options.get("overwrite"):
        raise UsageError(
            "--overwrite would replace what the job itself had saved before it was requeued; "
            "leave it out and choose another --output, or remove the earlier run first."
        )
    typed, place = quoted(words), f'{folder.default}/slurm-"$SLURM_JOB_ID"'
    after = words.index(name) + 1
    if output is None:
        typed[after:after] = ["--output", '"$run"']
    else:
        there = expanded(output)
        if (there / folder.begun).exists():
            raise UsageError(
                f"output {there}: there is one already; go on with it by launching "
                f"{name} --resume {shlex.quote(str(there))}, or choose another."
            )
        place = shlex.quote(str(there))
    again = [*typed[:after], "--resume", '"$run"', *(["--json"] if options["json"] else [])]
    if options.get("report") == "off":
        again += ["--report", "off"]
    return Work(typed, place, again, f'"$run"/{folder.begun}', saves)


def _in_a_file(words: Sequence[str], file: Path, *, resumes: bool) -> Work:
    """Predictions: with --resume they go on, or begin if there are none.

    Raises UsageError if there are some already, and they are not to go on.
    """
    partial = partial_name(file)
    saves = shlex.quote(str(partial))
    if resumes:
        return Work(quoted(words), saves=saves)
    if file.exists():
        raise UsageError(f"{file}: the file exists; choose another, or add --overwrite to replace it.")
    if partial.exists():
        raise UsageError(f"{partial} is of a command that did not end; add --resume to go on, or --overwrite.")
    after = words.index("predict") + 1
    return Work(quoted(words), again=quoted([*words[:after], "--resume", *words[after:]]), saves=saves)
