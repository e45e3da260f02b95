"""The exceptions that users see, and the exit code of each.

VitftError             the user can fix it; one line says what failed, the value, and the remedy
├── UsageError     2   a flag, a recipe key or a combination of settings
├── DataError      3   a dataset, a split or an image
├── ModelError     4   a model or a checkpoint
├── TrainingError  5   the run itself: non-finite loss, out of memory
└── Stopped        130 after SIGINT, 143 after SIGTERM; progress is saved
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

# Names of settings and flags in other trainers.
_SYNONYMS = {
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
_SETTING_OF = {synonym: name for name, synonyms in _SYNONYMS.items() for synonym in synonyms.split()}

_flag_style = False


@contextmanager
def typed_flags() -> Iterator[None]:
    """Spell settings in error messages as flags (--batch-size) while entered; the default is Python (batch_size)."""
    global _flag_style
    before, _flag_style = _flag_style, True
    try:
        yield
    finally:
        _flag_style = before


def _flags_to_arguments(message: str) -> str:
    """Spell the flags in a message as Python arguments, except in suggested `vitft` commands."""
    flag = re.compile(r"vitft [a-z][^;)`]*|(?<![^\s(`'\"])--([a-z][a-z-]*[a-z])")
    return flag.sub(lambda match: match[1].replace("-", "_") if match[1] else match[0], message)


class VitftError(Exception):
    """An error that the user can fix. The message is one line: what failed, the value, the remedy."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.splitlines())  # file names can contain newlines
        super().__init__(line if _flag_style else _flags_to_arguments(line))


class UsageError(VitftError):
    """Invalid usage or configuration."""

    exit_code = 2


class DataError(VitftError):
    """A dataset, split or image that cannot be used."""

    exit_code = 3


class ModelError(VitftError):
    """A model or checkpoint that cannot be found, read or used."""

    exit_code = 4


class TrainingError(VitftError):
    """A training run that cannot continue."""

    exit_code = 5


class Stopped(VitftError):  # noqa: N818 (not an error: the run was asked to stop)
    """A signal stopped the run after it saved its progress."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def joined(words: Sequence[str], last: str) -> str:
    """Words with commas between them, but for the last two: "a, b and c" if `last` is "and"."""
    *first, end = words
    return f" {last} ".join([", ".join(first), end] if first else [end])


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Raise UsageError if a module is not installed that comes with an extra, as in `pip install 'vitft[lora]'`.

    Args:
        extra: its name in pyproject.toml.
        what: what needs the modules, for the message: a command or a setting.
        modules: the modules, as they are imported.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UsageError(f"{what} needs {joined(missing, 'and')}, not installed here; pip install 'vitft[{extra}]'.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean X?` with the closest known name or synonym; empty if nothing is close."""
    names = list(known)
    synonym = from_synonym(name, names)
    matches = [synonym] if synonym else get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def from_synonym(name: str, known: Collection[str]) -> str | None:
    """The known setting that other trainers call `name`, such as lr for --learning-rate; None if there is none."""
    setting = _SETTING_OF.get(name.strip("-").replace("-", "_").lower())
    return setting if setting in known else None


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its final period; the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def as_flag(name: str) -> str:
    """Spell a setting as a flag: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"
