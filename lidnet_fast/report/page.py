"""From a `Report` to one HTML file: the table, the panels, the charts and the facts, with everything inline."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from lidnet_fast.files import write_text
from lidnet_fast.report.charts import forest_chart, froc_chart, line_chart, tradeoff_chart
from lidnet_fast.report.data import Arm, Column, Fact, Metric, Report, mean_of
from lidnet_fast.report.maps import maps_section
from lidnet_fast.report.panels import panels_section

_MANY_COLUMNS = 10  # with more, the table is set tighter
_COLOURS = 6  # s0 to s5 in report.css


def write_report(path: str | Path, report: Report) -> Path:
    """Write `report` as one self-contained HTML file and return its path.

    The page loads nothing: images are packed HU values and PNG data URIs, charts inline SVG, style and script inline.
    See `lidnet_fast.files.write_text`: `path` never holds half a page.
    """
    path = Path(path)
    write_text(path, render(report))
    return path


def render(report: Report) -> str:
    """The page's HTML."""
    style = ArmStyle(report.arms)
    charts = [tradeoff_chart(report, x, y, style) for x, y in report.tradeoffs]
    charts += [froc_chart(report.froc, style)] if report.froc else []
    charts += [line_chart(curve, style.among(list(curve.series))) for curve in report.curves]
    sections = [_results(report, style)]
    if report.forests:
        plots = "".join(forest_chart(forest, style) for forest in report.forests)
        sections.append(f'<section><h2>Gains</h2><div class="plots">{plots}</div></section>')
    if report.panels:
        sections.append(panels_section(report, style))
    sections += [maps_section(maps, style) for maps in report.maps if maps.rows]
    if charts:
        sections.append(f'<section><h2>Curves</h2><div class="plots">{"".join(charts)}</div></section>')
    if report.facts or report.config:
        sections.append(_facts(report))
    return Template(_asset("template.html")).substitute(
        title=escape(report.title),
        summary=escape(report.summary),
        style=_asset("report.css"),
        script=_asset("panels.js") + _asset("charts.js"),
        sections="\n".join(sections),
    )


class ArmStyle:
    """Gives each arm its CSS colour class, the same all over the page."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        references = [arm.name for arm in arms if arm.reference]
        self._classes = dict.fromkeys(references, "low") | dict.fromkeys(references[1:][-1:], "normal")
        self._classes |= {arm.name: "lid" for arm in arms if arm.highlight}
        controls = [arm.name for arm in arms if arm.name not in self._classes]
        self._classes |= {name: f"s{index % _COLOURS}" for index, name in enumerate(controls)}
        self._spare = [f"s{(len(controls) + index) % _COLOURS}" for index in range(_COLOURS)]

    def __call__(self, name: str) -> str:
        """The class of an arm; empty for another name."""
        return self._classes.get(name, "")

    def among(self, names: Sequence[str]) -> Callable[[str], str]:
        """The classes in a chart of these series: what isn't an arm takes colours that no arm of the chart has."""
        used = {self(name) for name in names}
        others = [name for name in names if not self(name)]
        if len(names) == 1 and others:
            return lambda name: "plain"
        free = [colour for colour in self._spare if colour not in used] or self._spare
        classes = self._classes | {name: free[index % len(free)] for index, name in enumerate(others)}
        return classes.__getitem__


def format_metric(value: Metric, column: Column) -> tuple[str, str]:
    """A table value as text, and its interval (empty without one). None and NaN are a dash."""
    mean = mean_of(value)
    if mean is None:
        return "\N{EN DASH}", ""
    interval = ""
    if isinstance(value, tuple) and value[1] < value[2]:
        dash = " to " if value[1] < 0 else "\N{EN DASH}"
        interval = f"{_number(value[1], column.format)}{dash}{_number(value[2], column.format)}"
    return _number(mean, column.format), interval


def best_texts(report: Report) -> dict[str, str]:
    """Column key -> the best value among the trained arms, as it is printed (so that equal prints tie)."""
    best = {}
    for column in report.columns:
        means = [mean_of(arm.metrics.get(column.key)) for arm in report.arms if not arm.reference]
        values = [value for value in means if value is not None]
        if column.higher_is_better is not None and len(values) > 1:
            choose = max if column.higher_is_better else min
            best[column.key] = _number(choose(values), column.format)
    return best


def _number(value: float, specification: str) -> str:
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    return format(value, specification).replace("-", "\N{MINUS SIGN}")


def _results(report: Report, style: ArmStyle) -> str:
    best = best_texts(report)
    rows = "".join(_row(arm, report.columns, best, style) for arm in report.arms)
    notes = ["Underlined: the best, reference images aside."] if best else []
    if any(isinstance(value, tuple) for arm in report.arms for value in arm.metrics.values()):
        notes.append("Small: interval of the mean.")
    if any(arm.reference for arm in report.arms):
        notes.append("Italic: reference images, which nothing denoised.")
    meanings = "".join(
        f"<dt>{escape(f'{column.group}: ' if column.group else '')}{escape(column.label)}</dt>"
        f"<dd>{escape(column.help)}</dd>"
        for column in report.columns
        if column.help
    )
    if meanings:
        meanings = f'<details class="meaning"><summary>What the columns mean</summary><dl>{meanings}</dl></details>'
    return (
        '<section><h2>Results</h2><div class="card scroll" tabindex="0" role="region" aria-label="Result table">'
        f'<table class="{"dense" if len(report.columns) > _MANY_COLUMNS else "airy"}">'
        f"<thead>{_table_head(report.columns)}</thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{escape(" ".join(notes))}</p>{meanings}</section>'
    )


def _table_head(columns: Sequence[Column]) -> str:
    groups = ""
    if any(column.group for column in columns):
        groups = '<tr><th class="group"></th>'
        for name, members in groupby(columns, key=lambda column: column.group):
            label = f"<span>{escape(name)}</span>" if name else ""
            groups += f'<th class="group" colspan="{len(list(members))}" scope="colgroup">{label}</th>'
        groups += "</tr>"
    heads = ""
    for column in columns:
        arrow = {True: " \N{UPWARDS ARROW}", False: " \N{DOWNWARDS ARROW}", None: ""}[column.higher_is_better]
        unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
        heads += f'<th scope="col"><abbr title="{escape(column.help)}">{escape(column.label)}{arrow}</abbr>{unit}</th>'
    return f'{groups}<tr><th scope="col">Arm</th>{heads}</tr>'


def _row(arm: Arm, columns: Sequence[Column], best: Mapping[str, str], style: ArmStyle) -> str:
    cells = ""
    for column in columns:
        text, interval = format_metric(arm.metrics.get(column.key), column)
        if not arm.reference and text == best.get(column.key):
            text = f'<b>{text}</b><span class="hidden-text"> (best)</span>'
        cells += f"<td>{text}{f'<small>{interval}</small>' if interval else ''}</td>"
    kind = "highlight" if arm.highlight else "reference" if arm.reference else "control"
    note = f" <small>{escape(arm.note)}</small>" if arm.note else ""
    head = f'<th scope="row"><div class="{style(arm.name)}"><i class="swatch"></i>{escape(arm.name)}{note}</div></th>'
    return f'<tr class="{kind}">{head}{cells}</tr>'


def _facts(report: Report) -> str:
    groups: dict[str, Mapping[str, Fact]] = {}
    plain = {name: value for name, value in report.facts.items() if not isinstance(value, Mapping)}
    if plain:
        groups["Run"] = plain
    groups |= {name: value for name, value in report.facts.items() if isinstance(value, Mapping)}
    cards = ""
    for title, facts in groups.items():
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_fact(value))}</dd>" for name, value in facts.items())
        cards += f'<div class="card"><h3>{escape(title)}</h3><dl>{items}</dl></div>'
    config = ""
    if report.config:
        config = (
            '<details class="card config"><summary>Resolved configuration</summary>'
            f"<pre>{escape(report.config)}</pre></details>"
        )
    return f'<section><h2>This run</h2><div class="facts">{cards}</div>{config}</section>'


def _fact(value: Fact) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _asset(name: str) -> str:
    return files("lidnet_fast.report").joinpath(name).read_text(encoding="utf-8")
