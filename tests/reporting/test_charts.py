"""The charts of a report: where points land, and what stands at the axes."""

import re
import xml.etree.ElementTree as ET

import pytest

from vitft.reporting.charts import HEIGHT, WIDTH, Axis, Line, chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 4, [0, 1, 2, 3, 4]),
        (0.31, 0.89, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (-3, 12, [0, 5, 10]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "style", "expected"),
    [
        ([1.0, 1.0], "percent", ["95 %", "96 %", "97 %", "98 %", "99 %", "100 %"]),
        ([0.0, 0.0], "percent", ["0 %", "10 %", "20 %", "30 %", "40 %", "50 %"]),
        ([0.98, 0.985], "percent", ["98.0 %", "98.1 %", "98.2 %", "98.3 %", "98.4 %", "98.5 %"]),
        ([1e-4, 1e-4], "power", ["9.6e-5", "9.8e-5", "1.00e-4", "1.02e-4", "1.04e-4"]),
        ([0, 2e-5], "power", ["0", "5e-6", "1.0e-5", "1.5e-5", "2.0e-5"]),
        ([2.30255, 2.30265], "plain", ["2.30256", "2.30258", "2.30260", "2.30262", "2.30264"]),
        ([0.1, 2.3], "plain", ["0.0", "0.5", "1.0", "1.5", "2.0"]),
    ],
)
def test_numbers_at_an_axis_differ_and_are_possible(values: list[float], style: str, expected: list[str]) -> None:
    svg = chart([Line("a", list(enumerate(values)))], Axis("epoch"), Axis("value", style), "t")
    root = ET.fromstring(svg)
    assert [one.text for one in root.iter("text") if one.get("class") == "y"] == expected


def test_points_are_in_proportion_and_inside() -> None:
    svg = chart([Line("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], Axis("step", low=0, high=10),
                Axis("accuracy", "percent", low=0, high=1), "A & B")  # fmt: skip
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "A & B"
    path = next(one for one in root.iter("path") if "line" in one.get("class", ""))
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
    assert places[1] == pytest.approx([(places[0][i] + places[2][i]) / 2 for i in (0, 1)])
    assert places[0][0] < places[2][0] <= WIDTH
    assert 0 <= places[2][1] < places[0][1] <= HEIGHT
    assert [one.text for one in root.iter("title")] == ["a, step 0: 0 %", "a, step 5: 50 %", "a, step 10: 100 %"]


def test_what_is_not_finite_is_left_out_and_one_value_has_an_axis() -> None:
    assert chart([Line("a", [(1.0, float("nan"))])], Axis("x"), Axis("y"), "t") == ""
    svg = chart([Line("a", [(1.0, 2.0), (2.0, float("inf"))])], Axis("x"), Axis("y"), "t")
    assert svg.count("<circle") == 1
    assert "nan" not in svg


def test_long_lines_have_no_dots() -> None:
    svg = chart([Line("a", [(i, i * i) for i in range(200)])], Axis("x"), Axis("y"), "t")
    assert "<circle" not in svg
    assert svg.count("<path") > 1


def test_names_cannot_be_markup() -> None:
    svg = chart([Line("<script>", [(0, 1), (1, 2)])], Axis("<b>"), Axis("y"), '"><script>')
    assert "<script>" not in svg
    assert "<b>" not in svg
