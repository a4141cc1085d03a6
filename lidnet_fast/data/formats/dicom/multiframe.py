"""Enhanced (multi-frame) CT: one file of many slices, flattened to one header per frame.

The standard keeps what may differ between frames in functional groups (DICOM PS3.3 C.7.6.16): a sequence of macros
shared by all frames and one sequence per frame. A frame's own macro counts before the shared one.
"""

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
HU_UNITS = ("[hnsf'U]", "hnsf'U", "HU")


def frame_header(image: Dataset, frame: int) -> Dataset:
    """Return the header of one frame, under the keywords that a single-frame CT image has.

    Args:
        image: an enhanced CT image, or its header.
        frame: which frame, from 0.

    Raises:
        KeyError, IndexError: the functional groups are missing, or there are fewer than frames.
    """
    flat = Dataset()
    flat.update({tag: element for tag, element in image.items() if element.VR != "SQ"})
    for groups in (image[SHARED].value[0], image[PER_FRAME].value[frame]):
        for macro in _MACROS:
            for item in groups.get(macro) or ():
                flat.update(item)
    if "FrameType" in flat:
        flat.pop("ImageType", None)  # the element is the image's own: setting its value would change the image
        flat.ImageType = flat.FrameType
    return flat


def foreign_unit(frame: Dataset) -> str | None:
    """Name the unit of a frame's values where that isn't HU, as in perfusion maps."""
    units = frame.get("MeasurementUnitsCodeSequence") or ()
    names = [str(unit.get("CodeValue")) for unit in units]
    return names[0] if names and names[0] not in HU_UNITS else None
