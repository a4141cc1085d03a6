"""The header of an image, and of each frame of enhanced (multi-frame) CT, under the same keywords.

Enhanced CT keeps what may differ between frames in functional groups (DICOM PS3.3 C.7.6.16): a sequence of macros
shared by all frames and one sequence per frame. A frame's own macro counts before the shared one, and that before what
the image says outside of both.
"""

from pydicom import Dataset

SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"

MACROS = (
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence",
    "CTReconstructionSequence",
    "FrameContentSequence",
    "RealWorldValueMappingSequence",
)


def frame_header(image: Dataset, frame: int = 0) -> Dataset:
    """Return the header of one frame, under the keywords that a single-frame CT image has.

    Args:
        image: a CT image, or its header.
        frame: which frame, from 0. Where the image has no functional groups for it, its own elements count.
    """
    flat = Dataset()
    flat.update({tag: element for tag, element in image.items() if element.VR != "SQ"})
    own = (image.get(PER_FRAME) or ())[frame : frame + 1]
    for groups in (image, *(image.get(SHARED) or ())[:1], *own):
        for macro in MACROS:
            for item in groups.get(macro) or ():
                flat.update(item)
    if "FrameType" in flat:
        flat.pop("ImageType", None)  # the element is the image's own: setting its value would change the image
        flat.ImageType = flat.FrameType
    return flat
