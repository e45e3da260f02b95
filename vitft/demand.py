"""What a model's configuration asks of this machine, before anything is allocated for it."""

import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch

from vitft.console import size
from vitft.errors import ModelError

_MOST = {"num_labels": 1_000_000, "num_hidden_layers": 1000, "depths": 1000}
"""Of what a configuration makes a list as long as it says, while it is read: far over any that there is."""


def check_lengths(document: Any, where: str) -> None:
    """Raise ModelError for a config.json, as read, that would make lists of absurd length."""
    for name, value in document.items() if isinstance(document, dict) else ():
        lengths = value if isinstance(value, list) else [value]
        for length in lengths if name in _MOST else ():
            if isinstance(length, int) and length > _MOST[name]:
                raise ModelError(f"{where}: {name} {length:,} is over {_MOST[name]:,}; is its config.json right?")
        check_lengths(value, where)


def check_demand(make: Callable[[Any], Any], stored: Any, where: str) -> None:
    """Raise ModelError for a configuration of which `make` could make no model, or none that fits in memory."""
    try:
        with torch.device("meta"), warnings.catch_warnings():  # shapes alone
            warnings.simplefilter("ignore")
            model = make(stored)
    except Exception as error:  # sizes that do not fit together fail in as many ways as there are layers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
        raise ModelError(f"{where}: config.json is not usable: {reason}.") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if needed > (there := psutil.virtual_memory().total):
        raise ModelError(
            f"{where}: its weights alone take {size(needed)}, and this machine has {size(there)} of memory."
        )
