"""Line charts as SVG: no library in the page, colors from its style sheet, readable without a script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 204
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 18, 12, 38
_MARKED = 40  # up to so many points, each has a dot that says its numbers


@dataclass(frozen=True)
class Line:
    """A named line. `kind` is its class in the style sheet: one, two, three or faint."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "one"


@dataclass(frozen=True)
class Axis:
    """An axis: its title, and how its numbers are written: plain, percent (they are from 0 to 1) or power (of ten)."""

    title: str
    style: str = "plain"
    low: float | None = None
    high: float | None = None

    def text(self, value: float, step: float | None = None) -> str:
        """A number on this axis; with as many digits as tell it from the next one, if that is a `step` away."""
        if self.style == "percent":
            value, step = 100 * value, step and 100 * step
        last = None if step is None else math.floor(math.log10(step) + 1e-9)  # the digit that differs, a power of ten
        if self.style == "power":
            digits = 1 if last is None or not value else max(0, math.floor(math.log10(abs(value)) + 1e-9) - last)
            number, power = f"{value:.{digits}e}".split("e")
            return f"{number}e{int(power)}" if value else "0"
        text = f"{value:,.4g}" if last is None else f"{value:,.{max(0, -last)}f}"
        return f"{text} %" if self.style == "percent" else text


def chart(lines: Sequence[Line], x: Axis, y: Axis, title: str) -> str:
    """An SVG element with these lines; points that are not finite are left out. Empty without points."""
    kept = [Line(one.name, [p for p in one.points if all(map(math.isfinite, p))], one.kind) for one in lines]
    kept = [one for one in kept if one.points]
    if not kept:
        return ""
    everything = [point for one in kept for point in one.points]
    (x_low, x_high), (y_low, y_high) = (
        _limits([point[i] for point in everything], axis) for i, axis in enumerate((x, y))
    )

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    y_ticks, x_ticks = ticks(y_low, y_high), ticks(x_low, x_high)
    for value in y_ticks:
        _, level = place((x_low, value))
        parts.append(f'<path class="grid" d="M{_LEFT} {level:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{level + 4:.1f}">{y.text(value, _step(y_ticks))}</text>')
    for value in x_ticks:
        across, _ = place((value, y_low))
        parts.append(
            f'<text class="x" x="{across:.1f}" y="{HEIGHT - _BOTTOM + 17}">{x.text(value, _step(x_ticks))}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x title" x="{middle:.0f}" y="{HEIGHT - 5}">{escape(x.title)}</text>')
    for one in kept:
        places = [place(point) for point in one.points]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        parts.append(f'<path class="line {one.kind}" d="M{path}"/>')
        for (a, b), point in zip(places, one.points, strict=True) if len(places) <= _MARKED else ():
            said = f"{one.name}, {x.title} {x.text(point[0])}: {y.text(point[1])}"
            dot = f'<circle class="{one.kind}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
            parts.append(f"{dot}<title>{escape(said)}</title></circle>")
    return "".join([*parts, "</svg>"])


def _limits(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """Where an axis begins and ends: never in one point."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    low = axis.low if axis.low is not None else low if axis.style == "plain" and low == 0 else low - room
    high = axis.high if axis.high is not None else high + room
    if axis.style == "percent":
        low, high = max(low, 0.0), min(high, 1.0)
    return (low, high) if high > low else (low, low + 1)


def _step(values: Sequence[float]) -> float | None:
    return values[1] - values[0] if len(values) > 1 else None


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: at most `most`, a step of 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) < most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
