"""What a run does about what goes wrong on its way: a loss that is no number, a disk that takes no more."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from vitft import checkpoint as ckpt
from vitft import console
from vitft.errors import TrainingError

T = TypeVar("T")
_ROLLBACKS = 5  # halvings of the rate in one command: then something else is wrong
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable"
)


class Rollback(TrainingError):  # noqa: N818  (it reads as what it is)
    """The loss is no number, and there is a checkpoint to go back to."""


def persisting(run: Path, attempt: Callable[[], T], again: Callable[[], T]) -> T:
    """Train; after a rollback, `again` from the newest whole checkpoint at half the rate, which is written down."""
    with _writing(run):
        for _ in range(_ROLLBACKS):
            try:
                return attempt()
            except Rollback as fault:
                if os.environ.get("RANK", "0") == "0":
                    config = ckpt.read_config(run)
                    config = config.model_copy(update={"lr": config.lr / 2})
                    ckpt.write_config(run, config)
                    console.warn(f"{fault}; going on from there at --lr {config.lr:g}")
                if torch.distributed.is_initialized():  # no process reads the rate before it is written
                    torch.distributed.barrier()
                attempt = again
        return attempt()


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
            f"{_REMEDIES[number]}, then go on with: vitft train --resume {run}"
        ) from error
