"""
Figures of a report: what is drawn where. A template turns the marks into SVG.

SVG by hand rather than by matplotlib, because its text is the page's own and its colours are those of the page's style
sheet: one drawing is right in the light, in the dark and on paper. Only ticks are matplotlib's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from dapo_trl.diagnosis import CalibrationBin
from dapo_trl.intervals import Estimate


_WIDTH = 320  # so narrow that the text is still readable on a phone; figures stand side by side where there is room
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 38
_ROW = 46
_FEW = 5  # problems below which an interval says nothing

Points = Sequence[tuple[float, float]]


@dataclass
class Figure:
    """
    A figure, mark by mark.

    Attributes:
        title (`str`):
            What it shows.
        description (`str`):
            The same in words, for who cannot see it.
        height (`float`), width (`float`):
            In the units of the marks.
        legend (`list[tuple[str, str]]`):
            Style and label of each series.
        marks (`list[tuple[str, dict, str]]`):
            SVG element, its attributes and its text.
    """

    title: str
    description: str
    height: float = 230
    width: float = _WIDTH
    legend: list[tuple[str, str]] = field(default_factory=list)
    marks: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        self.marks.append(("line", {name: _rounded(x) for name, x in ends.items()} | {"class": style}, ""))

    def curve(self, points: Points, style: str) -> None:
        """A line through points."""
        places = " ".join(f"{_rounded(x)},{_rounded(y)}" for x, y in points)
        self.marks.append(("polyline", {"points": places, "class": style}, ""))

    def bar(self, x: float, y: float, width: float, height: float, style: str, title: str = "") -> None:
        """A rectangle from its upper left corner."""
        sides = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0)}
        self.marks.append(("rect", {name: _rounded(x) for name, x in sides.items()} | {"class": style}, title))

    def dot(self, x: float, y: float, style: str, title: str = "", radius: float = 4.5) -> None:
        """A point."""
        self.marks.append(("circle", {"cx": _rounded(x), "cy": _rounded(y), "r": radius, "class": style}, title))

    def text(self, x: float, y: float, text: str, style: str) -> None:
        """A line of text."""
        self.marks.append(("text", {"x": _rounded(x), "y": _rounded(y), "class": style}, text))


@dataclass(frozen=True)
class _Scale:
    """From numbers to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, x: float) -> float:
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)


def interval_figure(title: str, rows: Sequence[tuple[str, str, Estimate]], low: float, high: float) -> Figure:
    """
    Means with their intervals, one below the other.

    Args:
        title (`str`):
            What they are.
        rows (sequence of `tuple[str, str, Estimate]`):
            Label, style and mean of each.
        low (`float`):
            Begin of the axis; what lies beyond is cut there.
        high (`float`):
            Its end.

    Returns:
        [`Figure`].
    """
    height = _ROW * len(rows) + 34
    figure = Figure(title, "; ".join(f"{label}: {estimate}" for label, _, estimate in rows), height)
    x = _Scale(low, high, 8, _WIDTH - 12)
    for tick in _ticks(low, high, 5):
        figure.line(x(tick), 2, x(tick), height - 26, "zero" if tick == 0 > low else "grid")
        figure.text(x(tick), height - 10, f"{tick:.0%}".replace("-", "−"), "tick middle")
    for number, (label, style, estimate) in enumerate(rows):
        y = _ROW * number + 16
        figure.text(8, y, label, "label")
        figure.text(_WIDTH - 12, y, f"{estimate.mean:.1%}", "number end")
        ends = [x(min(max(end, low), high)) for end in (estimate.low, estimate.high, estimate.mean)]
        figure.line(8, y + 15, _WIDTH - 12, y + 15, "track")
        figure.line(ends[0], y + 15, ends[1], y + 15, f"interval {style}")
        figure.dot(ends[2], y + 15, f"point {style}", f"{label}: {estimate}")
    return figure


def curve_figure(title: str, series: Mapping[str, Points], x_title: str, constant: tuple[str, float] | None = None):
    """
    Numbers over the course of a training.

    Args:
        title (`str`):
            What they are.
        series (`dict[str, list[tuple[float, float]]]`):
            Label -> points. At least one has a point.
        x_title (`str`):
            What is counted on the horizontal axis.
        constant (`tuple[str, float]`, *optional*):
            Label and height of a line to compare with.

    Returns:
        [`Figure`].
    """
    points = [point for part in series.values() for point in part]
    heights = [y for _, y in points] + ([constant[1]] if constant else [])
    said = [f"{label} from {part[0][1]:.3g} to {part[-1][1]:.3g}" for label, part in series.items() if part]
    figure = Figure(title, "; ".join(said))
    x, y = _axes(figure, [px for px, _ in points], heights, x_title)
    if constant:
        figure.line(x.start, y(constant[1]), x.end, y(constant[1]), "constant")
        figure.legend.append(("constant", f"{constant[0]} {constant[1]:.3g}"))
    for number, (label, part) in enumerate(series.items()):
        style = f"series{number}"
        figure.curve([(x(px), y(py)) for px, py in part], f"curve {style}")
        if len(part) <= 12:
            for px, py in part:
                figure.dot(x(px), y(py), f"point {style}", f"{label}: {py:.4g} at {px:g}", 2.5)
        if len(series) > 1 or constant:
            figure.legend.append((style, label))
    return figure


def calibration_figure(bins: Sequence[CalibrationBin]) -> Figure:
    """
    Mean outcomes by predicted value.

    Args:
        bins (sequence of [`~dapo_trl.diagnosis.CalibrationBin`]):
            At least one.

    Returns:
        [`Figure`].
    """
    said = "; ".join(f"valued {bin.value:.2f}, ended right {bin.outcome}" for bin in bins)
    figure = Figure("Mean outcome by value", said, height=330)
    bottom = 330 - _BOTTOM
    x, y = _Scale(0, 1, _LEFT, _WIDTH - _RIGHT), _Scale(0, 1, bottom, _TOP)
    _grid(figure, x, y, "critic's value", (0, 0.25, 0.5, 0.75, 1), (0, 0.25, 0.5, 0.75, 1), bottom)
    figure.line(x(0), y(0), x(1), y(1), "constant")
    for bin in bins:
        title = (
            f"value {bin.value:.2f}: {bin.outcome} right; {bin.num_states:,} states of {bin.num_problems:,} problems"
        )
        if bin.num_problems >= _FEW:
            figure.line(x(bin.value), y(bin.outcome.low), x(bin.value), y(bin.outcome.high), "interval critic")
        style = "point critic" if bin.num_problems >= _FEW else "few critic"
        figure.dot(x(bin.value), y(bin.outcome.mean), style, title)
    figure.legend = [("critic", "share that ended right"), ("constant", "as valued")]
    if any(bin.num_problems < _FEW for bin in bins):
        figure.legend.append(("few", f"of fewer than {_FEW} problems"))
    return figure


def histogram_figure(title: str, values: np.ndarray, low: float, high: float, style: str, x_title: str) -> Figure:
    """
    How often which numbers are there.

    Args:
        title (`str`):
            What they are.
        values (`np.ndarray` of shape `(N,)`):
            At least one number.
        low (`float`):
            Begin of the axis.
        high (`float`):
            Its end.
        style (`str`):
            Colour of the bars.
        x_title (`str`):
            What is on the horizontal axis.

    Returns:
        [`Figure`].
    """
    counts, edges = np.histogram(values, bins=40, range=(low, high))
    quarter, median, three = np.quantile(values, [0.25, 0.5, 0.75])
    said = f"{len(values):,} in all; median {median:.2f}, half of them between {quarter:.2f} and {three:.2f}"
    figure = Figure(title, said)
    x, y = _axes(figure, [low, high], [0.0, float(counts.max())], x_title)
    for number, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        title = f"{start:.2f} to {end:.2f}: {number:,}"
        figure.bar(x(start) + 0.5, y(number), x(end) - x(start) - 1, y(0) - y(number), f"fill {style}", title)
    if low < 0 < high:
        figure.line(x(0), y.start, x(0), y.end, "zero")
    return figure


def parts_figure(title: str, parts: Sequence[tuple[str, str, int]]) -> Figure:
    """
    A whole and its parts.

    Args:
        title (`str`):
            What the whole is.
        parts (sequence of `tuple[str, str, int]`):
            Label, style and size of each part.

    Returns:
        [`Figure`].
    """
    whole = max(sum(size for _, _, size in parts), 1)
    said = "; ".join(f"{label}: {size:,} of {whole:,}, {size / whole:.0%}" for label, _, size in parts)
    figure = Figure(title, said, height=46 + 24 * len(parts))
    x = _Scale(0, whole, 8, _WIDTH - 12)
    start = 0
    for number, (label, style, size) in enumerate(parts):
        figure.bar(x(start), 6, x(start + size) - x(start) - 1, 22, f"fill {style}", f"{label}: {size:,}")
        y = 54 + 24 * number
        figure.bar(8, y - 10, 12, 12, f"fill {style}")
        figure.text(28, y, label, "label")
        figure.text(_WIDTH - 12, y, f"{size:,} · {size / whole:.0%}", "number end")
        start += size
    return figure


def _axes(figure: Figure, xs: Sequence[float], ys: Sequence[float], x_title: str) -> tuple[_Scale, _Scale]:
    """Scales that hold all points, with ticks and lines."""
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 4), _ticks(min(ys), max(ys), 4, is_wider=True)
    bottom = figure.height - _BOTTOM
    x = _Scale(min(xs), max(max(xs), min(xs) + 1e-9), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(y_ticks[0], y_ticks[-1], bottom, _TOP)
    _grid(figure, x, y, x_title, x_ticks, y_ticks, bottom)
    return x, y


def _grid(
    figure: Figure, x: _Scale, y: _Scale, title: str, xs: Sequence[float], ys: Sequence[float], bottom: float
) -> None:
    for tick in ys:
        figure.line(x.start, y(tick), x.end, y(tick), "grid")
        figure.text(x.start - 6, y(tick) + 4, _short(tick), "tick end")
    for tick in xs:
        figure.line(x(tick), bottom, x(tick), bottom + 4, "axis")
        figure.text(x(tick), bottom + 17, _short(tick), "tick middle")
    figure.line(x.start, bottom, x.end, bottom, "axis")
    figure.text(x.end, bottom + 33, title, "tick end")


def _ticks(low: float, high: float, number: int, is_wider: bool = False) -> list[float]:
    """Round numbers between two others; or, if wider, around them."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    ticks = MaxNLocator(number, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = (high - low) * 1e-6
    return [round(float(t), 10) for t in ticks if is_wider or low - slack <= t <= high + slack]


def _short(number: float) -> str:
    """A tick's label."""
    if abs(number) >= 10_000:
        return f"{number / 1000:g}k"
    return f"{number:.4g}".replace("-", "−")


def _rounded(number: float) -> float:
    """Tenths of a unit are enough, and half of the file."""
    return round(float(number), 1)
