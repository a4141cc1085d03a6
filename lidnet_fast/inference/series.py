"""The slices of a DICOM series in the order in which they lie, and its files read once each, ahead of their use."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path

from lidnet_fast.data.formats.dicom.images import SAME_POSITION, DicomSeries
from lidnet_fast.data.formats.dicom.writer import CTImage, read_image
from lidnet_fast.errors import InputError


def frames_in_place(series: DicomSeries) -> dict[Path, list[int]]:
    """The files from one end of the series to the other: file -> its frames, likewise.

    Raises:
        InputError: a slice doesn't say where it lies, two lie at the same place, or the frames of multi-frame files lie
            between those of others.
    """
    placed: list[tuple[float, Path, int]] = []
    for image in series.images:
        if len(image.slices) != image.frames:
            raise InputError(
                f"{image.path}: doesn't say where its slices lie, and the model looks at neighbouring slices. "
                "To fix: use a model of data.denoiser_context false"
            )
        for frame, part in enumerate(image.slices):
            position = float(part.geometry.axes[2] @ part.geometry.origin)
            placed.append((position, image.path, frame if part.frame is None else part.frame))
    placed.sort(key=lambda item: item[0])
    for (before, path, _), (after, other, _) in pairwise(placed):
        if after - before < SAME_POSITION:
            raise InputError(
                f"{path} and {other}: lie at the same place, and the model looks at neighbouring slices. "
                "To fix: give scans of several phases a series each"
            )
    ordered: dict[Path, list[int]] = {}
    last = None
    for _, path, frame in placed:
        if path in ordered and path != last:
            raise InputError(
                f"{path}: its frames lie between those of {last}, and the model looks at neighbouring slices. "
                "To fix: make one multi-frame file of them"
            )
        ordered.setdefault(path, []).append(frame)
        last = path
    return ordered


def with_neighbours(frames: Mapping[Path, Sequence[int]], batch: range, context: int) -> list[Path]:
    """The files of a batch, and on both sides those that hold neighbouring slices of it.

    Args:
        frames: all files of the series, in order, and their frames.
        batch: the places of its files among them.
        context: neighbouring slices on each side.
    """
    files = list(frames)

    def nearest(places: range) -> Iterator[Path]:
        found = 0
        for place in places:
            if found >= context:
                return
            found += len(frames[files[place]])
            yield files[place]

    before, after = nearest(range(batch.start - 1, -1, -1)), nearest(range(batch.stop, len(files)))
    return [*reversed(list(before)), *files[batch.start : batch.stop], *after]


def read_ahead(wanted: Sequence[Sequence[Path]], pool: Executor) -> Iterator[list[CTImage]]:
    """Decode lists of files, each while the one before is in use; what follows needs again isn't read again."""
    reading: dict[Path, Future[CTImage]] = {}
    for files, following in zip(wanted, [*wanted, []][1:], strict=True):
        for path in (*files, *following):
            if path not in reading:
                reading[path] = pool.submit(read_image, path)
        yield [reading[path].result() for path in files]
        reading = {path: reading[path] for path in following}
