"""CT images in DICOM files, sorted into series: what everything that reads DICOM begins with."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from pydicom.uid import generate_uid

from lidnet_fast.data.formats.account import Found, Rejected
from lidnet_fast.data.formats.dicom.headers import HeaderResult, ImageHeader, read_headers
from lidnet_fast.data.formats.dicom.pixels import decode
from lidnet_fast.data.prepare.jobs import run
from lidnet_fast.errors import InputError

SAME_POSITION = 1e-3
"""Slices closer than this, in mm, are at the same position."""
_FILES_PER_JOB = 64


@dataclasses.dataclass(frozen=True)
class DicomSeries:
    """The files of one CT series, of which nothing is asked as a volume.

    Attributes:
        uid: SeriesInstanceUID, or what stands for it; see `_identified`.
        images: the files' headers, in the order in which the files were found.
    """

    uid: str
    images: tuple[ImageHeader, ...]

    @property
    def files(self) -> list[Path]:
        """The files."""
        return [image.path for image in self.images]

    def rejected(self, reason: str) -> Rejected:
        """What an account says of the series when it can't be used."""
        return Rejected(self.uid, self.folder, reason, self.files)

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all of them."""
        return Path(os.path.commonpath([path.parent for path in self.files]))


def find_images(
    files: Sequence[Path], what: str, *, reformats: bool, executor: Executor | None = None
) -> Found[DicomSeries]:
    """Read the headers of some files and sort the CT images among them into series, without copies.

    Args:
        files: the files.
        what: what the progress bar says.
        reformats: take reformats (coronal and sagittal sections, projections), too.
        executor: runs the reading.

    Returns:
        The series in the order of their first files. What was rejected are files of which nobody can say to which
        series they belong, and series that several patients share.
    """
    jobs = [files[start : start + _FILES_PER_JOB] for start in range(0, len(files), _FILES_PER_JOB)]
    read = partial(read_headers, reformats=reformats)
    results: list[HeaderResult] = [header for batch in run(executor, read, jobs, what) for header in batch]
    skipped = Counter(result for result in results if isinstance(result, str))
    rejected = [result for result in results if isinstance(result, Rejected)]
    by_series: dict[str, list[ImageHeader]] = {}
    for image in _identified([result for result in results if isinstance(result, ImageHeader)]):
        by_series.setdefault(image.series_uid, []).append(image)
    series = []
    for uid, images in by_series.items():
        one = DicomSeries(uid, tuple(_without_copies(images)))
        skipped["copies of another"] += len(images) - len(one.images)
        if fault := _shared_by_patients(one):
            rejected.append(one.rejected(fault))
        else:
            series.append(one)
    return Found(found=len(files), skipped=+skipped, rejected=rejected, series=series)


def _identified(images: Sequence[ImageHeader]) -> list[ImageHeader]:
    """Give images without SeriesInstanceUID one for each folder and geometry, and images without patient their series.

    The UID follows from the images' own, so that it is the same wherever they lie.
    """
    groups: dict[tuple[Path, str], list[list[ImageHeader]]] = {}
    for image in images:
        if not image.series_uid:
            candidates = groups.setdefault((image.path.parent, image.patient_id), [])
            group = next((group for group in candidates if _alike(group[0], image)), None)
            if group is None:
                candidates.append([image])
            else:
                group.append(image)
    uids: dict[Path, str] = {}
    for group in chain.from_iterable(groups.values()):
        uid = generate_uid(entropy_srcs=["series", min(image.sop_instance_uid for image in group)])
        uids |= {image.path: uid for image in group}
    named = [dataclasses.replace(image, series_uid=image.series_uid or uids[image.path]) for image in images]
    return [dataclasses.replace(image, patient_id=image.patient_id or image.series_uid) for image in named]


def _alike(one: ImageHeader, other: ImageHeader) -> bool:
    """Whether images can be of one series by their geometry."""
    if not (one.slices and other.slices):
        return not (one.slices or other.slices)
    return one.slices[0].geometry.difference(other.slices[0].geometry, places=False) is None


def _shared_by_patients(series: DicomSeries) -> str | None:
    first = series.images[0]
    for other in series.images[1:]:
        if other.patient_id != first.patient_id:
            return (
                f"series {series.uid}: {first.path} and {other.path} share its SeriesInstanceUID, but not the patient: "
                f"{first.patient_id}, {other.patient_id}. To fix: give every series identifiers of its own"
            )
    return None


def _without_copies(images: Sequence[ImageHeader]) -> list[ImageHeader]:
    """Keep the first of the images of a series that agree in patient, place and pixels.

    Identifiers don't count, since those that should be unique may not be, and copies may have been given new ones.
    Images whose place is unknown are copies only under one SOPInstanceUID.
    """
    copies: set[Path] = set()
    for group in _at_one_place(images):
        kept: list[tuple[ImageHeader, bytes]] = []
        for image in group:
            digest = _digest_of_pixels(image)
            if any(digest == pixels and _agree(image, other) for other, pixels in kept):
                copies.add(image.path)
            else:
                kept.append((image, digest))
    return [image for image in images if image.path not in copies]


def _at_one_place(images: Sequence[ImageHeader]) -> list[list[ImageHeader]]:
    """Groups of two and more images that may lie at one place."""
    groups: dict[str, list[ImageHeader]] = {}
    placed = []
    for image in images:
        if image.slices:
            geometry = image.slices[0].geometry
            placed.append((float(geometry.axes[2] @ geometry.origin), image))
        else:
            groups.setdefault(image.sop_instance_uid, []).append(image)
    placed.sort(key=lambda item: item[0])
    steps = np.flatnonzero(np.diff([position for position, _ in placed]) >= SAME_POSITION) + 1
    ends = [0, *steps.tolist(), len(placed)]
    close = [[image for _, image in placed[start:end]] for start, end in pairwise(ends)]
    return [group for group in (*groups.values(), *close) if len(group) > 1]


def _agree(one: ImageHeader, other: ImageHeader) -> bool:
    places = [[part.geometry for part in image.slices] for image in (one, other)]
    return (
        one.patient_id == other.patient_id
        and len(places[0]) == len(places[1])
        and not any(mine.difference(theirs) for mine, theirs in zip(*places, strict=True))
    )


def _digest_of_pixels(image: ImageHeader) -> bytes:
    """Of HU, whatever numbers and transfer syntax stand for them; of the file where it can't be decoded."""
    digest = hashlib.sha256()
    try:
        pixels = decode(image.path)
        for frame in range(len(pixels.frames)):
            hu, _ = pixels.hu(frame)
            digest.update(f"{hu.shape}".encode() + hu.tobytes())
    except InputError:
        with image.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return digest.digest()
