"""LIDC-IDRI's XML: up to four readers' outlines of nodules, one file per series (Armato et al. 2011).

The rule, for nodules of 3 mm and more (smaller ones are marked by a point and left out, as are "non-nodules"):

1. A reader's outline runs through the first pixels outside the nodule; its box holds the pixels inside. Several
   outlines of one nodule on a slice make one box; outlines with ``inclusion`` FALSE are holes and change nothing.
2. Nodules that different readers outlined are the same nodule when their boxes overlap on some slice.
3. A nodule has a box on every slice on which at least `readers` readers outlined it: the median of their left edges, of
   their upper edges and so on.

Slices are found by ``imageSOP_UID``, or by ``imageZposition`` where the images don't have it (LUNA16's .mhd files).
"""

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lidnet_fast.data.annotations.boxes import slice_at
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.errors import InputError
from lidnet_fast.progress import progress


@dataclasses.dataclass(frozen=True)
class _Outline:
    """One reader's outline of a nodule on one slice: pixel coordinates of the first pixels outside."""

    reader: int
    nodule: int
    sop_instance_uid: str
    z_mm: float
    low: tuple[float, float]
    high: tuple[float, float]


def read_boxes(path: Path, series: Sequence[Series], readers: int) -> dict[str, np.ndarray]:
    """Read the nodules of some series as boxes; files of other series, and of chest radiographs, are passed over.

    Args:
        path: an XML file, or a folder with XML files somewhere below it.
        series: the series.
        readers: how many readers must have outlined a nodule on a slice, 1 to 4.

    Returns:
        Boxes by series UID, float32 [n, 5] (slice, x1, y1, x2, y2) in pixels; n may be 0.

    Raises:
        InputError: no file is one of LIDC-IDRI's, one is damaged or speaks of a slice that its series doesn't have, or
            two contradict each other about one series. The message names the file.
    """
    if not 1 <= readers <= 4:
        raise InputError(f"readers must be 1 to 4, got {readers}")
    files = [file for file in files_below([path]).paths if file.suffix.lower() == ".xml"]
    known = {one.series_uid: one for one in series}
    found: dict[str, tuple[Path, list[_Outline]]] = {}
    count = 0
    for file in progress(files, "reading LIDC-IDRI XML"):
        uid, outlines = _parse(file)
        count += uid is not None
        if uid in known:
            earlier, same = found.setdefault(uid, (file, outlines))
            if same != outlines:
                raise InputError(f"{file}: contradicts {earlier} about series {uid}")
    if not count:
        raise InputError(f"{path}: holds no XML file with LIDC-IDRI's readings of CT")
    boxes = {uid: _merge(known[uid], outlines, readers, file) for uid, (file, outlines) in found.items()}
    return {uid: boxes.get(uid, np.empty((0, 5), np.float32)) for uid in known}


def _parse(file: Path) -> tuple[str | None, list[_Outline]]:
    """Read one file; without a series UID where it isn't a reading of CT."""
    try:
        root = ElementTree.parse(file).getroot()
        if _name(root) != "LidcReadMessage":
            return None, []
        for element in root.iter():
            element.tag = _name(element)
        uid = root.findtext("ResponseHeader/SeriesInstanceUid", "").strip()
        if not uid:
            raise InputError(f"{file}: has no SeriesInstanceUid")
        return uid, list(_outlines(root))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: can't be read as LIDC-IDRI XML: {error}") from error


def _name(element: ElementTree.Element) -> str:
    """The tag without its namespace, which differs between the files."""
    return element.tag.rpartition("}")[2]


def _outlines(root: ElementTree.Element) -> Iterator[_Outline]:
    for reader, session in enumerate(root.findall("readingSession")):
        for nodule, element in enumerate(session.findall("unblindedReadNodule")):
            for roi in element.findall("roi"):
                points = np.array(
                    [[float(edge.findtext(name, "")) for name in ("xCoord", "yCoord")] for edge in roi.iter("edgeMap")]
                )
                if len(points) < 2 or roi.findtext("inclusion", "TRUE").strip().upper() == "FALSE":
                    continue
                if not np.isfinite(points).all():
                    raise ValueError("an outline has points that aren't finite")
                yield _Outline(
                    reader=reader,
                    nodule=nodule,
                    sop_instance_uid=roi.findtext("imageSOP_UID", "").strip(),
                    z_mm=float(roi.findtext("imageZposition", "nan")),
                    low=tuple(points.min(axis=0).tolist()),
                    high=tuple(points.max(axis=0).tolist()),
                )


def _merge(series: Series, outlines: Sequence[_Outline], readers: int, file: Path) -> np.ndarray:
    """Apply the rule to one series."""
    _check_pixel_order(series, file)
    slice_of = {uid: z for z, uid in enumerate(series.sop_instance_uids)}
    marked: dict[tuple[int, int, int], np.ndarray] = {}  # by reader, nodule and slice: box
    for outline in outlines:
        z = slice_of.get(outline.sop_instance_uid)
        if z is None:
            z = slice_at(series, outline.z_mm, str(file))
        key = (outline.reader, outline.nodule, z)
        box = _inside(outline, series)
        earlier = marked.get(key, box)
        marked[key] = np.concatenate([np.minimum(box[:2], earlier[:2]), np.maximum(box[2:], earlier[2:])])
    group_of = _groups(marked)
    by_place: dict[tuple[int, int], dict[int, list[np.ndarray]]] = {}  # by nodule and slice, then by reader
    for (reader, nodule, z), box in marked.items():
        by_place.setdefault((group_of[reader, nodule], z), {}).setdefault(reader, []).append(box)
    rows = [
        [z, *np.median([_hull(boxes) for boxes in by_reader.values()], axis=0)]
        for (_, z), by_reader in sorted(by_place.items())
        if len(by_reader) >= readers
    ]
    return np.array(rows, np.float32).reshape(-1, 5)


def _check_pixel_order(series: Series, file: Path) -> None:
    """Refuse a volume whose pixels are in another order than those of the DICOM images, in which outlines are counted.

    LUNA16's files keep their order, also where both axes of the images are mirrored.
    """
    if not isinstance(series, VolumeSeries):
        return
    mirrored = series.orientation[0] < 0, series.orientation[4] < 0
    kept = mirrored == (False, False) or (all(mirrored) and series.header.path.suffix.lower() in (".mhd", ".mha"))
    if series.file_axes != (0, 1, 2) or not kept:
        raise InputError(
            f"{file}: counts pixels of DICOM images, and {series.header.path} has its own in another order (its rows "
            f"and columns run along {series.orientation}). To fix: give the DICOM images, or LUNA16's .mhd files"
        )


def _inside(outline: _Outline, series: Series) -> np.ndarray:
    """Box of the pixels inside an outline, in pixel-edge coordinates; one too thin to have an inside counts whole."""
    low, high = np.array(outline.low, np.float32), np.array(outline.high, np.float32)
    thin = high - low < 2
    _, height, width = series.shape
    corners = np.concatenate([low + ~thin, high + thin])
    box = corners.clip(0, [width, height, width, height])
    if (box[:2] >= box[2:]).any():
        raise InputError(
            f"series {series.series_uid}: an outline of reader {outline.reader + 1} lies outside its images"
        )
    return box


def _hull(boxes: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(boxes)
    return np.concatenate([stacked[:, :2].min(axis=0), stacked[:, 2:].max(axis=0)])


def _groups(marked: dict[tuple[int, int, int], np.ndarray]) -> dict[tuple[int, int], int]:
    """Number the nodules so that those which overlap on some slice have one number; by (reader, nodule)."""
    nodules = sorted({(reader, nodule) for reader, nodule, _ in marked})
    place = {nodule: n for n, nodule in enumerate(nodules)}
    keys, boxes = list(marked), np.array(list(marked.values())).reshape(-1, 4)
    slices = np.array([z for _, _, z in keys])
    touch = (
        (slices[:, None] == slices)
        & (np.maximum(boxes[:, None, :2], boxes[:, :2]) < np.minimum(boxes[:, None, 2:], boxes[:, 2:])).all(axis=2)
    )  # fmt: skip
    one, two = np.nonzero(touch)
    index = np.array([place[reader, nodule] for reader, nodule, _ in keys], int)
    graph = coo_array((np.ones(len(one)), (index[one], index[two])), shape=(len(nodules), len(nodules)))
    _, labels = connected_components(graph, directed=False)
    return dict(zip(nodules, labels.tolist(), strict=True))
