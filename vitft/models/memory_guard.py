"""What a model's configuration and its pickled weights ask of this machine, before anything is allocated for them."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from vitft.errors import ModelError
from vitft.io.console import size

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


def check_pickled(file: Path) -> None:
    """Raise ModelError for a pytorch_model.bin that would take far more memory than its bytes.

    torch.save compresses nothing, so the parts of its archive have no more bytes than the file; and a tensor may
    repeat the few numbers that it stores (a stride of 0), which reading it in float32 writes out.
    """
    own = file.stat().st_size
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                parts = sum(entry.file_size for entry in archive.infolist())
            if parts > own:
                raise _inflated(file, parts, own)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except ModelError:
        raise
    except Exception as error:  # a torn or hostile pickle raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
        raise ModelError(f"{file}: its weights cannot be read: {reason}.") from error
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)] if isinstance(state, dict) else []
    written = sum(4 * tensor.numel() for tensor in tensors)  # in float32
    if written > _INFLATION * own + _SLACK:
        raise _inflated(file, written, own)


_INFLATION, _SLACK = 8, 64_000_000  # of a byte for each number, and of weights that two layers share


def _inflated(file: Path, needed: int, own: int) -> ModelError:
    return ModelError(
        f"{file}: its weights take {size(needed)} of memory, and the file has {size(own)}; take safetensors."
    )
