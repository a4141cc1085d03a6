"""CT series from folders of DICOM files: found by their headers, put into order, decoded to Hounsfield units.

Two passes: `scan` reads headers only and checks everything that headers can show, so that a study with a missing slice
is refused before anything is decoded; `read_volume` decodes one series. Compressed transfer syntaxes are decoded by
pydicom with GDCM and OpenJPEG.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Literal

import numpy as np

from lidnet_fast.data.formats.dicom.headers import HeaderResult, SliceHeader, read_headers
from lidnet_fast.data.formats.dicom.pixels import decode
from lidnet_fast.data.formats.find import Found, files_below
from lidnet_fast.data.formats.geometry import Rejected, Rejections, Series, hu_volume, spacing_fault, tilt_fault
from lidnet_fast.data.prepare.jobs import run
from lidnet_fast.errors import InputError

_SAME_POSITION = 1e-3
"""Slices closer than this, in mm, are at the same position."""
_LARGEST_GAP = 1.5
"""Slices are missing where two neighbours are further apart than this many times the series' median distance."""
_FILES_PER_JOB = 64

Accept = Literal["regular", "resampleable", "any"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTSeries(Series):
    """One CT series in DICOM files.

    Attributes:
        files: the file of every slice.
        frames: where the files are multi-frame, the frame of every slice, from 0; otherwise empty.
    """

    frames: tuple[int, ...] = ()

    def read(self) -> np.ndarray:
        """See `read_volume`."""
        return read_volume(self)


def scan(
    sources: Sequence[Path], what: str = "reading headers", *, strict: bool = True, accept: Accept = "regular"
) -> Found[CTSeries]:
    """Find the CT series below some folders.

    Files are recognised by their content, whatever their names; series by their SeriesInstanceUID, wherever their
    files lie. What isn't a CT image (other modalities, localisers, reports, DICOMDIR, other files) is skipped. Where
    two slices are alike to the pixel, the first is kept.

    Args:
        sources: folders, searched with everything below them, or single files.
        what: what the progress bar says.
        strict: raise at the first series that can't be used; otherwise it is returned among those rejected.
        accept: "regular" refuses a series whose slices are missing, twice there and different, unevenly spaced or
            tilted; "resampleable" lets the last two pass; "any" takes whatever slices there are, in their order.

    Raises:
        InputError: a source doesn't exist or no source has CT; with `strict`, a file is truncated or lacks a needed
            value, or a series isn't of the accepted kind or has slices of different size, spacing or orientation.
            The message names the file or the series.
    """
    files = files_below(sources)
    found = scan_files(files.paths, what, strict=strict, accept=accept)
    found.skipped.update(files.skipped)
    found.check_any(sources)
    return found


def scan_files(
    files: Sequence[Path], what: str, *, strict: bool, accept: Accept, executor: Executor | None = None
) -> Found[CTSeries]:
    """Find the CT series in some files, their headers read by `executor`; see `scan`."""
    by_series: dict[str, list[SliceHeader]] = {}
    damaged: dict[str, Rejected] = {}
    rejections = Rejections(strict)
    skipped: Counter[str] = Counter()
    jobs = [files[start : start + _FILES_PER_JOB] for start in range(0, len(files), _FILES_PER_JOB)]
    results: list[HeaderResult] = [header for batch in run(executor, read_headers, jobs, what) for header in batch]
    for found in results:
        if isinstance(found, str):
            skipped[found] += 1
        elif isinstance(found, list):
            by_series.setdefault(found[0].series_uid, []).extend(found)
        else:
            damaged.setdefault(found.series_uid or str(found.path), found)
    rejections.add(list(damaged.values()))
    series = []
    for uid in sorted(by_series.keys() - damaged.keys()):
        try:
            series.append(_assemble(by_series[uid], accept))
        except InputError as error:
            rejections.add([Rejected(uid, by_series[uid][0].path.parent, str(error))])
    return Found(series, skipped, rejections.all)


def _check_alike(slices: Sequence[SliceHeader]) -> None:
    """Refuse a series whose slices differ in what they must share."""
    first = slices[0]
    for other in slices[1:]:
        files = f"series {first.series_uid}: its files {first.path} and {other.path} differ in"
        if first.patient_id != other.patient_id:
            raise InputError(f"{files} patient: {first.patient_id}, {other.patient_id}")
        if found := first.geometry.difference(other.geometry, places=False):
            raise InputError(f"{files} {found.what}: {found.mine}, {found.other}")


def _assemble(slices: list[SliceHeader], accept: Accept) -> CTSeries:
    """Sort one series' slices by their position along the normal and check that they are of the accepted kind."""
    _check_alike(slices)
    normal = slices[0].geometry.axes[2]
    slices = sorted(slices, key=lambda part: float(normal @ part.geometry.origin))
    if accept != "any":
        slices = _without_copies(slices)
    first = slices[0]
    gaps = np.diff([normal @ part.geometry.origin for part in slices])
    thickness, y_spacing, x_spacing = first.geometry.spacing
    thicknesses = [part.geometry.spacing[0] for part in slices if part.geometry.spacing[0] > 0]
    series = CTSeries(
        series_uid=first.series_uid,
        patient_id=first.patient_id,
        description=first.description,
        files=tuple(part.path for part in slices),
        frames=tuple(part.frame for part in slices if part.frame is not None),
        sop_instance_uids=tuple(part.sop_instance_uid for part in slices),
        positions=tuple(part.geometry.origin for part in slices),
        shape=(len(slices), *first.geometry.shape[1:]),
        spacing=(float(np.median(gaps)) if len(gaps) else thickness, y_spacing, x_spacing),
        orientation=first.geometry.orientation,
        slice_thickness=float(np.median(thicknesses)) if thicknesses else None,
        kernel=_only({part.kernel for part in slices}),
        body_part=_only({part.body_part for part in slices}),
    )
    if len(series.frames) not in (0, len(slices)):
        raise InputError(
            f"series {first.series_uid} in {first.path.parent}: some of its files are multi-frame, not all"
        )
    if accept != "any":
        _check_complete(series)
    if accept == "regular":
        check_regular(series)
    return series


def _only(names: set[str]) -> str:
    """The name that all slices have, or empty."""
    return next(iter(names)) if len(names) == 1 else ""


def _without_copies(slices: list[SliceHeader]) -> list[SliceHeader]:
    """Keep one of the slices at a position when their pixels are alike.

    Raises:
        InputError: they differ.
    """
    kept = slices[:1]
    normal = slices[0].geometry.axes[2]
    for part in slices[1:]:
        step = np.subtract(part.geometry.origin, kept[-1].geometry.origin)
        if normal @ step >= _SAME_POSITION:
            kept.append(part)
        elif np.linalg.norm(step) >= _SAME_POSITION or not np.array_equal(_pixels(part), _pixels(kept[-1])):
            raise InputError(
                f"series {part.series_uid}: two different slices at the same position, "
                f"{normal @ part.geometry.origin:g} mm: {kept[-1].path} and {part.path}"
            )
    return kept


def _pixels(part: SliceHeader) -> np.ndarray:
    return _decode(part.path, part.geometry.shape[1:], (part.frame or 0,))[0]


def _check_complete(series: CTSeries) -> None:
    distances = series.distances
    wide = np.flatnonzero(np.diff(distances) > _LARGEST_GAP * series.spacing[0])
    if len(wide):
        places = ", ".join(f"{distances[i]:g} and {distances[i + 1]:g} mm" for i in wide[:3])
        more = f" and at {len(wide) - 3} more places" if len(wide) > 3 else ""
        raise InputError(
            f"series {series.series_uid} in {series.files[0].parent}: slices are missing between {places}{more}; "
            f"its slices are {series.spacing[0]:g} mm apart"
        )


def check_regular(series: Series) -> None:
    """Refuse a series whose slices are unevenly spaced or tilted.

    Raises:
        InputError: naming the series and what is irregular.
    """
    if fault := spacing_fault(series) or tilt_fault(series):
        raise InputError(
            f"series {series.series_uid} in {series.files[0].parent}: {fault}. To fix: --resample makes it regular"
        )


def read_volume(series: CTSeries) -> np.ndarray:
    """Decode a series.

    Values become HU by the rule of `lidnet_fast.data.formats.dicom.pixels`; where nothing was measured, they become
    `LOWEST_HU`.

    Returns:
        int16 [Z, H, W], HU.

    Raises:
        InputError: a file is truncated or can't be decoded; the message names it.
    """
    size = series.shape[1:]
    volume: np.ndarray | None = None
    files = np.array([str(path) for path in series.files])
    for name in dict.fromkeys(files):
        places = np.flatnonzero(files == name)
        decoded = _decode(Path(name), size, [series.frames[place] for place in places] if series.frames else [0])
        if volume is None:  # allocated once a file has shown that it is of the size that its header says
            volume = np.empty(series.shape, np.int16)
        volume[places] = decoded
    assert volume is not None
    return volume


def _decode(path: Path, size: tuple[int, int], frames: Sequence[int]) -> np.ndarray:
    """Decode frames of a file to int16 [n, H, W], HU."""
    pixels = decode(path, frames)
    for stored in pixels.frames:
        if stored.shape != size:
            raise InputError(f"{path}: decodes to {list(stored.shape)} pixels, its header says {list(size)}")
    return np.stack([hu_volume(pixels.hu(place)[0]) for place in range(len(frames))])
