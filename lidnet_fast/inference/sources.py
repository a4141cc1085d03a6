"""What there is to denoise in a folder: CT series in DICOM and volumes, however irregular."""

from pathlib import Path

from lidnet_fast.data.formats.account import Found
from lidnet_fast.data.formats.dicom.images import DicomSeries, find_images
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.volumes.series import VolumeSeries, scan_volumes


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
    volumes, rest = scan_volumes(files.paths, [source], max_volume_gib=max_volume_gib, any_values=any_values)
    images = find_images(rest, "reading headers", reformats=reformats)
    found = Found[DicomSeries | VolumeSeries]()
    for account in (files, images, volumes):
        found.take(account)
    for series in images.series:
        if fault := _ambiguous(series):
            found.reject([series.rejected(fault)])
        else:
            found.series.append(series)
    found.series += volumes.series
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
