"""Datasets stored as pixel arrays: scikit-learn's digits and the original CIFAR batches."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vitft.data.sampling import stratified_sample
from vitft.data.sources.features import to_png
from vitft.data.sources.schema import Splits, image_structs, make_split
from vitft.errors import DataError

_SIDE = 32  # pixels, of every CIFAR image


def read_digits() -> Splits:
    """Read scikit-learn's 1,797 handwritten digits, 8x8 gray. A fixed stratified 20 % is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)  # stored as 0 to 16
    labels = digits.target.astype(np.int64)
    test = stratified_sample(labels, np.arange(len(labels), dtype=np.uint64), round(len(labels) / 5), 0, "digits test")
    names = [str(name) for name in digits.target_names]
    return {
        split: make_split(image_structs(pa.array([to_png(image) for image in images[mask]])), labels[mask], names)
        for split, mask in (("train", ~test), ("test", test))
    }


def cifar_folder(root: Path) -> Path | None:
    """The folder with the original CIFAR-10 or CIFAR-100 batches: the root, or the one the archive unpacks to."""
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-100-python"):
        if (folder / "data_batch_1").is_file() or ((folder / "train").is_file() and (folder / "meta").is_file()):
            return folder
    return None


def read_cifar(folder: Path, label_column: str | None = None) -> Splits:
    """Read the original Python batches. For CIFAR-100, `label_column` chooses `fine_label` or `coarse_label`.

    Raises DataError for a batch that holds anything but numbers, names and one array.
    """
    if (folder / "data_batch_1").is_file():
        key, meta, names_key = b"labels", folder / "batches.meta", b"label_names"
        parts = {"train": sorted(folder.glob("data_batch_[0-9]")), "test": [folder / "test_batch"]}
    else:
        kind = b"coarse_label" if label_column in ("coarse_label", "coarse_labels") else b"fine_label"
        key, meta, names_key = kind + b"s", folder / "meta", kind + b"_names"
        parts = {"train": [folder / "train"], "test": [folder / "test"]}
    names = _names(meta, names_key) if meta.is_file() else None
    splits = {}
    for split, files in parts.items():
        batches = [_batch(file, key) for file in files if file.is_file()]
        if batches:
            images, labels = map(np.concatenate, zip(*batches, strict=True))
            splits[split] = make_split(image_structs(_ppm(images)), labels, names)
    return splits


def _names(meta: Path, key: bytes) -> list[str]:
    names = _unpickle(meta).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{meta} has no {key.decode()}; unpack the archive again.")
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _batch(file: Path, key: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 32, 32, 3) and labels (n,) of one batch. The file stores channels first."""
    content = _unpickle(file)
    try:
        data, labels = np.asarray(content[b"data"]), np.asarray(content[key], np.int64)
        if data.dtype != np.uint8 or labels.min(initial=0) < 0 or len(labels) != len(data):
            raise ValueError(f"{len(data)} images of {data.dtype} and {len(labels)} labels")
        return data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file} is not a CIFAR batch: {error!r}; unpack the archive again.") from error


class _Unpickler(pickle.Unpickler):
    """Unpickles only what CIFAR batches hold: dictionaries, lists, bytes, numbers and NumPy arrays of bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)  # bytes of text still allowed: no more than the file has

    def find_class(self, module: str, name: str) -> Any:
        """Return only what makes an array of bytes; a pickle could otherwise call any function."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda kind, shape, code: np.empty(0, np.uint8)  # its shape and content follow in the file
        if (module, name) == ("numpy", "ndarray"):
            return name  # only an argument of _reconstruct; if called, it could make an array of any size
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes like this for Python 2
            return self._latin1
        raise pickle.UnpicklingError(f"it uses {module}.{name}, which no CIFAR batch needs")

    def _latin1(self, text: str, encoding: str = "latin1") -> bytes:
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it has more text than bytes")
        return text.encode("latin1")


def _uint8(code: str | bytes, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    if code not in ("u1", "|u1", b"u1", b"|u1"):
        raise pickle.UnpicklingError(f"its array holds {code!r}, but images are bytes")
    return np.dtype("u1", False, True)


_MAX_BYTES = 500_000_000  # CIFAR-100's file has 155 million
_MAX_OPERATIONS = 3_000_000  # each makes at most 72 bytes (an empty dictionary and its slot); CIFAR-100 has 300,000


def _check_pickle(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that would need far more memory than its size.

    The memo is a list as long as its largest index, and a bytearray has the length that the pickle states.
    """
    largest = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(data), 1):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            largest = max(largest, int(argument or 0))
        if largest > count or count > _MAX_OPERATIONS or operation.name == "BYTEARRAY8":
            raise pickle.UnpicklingError("it needs more memory than a batch of its size")


def _unpickle(file: Path) -> dict[bytes, Any]:
    try:
        if (length := file.stat().st_size) > _MAX_BYTES:
            raise pickle.UnpicklingError(f"it has {length:,} bytes, over {_MAX_BYTES:,}")
        data = file.read_bytes()
        _check_pickle(data)
        content = _Unpickler(data).load()
    except OSError:
        raise
    except Exception as error:  # corrupt or malicious pickles raise almost anything
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{file} is not a CIFAR batch: {reason}; unpack the archive again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a CIFAR batch: it holds {type(content).__name__}; unpack the archive again.")
    # Python 3 writes str keys where Python 2 wrote bytes.
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _ppm(images: NDArray[np.uint8]) -> pa.Array:
    """(n, 32, 32, 3) as uncompressed PPM files: lossless, and encoded for all images at once."""
    head = np.frombuffer(f"P6 {_SIDE} {_SIDE} 255\n".encode(), np.uint8)
    files = np.empty((len(images), len(head) + images[0].size if len(images) else 0), np.uint8)
    files[:, : len(head)] = head
    files[:, len(head) :] = images.reshape(len(images), -1)
    offsets = np.arange(len(files) + 1, dtype=np.int32) * files.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(files))]
    return pa.Array.from_buffers(pa.binary(), len(files), buffers)
