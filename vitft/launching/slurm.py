"""A job of SLURM: the script, which is text to read and to edit, and its submission."""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vitft.errors import UsageError
from vitft.launching.requeued import SHARED, Work

NOTICE_S = 120
"""How many seconds before the end of a job's time it is asked to save, unless it is told."""

_TIME = re.compile(r"(?:(\d+)-(\d{1,2})|(\d+))(?::(\d{1,2}))?(?::(\d{1,2}))?|UNLIMITED", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Resources:
    """What a job asks for, as in sbatch. What is None is left to the cluster.

    Attributes:
        nodes: How many machines.
        gpus_per_node: A number, or a type and a number such as h100:8; 0 for a job on CPUs.
        cpus_per_task: CPUs of each process.
        time: The time limit: minutes, hours:minutes:seconds or days-hours.
        partition: The partition to submit to.
        account: The account to charge.
        requeue: Whether the job is queued again when it is preempted or its time is up.
        notice: How many seconds before its time is up it is asked to save; None for NOTICE_S.
        options: Other options of sbatch, each as one text such as --qos=low.
    """

    nodes: int = 1
    gpus_per_node: str = "1"
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    requeue: bool = True
    notice: int | None = None
    options: Sequence[str] = ()

    @property
    def per_node(self) -> int:
        """Processes of each node: one for each GPU."""
        return max(1, int(self.gpus_per_node.rpartition(":")[2]))

    @property
    def processes(self) -> int:
        """All processes."""
        return self.nodes * self.per_node

    def check(self, name: str) -> None:
        """Raise UsageError unless these are resources that the command `name` can use."""
        if not re.fullmatch(r"([\w.-]+:)?\d+", self.gpus_per_node, re.ASCII):
            raise UsageError(f"--gpus-per-node {self.gpus_per_node}: give a number, or a type and a number: h100:8.")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UsageError(
                f"--time {self.time}: give minutes, hours:minutes:seconds or days-hours, such as 90, 4:00:00 or 2-12; "
                "or UNLIMITED."
            )
        for flag, value in (("--partition", self.partition), ("--account", self.account)):
            if value is not None and not re.fullmatch(r"[\w.,:+@/-]+", value):
                raise UsageError(f"{flag} {value!r}: give a name without spaces.")
        for option in self.options:
            if not re.fullmatch(r"--?[a-zA-Z]\S*( \S+)?", option) or not option.isprintable():
                raise UsageError(f"--sbatch {option!r}: give one option of sbatch, such as --sbatch=--qos=low.")
        if self.processes > 1 and name not in SHARED:
            raise UsageError(
                f"{name} works in one process, got {self.nodes} × {self.per_node}; "
                f"leave out --nodes and --gpus-per-node ({', '.join(SHARED)} share their work)."
            )

    def check_notice(self, name: str, *, saves: bool) -> None:
        """Raise UsageError if a job with this command cannot be asked to save so early."""
        if not saves and self.notice is not None:
            raise UsageError(f"--notice {self.notice}: {name} has nothing to save before its time is up; leave it out.")
        if saves and self.time is not None and self.notice_s >= _seconds(self.time):
            raise UsageError(
                f"--time {self.time}: the job is asked to save {self.notice_s} s before its time is up, which is "
                "at once; give a longer --time or a shorter --notice."
            )

    @property
    def notice_s(self) -> int:
        """Seconds before the time is up."""
        return NOTICE_S if self.notice is None else self.notice

    def lines(self) -> list[str]:
        """The options of sbatch."""
        tasks = self.per_node if self.processes > 1 else None
        gpus = None if self.gpus_per_node == "0" else self.gpus_per_node
        named = {
            "nodes": self.nodes, "ntasks-per-node": tasks, "gpus-per-node": gpus,
            "cpus-per-task": self.cpus_per_task, "time": self.time, "partition": self.partition,
            "account": self.account,
        }  # fmt: skip
        lines = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*lines, *self.options]


def job_script(name: str, work: Work, resources: Resources, folder: Path) -> str:
    """The script of a job, which saves when it is preempted or its time is up, requeues itself, and then goes on.

    Args:
        name: The command of vitft.
        work: What is run, and what when the job is requeued.
        resources: What the job asks for.
        folder: Where it is run.

    Returns:
        The text for sbatch.

    Raises:
        UsageError: if the command cannot use the resources.
    """
    resources.check(name)
    resources.check_notice(name, saves=work.saves is not None)
    template = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined).from_string(
        files("vitft").joinpath("launching", "job.sh").read_text(encoding="utf-8")
    )
    # srun takes no number of CPUs from sbatch since SLURM 22.05.
    cpus = f"--cpus-per-task={resources.cpus_per_task} " if resources.cpus_per_task else ""
    return template.render(
        name=f"vitft-{name.replace(' ', '-')}", options=resources.lines(), notice_s=resources.notice_s,
        requeue=resources.requeue,
        folder=shlex.quote(str(folder)), place=work.place, command=_array(work.command), begun=work.begun,
        again=_array(work.again) if work.again else None, saves=work.saves, processes=resources.processes,
        per_node=resources.per_node, srun_options=cpus,
    )  # fmt: skip


def _seconds(time: str) -> float:
    """A time limit of sbatch, in seconds. Without days, the first number is of minutes; of three, of hours."""
    found = _TIME.fullmatch(time)
    if found is None:
        return math.inf
    days, hours, number, second, third = (int(part or 0) for part in found.groups())
    if found[3] and not found[5]:
        seconds = 60 * number + second
    else:
        seconds = 86400 * days + 3600 * (hours + number) + 60 * second + third
    return seconds or math.inf  # 0 is no limit, as UNLIMITED is


def _array(words: Sequence[str]) -> str:
    """The elements of an array of bash, with a line for each option."""
    text = shlex.quote(sys.executable) + " -m vitft"
    for word in words:
        text += f"\n  {word}" if word.startswith("--") else f" {word}"
    return text


def submit(script: str) -> str:
    """Submit a job; returns its number. Raises UsageError."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=os.fsencode(script), capture_output=True)
    except OSError as error:
        raise UsageError(
            f"sbatch cannot be run ({error.strerror}): submit on a login node of the cluster, "
            "or add --dry-run to see the script."
        ) from error
    said = os.fsdecode(done.stderr).replace("sbatch: error: ", "").splitlines()
    if done.returncode:
        raise UsageError(f"sbatch refuses the job: {'; '.join(said) or f'exit code {done.returncode}'}")
    return os.fsdecode(done.stdout).strip().partition(";")[0]
