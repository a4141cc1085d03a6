"""CT series from folders of DICOM files: found by their headers, put into order, decoded to Hounsfield units.

Two passes: `scan` reads headers only and checks everything that headers can show, so that a study with a missing slice
is refused before anything is decoded; `read_volume` decodes one series. Compressed transfer syntaxes are decoded by
pydicom with GDCM and OpenJPEG.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import compress, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from lidnet_fast.data.formats.account import Found
from lidnet_fast.data.formats.dicom.headers import SliceHeader, acquired_with
from lidnet_fast.data.formats.dicom.images import SAME_POSITION, DicomSeries, find_images
from lidnet_fast.data.formats.dicom.pixels import decode
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.geometry import Series, hu_volume, spacing_fault, tilt_fault
from lidnet_fast.errors import InputError

_LARGEST_GAP = 1.5
"""Slices are missing where two neighbours are further apart than this many times the distance usual for them."""
_SAME_THICKNESS = 0.1
"""Slices whose thickness differs by less than this fraction are equally thick."""

Accept = Literal["regular", "resampleable"]


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
    sources: Sequence[Path],
    what: str = "reading headers",
    *,
    strict: bool = True,
    accept: Accept = "regular",
    reformats: bool = False,
) -> Found[CTSeries]:
    """Find the CT series below some folders.

    Files are recognised by their content, whatever their names; series by their SeriesInstanceUID, wherever their
    files lie. What isn't a CT image (other modalities, localisers, reports, DICOMDIR, other files) is skipped. Of
    images that agree in place and pixels, the first is kept.

    Args:
        sources: folders, searched with everything below them, or single files.
        what: what the progress bar says.
        strict: raise at the first series that can't be used; otherwise it is returned among those rejected.
        accept: "regular" refuses a series whose slices are missing, twice there and different, unevenly spaced or
            tilted; "resampleable" lets the last two pass.
        reformats: take reformats, too.

    Raises:
        InputError: a source doesn't exist or no source has CT; with `strict`, a file is truncated or lacks a needed
            value, or a series isn't of the accepted kind or has slices of different size, spacing or orientation.
            The message names the file or the series.
    """
    files = files_below(sources)
    found = scan_files(files.paths, what, strict=strict, accept=accept, reformats=reformats)
    found.take(files)
    found.check_any(sources)
    return found


def scan_files(
    files: Sequence[Path],
    what: str,
    *,
    strict: bool,
    accept: Accept,
    reformats: bool,
    executor: Executor | None = None,
) -> Found[CTSeries]:
    """Find the CT series in some files, their headers read by `executor`; see `scan`."""
    images = find_images(files, what, reformats=reformats, executor=executor)
    found = Found[CTSeries](strict)
    found.take(images)
    for one in sorted(images.series, key=lambda one: one.uid):
        try:
            found.series.append(assemble(one, accept))
        except InputError as error:
            found.reject([one.rejected(str(error))])
    return found


def assemble(found: DicomSeries, accept: Accept) -> CTSeries:
    """Sort one series' slices by their position along the normal and check that they are of the accepted kind.

    Raises:
        InputError: they aren't; see `scan`.
    """
    for image in found.images:
        if image.fault is not None:
            raise InputError(image.fault)
    slices = [part for image in found.images for part in image.slices]
    first = slices[0]
    for other in slices[1:]:
        if fault := first.geometry.difference(other.geometry, places=False):
            raise InputError(
                f"series {found.uid}: its files {first.path} and {other.path} differ in {fault.what}: "
                f"{fault.mine}, {fault.other}"
            )
    normal = first.geometry.axes[2]
    slices.sort(key=lambda part: float(normal @ part.geometry.origin))
    _check_one_pass(found.uid, slices)
    gaps = np.diff([normal @ part.geometry.origin for part in slices])
    for one, other in compress(pairwise(slices), gaps < SAME_POSITION):
        raise InputError(
            f"series {found.uid}: two different slices at the same position, "
            f"{normal @ other.geometry.origin:g} mm: {one.path} and {other.path}"
        )
    thickness, y_spacing, x_spacing = first.geometry.spacing
    series = CTSeries(
        series_uid=found.uid,
        patient_id=found.images[0].patient_id,
        description=found.images[0].description,
        files=tuple(part.path for part in slices),
        frames=tuple(part.frame for part in slices if part.frame is not None),
        sop_instance_uids=tuple(part.sop_instance_uid for part in slices),
        positions=tuple(part.geometry.origin for part in slices),
        shape=(len(slices), *first.geometry.shape[1:]),
        spacing=(float(np.median(gaps)) if len(gaps) else thickness, y_spacing, x_spacing),
        orientation=first.geometry.orientation,
        **acquired_with(slices),
    )
    if len(series.frames) not in (0, len(slices)):
        raise InputError(f"series {found.uid} in {found.folder}: some of its files are multi-frame, not all")
    _check_complete(series, [part.geometry.spacing[0] for part in slices])
    if accept == "regular":
        check_regular(series)
    return series


def _check_one_pass(uid: str, slices: Sequence[SliceHeader]) -> None:
    """Refuse slices of several acquisitions or kernels among each other: they are several scans under one UID.

    Those of a scan in blocks, one behind the other, lie together.
    """
    for what, values in (
        ("AcquisitionNumber", [part.acquisition for part in slices]),
        ("ConvolutionKernel", [part.kernel or None for part in slices]),
    ):
        changes = [n for n, (one, other) in enumerate(pairwise(values), 1) if one != other]
        if None not in values and len(changes) >= len(set(values)):
            one, other = slices[changes[0] - 1], slices[changes[0]]
            raise InputError(
                f"series {uid}: slices of different {what} lie among each other, such as {one.path} and {other.path}: "
                f"several scans under one SeriesInstanceUID. To fix: give each a SeriesInstanceUID of its own"
            )


def _check_complete(series: CTSeries, thicknesses: Sequence[float]) -> None:
    """Refuse gaps that are wide for slices of the thickness on either side."""
    distances = series.distances
    if len(distances) < 3:
        return
    usual = _usual_gaps(np.diff(distances), np.array(thicknesses))
    wide = np.flatnonzero(np.diff(distances) > _LARGEST_GAP * usual)
    if len(wide):
        places = ", ".join(f"{distances[i]:g} and {distances[i + 1]:g} mm" for i in wide[:3])
        more = f" and at {len(wide) - 3} more places" if len(wide) > 3 else ""
        raise InputError(
            f"series {series.series_uid} in {series.files[0].parent}: slices are missing between {places}{more}; "
            f"its slices are {usual[wide[0]]:g} mm apart"
        )


def _usual_gaps(gaps: np.ndarray, thicknesses: np.ndarray) -> np.ndarray:
    """The median distance of slices as thick as those at each gap, of the thicker ones where two thicknesses meet.

    Slices too few to tell are taken for contiguous.
    """
    values, places = np.unique(thicknesses, return_inverse=True)
    kinds = np.cumsum(np.diff(values, prepend=values[:1]) > _SAME_THICKNESS * values)[places]
    usual = np.empty(len(kinds))
    for kind in np.unique(kinds):
        alike = kinds == kind
        inside = gaps[alike[1:] & alike[:-1]]
        contiguous = len(inside) < 2 and thicknesses[alike].any()
        usual[alike] = np.median(thicknesses[alike] if contiguous else inside if len(inside) else gaps)
    return np.maximum(usual[1:], usual[:-1])


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
        decoded = decode_slices(Path(name), size, [series.frames[place] for place in places] if series.frames else [0])
        if volume is None:  # allocated once a file has shown that it is of the size that its header says
            volume = np.empty(series.shape, np.int16)
        volume[places] = decoded
    assert volume is not None
    return volume


def decode_slices(path: Path, size: tuple[int, int], frames: Sequence[int]) -> np.ndarray:
    """Decode frames of a file to int16 [n, H, W], HU.

    Raises:
        InputError: the file can't be decoded, or to another size; the message names it.
    """
    pixels = decode(path, frames)
    for stored in pixels.frames:
        if stored.shape != size:
            raise InputError(f"{path}: decodes to {list(stored.shape)} pixels, its header says {list(size)}")
    return np.stack([hu_volume(pixels.hu(place)[0]) for place in range(len(frames))])
