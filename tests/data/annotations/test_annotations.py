"""The boxes of LUNA16 and LIDC-IDRI, from files in the published layouts."""

import numpy as np
import pytest

from lidnet_fast.data.annotations import read_annotations
from lidnet_fast.data.annotations.luna16 import SMALLEST_CIRCLE
from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError

sitk = pytest.importorskip("SimpleITK")

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.1057566580315150620007448212"
OTHER = "1.3.6.1.4.1.14519.5.2.1.6279.6001.108197895896446896160048741492"
LUNA16 = "seriesuid,coordX,coordY,coordZ,diameter_mm"


@pytest.fixture
def luna16(tmp_path):
    """A folder in LUNA16's layout, with the direction asked for; and a writer of its table."""

    def write(direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), **lines):
        image = sitk.GetImageFromArray(np.full((20, 60, 80), -3024, np.int16))
        image.SetSpacing((0.8, 0.7, 2.5))
        image.SetOrigin((-120.5, 35.25, -300))
        image.SetDirection(direction)
        (tmp_path / "subset0").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "subset0" / f"{UID}.mhd"))
        return image, find_series([tmp_path / "subset0"], "", strict=True, resample=False).series

    return write


def table(folder, *lines):
    path = folder / "annotations.csv"
    path.write_text("\n".join([LUNA16, *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (1, 0, 0, 0, 1, 0, 0, 0, -1),
        (0.8, -0.576, 0.168, 0.6, 0.768, -0.224, 0, 0.28, 0.96),
    ],
    ids=["axial", "mirrored", "head first", "oblique"],
)
def test_a_sphere_against_its_voxels(tmp_path, luna16, direction):
    """The boxes hold just the voxels that SimpleITK places inside the sphere."""
    image, (series,) = luna16(direction)
    centre, diameter = np.array(image.TransformContinuousIndexToPhysicalPoint((41.3, 27.6, 9.2))), 14.6
    line = ",".join(str(value) for value in (UID, *centre, diameter))
    rows = read_annotations(table(tmp_path, line, f"{OTHER},1,2,3,4"), [series])[UID]
    inside = np.zeros((20, 60, 80), bool)
    for z, y, x in np.ndindex(*inside.shape):
        inside[z, y, x] = np.linalg.norm(image.TransformIndexToPhysicalPoint((x, y, z)) - centre) < diameter / 2
    if direction[8] == -1:
        inside = inside[::-1]
    expected = {}
    for z in np.flatnonzero(inside.any(axis=(1, 2))):
        ys, xs = np.nonzero(inside[z])
        expected[z] = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert rows[:, 0].tolist() == sorted(expected)
    assert len(rows) == 6
    for z, *box in rows:
        # The circle's edge lies within the pixel at its border or in the next one.
        assert np.abs(np.array(box) - expected[z]).max() < 1


def test_small_and_outlying_nodules(tmp_path, luna16):
    image, (series,) = luna16()

    def lesion(index, diameter):
        place = image.TransformContinuousIndexToPhysicalPoint(index)
        return ",".join(str(value) for value in (UID, *place, diameter))

    # Between two slices, touching neither: the nearer one, with the whole sphere's box.
    rows = read_annotations(table(tmp_path, lesion((40, 30, 5.4), 1.6)), [series])[UID]
    np.testing.assert_allclose(rows, [[5, 39.5, 30.5 - 0.8 / 0.7, 41.5, 30.5 + 0.8 / 0.7]], rtol=1e-5)
    # A sphere of 5.2 mm reaches its neighbouring slices with circles of 1.4 mm, too small to count.
    assert SMALLEST_CIRCLE > (5.2**2 - 5**2) ** 0.5 / 0.8
    assert read_annotations(table(tmp_path, lesion((40, 30, 5), 5.2)), [series])[UID][:, 0].tolist() == [5]
    # Clipped at the image's edge.
    rows = read_annotations(table(tmp_path, lesion((0, 59, 5), 8)), [series])[UID]
    assert rows[:, [1, 4]].tolist() == [[0, 60]] * len(rows)
    for index in ((-20, 30, 5), (40, 30, 40)):
        with pytest.raises(InputError, match=r"annotations\.csv, line 2: the nodule lies outside series"):
            read_annotations(table(tmp_path, lesion(index, 5)), [series])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{UID},1,2,three,4", "line 2: coordZ 'three' isn't a number"),
        (f"{UID},1,2,nan,4", r"line 2: coordZ 'nan' isn't a number"),
        (f"{UID},1,2,3,-4", "line 2: the nodule .* of -4 mm isn't a sphere"),
        (f"{UID},1,2,3,1e200", r"line 2: the nodule .* of 1e\+200 mm isn't a sphere"),
        (f"{UID},1,2,3", "line 2: has 4 values for 5 columns"),
        (f"{OTHER},1,2,3,4", "has no lesion in any of the 1 series found"),
    ],
)
def test_bad_luna16(tmp_path, luna16, line, message):
    _, series = luna16()
    with pytest.raises(InputError, match=rf"annotations\.csv.* ?{message}"):
        read_annotations(table(tmp_path, line), series)


def test_the_documented_luna16_command(tmp_path, luna16):
    image, _ = luna16()
    place = image.TransformIndexToPhysicalPoint((40, 30, 5))
    boxes = table(tmp_path, ",".join(str(value) for value in (UID, *place, 6)))
    summary = prepare(
        [tmp_path / "subset0"], tmp_path / "store", boxes=boxes, simulate_dose=0.25, val_fraction=0, test_fraction=0
    )
    assert summary.boxes["train"] == 3
    assert summary.skipped == {}
    half = 3 / 0.7
    np.testing.assert_allclose(Store(tmp_path / "store").boxes(0, 5), [[36.75, 30.5 - half, 44.25, 30.5 + half]])


def outline(x1, y1, x2, y2, z, sop, inclusion="TRUE"):
    """An ROI of LIDC-IDRI: the corners of a rectangle, among the first pixels outside the nodule."""
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in corners)
    return (
        f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>{sop}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def point(x, y, z, sop):
    return (
        f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>{sop}</imageSOP_UID><inclusion>TRUE</inclusion>"
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap></roi>"
    )


def message(uid, *sessions, namespace="http://www.nih.gov", root="LidcReadMessage"):
    """A file of LIDC-IDRI; a session is a list of nodules, a nodule a list of ROIs."""
    text = ""
    for session in sessions:
        nodules = "".join(
            f"<unblindedReadNodule><noduleID>{n}</noduleID><characteristics><subtlety>5</subtlety></characteristics>"
            f"{''.join(rois)}</unblindedReadNodule>"
            for n, rois in enumerate(session)
        )
        text += (
            "<readingSession><annotationVersion>3.12</annotationVersion>"
            f"<servicingRadiologistID>anon</servicingRadiologistID>{nodules}"
            "<nonNodule><nonNoduleID>1</nonNoduleID><imageZposition>100</imageZposition><imageSOP_UID>1</imageSOP_UID>"
            "<locus><xCoord>1</xCoord><yCoord>2</yCoord></locus></nonNodule></readingSession>"
        )
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} uid="1.3.6.1.4.1.14519.5.2.1.6279.6001.1307390687803.0" '
        f'xmlns="{namespace}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        f"<ResponseHeader><Version>1.8.1</Version><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>"
        f"{text}</{root}>"
    )


@pytest.fixture
def lidc(tmp_path, write_series):
    """One DICOM series of LIDC-IDRI, 64 x 64, z = 100, 102.5, ...; `write(*sessions)` writes its XML."""
    write_series(tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001", np.zeros((6, 64, 64), np.int16), series_uid=UID)
    series = scan([tmp_path / "LIDC-IDRI"]).series
    sops = series[0].sop_instance_uids

    def write(*sessions, name="157/158.xml", **options):
        path = tmp_path / "tcia-lidc-xml" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message(UID, *sessions, **options))
        return tmp_path / "tcia-lidc-xml"

    return series, sops, write


def test_readers_are_merged(lidc):
    series, sops, write = lidc

    def at(z, *corners, **options):
        return outline(*corners, 100 + 2.5 * z, sops[z], **options)

    folder = write(
        # Reader 1: a nodule on slices 1 to 3, on slice 2 in two pieces with a hole; another one far away.
        [
            [
                at(1, 10, 10, 20, 20),
                at(2, 10, 10, 15, 20),
                at(2, 14, 12, 22, 18),
                at(2, 12, 12, 40, 40, inclusion="FALSE"),
                at(3, 10, 10, 20, 20),
            ],
            [at(2, 40, 40, 50, 50)],
        ],
        # Reader 2: the same nodule on slices 1 and 2; a point of less than 3 mm.
        [[at(1, 12, 11, 24, 19), at(2, 12, 11, 24, 19)], [point(42, 42, 105, sops[2])]],
        # Reader 3: on slice 1 only, no overlap with reader 1 there but with reader 2.
        [[at(1, 20, 12, 30, 20)]],
        # Reader 4: nothing.
        [],
    )
    # A pixel inside on each side; medians of two are their means.
    two = [[1, 13, 12, 24, 20], [2, 12, 11.5, 23, 19.5]]
    np.testing.assert_allclose(read_annotations(folder, series, readers=2)[UID], two)
    np.testing.assert_allclose(read_annotations(folder, series, readers=3)[UID], two[:1])
    one = read_annotations(folder, series, readers=1)[UID]
    np.testing.assert_allclose(one, [*two, [3, 11, 11, 20, 20], [2, 41, 41, 50, 50]])
    assert one.dtype == np.float32


def test_slices_by_position_thin_outlines_and_edges(tmp_path, lidc, write_series):
    """LUNA16's volumes have no SOP instances; a pixel-wide outline has no inside; an outline may run along the edge."""
    series, _, write = lidc
    thin = [outline(10, 20, 10, 20.0, 105, "1.2.3.4")]
    edge = [outline(-1, 50, 5, 64, 107.5, "1.2.3.4")]
    folder = write([thin, edge], namespace="http://www.nih.gov/idri")
    rows = read_annotations(folder, series, readers=1)[UID]
    np.testing.assert_allclose(rows, [[2, 10, 20, 11, 21], [3, 0, 51, 5, 64]])


@pytest.mark.parametrize(
    ("suffix", "order", "taken"),
    [
        (".mhd", "LPS", True),
        (".mhd", "RAS", True),  # as some of LUNA16
        (".nii.gz", "LPS", True),
        (".mhd", "LAI", False),
        (".nii.gz", "LAS", False),
        (".nii.gz", "RAS", False),
        (".mha", "PIR", False),
    ],
)
def test_volumes_with_pixels_in_another_order(tmp_path, lidc, suffix, order, taken):
    """A box at the upper left of the DICOM images would lie elsewhere on them."""
    _, _, write = lidc
    image = sitk.GetImageFromArray(np.full((6, 64, 64), -1000, np.int16))
    image.SetOrigin((0, 0, 100))
    image.SetSpacing((1, 1, 2.5))
    path = tmp_path / f"{UID}{suffix}"
    sitk.WriteImage(sitk.DICOMOrient(image, order), str(path))
    series = find_series([path], "", strict=True, resample=False).series
    folder = write([[outline(4, 9, 20, 30, 105, "unknown")]])
    if taken:
        assert read_annotations(folder, series, readers=1)[UID].tolist() == [[2, 5, 10, 20, 30]]
    else:
        with pytest.raises(
            InputError, match=r"158\.xml: counts pixels of DICOM images, and .* in another order .*To fix"
        ):
            read_annotations(folder, series, readers=1)


def test_other_files_are_passed_over(lidc):
    series, sops, write = lidc
    folder = write([[outline(10, 10, 20, 20, 100, sops[0])]])
    (folder / "chest.xml").write_text(message("1.2.3", root="IdriReadMessage", namespace="http://www.nih.gov/idri"))
    (folder / "other.xml").write_text(message(OTHER, [[outline(1, 1, 9, 9, 0, "9.9")]]))
    (folder / "copy.xml").write_text((folder / "157" / "158.xml").read_text())
    (folder / "readme.txt").write_text("no XML")
    assert len(read_annotations(folder, series, readers=1)[UID]) == 1


BILLION_LAUGHS = (
    '<!DOCTYPE a [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    + "]><LidcReadMessage>&a9;</LidcReadMessage>"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<LidcReadMessage>", "bad.xml: can't be read as LIDC-IDRI XML"),
        ("", "bad.xml: can't be read as LIDC-IDRI XML"),
        (BILLION_LAUGHS, "bad.xml: can't be read as LIDC-IDRI XML"),
        ('<?xml version="1.0" encoding="no-such"?><a/>', "bad.xml: can't be read as LIDC-IDRI XML: unknown encoding"),
        (message(""), "bad.xml: has no SeriesInstanceUid"),
        (
            message(UID, [[outline("left", 1, 9, 9, 100, "1")]]),
            "bad.xml: can't be read as LIDC-IDRI XML: could not convert",
        ),
        (message(UID, [[outline("inf", 1, 9, 9, 100, "1")]]), "bad.xml: .*points that aren't finite"),
        (message(UID, [[outline(1, 1, 9, 9, 400, "1")]]), "bad.xml: series .* has no slice at z_mm 400"),
        (message(UID, [[outline(90, 1, 99, 9, 100, "1")]]), "an outline of reader 1 lies outside its images"),
        (message(UID), "has no lesion in any of the 1 series found"),
        (message("1.2", root="IdriReadMessage"), "bad.xml: holds no XML file with LIDC-IDRI's readings of CT"),
    ],
)
def test_bad_lidc(tmp_path, lidc, text, expected):
    series, _, _ = lidc
    (tmp_path / "bad.xml").write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        read_annotations(tmp_path / "bad.xml", series)
    assert "\n" not in str(error.value)


def test_two_stories_of_one_series(lidc):
    series, sops, write = lidc
    write([[outline(10, 10, 20, 20, 100, sops[0])]], name="a.xml")
    folder = write([[outline(10, 10, 21, 20, 100, sops[0])]], name="b.xml")
    with pytest.raises(InputError, match=r"b\.xml: contradicts .*a\.xml about series"):
        read_annotations(folder, series)
    with pytest.raises(InputError, match="readers must be 1 to 4, got 5"):
        read_annotations(folder, series, readers=5)
