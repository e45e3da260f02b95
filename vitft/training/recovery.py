"""Recovery from faults during a run: a non-finite loss, a full disk."""

import errno
import gc
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from vitft.checkpoints import checkpoint as ckpt
from vitft.errors import TrainingError
from vitft.io import console

T = TypeVar("T")
_ROLLBACKS = 5  # of one command; if that many do not help, something else is wrong
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable"
)


REMEDY = "Try a lower --lr or more --warmup."


class Diverged(TrainingError):  # noqa: N818
    """A non-finite loss, gradient or weight, in a run that can roll back to an earlier checkpoint."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}. {REMEDY}")
        self.fault, self.step = f"{what} at step {step}", step


def with_recovery(run: Path, attempt: Callable[[], T], again: Callable[[], T]) -> T:
    """Call `attempt`; if training diverges, call `again` from an earlier checkpoint at half the learning rate.

    That is the newest intact checkpoint with finite weights and losses. If a run gets no further than before, it
    goes further back the next time. Raises TrainingError if there is no such checkpoint.
    """
    failed, tried = 0, None
    with _writing(run):
        for _ in range(_ROLLBACKS):
            try:
                return attempt()
            except Diverged as fault:
                tried = _roll_back(run, fault, tried, further=fault.step > failed)
                failed = fault.step
            gc.collect()  # the model and its optimizer reference each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            attempt = again
        return attempt()


def _roll_back(run: Path, fault: Diverged, tried: int | None, *, further: bool) -> int:
    """Remove checkpoints after the one to go back to, and halve the learning rate; return that checkpoint's step."""
    chosen: list[int | None] = [None]
    if os.environ.get("RANK", "0") == "0":
        for folder in ckpt.step_folders(run):
            step = ckpt.step_of(folder)
            untried = tried is None or step < tried or (further and step > tried)
            if untried and ckpt.find_damage(folder) is None and ckpt.is_finite(folder):
                config = ckpt.read_config(run)
                config = config.model_copy(update={"lr": config.lr / 2})
                ckpt.write_config(run, config)
                ckpt.remove_after(run, step)
                console.warn(f"{fault.fault}; going back to {folder.name}, and continuing with --lr {config.lr:g}")
                chosen = [step]
                break
    found: int | None = broadcast_object_list(chosen)[0]  # processes wait until that is written
    if found is None:
        before = "no checkpoint was saved before it" if tried is None else f"there is none before step {tried}"
        raise TrainingError(f"{fault.fault}; {before} to go back to. {REMEDY}") from fault
    return found


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a TrainingError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # in errors of safetensors
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        file = Path(str(getattr(error, "filename", None) or run))
        if number not in _REMEDIES or not file.is_relative_to(run):
            raise  # it was not a file of the run
        raise TrainingError(
            f"{file} cannot be written: {os.strerror(number)}; earlier checkpoints are intact. "
            f"{_REMEDIES[number]}, then resume with: vitft train --resume {shlex.quote(str(run))}"
        ) from error
