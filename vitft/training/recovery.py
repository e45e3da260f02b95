"""What a run does about what goes wrong on its way: a loss that is no number, a disk that takes no more."""

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
_ROLLBACKS = 5  # halvings of the rate in one command: then something else is wrong
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable"
)


REMEDY = "Try a lower --lr or more --warmup."


class Diverged(TrainingError):  # noqa: N818  (it reads as what it is)
    """A loss, a gradient or weights that are no numbers, in a run that may go back to an earlier checkpoint."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}. {REMEDY}")
        self.fault, self.step = f"{what} at step {step}", step


def persisting(run: Path, attempt: Callable[[], T], again: Callable[[], T]) -> T:
    """Train; where that diverges, `again` from an earlier checkpoint at half the rate, which is written down.

    That is the newest whole one with finite weights and losses. Where a run got no further than before, what it
    began from was at fault, so the next one lies farther back. Raises TrainingError when there is none.
    """
    failed, tried = 0, None
    with _writing(run):
        for _ in range(_ROLLBACKS):
            try:
                return attempt()
            except Diverged as fault:
                tried = _roll_back(run, fault, tried, further=fault.step > failed)
                failed = fault.step
            gc.collect()  # the model and its optimizer hold one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            attempt = again
        return attempt()


def _roll_back(run: Path, fault: Diverged, tried: int | None, *, further: bool) -> int:
    """Make the checkpoint to go back to the newest, and halve the rate; the checkpoint's step."""
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
                console.warn(f"{fault.fault}; going back to {folder.name}, and on from there at --lr {config.lr:g}")
                chosen = [step]
                break
    found: int | None = broadcast_object_list(chosen)[0]  # no process goes on before that is written
    if found is None:
        before = "no checkpoint was saved before it" if tried is None else f"there is none before step {tried}"
        raise TrainingError(f"{fault.fault}; {before} to go back to. {REMEDY}") from fault
    return found


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    """A disk that is full or may not be written to ends a run in one line. Raises TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        file = Path(str(getattr(error, "filename", None) or run))
        if number not in _REMEDIES or not file.is_relative_to(run):
            raise  # it was no writing of ours
        raise TrainingError(
            f"{file} cannot be written: {os.strerror(number)}; what was saved before is whole. "
            f"{_REMEDIES[number]}, then go on with: vitft train --resume {shlex.quote(str(run))}"
        ) from error
