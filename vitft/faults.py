"""What a run does about what goes wrong on its way: a loss that is no number, a disk that takes no more."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from vitft import checkpoint as ckpt
from vitft import console
from vitft.errors import TrainingError

T = TypeVar("T")
_ROLLBACKS = 5  # halvings of the rate in one command: then something else is wrong


class Rollback(TrainingError):  # noqa: N818  (it reads as what it is)
    """The loss is no number, and there is a checkpoint to go back to."""


def persisting(run: Path, attempt: Callable[[], T], again: Callable[[], T]) -> T:
    """Train; after a rollback, `again` from the newest whole checkpoint at half the rate, which is written down."""
    for _ in range(_ROLLBACKS):
        try:
            return _writing(run, attempt)
        except Rollback as fault:
            if os.environ.get("RANK", "0") == "0":
                config = ckpt.read_config(run)
                config = config.model_copy(update={"lr": config.lr / 2})
                console.warn(f"{fault}; going on from there at --lr {config.lr:g}")
                ckpt.write_config(run, config)
            if torch.distributed.is_initialized():  # no process reads the rate before it is written
                torch.distributed.barrier()
            attempt = again
    return _writing(run, attempt)


def _writing(run: Path, attempt: Callable[[], T]) -> T:
    """Train; a disk that is full or may not be written to ends it in one line. Raises TrainingError."""
    try:
        return attempt()
    except BrokenPipeError:  # who read our words is gone: that is no fault of the disk
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        at = getattr(error, "filename", None) or run
        raise TrainingError(
            f"{at} cannot be written: {reason}; what was saved before is whole. Make room, then go on with: "
            f"vitft train --resume {run}"
        ) from error
