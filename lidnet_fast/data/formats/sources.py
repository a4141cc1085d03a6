"""All CT below a user's folders, in whatever of the known forms it is."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from lidnet_fast.data.formats.account import Found, Rejected
from lidnet_fast.data.formats.deeplesion import is_deeplesion, scan_deeplesion
from lidnet_fast.data.formats.dicom.series import check_regular, scan_files
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.formats.volumes.series import scan_volumes
from lidnet_fast.errors import InputError


def find_series(
    sources: Sequence[Path],
    what: str,
    *,
    strict: bool,
    resample: bool,
    follow_links: bool = False,
    reformats: bool = False,
    max_volume_gib: float | None = None,
    any_values: bool = False,
    executor: Executor | None = None,
) -> Found[Series]:
    """Find the CT series below some folders: DICOM, volumes (NIfTI, MetaImage, NRRD), DeepLesion.

    Args:
        sources: folders, searched with everything below them, or single files. A folder with DL_info.csv in it is
            DeepLesion.
        what: what the progress bar of the DICOM headers says.
        strict: raise at the first series that can't be used.
        resample: let series pass that are tilted or unevenly spaced.
        follow_links: follow links below the folders to wherever they lead.
        reformats: take reformats in DICOM files, too.
        max_volume_gib: up to how many GiB a compressed volume may unpack; see `VolumeHeader.check_unpacked`.
        any_values: take volumes whose values don't look like HU.
        executor: runs the work.

    Raises:
        InputError: a source doesn't exist or no source has CT; with `strict`, a series can't be used.
    """
    found = Found[Series](strict)
    for root in filter(is_deeplesion, sources):
        images = scan_deeplesion(root, follow_links=follow_links)
        found.take(images)
        found.series += images.series
    others = [source for source in sources if not is_deeplesion(source)]
    if others:
        files = files_below(others, follow_links=follow_links)
        found.take(files)
        volumes, rest = scan_volumes(
            files.paths, others, executor, max_volume_gib=max_volume_gib, any_values=any_values
        )
        found.take(volumes)
        scan = scan_files(rest, what, strict=strict, accept="resampleable", reformats=reformats, executor=executor)
        found.take(scan)
        found.series += [*volumes.series, *scan.series]
    found.series = found.drop(_repeated(found.series), found.series)
    if not resample:
        found.series = found.drop(_irregular(found.series), found.series)
    found.series.sort(key=lambda one: one.series_uid)
    found.check_any(sources)
    return found


def _repeated(series: Sequence[Series]) -> list[Rejected]:
    """Series of one name from different sources."""
    counts = Counter(one.series_uid for one in series)
    return [
        one.rejected(f"{one.files[0]}: another source has a series {one.series_uid} too")
        for one in series
        if counts[one.series_uid] > 1
    ]


def _irregular(series: Sequence[Series]) -> list[Rejected]:
    faulty = []
    for one in series:
        try:
            check_regular(one)
        except InputError as error:
            faulty.append(one.rejected(str(error)))
    return faulty
