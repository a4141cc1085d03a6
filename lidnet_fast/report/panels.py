"""The page's image panels: slices side by side with their boxes, lesions magnified, and the tools above them.

Every column carries its HU values, which `panels.js` shows through the reader's window; the 8-bit pictures next to them
are what a browser without scripts shows.
"""

import json
from collections.abc import Callable
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from lidnet_fast.report.data import Panel, Report
from lidnet_fast.report.images import (
    DIVERGING,
    difference_gradient,
    difference_limit,
    difference_png,
    gray_png,
    lesion_crop,
    packed_hu,
)

_CROPS = 4  # magnified lesions per panel
_PRESETS = (("lung", -600, 1500), ("soft tissue", 40, 400), ("bone", 400, 1800))
"""Display windows: name, level and width in HU."""
_LEVELS = (-1200, 1200)
_WIDTHS = (20, 4000)
_LIMITS = (5, 10, 20, 50, 100, 200, 500, 1000)
"""Ends of the differences' colour scale that a reader can choose from, HU."""

View = tuple[int, int, int, int]
"""The part of a slice that a picture shows: x, y, width and height in pixels."""


def panels_section(report: Report, style: Callable[[str], str]) -> str:
    """The section with all panels of a report.

    Args:
        report: it has at least one panel.
        style: from an arm's name to its CSS colour class.
    """
    differences = [image for panel in report.panels if (image := panel.difference_image()) is not None]
    limit = difference_limit(differences)
    panels = "".join(_panel(panel, report, limit, style) for panel in report.panels)
    tools = _tools(report, limit if differences else None)
    return (
        f'<section><h2>Images</h2><div class="room" data-colours="{json.dumps(list(DIVERGING.items()))}">'
        f"{tools}{panels}</div>"
        '<p class="note">Below each slice its lesions (at most the first four) are magnified, pixel by pixel. '
        "Windows and differences are computed from HU values, rounded to whole numbers. "
        "<noscript>Window, boxes and keyboard need JavaScript; without it, pictures have 256 grey values over "
        f"{_range(*report.window)} HU.</noscript></p>"
        '<dialog aria-label="Large view"></dialog></section>'
    )


def _tools(report: Report, limit: float | None) -> str:
    """The tools above the panels, hidden until their script shows them; `limit` is None where there's no difference."""
    low, high = report.window
    presets = (("evaluation", (low + high) / 2, high - low), *_PRESETS)
    options = "".join(
        f'<option value="{level:g} {width:g}">{name} {_signed(level)} / {width:g}</option>'
        for name, level, width in presets
    )
    bottom, top = min(_LEVELS[0], low), max(_LEVELS[1], high)
    widest = max(_WIDTHS[1], high - low)
    detections = "" if any(panel.detections for panel in report.panels) else " hidden"
    keys = (
        ("\N{LEFTWARDS ARROW} \N{RIGHTWARDS ARROW} or j k", "lesions"),
        ("b", "boxes"),
        (f"1\N{EN DASH}{len(presets)}", "windows"),
        ("Enter or click", "enlarge"),
        ("drag", "level and width"),
    )
    hint = "".join(f"<span><kbd>{key}</kbd> {what}</span>" for key, what in keys)
    return (
        '<div class="tools" hidden>'
        '<div class="toolset" role="group" aria-label="Lesions">'
        '<button type="button" data-step="-1" aria-label="Previous lesion">\N{LEFTWARDS ARROW}</button>'
        '<output data-tool="position" role="status">no lesion chosen</output>'
        '<button type="button" data-step="1" aria-label="Next lesion">\N{RIGHTWARDS ARROW}</button></div>'
        '<div class="toolset windowing needs-values" role="group" aria-label="Display window">'
        f'<label>window <select data-tool="preset">{options}<option value="" hidden>own</option></select></label>'
        f'<label>level <input type="range" data-tool="level" min="{bottom:g}" max="{top:g}" step="5">'
        '<output data-tool="level-text"></output></label>'
        f'<label>width <input type="range" data-tool="width" min="{_WIDTHS[0]}" max="{widest:g}" step="10">'
        '<output data-tool="width-text"></output></label></div>'
        '<div class="toolset" role="group" aria-label="Boxes">'
        '<label><input type="checkbox" data-tool="lesions" checked><i class="key"></i>lesions</label>'
        f'<label{detections}><input type="checkbox" data-tool="found" checked><i class="key found"></i>'
        "detections</label>"
        f'<label{detections}>score \N{GREATER-THAN OR EQUAL TO} <input type="range" min="0" max="1" step="0.05" '
        f'value="{report.score_threshold:g}" data-tool="score"><output data-tool="score-text"></output></label></div>'
        f"{'' if limit is None else _difference_tools(report, limit)}"
        f'<p class="hint">{hint}<output data-tool="readout" aria-hidden="true"></output></p></div>'
    )


def _difference_tools(report: Report, limit: float) -> str:
    """Which column's difference is shown, and over what range of HU."""
    first = next(panel for panel in report.panels if panel.difference is not None)
    assert first.difference is not None
    minuend, subtrahend = first.difference
    names = "".join(
        f"<option{' selected' if name == minuend else ''}>{escape(name)}</option>"
        for name in first.images
        if name != subtrahend
    )
    limits = sorted({*_LIMITS, limit})
    return (
        '<div class="toolset needs-values" role="group" aria-label="Difference">'
        f'<label>difference <select data-tool="minuend">{names}</select></label>'
        f"<span>\N{MINUS SIGN} {escape(subtrahend)}</span>"
        '<label class="scale"><output data-tool="limit-text"></output>'
        f'<i style="background:{difference_gradient()}"></i><span class="hidden-text">ends of the colour scale</span>'
        f'<input type="range" data-tool="limit" data-limits="{json.dumps(limits)}" min="0" max="{len(limits) - 1}" '
        f'value="{limits.index(limit)}"></label></div>'
    )


def _panel(panel: Panel, report: Report, limit: float, style: Callable[[str], str]) -> str:
    boxes = np.asarray(panel.boxes, dtype=np.float64).reshape(-1, 4)
    height, width = panel.shape
    crops = [lesion_crop(box, panel.shape) for box in boxes[:_CROPS]]
    views = [(0, 0, width, height), *((x, y, side, side) for x, y, side in crops)]
    figures = ""
    for name, image in panel.images.items():
        hu = np.asarray(image)
        pictures = _pictures(name, hu, lambda part: gray_png(part, report.window), views, boxes, panel, report)
        figures += _figure(name, panel.captions.get(name, ""), f'data-hu="{packed_hu(hu)}"', pictures, style)
    difference = panel.difference_image()
    if panel.difference is not None and difference is not None:
        name = " \N{MINUS SIGN} ".join(panel.difference)
        pictures = _pictures(name, difference, lambda part: difference_png(part, limit), views, boxes, panel, report)
        minuend, subtrahend = (escape(operand) for operand in panel.difference)
        figures += _figure(name, "", f'data-minuend="{minuend}" data-subtrahend="{subtrahend}"', pictures, style)
    columns = len(panel.images) + (difference is not None)
    return (
        f'<article class="panel"><h3>{escape(panel.title)}</h3>'
        f'<div class="strip" style="--n:{columns}" data-width="{width}" data-height="{height}">{figures}</div>'
        "</article>"
    )


def _pictures(
    name: str,
    image: np.ndarray,
    picture: Callable[[np.ndarray], str],
    views: list[View],
    boxes: np.ndarray,
    panel: Panel,
    report: Report,
) -> str:
    """One column's pictures, each a button that enlarges it: the whole slice and its lesions."""
    pictures = ""
    for index, (x, y, w, h) in enumerate(views):
        overlay = "".join(_rectangle(box, (x, y, w, h), "lesion") for box in boxes)
        overlay += "".join(
            _detection(box, score, (x, y, w, h), report.score_threshold)
            for box, score in panel.detections.get(name, ())
        )
        pictures += (
            f'<button type="button" class="view {"zoom" if index else "full"}" data-x="{x}" data-y="{y}">'
            f'<img width="{w}" height="{h}" alt="{escape(name)}{f", lesion {index}" if index else ""}" '
            f'src="{picture(image[y : y + h, x : x + w])}"><svg aria-hidden="true">{overlay}</svg></button>'
        )
    return pictures


def _figure(name: str, caption: str, data: str, pictures: str, style: Callable[[str], str]) -> str:
    swatch = f'<span class="{style(name)}"><i class="swatch"></i></span>' if style(name) else ""
    return (
        f'<figure class="ct {style(name)}" data-name="{escape(name)}" {data}><figcaption>{swatch}<b>{escape(name)}</b>'
        f"<small>{escape(caption)}</small></figcaption>{pictures}</figure>"
    )


def _rectangle(box: ArrayLike, view: View, kind: str) -> str:
    """A box as an SVG rectangle in per cent of its view, so that strokes keep their width at any size."""
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float64).tolist()
    x, y, w, h = view
    return (
        f'<rect class="{kind}" x="{(x1 - x) / w:.3%}" y="{(y1 - y) / h:.3%}" '
        f'width="{(x2 - x1) / w:.3%}" height="{(y2 - y1) / h:.3%}"/>'
    )


def _detection(box: ArrayLike, score: float, view: View, threshold: float) -> str:
    """A detection's rectangle with its score above it, or below where there is no room above."""
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float64).tolist()
    x, y, w, h = view
    if x2 <= x or y2 <= y or x1 >= x + w or y1 >= y + h:
        return ""
    left = min(max((x1 - x) / w, 0.0), 0.88)
    top, shift = ((y1 - y) / h, -4) if (y1 - y) / h > 0.08 else ((y2 - y) / h, 12)
    text = f'<text x="{left:.3%}" y="{top:.3%}" dy="{shift}">{score:.2f}</text>'
    hidden = " below" if score < threshold else ""
    return f'<g class="found{hidden}" data-score="{score:.4f}">{_rectangle(box, view, "")}{text}</g>'


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _range(low: float, high: float) -> str:
    return f"{_signed(low)} \N{HORIZONTAL ELLIPSIS} {_signed(high)}"
