"""What can go wrong, and with which exit code a command then ends.

VitftError             a person can mend it: one line says what, got, remedy
├── UsageError     2   a flag, a recipe key or a combination of settings
├── DataError      3   a data set, a split or an image
├── ModelError     4   a model or a checkpoint
├── TrainingError  5   the run itself: non-finite loss, out of memory
└── Stopped        130 by SIGINT, 143 by SIGTERM; everything is saved
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# What other trainers call a setting or a flag, beside its name here.
_ELSEWHERE = {
    "batch_size": "batch bs train_batch_size per_device_train_batch_size",
    "best_by": "metric_for_best_model monitor",
    "classes": "num_classes num_labels n_classes",
    "clip_norm": "max_grad_norm grad_clip clip_grad",
    "dataset": "data data_dir dataset_name train_dir",
    "early_stopping": "patience early_stopping_patience",
    "epochs": "epoch num_epochs n_epochs num_train_epochs",
    "eval_every": "eval_steps",
    "heads": "num_heads n_heads num_attention_heads",
    "image_size": "img_size input_size resolution",
    "keep": "save_total_limit",
    "layers": "depth num_layers n_layers num_hidden_layers",
    "log_every": "logging_steps log_interval",
    "lr": "learning_rate",
    "min_delta": "early_stopping_threshold",
    "mlp": "mlp_dim intermediate_size",
    "model": "model_name model_name_or_path pretrained",
    "optimizer": "optim opt",
    "output": "output_dir out_dir",
    "resume": "resume_from_checkpoint",
    "save_every": "save_steps",
    "schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "warmup": "warmup_ratio",
    "weight_decay": "wd",
    "width": "dim hidden_size embed_dim",
}
_HERE = {other: ours for ours, others in _ELSEWHERE.items() for other in others.split()}


_typed = False


@contextmanager
def typed_flags() -> Iterator[None]:
    """While a command runs, errors name settings as it spells them, --batch-size; else as Python does, batch_size."""
    global _typed
    before, _typed = _typed, True
    try:
        yield
    finally:
        _typed = before


def _in_python(message: str) -> str:
    """The message with its flags spelled as arguments, but for those of a command to be typed."""
    flag = re.compile(r"vitft [a-z][^;)`]*|(?<![^\s(`'\"])--([a-z][a-z-]*[a-z])")
    return flag.sub(lambda found: found[1].replace("-", "_") if found[1] else found[0], message)


class VitftError(Exception):
    """A failure that a person can mend; its text is one line: what, got, remedy."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.splitlines())  # names from files may hold line ends
        super().__init__(line if _typed else _in_python(line))


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
    """`; did you mean X?` for the known word that was meant or is nearest to what was typed, else nothing."""
    words = list(known)
    found = meant(got, words)
    matches = [found] if found else get_close_matches(got, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def meant(got: str, known: Iterable[str]) -> str | None:
    """The known word that is called `got` elsewhere: lr for --learning-rate."""
    found = _HERE.get(got.strip("-").replace("-", "_").lower())
    return found if found in list(known) else None


def as_flag(name: str) -> str:
    """A setting's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"
