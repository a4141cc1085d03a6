"""Enhanced (multi-frame) CT: one file of many slices, flattened to one header per frame.

The standard keeps what may differ between frames in functional groups (DICOM PS3.3 C.7.6.16): a sequence of macros
shared by all frames and one sequence per frame. A frame's own macro counts before the shared one.
"""

from collections.abc import Iterator

from pydicom import Dataset

SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"

_MACROS = (
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence",
    "RealWorldValueMappingSequence",
)
_HU_UNITS = ("[hnsf'U]", "hnsf'U", "HU")


def frame_header(image: Dataset, frame: int) -> Dataset:
    """Return the values of one frame under the keywords that a single-frame CT image has them.

    Args:
        image: header of an enhanced CT image.
        frame: which frame, from 0.

    Raises:
        KeyError, IndexError: the functional groups are missing, or there are fewer than frames.
    """
    flat = Dataset()
    for groups in (image[SHARED].value[0], image[PER_FRAME].value[frame]):
        for macro in _MACROS:
            for item in groups.get(macro) or ():
                flat.update(item)
    if "FrameType" in flat:
        flat.ImageType = flat.FrameType
    return flat


def frame_headers(image: Dataset) -> Iterator[Dataset]:
    """Yield the header of every frame, with the values that all frames share."""
    common = Dataset()
    common.update({tag: element for tag, element in image.items() if element.VR != "SQ"})
    for frame in range(int(image.NumberOfFrames)):
        flat = Dataset()
        flat.update(common)
        flat.update(frame_header(image, frame))
        yield flat


def foreign_unit(frame: Dataset) -> str | None:
    """Name the unit of a frame's values where that isn't HU, as in perfusion maps."""
    units = frame.get("MeasurementUnitsCodeSequence") or ()
    names = [str(unit.get("CodeValue")) for unit in units]
    return names[0] if names and names[0] not in _HU_UNITS else None
