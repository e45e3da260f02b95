"""Sizes of one's own in place of a ViT's, and values that would fit where they do not."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from vitft.errors import UsageError
from vitft.spec import ViTSpec

_SIDES = {
    "image_size": ("image_height", "image_width"),
    "patch_size": ("patch_height", "patch_width", "stride_height", "stride_width"),
}
_FAR = 4096  # steps to look for a value that fits; no side, width or number of heads is a multiple so far off


def with_sizes(base: ViTSpec, given: Mapping[str, int | None], spelled: Callable[[str], str] = str) -> ViTSpec:
    """`base` with those sizes that are given; a patch's side is its stride too.

    Raises UsageError in the words of who gave them: each size `spelled` as there, with the nearest
    values that fit what else is given.
    """
    sizes = {name: value for name, value in given.items() if value is not None}
    fault = _fault(base, sizes)
    if fault is None:
        return _put(base, sizes)
    said, _, remedy = fault.removesuffix(".").partition("; try ")
    ways = []
    for name in sizes:
        if _names(said, name):
            fitting = _fitting(base, sizes, name)
            ways += [f"{spelled(name)} {' or '.join(map(str, fitting))}"] if fitting else []
            said = _pattern(name).sub(spelled(name), said)
    raise UsageError(f"{said}; try {', or '.join(ways) or remedy}.")


def _put(base: ViTSpec, sizes: Mapping[str, int]) -> ViTSpec:
    fields = {field: value for name, value in sizes.items() for field in _SIDES.get(name, (name,))}
    return replace(base, **fields)  # type: ignore[arg-type]


def _fault(base: ViTSpec, sizes: Mapping[str, int]) -> str | None:
    try:
        _put(base, sizes)
    except UsageError as error:
        return str(error)
    return None


def _fitting(base: ViTSpec, sizes: Mapping[str, int], name: str) -> list[int]:
    """The nearest smaller and larger value of a size with which nothing is wrong that involves it."""
    value = sizes[name]

    def fits(other: int) -> bool:
        return not _names(_fault(base, {**sizes, name: other}) or "", name)

    # A divisor may be far below what was given, a multiple never is far above.
    smaller = (*range(value - 1, max(value - _FAR, 0), -1), *range(min(value - _FAR, _FAR), 0, -1))
    larger = range(max(value, 0) + 1, max(value, 0) + _FAR)
    return [found for some in (smaller, larger) if (found := next(filter(fits, some), None)) is not None]


def _names(text: str, name: str) -> bool:
    return _pattern(name).search(text) is not None


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join((name, *_SIDES.get(name, ())))})\b")
