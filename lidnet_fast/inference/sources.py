"""What there is to denoise in a folder: CT series in DICOM and volumes, however irregular."""

from collections import Counter
from pathlib import Path

from lidnet_fast.data.formats.dicom.images import DicomSeries, find_images
from lidnet_fast.data.formats.find import Found, files_below
from lidnet_fast.data.formats.geometry import Rejected
from lidnet_fast.data.formats.itk.files import is_volume
from lidnet_fast.data.formats.itk.series import VolumeSeries
from lidnet_fast.errors import InputError
from lidnet_fast.inference.volumes import inspect_volume


def find(
    source: Path,
    out: Path,
    *,
    follow_links: bool = False,
    reformats: bool = False,
    max_volume_gib: float | None = None,
    any_values: bool = False,
) -> Found[DicomSeries | VolumeSeries]:
    """Look through a file, or a folder with everything below it.

    Files are recognised by their content, whatever their names; volumes by their names. Nothing is asked of a series
    but its identifiers: slices may be missing, tilted or unevenly spaced.

    Args:
        source: the file or folder.
        out: a folder to leave out, wherever it lies.
        follow_links: follow links below the folder to wherever they lead.
        reformats: take reformats in DICOM files, too.
        max_volume_gib: see `VolumeHeader.check_unpacked`.
        any_values: see `VolumeSeries`.

    Returns:
        DICOM series in the order of their first files, then volumes. What was rejected are series whose identifiers
        aren't unique, and files of which nobody can say to which series they belong.

    Raises:
        InputError: `source` doesn't exist, or holds no CT.
    """
    files = files_below([source], without=out, follow_links=follow_links)
    volumes = Found[VolumeSeries]([], Counter(), [])
    for path in filter(is_volume, files.paths):
        try:
            volume = inspect_volume(path, max_volume_gib=max_volume_gib, any_values=any_values)
        except InputError as error:
            volumes.rejected.append(Rejected("", path, str(error)))
            continue
        if isinstance(volume, VolumeSeries):
            volumes.series.append(volume)
        else:
            volumes.skipped[volume] += 1
    taken = {file for volume in volumes.series for file in volume.files}
    others = [path for path in files.paths if not is_volume(path) and path not in taken]
    images = find_images(others, "reading headers", reformats=reformats)
    found = Found[DicomSeries | VolumeSeries]([], files.skipped + images.skipped + volumes.skipped, images.rejected)
    for series in images.series:
        if fault := _ambiguous(series):
            found.rejected.append(Rejected(series.uid, series.folder, fault))
        else:
            found.series.append(series)
    found.series.extend(volumes.series)
    found.rejected.extend(volumes.rejected)
    found.check_any([source])
    return found


def _ambiguous(series: DicomSeries) -> str | None:
    """Say which images of a series can't be told apart; what is made of them would have one name."""
    earlier: dict[str, Path] = {}
    for image in series.images:
        other = earlier.setdefault(image.sop_instance_uid, image.path)
        if other is not image.path:
            return (
                f"series {series.uid}: {other} and {image.path} share a SOPInstanceUID, but are different images. "
                "To fix: give every image identifiers of its own"
            )
    return None
