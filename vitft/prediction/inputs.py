"""What can be classified: files, folders, globs, images in memory; and how each becomes the model's input."""

import codecs
import glob
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitft.data.augment import Preprocess, resize_and_crop
from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources.folders import Listing, describe_others
from vitft.errors import DataError
from vitft.io import console
from vitft.io.paths import expanded

Given = str | Path | bytes | Image.Image | NDArray[Any] | torch.Tensor
"""What can be classified: see `Predictor.__call__`."""
Found = str | bytes | Image.Image | DataError
"""One image: a file's name, an encoded or a decoded image, or the reason why it is none."""


def find_images(given: Iterable[Given]) -> Iterator[Found]:
    """Every image behind what is given, in order; files in folders that are not images are reported.

    A missing file, or a glob without matches, is kept, to get a row with its error. Raises DataError if there is no
    image at all.
    """
    count, empty = 0, list[str]()
    for one in given:
        before = count
        for found in find_files(one) if isinstance(one, str | Path) else _in_memory(one):
            count += 1
            yield found
        if count == before and len(empty) < _NAMED:
            empty.append(str(one))
    if count == 0:
        where = f" in {', '.join(empty)}" if empty else ""
        raise DataError(f"no image found{where}; give image files, folders or globs.")


_NAMED = 5  # folders without images that an error names


def find_files(given: str | Path) -> Iterator[str]:
    """The image files behind a file, a folder or a glob, as `find_images` does."""
    word = str(given)
    path = expanded(word)
    if os.path.isdir(path):  # noqa: PTH112  (unlike Path.is_dir, it raises nothing for a name that is too long)
        try:
            tree = Listing(path).tree
        except OSError as error:
            console.warn(f"{word}: cannot be listed: {error.strerror or error}")
            yield word
            return
        plain, pictures = describe_others(tree.other_files(), tree.path)
        for sentence in plain:
            console.note(f"{word}: {sentence}")
        for sentence in pictures:
            console.warn(f"{word}: {sentence}")
        yield from (str(Path(file)) for file in tree.files())
    elif not os.path.exists(path) and glob.has_magic(word):  # noqa: PTH110
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob wants relative ones)
        yield from [name for name in names if Path(name).is_file()] or [word]
    else:
        yield word


def printable(text: str) -> str:
    r"""The text with bytes that are not UTF-8 as Python escapes them: \udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed_paths(stream: Any, name: str) -> Iterator[str]:
    """The paths in a list, one a line, or ended by NUL as by `find -print0`; it is read as far as they are asked for.

    Empty lines are skipped. Raises DataError for an image in place of a list.
    """
    blocks = iter(lambda: stream.read1(_BLOCK), b"")
    rest = next(blocks, b"").removeprefix(codecs.BOM_UTF8)
    while b"\n" not in rest and b"\0" not in rest and (more := next(blocks, b"")):
        rest += more
    if rest.startswith(_IMAGES) or rest[8:12] == b"WEBP":
        raise DataError(f"{name} is an image, not a list of paths; give its path.")
    end, ignored = (b"\0", b"") if b"\0" in rest else (b"\n", b"\r")
    for block in chain([b""], blocks):
        *whole, rest = (rest + block).split(end)
        yield from (os.fsdecode(path) for line in whole if (path := line.removesuffix(ignored)))
    if path := rest.removesuffix(ignored):
        yield os.fsdecode(path)


_BLOCK = 2**16
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


def _in_memory(given: bytes | Image.Image | NDArray[Any] | torch.Tensor) -> Iterator[Found]:
    if isinstance(given, bytes | Image.Image):
        yield given
    else:
        array = _channels_last(given) if isinstance(given, torch.Tensor) else given
        yield from map(_pictured, array if array.ndim == 4 else array[None])


def _channels_last(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = (tensor * 255).round().clamp(0, 255).to(torch.uint8)
    return tensor.movedim(-3, -1).numpy() if tensor.ndim >= 3 else tensor.numpy()


def _pictured(array: NDArray[Any]) -> Image.Image | DataError:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        shape = " x ".join(map(str, array.shape))
        return DataError(f"is an array of {array.dtype}, {shape}; give uint8 (height, width) or (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(array.reshape(array.shape[:2]) if channels == 1 else array))


def read_image(found: Found | dict[str, Any], preprocess: Preprocess, max_pixels: int) -> torch.Tensor | str:
    """The resized image, uint8 (1, H, W, 3), or the reason why it cannot be read. A dict is a dataset's cell."""
    if isinstance(found, DataError):
        return str(found)
    try:
        if isinstance(found, str) and not expanded(found).exists() and glob.has_magic(found):
            return "matches no file"
        source = encoded(found) if isinstance(found, dict) else expanded(found) if isinstance(found, str) else found
        pixels = decode(source, max_pixels, value_range=preprocess.value_range)
        # Resized at once, so that a batch of photos is never in memory at full size.
        return resize_and_crop(torch.from_numpy(pixels)[None], preprocess)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
