"""Lesion boxes as published data sets keep them: each reader states its rule, `read_annotations` picks the reader."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.annotations import lidc_idri, luna16
from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.errors import InputError


def read_annotations(
    path: Path, series: Sequence[Series], *, rejected: frozenset[str] = frozenset(), readers: int = 2
) -> dict[str, np.ndarray]:
    """Read lesion boxes, in whichever of the known formats they are.

    Args:
        path: our CSV (docs/box_csv.md), LUNA16's annotations.csv, or an LIDC-IDRI XML file or folder of such.
        series: the series that they may speak of.
        rejected: series that were found but can't be used; our CSV may speak of them too.
        readers: of LIDC-IDRI: how many readers must have outlined a nodule on a slice.

    Returns:
        For every series UID of `series` its boxes, float32 [n, 5] (slice, x1, y1, x2, y2) in pixels; n may be 0.

    Raises:
        InputError: the file is missing or damaged, a value in it is wrong, or it speaks of none of the series.
    """
    if path.is_dir() or path.suffix.lower() == ".xml":
        found = lidc_idri.read_boxes(path, series, readers)
    elif not path.is_file():
        raise InputError(f"{path}: there is no such file")
    elif luna16.recognises(path):
        found = luna16.read_boxes(path, series)
    else:
        return read_boxes(path, series, rejected)
    if not any(len(rows) for rows in found.values()) and not rejected:
        raise InputError(f"{path}: has no lesion in any of the {len(series)} series found")
    return found
