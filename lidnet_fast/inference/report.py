"""Lesions of a DICOM series as a DICOM Structured Report: TID 1500 (PS3.16), written with highdicom.

Each lesion is two measurement groups (TID 1411) under one tracking identifier: its boxes as regions of the source
images, in pixels, and its box in three dimensions as the surface between two faces, in mm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.codedict import codes

from lidnet_fast import __version__
from lidnet_fast.data.formats.dicom.series import CTSeries
from lidnet_fast.data.formats.dicom.values import one_line, optional_number, text
from lidnet_fast.data.formats.dicom.writer import Derivation
from lidnet_fast.errors import InputError
from lidnet_fast.files import whole
from lidnet_fast.inference.lesions import Lesion

_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def write_report(path: Path, series: CTSeries, lesions: Sequence[Lesion], derivation: Derivation) -> None:
    """Write the report of a series.

    Args:
        path: the file to make.
        series: the source images.
        lesions: what was found, at least one. A series without a frame of reference gets no regions in space.
        derivation: how they were found; the report's UIDs follow from it.

    Raises:
        InputError: the source's headers don't have what a report needs.
    """
    headers: dict[Path, Dataset] = {}
    for z in sorted({z for lesion in lesions for z in lesion.candidate.slices.tolist()}):
        headers.setdefault(series.files[z], _header(series.files[z]))
    first = next(iter(headers.values()))
    try:
        report = sr.Comprehensive3DSR(
            evidence=list(headers.values()),
            content=_content(series, lesions, headers, derivation)[0],
            series_instance_uid=derivation.uid("series", series.series_uid),
            series_number=_series_number(first),
            sop_instance_uid=derivation.uid("image", series.series_uid),
            instance_number=1,
            manufacturer="lidnet_fast",
            manufacturer_model_name="lidnet-fast detect",
            software_versions=__version__,
            series_description=f"lesions {derivation.model}"[:64],
            is_complete=True,
        )
        with whole(path) as file:
            report.save_as(file, enforce_file_format=True)
    except (OSError, InputError):
        raise
    except Exception as error:  # whatever highdicom and pydicom make of a header's values
        raise InputError(f"{series.files[0]}: no DICOM SR can refer to it: {one_line(error)}") from error


def _header(path: Path) -> Dataset:
    """The header of a source image, with what a report takes from it."""
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not header.get(keyword):
            setattr(header, keyword, header.file_meta.get(f"MediaStorage{keyword}"))
    for keyword in _REQUIRED:
        text(header, keyword, path)
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, None)
    return header


def _series_number(header: Dataset) -> int:
    """The source's + 2000, beside that of its denoised series."""
    number = optional_number(header, "SeriesNumber")
    return 1 if number is None or not 0 <= number < 2**31 - 2001 else int(number) + 2000


def _content(
    series: CTSeries, lesions: Sequence[Lesion], headers: Mapping[Path, Dataset], derivation: Derivation
) -> sr.MeasurementReport:
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=derivation.uid("series", "device"),
            name="lidnet_fast",
            manufacturer_name="lidnet_fast",
            model_name=derivation.model,
        ),
    )
    algorithm = sr.AlgorithmIdentification(
        name=f"lidnet-fast detect, {derivation.model}", version=__version__, parameters=[derivation.description]
    )
    groups = [group for lesion in lesions for group in _groups(lesion, series, headers, derivation, algorithm)]
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
    )


def _groups(
    lesion: Lesion,
    series: CTSeries,
    headers: Mapping[Path, Dataset],
    derivation: Derivation,
    algorithm: sr.AlgorithmIdentification,
) -> list[sr.VolumetricROIMeasurementsAndQualitativeEvaluations]:
    tracking = sr.TrackingIdentifier(
        uid=hd.UID(derivation.uid("image", f"{series.series_uid} {lesion.number}")),
        identifier=f"lesion {lesion.number}",
    )
    certainty = sr.Measurement(
        name=codes.DCM.CertaintyOfFinding, value=100 * lesion.candidate.score, unit=codes.UCUM.Percent
    )
    regions, sources = [], []
    for z, (x1, y1, x2, y2) in zip(lesion.candidate.slices.tolist(), lesion.candidate.boxes, strict=True):
        header = headers[series.files[z]]
        reference = (
            header.SOPClassUID,
            header.SOPInstanceUID,
            [series.frames[z] + 1] if series.frames else None,
        )
        outline = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])
        regions.append(sr.ImageRegion(sr.GraphicTypeValues.POLYLINE, outline, sr.SourceImageForRegion(*reference)))
        sources.append(sr.SourceImageForSegmentation(*reference))
    groups = [
        sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking,
            referenced_regions=regions,
            finding_type=codes.SCT.Lesion,
            algorithm_id=algorithm,
            measurements=[certainty],
        )
    ]
    frame_of_reference = headers[series.files[int(lesion.candidate.slices[0])]].get("FrameOfReferenceUID")
    if frame_of_reference:
        faces = [face[[0, 1, 2, 3, 0]] for face in np.split(lesion.corners, 2)]
        surface = sr.VolumeSurface(sr.GraphicTypeValues3D.POLYGON, faces, frame_of_reference, sources)
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking,
                referenced_volume_surface=surface,
                finding_type=codes.SCT.Lesion,
                algorithm_id=algorithm,
                measurements=[certainty],
            )
        )
    return groups
