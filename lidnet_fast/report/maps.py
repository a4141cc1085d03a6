"""The page's tables of small maps, such as where each arm made something up in each case."""

from collections.abc import Callable
from html import escape

import numpy as np

from lidnet_fast.report.data import ScoreMaps
from lidnet_fast.report.images import difference_gradient, difference_png


def maps_section(maps: ScoreMaps, style: Callable[[str], str]) -> str:
    """The section of one table of maps, closed until the reader opens it.

    Args:
        maps: it has at least one row.
        style: from an arm's name to its CSS colour class.
    """
    heads = "".join(
        f'<th scope="col" class="{style(arm)}"><i class="swatch"></i>{escape(arm)}</th>' for arm in maps.arms
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(case)}</th>'
        + "".join(
            f"<td>{_picture(f'{arm}, {case}', np.asarray(scores), maps.limit)}</td>" for arm, scores in row.items()
        )
        + "</tr>"
        for case, row in maps.rows.items()
    )
    scale = (
        f'<span class="scale">\N{MINUS SIGN}{maps.limit:.1f} <i style="background:{difference_gradient()}"></i> '
        f"{maps.limit:.1f}</span>"
    )
    return (
        f'<section><h2>{escape(maps.title)}</h2><details class="room maps"><summary>{len(maps.rows)} cases {scale}'
        f'</summary><div class="scroll" tabindex="0" role="region" aria-label="{escape(maps.title)}">'
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        f'<p class="note">{escape(maps.note)}</p></section>'
    )


def _picture(name: str, scores: np.ndarray, limit: float) -> str:
    height, width = scores.shape
    source = difference_png(scores, limit)
    return f'<img loading="lazy" width="{width}" height="{height}" alt="{escape(name)}" src="{source}">'
