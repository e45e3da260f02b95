"""What a sweep varies: settings with a range, `lr=1e-5..1e-3`, or a list of values, `layer_decay=0.6,0.75,1`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from vitft.config.base import unsets
from vitft.config.train import TrainConfig
from vitft.errors import UsageError, nearest

Value = str | float | int | bool | None
Values = dict[str, Value]
"""A value for each setting that is varied."""

LOGARITHMIC = 10
"""A range whose ends differ by this factor or more is searched on a logarithmic scale."""


@dataclass(frozen=True)
class Range:
    """All numbers, or whole numbers, from `low` to `high`."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether the setting takes whole numbers."""
        return isinstance(self.low, int)

    @property
    def logarithmic(self) -> bool:
        """Whether to search orders of magnitude."""
        return self.low > 0 and self.high / self.low >= LOGARITHMIC * (1 - 1e-9)

    def __contains__(self, value: Value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choices:
    """One of these values."""

    values: tuple[Value, ...]

    def __contains__(self, value: Value) -> bool:
        return value in self.values


Space = dict[str, Range | Choices]


def read_space(vary: Mapping[str, str], base: Mapping[str, Any]) -> Space:
    """Parse `low..high` and `value,value,...`, or `value;value` where values have commas, by setting.

    Args:
        vary: the text of each setting that is varied.
        base: the other settings. A value has to be possible beside these, with some values of what else is varied.

    Raises:
        UsageError: for an unknown setting, a value that it may not have, or a setting that a sweep may not vary.
    """
    for name in vary:
        _check_name(name)
    listed = {name: [(name, _typed(name, one)) for one in _texts(text)] for name, text in vary.items()}
    space = {}
    for name, text in vary.items():
        others = product(*(values for other, values in listed.items() if other != name))
        beside = [dict(base), *({**base, **dict(some)} for some in islice(others, _TRIED))]
        space[name] = _read(name, text.strip(), beside)
    return space


def _texts(text: str) -> list[str]:
    """The values of a list, or the ends of a range."""
    ends = _RANGE.fullmatch(text.strip())
    return [*ends.groups()] if ends else [value.strip() for value in text.split(";" if ";" in text else ",")]


def _read(name: str, text: str, beside: Sequence[Mapping[str, Any]]) -> Range | Choices:
    values = tuple(_value(name, value, beside) for value in _texts(text))
    if _RANGE.fullmatch(text):
        low, high = values
        if type(low) not in (int, float) or type(high) not in (int, float) or low >= high:
            raise UsageError(f"--set {name}={text}: a range is two numbers, the smaller one first, as in 1e-5..1e-3.")
        return Range(low, high)
    if len(set(values)) < max(2, len(values)):
        what = "the same value twice" if len(values) > 1 else "only one value"
        raise UsageError(f"--set {name}={text}: has {what}; list different ones, or give a range such as 1e-5..1e-3.")
    return Choices(values)


_RANGE = re.compile(r"([-+.\de]*\d)\s*\.\.\s*([-+]?\.?\d[-+.\de]*)", re.IGNORECASE)  # ../ begins no range


def _check_name(name: str) -> None:
    field = TrainConfig.model_fields.get(name)
    if field is None:
        hint = nearest(name, TrainConfig.model_fields) or "; `vitft train --help` lists the settings"
        raise UsageError(f"--set {name}: unknown setting{hint}")
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    reason = _NOT_VARIED.get(name)
    if reason is None and extra["panel"] in ("Data", "Reading") and name not in ("sampling", "max_train_samples"):
        reason = "it changes which images are scored, and trials on different images cannot be compared"
    if reason is None and extra["changeable"]:
        reason = "it does not change the result"
    if reason is not None:
        raise UsageError(f"--set {name}: {reason}; remove it.")


_NOT_VARIED = {
    "seed": "--seeds repeats each trial with several",
    "best_by": "it is what the trials are compared by",
    "skip_test": "a sweep never reads the test images",
}


def _value(name: str, text: str, beside: Sequence[Mapping[str, Any]]) -> Any:
    """A value as the setting has it. Raises UsageError if it is impossible beside each of the other settings."""
    typed, errors = _typed(name, text), []
    for settings in beside:
        try:
            value: Value = getattr(TrainConfig.parse({**settings, name: typed}, "flags"), name)
            return value if typed is not None else None
        except UsageError as error:
            errors.append(error)
    raise UsageError(f"--set {name}={text}: {errors[0]}") from errors[0]


def _typed(name: str, text: str) -> str | bool | None:
    return None if unsets(text, TrainConfig.model_fields[name]) else _SWITCH.get(text, text)


_SWITCH = {"true": True, "false": False}
_TRIED = 1000  # combinations of the other values, beside which one has to be possible


def combinations(space: Space) -> list[Values] | None:
    """Every combination of the values; None if a setting has a range."""
    listed = [one.values for one in space.values() if isinstance(one, Choices)]
    return [dict(zip(space, values, strict=True)) for values in product(*listed)] if len(listed) == len(space) else None


def point_of(config: TrainConfig, space: Space) -> Values | None:
    """What the settings have for what is varied, if the space includes it."""
    point = {name: getattr(config, name) for name in space}
    return point if all(value in space[name] for name, value in point.items()) else None
