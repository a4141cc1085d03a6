"""Lesions found in a series, and the files that say where they are; docs/detect.md describes them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast import __version__
from lidnet_fast.data.annotations.boxes import COLUMNS as BOX_COLUMNS
from lidnet_fast.data.annotations.luna16 import CANDIDATE_COLUMNS
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text
from lidnet_fast.models.linking import Candidate

FORMAT = "lidnet_fast-lesions"
VERSION = 1
CANDIDATES, BOXES = "candidates.csv", "boxes.csv"
_ENDS = (min, min, max, max)


@dataclass(frozen=True)
class Lesion:
    """A candidate with its place in space.

    Attributes:
        number: from 1, in the order of the scores.
        candidate: its boxes.
        centre: float64 [3], (x, y, z) in mm.
        corners: float64 [8, 3] in mm, of its box in three dimensions: clockwise on its first face, then on its last.
    """

    number: int
    candidate: Candidate
    centre: np.ndarray
    corners: np.ndarray

    @classmethod
    def at(cls, number: int, candidate: Candidate, series: Series) -> "Lesion":
        """Place a candidate; its box reaches half a slice distance beyond the middle of its outermost slices."""
        first, last, x1, y1, x2, y2 = candidate.box
        rectangle = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
        half = series.axes[2] * series.spacing[0] / 2
        faces = [series.to_patient(np.full(4, z), rectangle) + beyond for z, beyond in ((first, -half), (last, half))]
        return cls(number, candidate, candidate.centre(series.to_patient), np.concatenate(faces))


def write_lesions(path: Path, series: Series, lesions: Sequence[Lesion], found_by: Mapping[str, Any]) -> None:
    """Write the lesions of a series as JSON.

    Args:
        path: the file to make.
        series: the series; slices and boxes are written as its source counts them.
        lesions: best first.
        found_by: with what they were found, JSON-able.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "software": __version__,
        **found_by,
        "series_uid": series.series_uid,
        "shape": list(series.source_shape),
        "spacing_mm": list(series.spacing),
        "lesions": [_record(lesion, series) for lesion in lesions],
    }
    write_text(path, json.dumps(record, indent=1))


def _record(lesion: Lesion, series: Series) -> dict[str, Any]:
    candidate = lesion.candidate
    boxes = []
    for z, box, score in zip(candidate.slices.tolist(), candidate.boxes, candidate.scores.tolist(), strict=True):
        place, *corners = series.from_source(np.array([z, *box])).tolist()  # there and back are the same exchange
        named = {"sop_instance_uid": series.sop_instance_uids[z]} if series.sop_instance_uids else {}
        boxes.append({"slice": int(place), **named, **dict(zip(BOX_COLUMNS[1:], corners, strict=True)), "score": score})
    return {
        "lesion": lesion.number,
        "score": candidate.score,
        "centre_mm": lesion.centre.tolist(),
        "box": {
            "first_slice": min(box["slice"] for box in boxes),
            "last_slice": max(box["slice"] for box in boxes),
            **{name: end(box[name] for box in boxes) for name, end in zip(BOX_COLUMNS[1:], _ENDS, strict=True)},
            "corners_mm": lesion.corners.tolist(),
        },
        "boxes": boxes,
    }


def read_lesions(path: Path) -> dict[str, Any]:
    """Read what `write_lesions` wrote.

    Raises:
        InputError: the file holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (record["format"], record["version"]) == (FORMAT, VERSION):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: isn't a file of lesions of version {VERSION}. To fix: remove it, and detect again")


def write_tables(out: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write `candidates.csv` and `boxes.csv` of several series; returns how many lesions they have."""
    candidates, boxes = [], []
    for record in records:
        for lesion in record["lesions"]:
            candidates.append([record["series_uid"], *lesion["centre_mm"], lesion["score"]])
            for box in lesion["boxes"]:
                boxes.append([record["series_uid"], box["slice"], *(box[name] for name in BOX_COLUMNS[1:])])
    _write_csv(out / CANDIDATES, CANDIDATE_COLUMNS, candidates)
    _write_csv(out / BOXES, (BOX_COLUMNS[0], "slice", *BOX_COLUMNS[1:]), boxes)
    return len(candidates)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())
