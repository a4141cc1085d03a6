"""Line and scatter charts as inline SVG: colours come from the page's style sheet, so that they follow its theme."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lidnet_fast.report.data import Arm, Column, Curve, Forest, Metric, Report, mean_of

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 428, 26, 246
FROC_TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which LUNA16 and others read a FROC curve."""

_LETTER = 6.2  # about its width in a forest plot's names
_ROW = 18
_LONG = 160
_BINS = 64
_CHARACTER = 6.0  # mean width of a label's character, in chart units

Floats = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]
Style = Callable[[str], str]
"""From a series' name to the CSS class that colours it."""


@dataclass(frozen=True)
class Axis:
    """A range of values laid over a range of chart units, with its labelled ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def __call__(self, values: ArrayLike) -> Floats:
        """Values to chart units."""
        scale = np.log if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(np.asarray(values, dtype=np.float64)) - low) / (high - low) * (self.end - self.start)


def linear_axis(values: Floats, start: float, end: float) -> Axis:
    """An axis from one round number to another around all values, with four to eight ticks."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - max(abs(low), 1e-9) * 0.1, high + max(abs(high), 1e-9) * 0.1
    exponent = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(k * exponent for k in (1, 2, 5, 10) if k * exponent >= (high - low) / 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((k * step, f"{k * step:.{digits}f}".replace("-", "\N{MINUS SIGN}")) for k in range(first, last + 1))
    return Axis(first * step, last * step, start, end, False, ticks)


def log_axis(values: Floats, start: float, end: float) -> Axis:
    """A logarithmic axis; ticks at powers of ten, with 2 and 5 between where there are few."""
    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 10.0)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(exponents) <= 3 else (1,)
    marks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    low = max([mark for mark in marks if mark <= low * (1 + 1e-9)])
    high = min([mark for mark in marks if mark >= high * (1 - 1e-9) and mark > low], default=low * 10)
    every = 1 + len(exponents) // 9
    ticks = [(mark, f"{mark:g}") for mark in marks if low <= mark <= high]
    return Axis(low, high, start, end, True, tuple(ticks[::every]))


def condense(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats | None]:
    """A series as drawn: itself; from 160 points on, 64 means of consecutive points and their 10-90 % band [2,64]."""
    if len(x) < _LONG:
        return x, y, None
    parts = np.array_split(np.arange(len(x)), _BINS)
    band = np.array([np.percentile(y[part], (10, 90)) for part in parts]).T
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts]), band


def line_chart(curve: Curve, style: Style) -> str:
    """A curve's chart with its legend, as an HTML figure."""
    drawn = {name: condense(*_usable(x, y, curve)) for name, (x, y) in curve.series.items()}
    drawn = {name: series for name, series in drawn.items() if len(series[0])}
    if not drawn:
        return _figure(curve.title, '<p class="empty">No data</p>', "")
    xs = np.concatenate([x for x, _, _ in drawn.values()])
    ys = np.concatenate([y if band is None else band.ravel() for _, y, band in drawn.values()])
    x_axis = (log_axis if curve.log_x else linear_axis)(xs, LEFT, RIGHT)
    y_axis = (log_axis if curve.log_y else linear_axis)(ys, BOTTOM, TOP)
    banded = any(band is not None for _, _, band in drawn.values())
    note = f"Lines: means of {_BINS} consecutive stretches; bands: 10th to 90th percentile." if banded else ""
    lines = "".join(_line(name, series, x_axis, y_axis, style) for name, series in drawn.items())
    svg = _frame(curve.title, curve.x_label, curve.y_label, x_axis, y_axis, lines)
    return _figure(curve.title, svg, _legend(drawn, style), note)


def froc_chart(froc: Mapping[str, tuple[ArrayLike, ArrayLike]], style: Style) -> str:
    """FROC curves between 1/8 and 8 false positives per image (logarithmic), held level beyond a curve's last point."""
    low, high = FROC_TICKS[0], FROC_TICKS[-1]
    labels = ("1/8", "1/4", "1/2", "1", "2", "4", "8")
    x_axis = Axis(low, high, LEFT, RIGHT, True, tuple(zip(FROC_TICKS, labels, strict=True)))
    y_axis = linear_axis(np.array([0.0, 1.0]), BOTTOM, TOP)
    lines = ""
    for name, (x, y) in froc.items():
        false_positives, sensitivity = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        inside = (false_positives > low) & (false_positives < high)
        ends = np.interp([low, high], false_positives, sensitivity, left=0.0)
        points = np.concatenate([[low], false_positives[inside], [high]])
        values = np.concatenate([ends[:1], sensitivity[inside], ends[1:]])
        lines += _line(name, (points, values, None), x_axis, y_axis, style)
    title = "Free-response ROC"
    svg = _frame(title, "false positives per image", "lesion sensitivity", x_axis, y_axis, lines)
    return _figure(title, svg, _legend(froc, style), "Beyond a curve's last point its sensitivity is held.")


def tradeoff_chart(report: Report, x_key: str, y_key: str, style: Style) -> str:
    """Two table columns against each other: a point per trained arm, with bars for its intervals.

    The axes fit the trained arms; a reference arm is a level line where it lies inside and a remark where it doesn't.
    """
    x_column, y_column = report.column(x_key), report.column(y_key)
    title = " against ".join(f"{c.label} ({c.group})" if c.group else c.label for c in (y_column, x_column))
    points = {arm.name: arm for arm in report.arms if not arm.reference and _has_point(arm, x_key, y_key)}
    if not points:
        return _figure(title, '<p class="empty">No data</p>', "")
    spans = [(_interval(arm, x_key), _interval(arm, y_key)) for arm in points.values()]
    x_axis = linear_axis(np.array([x for x, _ in spans]).ravel(), LEFT, RIGHT)
    y_axis = linear_axis(np.array([y for _, y in spans]).ravel(), BOTTOM, TOP)
    body = bars = ""
    taken: list[Rectangle] = []
    outside = []
    for arm in report.arms:
        level = mean_of(arm.metrics.get(y_key))
        if not arm.reference or level is None:
            continue
        if not y_axis.low <= level <= y_axis.high:
            outside.append(f"{arm.name} {format(level, y_column.format)}")
            continue
        y = float(y_axis(level))
        body += f'<line class="level {style(arm.name)}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text class="name {style(arm.name)}" x="{LEFT + 4}" y="{y - 4:.1f}">{escape(arm.name)}</text>'
        taken.append((LEFT, y - 14, LEFT + 4 + len(arm.name) * _CHARACTER, y))
    spots = {name: (float(x_axis(x[1])), float(y_axis(y[1]))) for name, (x, y) in zip(points, spans, strict=True)}
    taken += [(x - 6, y - 6, x + 6, y + 6) for x, y in spots.values()]
    for (name, (x, y)), (x_span, y_span) in zip(spots.items(), spans, strict=True):
        (x1, _, x2), (y1, _, y2) = x_axis(x_span), y_axis(y_span)
        bars += f'<path class="bar {style(name)}" d="M{x1:.1f} {y:.1f}H{x2:.1f}M{x:.1f} {y1:.1f}V{y2:.1f}"/>'
        taken += [(x1, y - 1, x2, y + 1), (x - 1, y2, x + 1, y1)]
    for name, (x, y) in spots.items():
        size = 6.5 if points[name].highlight else 4.5
        body += f'<g class="{style(name)}"><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
        body += f"{_point_label(name, x, y, taken)}</g>"
    svg = _frame(title, _axis_name(x_column), _axis_name(y_column), x_axis, y_axis, bars + body)
    notes = ["Up and to the right is better."] if x_column.higher_is_better and y_column.higher_is_better else []
    notes += [f"Off the scale: {', '.join(outside)}."] if outside else []
    return _figure(title, svg, "", " ".join(notes))


def forest_chart(forest: Forest, style: Style) -> str:
    """Differences with their intervals, one below the other, around a line at zero."""
    groups = {
        group: {name: _span(value) for name, value in rows.items() if mean_of(value) is not None}
        for group, rows in forest.rows.items()
    }
    spans = [span for rows in groups.values() for span in rows.values()]
    if not spans:
        return _figure(forest.title, '<p class="empty">No data</p>', "")
    longest = max(len(name) for rows in groups.values() for name in rows)
    left = min(24 + _LETTER * longest, WIDTH / 2)
    axis = linear_axis(np.array([0.0, *(end for span in spans for end in span)]), left, RIGHT)
    body, y = "", 4.0
    for group, rows in groups.items():
        y += _ROW
        body += f'<text class="heading" x="2" y="{y:.1f}">{escape(group)}</text>'
        for name, span in rows.items():
            y += _ROW
            x1, x, x2 = axis(span)
            colour = style(name) or "plain"
            body += f'<text class="name {colour}" x="12" y="{y:.1f}">{escape(name)}</text><g class="{colour}">'
            body += f'<path class="bar" d="M{x1:.1f} {y - 4:.1f}H{x2:.1f}"/>'
            body += f'<circle class="dot" cx="{x:.1f}" cy="{y - 4:.1f}" r="4.5"/></g>'
    bottom, zero = y + 10, float(axis(0.0))
    ticks = ""
    for mark, label in axis.ticks:
        x = float(axis(mark))
        ticks += f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom:.1f}"/>'
        ticks += f'<text class="tick middle" x="{x:.1f}" y="{bottom + 15:.1f}">{escape(label)}</text>'
    unit = f"{forest.label} ({forest.unit})" if forest.unit else forest.label
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 36:.0f}" role="img" aria-label="{escape(forest.title)}">'
        f'{ticks}<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="4" y2="{bottom:.1f}"/>'
        f'<text class="axis-name end" x="{RIGHT}" y="{bottom + 33:.1f}">{escape(unit)}</text>{body}</svg>'
    )
    return _figure(forest.title, svg, "", "Bars: 95 % intervals of the paired differences.")


def _usable(x: ArrayLike, y: ArrayLike, curve: Curve) -> tuple[Floats, Floats]:
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(xs) & np.isfinite(ys)
    keep &= ((xs > 0) | (not curve.log_x)) & ((ys > 0) | (not curve.log_y))
    return xs[keep], ys[keep]


def _line(name: str, series: tuple[Floats, Floats, Floats | None], x_axis: Axis, y_axis: Axis, style: Style) -> str:
    x, y, band = series
    px = x_axis(x)
    body = ""
    if band is not None:
        edge = [*zip(px, y_axis(band[0]), strict=True), *zip(px[::-1], y_axis(band[1])[::-1], strict=True)]
        body += f'<polygon class="band" points="{_points(edge)}"/>'
    body += f'<polyline points="{_points(zip(px, y_axis(y), strict=True))}"/>'
    if len(px) == 1:
        body += f'<circle class="dot" cx="{px[0]:.1f}" cy="{float(y_axis(y[0])):.1f}" r="3"/>'
    return f'<g class="line {style(name)}" data-name="{escape(name)}">{body}</g>'


def _points(pairs: Sequence[tuple[float, float]] | zip) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _frame(title: str, x_label: str, y_label: str, x_axis: Axis, y_axis: Axis, body: str) -> str:
    """The SVG: grid, tick labels and axis names around `body`; the axes' ranges are given to the page's script."""
    grid = ""
    for value, label in y_axis.ticks:
        y = float(y_axis(value))
        grid += f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{escape(label)}</text>'
    for value, label in x_axis.ticks:
        x = float(x_axis(value))
        grid += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        grid += f'<text class="tick middle" x="{x:.1f}" y="{BOTTOM + 17}">{escape(label)}</text>'
    ranges = "".join(
        f' data-{name}="{axis.low} {axis.high} {axis.start} {axis.end} {int(axis.log)}"'
        for name, axis in (("x", x_axis), ("y", y_axis))
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{ranges}>'
        f'{grid}<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
        f'<text class="axis-name" x="2" y="12">{escape(y_label)}</text>'
        f'<text class="axis-name end" x="{RIGHT}" y="{BOTTOM + 36}">{escape(x_label)}</text>{body}</svg>'
    )


def _figure(title: str, svg: str, legend: str, note: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{svg}{legend}{note}</figure>'


def _legend(names: Mapping[str, object], style: Style) -> str:
    items = (f'<li class="{style(name)}"><i class="sample"></i>{escape(name)}</li>' for name in names)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _has_point(arm: Arm, x_key: str, y_key: str) -> bool:
    values = (mean_of(arm.metrics.get(x_key)), mean_of(arm.metrics.get(y_key)))
    return all(value is not None and math.isfinite(value) for value in values)


def _interval(arm: Arm, key: str) -> tuple[float, float, float]:
    return _span(arm.metrics[key])


def _span(value: Metric) -> tuple[float, float, float]:
    """(low, mean, high) of a metric that exists; without an interval, all three are the mean."""
    mean = mean_of(value) or 0.0
    if isinstance(value, tuple) and math.isfinite(value[1]) and math.isfinite(value[2]):
        return value[1], mean, value[2]
    return mean, mean, mean


def _point_label(name: str, x: float, y: float, taken: list[Rectangle]) -> str:
    """A point's name, at the place around it that overlaps least; `taken` gets the label's rectangle."""
    width = len(name) * _CHARACTER
    places = [(x + 9, y + dy) for dy in (-6, 14)] + [(x - 9 - width, y + dy) for dy in (-6, 14)]
    places += [(x - width / 2, y + dy) for dy in (-12, 20, -26, 34)] + [(x + 9, y + dy) for dy in (-20, 28)]
    inside = [(left, base) for left, base in places if left >= LEFT + 2 and left + width <= WIDTH and base > TOP]

    def overlap(place: tuple[float, float]) -> float:
        left, base = place
        sides = (
            (min(left + width, x2) - max(left, x1), min(base + 2, y2) - max(base - 10, y1)) for x1, y1, x2, y2 in taken
        )
        return sum(w * h for w, h in sides if w > 0 and h > 0)

    left, base = min(inside or places, key=overlap)
    taken.append((left, base - 10, left + width, base + 2))
    return f'<text class="name" x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>'


def _axis_name(column: Column) -> str:
    name = f"{column.label}, {column.group}" if column.group else column.label
    return f"{name} ({column.unit})" if column.unit else name
