"""Charts as values: axes with their ticks, series with their points, already in the drawing's own coordinates.

Series differ in the shape of their marks and in their names, not in colour alone. Every point carries a text that
describes it, and the chart's table has the same figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mthp.units import format_size

WIDTH, HEIGHT = 640, 380
"""Width and height of the drawing, in its own units."""

LEFT, RIGHT, TOP, BOTTOM = 78, 20, 16, 62
"""Margins around the plot, in units of the drawing."""

MARKS = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.6 -4.6h9.2v9.2h-9.2z",
    "M0 -6.2L6 4.6H-6z",
    "M0 -6.6L5.6 0L0 6.6L-5.6 0z",
    "M-6 -4.6H6L0 6.2z",
    "M-1.8 -5.6h3.6v3.8h3.8v3.6h-3.8v3.8h-3.6v-3.8h-3.8v-3.6h3.8z",
)
"""Shapes of marks as SVG paths around the origin: circle, square, triangle, diamond, triangle down, cross."""

PADDING = 20
"""Space between the vertical axis and 0, in units of the drawing."""

DODGE = 9
"""Distance between marks that would hide each other, in units of the drawing."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: its coordinate and its text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """A point: its coordinates and its text."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class DrawnSeries:
    """A series as drawn: its class, name, mark, points and the line through them (an SVG path, or ``""``)."""

    key: str
    name: str
    mark: str
    points: tuple[Point, ...]
    line: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, ready to be drawn.

    Attributes:
        title: text above the chart.
        summary: description of the chart in words.
        x_name, y_name: names of the axes, with their units.
        x_ticks, y_ticks: marks of the axes.
        series: plotted series.
        frontier: an SVG path behind the series, or ``""``.
    """

    title: str
    summary: str
    x_name: str
    y_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[DrawnSeries, ...]
    frontier: str = ""

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Series:
    """Input of a chart: a name, and points of (x, y, text)."""

    name: str
    points: Sequence[tuple[float, float, str]]
    joined: bool = False


def chart(
    title: str,
    summary: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_unit: str = "",
    y_unit: str = "",
    y_range: tuple[float, float] | None = None,
    frontier: Sequence[tuple[float, float]] = (),
) -> Chart:
    """Lay out a chart. Marks of series that are not joined are drawn side by side where they coincide.

    Args:
        x_unit, y_unit: text after the numbers of the ticks. Ticks in ``bytes`` are printed as sizes, at round multiples
            of a power of 1024.
        y_range: ends of the vertical axis; from 0 to the largest value by default.
        frontier: corners of a staircase that is drawn behind the series, by ascending x.
    """
    points = [point for one in series for point in one.points]
    x_values = nice_ticks(0.0, max((x for x, _, _ in points), default=1.0))
    low, high = y_range or (0.0, max((y for _, y, _ in points), default=1.0))
    # Ticks of sizes are round in K, M or G, not in bytes.
    unit = 1024.0 ** int(math.log(high, 1024)) if y_unit == "bytes" and high >= 1 else 1.0
    y_values = [value * unit for value in nice_ticks(low / unit, high / unit)]
    across = _scale(x_values[0], x_values[-1], LEFT + PADDING, WIDTH - RIGHT)
    # In SVG, y grows downwards.
    up = _scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    # Joined points are not moved: a line through them would show wrong values.
    places = _side_by_side(
        [(across(x), up(y)) for x, y, _ in points], DODGE if not any(s.joined for s in series) else 0
    )
    drawn = []
    for number, one in enumerate(series):
        at = tuple(Point(*next(places), text) for _, _, text in one.points)
        line = "M" + "L".join(f"{point.x:.1f} {point.y:.1f}" for point in at) if one.joined and len(at) > 1 else ""
        # More series than shapes share them.
        drawn.append(DrawnSeries(f"s{number % len(MARKS)}", one.name, MARKS[number % len(MARKS)], at, line))
    return Chart(
        title,
        summary,
        x_name,
        y_name,
        tuple(Tick(across(value), f"{value:g}{x_unit}") for value in x_values),
        tuple(Tick(up(value), _tick_text(value, y_unit)) for value in y_values),
        tuple(drawn),
        _stairs([(across(x), up(y)) for x, y in frontier], up(y_values[0])),
    )


def _stairs(corners: Sequence[tuple[float, float]], bottom: float) -> str:
    """Return the SVG path of a staircase from the axis up, through `corners`, to the right end of the plot."""
    if not corners:
        return ""
    (x, y), *others = corners
    # The coverage of a setting holds until the bloat of the next one.
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)
    return f"M{x:.1f} {bottom:.1f}V{y:.1f}{steps}H{WIDTH - RIGHT}"


def _tick_text(value: float, unit: str) -> str:
    return format_size(int(value)) if unit == "bytes" else f"{value:g}{unit}"


def _side_by_side(places: Sequence[tuple[float, float]], by: float) -> Iterator[tuple[float, float]]:
    """Yield `places` in their order, with those that coincide moved `by` units apart."""
    number = Counter(places)
    seen: Counter[tuple[float, float]] = Counter()
    for x, y in places:
        # The middle of the group stays at the place.
        yield x + by * (seen[x, y] - (number[x, y] - 1) / 2), y
        seen[x, y] += 1


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round values from `low` to at least `high`, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    # All values are equal: the scale would divide by 0.
    if not high > low:
        high = low + 1.0
    raw = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    # The tolerances here and below are for floats: 3 * 0.1 / 0.1 is more than 3, and would add a tick.
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


@dataclass(frozen=True, slots=True)
class BarPart:
    """A part of a bar: its kind of memory, its start and width in thousandths of the longest bar, and its text."""

    key: str
    start: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its name, its parts, and a description of all of it in words."""

    name: str
    parts: tuple[BarPart, ...]
    text: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars over one scale, made of kinds of memory.

    Attributes:
        legend: class and label of the kinds that occur.
    """

    title: str
    summary: str
    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, str], ...]


def bar_chart(
    title: str,
    summary: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, str, int]]]],
    *,
    legend: Sequence[tuple[str, str]],
    full_names: Mapping[str, str] | None = None,
    size: Callable[[int], str],
) -> BarChart:
    """Lay out bars.

    Args:
        rows: the name of each bar, and the class, label and value of each of its parts.
        legend: class and label of every kind that may occur, in the order of the legend.
        full_names: full names of bars with abbreviated names, by that name.
        size: formats a value.
    """
    # All bars have the scale of the longest; not 0, by which widths are divided.
    whole = max((sum(value for _, _, value in parts) for _, parts in rows), default=0) or 1
    occurring = {key for _, parts in rows for key, _, value in parts if value}
    bars = []
    for name, parts in rows:
        made, start = [], 0.0
        for key, label, value in parts:
            if not value:
                continue
            width = 1000 * value / whole
            # Rounded after the sum, so that errors do not add up along the bar.
            made.append(BarPart(key, round(start, 2), round(width, 2), f"{label}: {size(value)}"))
            start += width
        bars.append(
            Bar(
                name,
                tuple(made),
                f"{(full_names or {}).get(name, name)}: {', '.join(part.text for part in made) or 'nothing'}",
            )
        )
    return BarChart(title, summary, tuple(bars), tuple(entry for entry in legend if entry[0] in occurring))
