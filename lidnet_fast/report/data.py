"""What a report shows: plain dataclasses that check themselves when they are made.

Every check raises `ValueError` with one line that names the field and the offending value, so that a report that exists
can be written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Metric = float | tuple[float, float, float] | None
"""A table value: a number, a (mean, low, high) interval, or None where it doesn't exist; NaN counts as None."""

Fact = str | int | float | bool | None
Detection = tuple[ArrayLike, float]
"""One detection: its box (x1, y1, x2, y2) in pixels and its score in [0, 1]."""


@dataclass(frozen=True)
class Column:
    """One column of the result table.

    `format` is a format specification such as ".2f"; `group` is a heading shared with neighbouring columns
    ("whole image"); `help` is a sentence for the reader. `higher_is_better` None: no best value is marked.
    """

    key: str
    label: str
    format: str = ".3f"
    unit: str = ""
    higher_is_better: bool | None = True
    help: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        try:
            format(1.0, self.format)
        except ValueError:
            raise ValueError(
                f"column {self.key!r}: {self.format!r} is not a format specification for a number"
            ) from None


@dataclass(frozen=True)
class Arm:
    """One row of the result table: a trained arm, or a `reference` (low dose, normal dose) with nothing trained.

    `metrics` maps column keys to values; a missing key and None both show as a dash. `highlight` marks the arm the
    report is about. `note` is a short remark next to the name.
    """

    name: str
    metrics: Mapping[str, Metric]
    highlight: bool = False
    reference: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for key, value in self.metrics.items():
            if isinstance(value, tuple) and (len(value) != 3 or value[1] > value[0] or value[0] > value[2]):
                raise ValueError(
                    f"arm {self.name!r}: {key!r} is {value}, not (mean, low, high) with low <= mean <= high"
                )


@dataclass(frozen=True, eq=False)
class Curve:
    """One line chart. `series` maps a name to x and y values of equal length; points that aren't finite are left out.

    A series whose name is an arm's is drawn in that arm's colour. Long series are shown as running means (see
    `charts.condense`). On logarithmic axes, points at or below zero are left out.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[ArrayLike, ArrayLike]]
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        for name, (x, y) in self.series.items():
            _check_xy(f"curve {self.title!r}, series {name!r}", x, y)


@dataclass(frozen=True)
class Forest:
    """One forest plot: differences with their intervals around zero.

    `rows` maps a group's heading to names and differences; a name that is an arm's is drawn in that arm's colour.
    """

    title: str
    label: str
    unit: str
    rows: Mapping[str, Mapping[str, Metric]]


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice, in several versions side by side.

    `images` maps a column name to a 2-D HU array; all have one shape. `boxes` [L,4] (x1, y1, x2, y2) are the annotated
    lesions in pixels, with pixel-edge coordinates; the first ones get a magnified crop. `detections` and `captions`
    (a short remark, such as the PSNR) belong to columns by name. `difference` names two columns: a last column then
    shows the first minus the second in a diverging colour map; the reader may choose another first.
    """

    title: str
    images: Mapping[str, ArrayLike]
    boxes: ArrayLike = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    detections: Mapping[str, Sequence[Detection]] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    difference: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        what = f"panel {self.title!r}"
        if not self.images:
            raise ValueError(f"{what}: no images")
        first, shape = next((name, np.shape(image)) for name, image in self.images.items())
        for name, image in self.images.items():
            if np.ndim(image) != 2 or np.size(image) == 0:
                raise ValueError(f"{what}: image {name!r} has shape {np.shape(image)}, expected [H,W]")
            if np.shape(image) != shape:
                raise ValueError(f"{what}: image {name!r} has shape {np.shape(image)}, but {first!r} has {shape}")
            if not np.isfinite(image).all():
                raise ValueError(f"{what}: image {name!r} has values that are not finite")
        _check_boxes(f"{what}: boxes", np.asarray(self.boxes, dtype=np.float64))
        for column in (*self.detections, *self.captions, *(self.difference or ())):
            if column not in self.images:
                raise ValueError(f"{what}: {column!r} is not one of its images ({', '.join(self.images)})")
        for column, found in self.detections.items():
            for box, score in found:
                _check_boxes(f"{what}: a detection in {column!r}", np.asarray(box, dtype=np.float64)[None])
                if not 0 <= score <= 1:
                    raise ValueError(f"{what}: a detection in {column!r} has score {score}, expected 0 to 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = np.shape(next(iter(self.images.values())))
        return height, width

    def difference_image(self) -> NDArray[np.float32] | None:
        """The difference column in HU, or None where there is none."""
        if self.difference is None:
            return None
        minuend, subtrahend = (np.asarray(self.images[name], dtype=np.float32) for name in self.difference)
        return minuend - subtrahend


@dataclass(frozen=True, eq=False)
class ScoreMaps:
    """Small maps of a signed score, one row per case and one column per arm.

    `rows` maps a case to its maps [H,W] by arm; all rows have the same arms. Colours saturate at -`limit` and +`limit`.
    """

    title: str
    note: str
    limit: float
    rows: Mapping[str, Mapping[str, ArrayLike]]

    def __post_init__(self) -> None:
        what = f"maps {self.title!r}"
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"{what}: limit is {self.limit}, expected a finite number above 0")
        for case, maps in self.rows.items():
            if list(maps) != self.arms:
                raise ValueError(f"{what}: {case!r} has the arms {', '.join(maps)}, expected {', '.join(self.arms)}")
            for arm, scores in maps.items():
                if np.ndim(scores) != 2 or not np.isfinite(scores).all():
                    raise ValueError(f"{what}: {arm!r} of {case!r} isn't a finite [H,W]")

    @property
    def arms(self) -> list[str]:
        """The columns' names."""
        return list(next(iter(self.rows.values()), {}))


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows. Texts are plain: they are escaped, never interpreted.

    `arms` are the table's rows in order and `columns` its columns. `tradeoffs` are pairs of column keys (x, y) to
    be drawn against each other, one point per arm. `froc` maps an arm's name to its false positives per image
    (increasing) and sensitivities. `facts` are plain facts, or groups of them one level deep. `config` is the resolved
    YAML text. `window` is the HU range that images are shown in at first, and always without scripts.
    `score_threshold`: detections below it are hidden until the reader lowers it.
    """

    title: str
    summary: str
    columns: Sequence[Column]
    arms: Sequence[Arm]
    tradeoffs: Sequence[tuple[str, str]] = ()
    forests: Sequence[Forest] = ()
    panels: Sequence[Panel] = ()
    maps: Sequence[ScoreMaps] = ()
    curves: Sequence[Curve] = ()
    froc: Mapping[str, tuple[ArrayLike, ArrayLike]] = field(default_factory=dict)
    facts: Mapping[str, Fact | Mapping[str, Fact]] = field(default_factory=dict)
    config: str = ""
    window: tuple[float, float] = (-1000.0, 400.0)
    score_threshold: float = 0.3

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms: empty, a report needs at least one")
        if not self.columns:
            raise ValueError("columns: empty, a report needs at least one")
        keys, names = [column.key for column in self.columns], [arm.name for arm in self.arms]
        _check_unique("columns", keys)
        _check_unique("arms", names)
        for arm in self.arms:
            _check_known(f"arm {arm.name!r}: metric", arm.metrics, keys)
        for pair in self.tradeoffs:
            _check_known("tradeoffs: column", pair, keys)
        _check_known("froc: arm", self.froc, names)
        for name, (x, y) in self.froc.items():
            _check_xy(f"froc of {name!r}", x, y)
            points = np.asarray([x, y], dtype=np.float64)
            if points.size == 0 or not np.isfinite(points).all() or np.any(np.diff(points[0]) < 0):
                raise ValueError(f"froc of {name!r}: false positives per image must be finite, increasing, not empty")
        low, high = self.window
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"window: {self.window}, expected (low, high) in HU with low < high")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold: {self.score_threshold}, expected 0 to 1")

    def column(self, key: str) -> Column:
        """The column with this key."""
        return next(column for column in self.columns if column.key == key)


def mean_of(metric: Metric) -> float | None:
    """The number that stands for a table value: itself or its mean; None for None and NaN."""
    value = metric[0] if isinstance(metric, tuple) else metric
    return None if value is None or math.isnan(value) else float(value)


def _check_unique(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: {name!r} appears more than once")


def _check_known(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not one of {', '.join(known)}")


def _check_xy(what: str, x: ArrayLike, y: ArrayLike) -> None:
    if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
        raise ValueError(f"{what}: x has shape {np.shape(x)} and y {np.shape(y)}, expected two equal lengths")


def _check_boxes(what: str, boxes: NDArray[np.float64]) -> None:
    if boxes.size == 0 and boxes.ndim <= 2:
        return
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{what}: shape {boxes.shape}, expected [L,4]")
    for box in boxes:
        if not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"{what}: {box.tolist()} is not a box (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
