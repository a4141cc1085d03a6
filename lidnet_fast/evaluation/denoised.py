"""Images that any tool denoised, found again as the store's series and cut to its fields of view."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.account import Account, Found
from lidnet_fast.data.formats.dicom.series import CTSeries, read_volume, scan_files
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.geometry import Geometry
from lidnet_fast.data.formats.volumes.files import is_volume, volume_stem
from lidnet_fast.data.formats.volumes.series import VolumeSeries, scan_volumes
from lidnet_fast.data.samples.dataset import SampleId
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.export import digest_name, exported_patient_id, exported_uid
from lidnet_fast.neighbours import neighbours
from lidnet_fast.progress import progress
from lidnet_fast.strangers_text import printable

_LARGEST_SHIFT_HU = 200.0
"""A denoiser doesn't move the mean by more than this; an offset or another scale does."""


@dataclasses.dataclass(frozen=True)
class DenoisedSeries:
    """A denoised volume on disk.

    Attributes:
        series_uid: SeriesInstanceUID; empty where the file has none.
        patient_id: PatientID; empty where the file has none.
        files: what it is read from, of DICOM the slices' in their order.
        geometry: of the volume.
        read: decodes it to [Z, H, W], HU.
    """

    series_uid: str
    patient_id: str
    files: tuple[Path, ...]
    geometry: Geometry
    read: Callable[[], np.ndarray]

    @property
    def path(self) -> Path:
        """The file, or the first slice's."""
        return self.files[0]


def denoised_views(
    folder: Path,
    store: Store,
    ids: Sequence[SampleId],
    crop: int | None,
    context: int = 0,
    max_volume_gib: float | None = None,
) -> dict[SampleId, np.ndarray]:
    """Cut the given fields of view from a folder's volumes, which are read one by one.

    Args:
        folder: with the denoised volumes of (at least) these samples' series; see `match`.
        store: whose series they are.
        ids: the fields of view, none of them flipped.
        crop: their side in pixels; None for whole slices.
        context: neighbouring slices on each side.
        max_volume_gib: see `VolumeHeader.check_unpacked`.

    Returns:
        int16 or float32 [2 context + 1, H, W] by field of view, HU.

    Raises:
        InputError: see `match`; or a volume can't be read, or its values aren't HU of its series.
    """
    by_series: dict[int, list[SampleId]] = defaultdict(list)
    for sample in dict.fromkeys(ids):
        by_series[sample[0]].append(sample)
    matched = match(folder, store, sorted(by_series), max_volume_gib)
    views: dict[SampleId, np.ndarray] = {}
    for index, one in progress(list(matched.items()), f"reading {folder.name}"):
        height, width = store.series[index].shape[1:]
        rows, columns = (height, width) if crop is None else (crop, crop)
        volume = one.read()
        for sample in by_series[index]:
            _, z, y0, x0, *_ = sample
            seen = neighbours(z, len(volume), context)
            views[sample] = np.ascontiguousarray(volume[seen, y0 : y0 + rows, x0 : x0 + columns])
        _check_values(one, store, {sample: views[sample] for sample in by_series[index]})
    return views


def match(
    folder: Path, store: Store, wanted: Sequence[int], max_volume_gib: float | None = None
) -> dict[int, DenoisedSeries]:
    """Find the volumes of some of a store's series, and print the account of the folder's files.

    A volume belongs to a series when (a) its file or a folder on the way to it is named as the series, or by the
    `digest_name` of it; where there is none, when (b) its SeriesInstanceUID is the series' or that of the series'
    export; where there is none either, when (c) patient and geometry are the series'. In each case its geometry must be
    the series': shape, spacing, origin and orientation.

    Args:
        folder: searched with everything below it.
        store: has the series.
        wanted: their indices.
        max_volume_gib: see `VolumeHeader.check_unpacked`.

    Raises:
        InputError: a series has no volume or several, or its volume has another geometry.
    """
    found = denoised_series(folder, max_volume_gib)
    matched: dict[int, DenoisedSeries] = {}
    for index in wanted:
        info = store.series[index]
        uids = {info.series_uid, exported_uid(info.series_uid, "low_dose")}
        patients = {info.patient_id, exported_patient_id(info.patient_id)}
        candidates = (
            [one for one in found.series if digest_name(info.series_uid) in _names(one.path, folder)]
            or [one for one in found.series if info.series_uid in _names(one.path, folder)]
            or [one for one in found.series if one.series_uid in uids]
            or [one for one in found.series if one.patient_id in patients and not one.geometry.difference(info)]
        )
        name = f"series {info.series_uid} of patient {info.patient_id}"
        if not candidates:
            raise InputError(
                f"{folder}: has no images of {name}: no file or folder of that name, no volume with that "
                "SeriesInstanceUID, and none with the patient's id, the size and the place of its slices"
            )
        if len(candidates) > 1:
            raise InputError(f"{folder}: {candidates[0].path} and {candidates[1].path} may both be {name}")
        (one,) = candidates
        if fault := one.geometry.difference(info):
            raise InputError(f"{one.path}: should be {name}, but {fault}")
        for other, claimed in matched.items():
            if claimed is one:
                raise InputError(f"{one.path}: may be {name} as well as series {store.series[other].series_uid}")
        matched[index] = one
    used = {path for one in matched.values() for path in one.files}
    others = {path for one in found.series for path in one.files} - used
    found.skipped += Counter({"of series that aren't evaluated": len(others)})
    found.close(used)
    print(printable("\n".join([f"{folder}:", *found.lines()])))
    return matched


def denoised_series(folder: Path, max_volume_gib: float | None = None) -> Found[DenoisedSeries]:
    """Find the volumes below a folder: NIfTI, MetaImage and NRRD files, or where there are none, DICOM series.

    Volumes of 8 bits (masks) are skipped.

    Raises:
        InputError: there are none, or a header can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    files = files_below([folder])
    volumes, rest = scan_volumes(files.paths, [folder], max_volume_gib=max_volume_gib)
    found = Found[DenoisedSeries](strict=True)
    found.take(files)
    found.take(volumes)
    if volumes.found:
        found.take(Account(found=len(rest), skipped=+Counter({"that aren't volumes": len(rest)})))
        found.series += map(_volume, volumes.series)
    else:
        what = f"headers of {folder.name}"
        scan = scan_files(rest, what, strict=True, accept="regular", reformats=True)
        found.take(scan)
        found.series += map(_dicom, scan.series)
    found.check_any([folder])
    return found


def _names(path: Path, folder: Path) -> set[str]:
    """Names of the file, without its suffix, and of the folders on the way to it."""
    *folders, file = path.relative_to(folder).parts
    return {*folders, volume_stem(path) if is_volume(path) else file}


def _check_values(found: DenoisedSeries, store: Store, views: Mapping[SampleId, np.ndarray]) -> None:
    """Refuse values that aren't HU, or not of this series."""
    means = [float(view[len(view) // 2].mean(dtype=np.float64)) for view in views.values()]
    expected = [
        float(store.read(index, z, (y0, x0, *view.shape[1:])).mean(dtype=np.float64))
        for (index, z, y0, x0, *_), view in views.items()
    ]
    if abs(np.mean(means) - np.mean(expected)) > _LARGEST_SHIFT_HU:
        raise InputError(
            f"{found.path}: its mean is {np.mean(means):.0f} in the fields of view, that of the normal dose "
            f"{np.mean(expected):.0f} HU: its values aren't HU, or it's another series"
        )


def _dicom(series: CTSeries) -> DenoisedSeries:
    return DenoisedSeries(
        series_uid=series.series_uid,
        patient_id=series.patient_id,
        files=series.files,
        geometry=series,
        read=lambda: read_volume(series),
    )


def _volume(series: VolumeSeries) -> DenoisedSeries:
    def read() -> np.ndarray:
        values = series.read_values()
        return values if values.dtype == np.int16 else values.astype(np.float32)

    return DenoisedSeries(
        series_uid="",
        patient_id="",
        files=series.files,
        geometry=series,
        read=read,
    )
