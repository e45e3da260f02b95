"""What a model's configuration asks of this machine, before anything is allocated for it."""

import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch

from vitft.console import size
from vitft.errors import ModelError

_LAYERS = 1000  # the deepest ViTs have under a hundred


def check_demand(make: Callable[[Any], Any], stored: Any, where: str) -> None:
    """Raise ModelError for a configuration of which `make` could make no model, or none that fits in memory."""
    depths = getattr(stored, "depths", None) or [getattr(stored, "num_hidden_layers", 0)]
    try:
        if sum(depths) > _LAYERS:
            raise ModelError(f"{where}: {sum(depths):,} layers are over {_LAYERS:,}; is its config.json right?")
        with torch.device("meta"), warnings.catch_warnings():  # shapes alone
            warnings.simplefilter("ignore")
            model = make(stored)
    except ModelError:
        raise
    except Exception as error:  # sizes that do not fit together fail in as many ways as there are layers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
        raise ModelError(f"{where}: config.json is not usable: {reason}.") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if needed > (there := psutil.virtual_memory().total):
        raise ModelError(
            f"{where}: its weights alone take {size(needed)}, and this machine has {size(there)} of memory."
        )
