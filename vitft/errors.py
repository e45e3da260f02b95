"""What can go wrong, and with which exit code a command then ends.

VitftError             a person can mend it: one line says what, got, remedy
├── UsageError     2   a flag, a recipe key or a combination of settings
├── DataError      3   a data set, a split or an image
├── ModelError     4   a model or a checkpoint
├── TrainingError  5   the run itself: non-finite loss, out of memory
└── Stopped        130 by SIGINT, 143 by SIGTERM; everything is saved
"""

from collections.abc import Iterable
from difflib import get_close_matches


class VitftError(Exception):
    """A failure that a person can mend; its text is one line: what, got, remedy."""

    exit_code = 1


class UsageError(VitftError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(VitftError):
    """A data set, split or image that cannot be used."""

    exit_code = 3


class ModelError(VitftError):
    """A model or checkpoint that cannot be found, read or used."""

    exit_code = 4


class TrainingError(VitftError):
    """A run that cannot go on."""

    exit_code = 5


class Stopped(VitftError):  # noqa: N818 (not a fault: the run was asked to stop)
    """A run that a signal ended, after saving."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(got: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to what was typed, else nothing."""
    matches = get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
