"""Modify the sizes of a ViT, and suggest valid values if they do not fit together."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from vitft.errors import UsageError
from vitft.spec import ViTSpec

_SIDES = {
    "image_size": ("image_height", "image_width"),
    "patch_size": ("patch_height", "patch_width", "stride_height", "stride_width"),
}
_SEARCH = 4096  # how far to search for a valid value; multiples of a side, width or number of heads are closer


def with_sizes(base: ViTSpec, overrides: Mapping[str, int | None], spell: Callable[[str], str] = str) -> ViTSpec:
    """A copy of `base` with new sizes; None leaves a size unchanged. A new patch size is also the stride.

    Raises UsageError if the sizes do not fit together. The message suggests the closest valid values and writes the
    name of each size as `spell(name)`, such as a flag.
    """
    sizes = {name: value for name, value in overrides.items() if value is not None}
    problem = _problem(base, sizes)
    if problem is None:
        return _replace(base, sizes)
    message, _, remedy = problem.removesuffix(".").partition("; try ")
    suggestions = []
    for name in sizes:
        if _mentions(message, name):
            values = _valid_values(base, sizes, name)
            suggestions += [f"{spell(name)} {' or '.join(map(str, values))}"] if values else []
            message = _pattern(name).sub(spell(name), message)
    raise UsageError(f"{message}; try {', or '.join(suggestions) or remedy}.")


def _replace(base: ViTSpec, sizes: Mapping[str, int]) -> ViTSpec:
    fields = {field: value for name, value in sizes.items() for field in _SIDES.get(name, (name,))}
    return replace(base, **fields)  # type: ignore[arg-type]


def _problem(base: ViTSpec, sizes: Mapping[str, int]) -> str | None:
    try:
        _replace(base, sizes)
    except UsageError as error:
        return str(error)
    return None


def _valid_values(base: ViTSpec, sizes: Mapping[str, int], name: str) -> list[int]:
    """The closest smaller and larger value of a size for which no problem mentions it."""
    value = sizes[name]

    def is_valid(other: int) -> bool:
        return not _mentions(_problem(base, {**sizes, name: other}) or "", name)

    # The closest divisor can be far below the value; the closest multiple is never far above it.
    smaller = (*range(value - 1, max(value - _SEARCH, 0), -1), *range(min(value - _SEARCH, _SEARCH), 0, -1))
    larger = range(max(value, 0) + 1, max(value, 0) + _SEARCH)
    closest = (next(filter(is_valid, values), None) for values in (smaller, larger))
    return [other for other in closest if other is not None]


def _mentions(text: str, name: str) -> bool:
    return _pattern(name).search(text) is not None


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join((name, *_SIDES.get(name, ())))})\b")
