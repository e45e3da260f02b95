"""Refuse configurations and pickled weights that need too much memory, before allocating any."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from vitft.errors import ModelError, first_line
from vitft.io.console import size
from vitft.spec import MOST_CLASSES, MOST_LAYERS

_LIMITS = {"num_labels": MOST_CLASSES, "num_hidden_layers": MOST_LAYERS, "depths": MOST_LAYERS}
"""Reading a configuration creates lists of these lengths."""


def check_lengths(document: Any, where: str) -> None:
    """Raise ModelError for a parsed config.json with an absurd number of labels or layers."""
    for name, value in document.items() if isinstance(document, dict) else ():
        lengths = value if isinstance(value, list) else [value]
        for length in lengths if name in _LIMITS else ():
            if isinstance(length, int) and length > _LIMITS[name]:
                raise ModelError(f"{where}: {name} {length:,} exceeds {_LIMITS[name]:,}; check its config.json.")
        check_lengths(value, where)


def check_memory(make: Callable[[Any], Any], hf_config: Any, where: str) -> None:
    """Raise ModelError if `make` cannot build a model from the configuration, or if its weights exceed the memory."""
    try:
        with torch.device("meta"), warnings.catch_warnings():  # only shapes
            warnings.simplefilter("ignore")
            model = make(hf_config)
    except Exception as error:  # each kind of layer fails differently if sizes do not match
        raise ModelError(f"{where}: config.json is invalid: {first_line(error)}.") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if needed > (memory := psutil.virtual_memory().total):
        raise ModelError(
            f"{where}: its weights alone take {size(needed)}, but this machine has {size(memory)} of memory."
        )


def check_pickled(file: Path) -> None:
    """Raise ModelError for a pytorch_model.bin that would take far more memory than its file size.

    torch.save does not compress, so the archive entries cannot be larger than the file. A tensor can also repeat a few
    stored numbers (stride 0); loading it as float32 would expand it.
    """
    file_size = file.stat().st_size
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > file_size:
                raise _inflated(file, unpacked, file_size)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except ModelError:
        raise
    except Exception as error:  # a corrupt or malicious pickle can raise anything
        raise ModelError(f"{file}: its weights cannot be read: {first_line(error)}.") from error
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)] if isinstance(state, dict) else []
    expanded = sum(4 * tensor.numel() for tensor in tensors)  # as float32
    if expanded > _INFLATION * file_size + _SLACK:
        raise _inflated(file, expanded, file_size)


_INFLATION, _SLACK = 8, 64_000_000  # allows for one-byte numbers and for weights shared by two layers


def _inflated(file: Path, needed: int, file_size: int) -> ModelError:
    return ModelError(
        f"{file}: its weights take {size(needed)} of memory, but the file has {size(file_size)}; use safetensors."
    )
