"""`vitft` in processes of its own that start at once: forked from one that has imported everything."""

import multiprocessing as mp
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.test_trainer import config
from vitft.history import recorded

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(
    ["vitft.trainer", "vitft.classification", "vitft.evaluation", "transformers.models.vit.modeling_vit"]
)
Process = Any

# 320 images in batches of 8: 40 steps an epoch, 80 in all.
LONGER = {"batch_size": 8, "max_train_samples": 320, "save_every": 10, "epochs": 2}


def flags(**changes: object) -> list[str]:
    """Those of a small run, with changes."""
    given = config(**LONGER | changes).model_dump(exclude_defaults=True)
    return [
        word
        for name, value in given.items()
        for word in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]


def start(*words: str, log: Path, before: Callable[[], None] | None = None, largest_file: int | None = None) -> Process:
    """`vitft` with these words; what it says goes to `log`, what it may write to one file is `largest_file` bytes.

    `before` runs first, in the process: a module's function.
    """
    process = _context.Process(target=_run, args=(words, log, before, largest_file))
    process.start()
    return process


def finish(*words: str, log: Path, **how: Any) -> tuple[int, str]:
    """Run to the end: the exit code, and all that was said."""
    process = start(*words, log=log, **how)
    process.join(240)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, log.read_text()


def within(extra_bytes: int, call: Callable[..., Any], *arguments: Any) -> str:
    """What a function came to in a process that may take so many bytes beside those it has: its repr, or its error."""
    receiving, sending = _context.Pipe(duplex=False)
    process = _context.Process(target=_within, args=(extra_bytes, sending, call, arguments))
    process.start()
    sending.close()
    try:
        return str(receiving.recv())
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"
    finally:
        process.join(60)


def _within(extra_bytes: int, sending: Any, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        said = repr(call(*arguments))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    sending.send(said)


def steps_done(run: Path) -> int:
    """The last step that a run has written down."""
    return max((line["step"] for line in recorded(run)), default=0)


def wait_for_step(alive: Callable[[], bool], run: Path, step: int) -> None:
    """Until a running process has got there."""
    wait_until(lambda: steps_done(run) >= step, alive)


def wait_until(reached: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Until a running process has got so far."""
    limit = time.monotonic() + 120
    while not reached():
        assert alive(), "the run ended by itself"
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.002)


def _run(words: tuple[str, ...], log: Path, before: Callable[[], None] | None, largest_file: int | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["vitft", *words]
    if before is not None:
        before()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from vitft.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
