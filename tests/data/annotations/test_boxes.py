from pathlib import Path

import numpy as np
import pytest

from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.errors import InputError

UID = "1.2.826.0.1.3680043.8.498"


@pytest.fixture
def series(tmp_path, write_series, make_hu):
    """Two series of 6 and 3 slices of 40 rows and 64 columns, z from 100 mm, every 2.5 mm and 5 mm."""
    write_series(tmp_path / "ct", make_hu(6, 40), series_uid=f"{UID}.1")
    write_series(tmp_path / "ct", make_hu(3, 40), series_uid=f"{UID}.2", spacing=(5, 0.7, 0.8))
    return scan([tmp_path / "ct"]).series


@pytest.fixture
def table(tmp_path):
    def write(*lines, encoding="utf-8"):
        path = tmp_path / "boxes.csv"
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        return path

    return write


def test_by_slice(series, table):
    path = table(
        "series_uid,slice,x1,y1,x2,y2", f"{UID}.1,5,10.5,3,20,40", f"{UID}.2,0,0,0,64,40", "", f"{UID}.1,2,1,2,3,4.25"
    )
    boxes = read_boxes(path, series)
    assert boxes[f"{UID}.1"].dtype == np.float32
    np.testing.assert_array_equal(boxes[f"{UID}.1"], [[5, 10.5, 3, 20, 40], [2, 1, 2, 3, 4.25]])
    np.testing.assert_array_equal(boxes[f"{UID}.2"], [[0, 0, 0, 64, 40]])


def test_spreadsheets_write_a_mark_spaces_and_another_order(series, table):
    path = table("y2, x1,y1,slice ,x2,series_uid", f'4,1,2,"2", 3 ,{UID}.1', encoding="utf-8-sig")
    np.testing.assert_array_equal(read_boxes(path, series)[f"{UID}.1"], [[2, 1, 2, 3, 4]])


def test_by_position(series, table):
    path = table(
        "series_uid,z_mm,x1,y1,x2,y2", f"{UID}.1,107.5,1,2,3,4", f"{UID}.1,103.7,1,2,3,4", f"{UID}.2,110,1,2,3,4"
    )
    boxes = read_boxes(path, series)
    assert boxes[f"{UID}.1"][:, 0].tolist() == [3, 1]
    assert boxes[f"{UID}.2"][:, 0].tolist() == [2]


def test_by_image(series, table):
    uid = series[0].sop_instance_uids[4]
    path = table("series_uid,sop_instance_uid,x1,y1,x2,y2", f"{UID}.1,{uid},1,2,3,4")
    np.testing.assert_array_equal(read_boxes(path, series)[f"{UID}.1"], [[4, 1, 2, 3, 4]])


def test_slices_of_a_bottom_up_series_count_from_the_head(tmp_path, write_series, make_hu, table):
    write_series(tmp_path / "ct", make_hu(4), orientation=(1, 0, 0, 0, -1, 0))
    series = scan([tmp_path / "ct"]).series
    path = table("series_uid,z_mm,x1,y1,x2,y2", f"{UID}.1,100,1,2,3,4", f"{UID}.1,92.5,1,2,3,4")
    assert read_boxes(path, series)[f"{UID}.1"][:, 0].tolist() == [0, 3]


def test_no_rows(series, table):
    boxes = read_boxes(table("series_uid,slice,x1,y1,x2,y2"), series)
    assert {uid: rows.shape for uid, rows in boxes.items()} == {f"{UID}.1": (0, 5), f"{UID}.2": (0, 5)}


GOOD = f"{UID}.1,2,1,2,3,4"
HEADER = "series_uid,slice,x1,y1,x2,y2"
BAD = {
    "missing column": (("series_uid,slice,x1,y1,x2", f"{UID}.1,2,1,2,3"), "line 1: column y2 is missing"),
    "unknown column": ((f"{HEADER},label", f"{GOOD},nodule"), "line 1: column 'label' is unknown"),
    "other names": (
        ("uid,z,xmin,ymin,xmax,ymax", GOOD),
        "line 1: column series_uid is missing.*column 'uid' is unknown",
    ),
    "column twice": ((f"{HEADER},x1", f"{GOOD},3"), "line 1: column x1 is there twice"),
    "no slice column": (("series_uid,x1,y1,x2,y2", f"{UID}.1,1,2,3,4"), "line 1: it has none of slice, z_mm, sop"),
    "two slice columns": ((f"{HEADER},z_mm", f"{GOOD},3"), "line 1: it has slice and z_mm of"),
    "empty file": (("",), "line 1: column series_uid is missing"),
    "few values": ((HEADER, GOOD, f"{UID}.1,2,1,2,3"), "line 3: has 5 values for 6 columns"),
    "many values": ((HEADER, GOOD, f"{GOOD},7"), "line 3: has 7 values for 6 columns"),
    "empty value": ((HEADER, GOOD, "", f"{UID}.1,2,,2,3,4"), "line 4: x1 is empty"),
    "text": ((HEADER, f"{UID}.1,2,left,2,3,4"), "line 2: x1 'left' isn't a number"),
    "slice text": ((HEADER, f"{UID}.1,2.0,1,2,3,4"), r"line 2: slice '2\.0' isn't a whole number"),
    "NaN": ((HEADER, f"{UID}.1,2,1,nan,3,4"), r"line 2: y1 'nan' isn't a number"),
    "series": ((HEADER, "1.2.3,2,1,2,3,4"), r"line 2: there is no series 1\.2\.3 among the 2 CT series"),
    "slice": ((HEADER, f"{UID}.2,3,1,2,3,4"), r"line 2: .*slice 3 isn't one of 0\.\.2"),
    "position": (
        ("series_uid,z_mm,x1,y1,x2,y2", f"{UID}.1,114,1,2,3,4"),
        r"line 2: series .*\.1 has no slice at z_mm 114; it reaches from 100 to 112\.5",
    ),
    "image": (
        ("series_uid,sop_instance_uid,x1,y1,x2,y2", f"{UID}.1,1.2.3,1,2,3,4"),
        r"line 2: series .* has no image 1\.2\.3",
    ),
    "outside": (
        (HEADER, GOOD, f"{UID}.1,2,1,2,64.5,4"),
        r"line 3: box \(1, 2, 64\.5, 4\) reaches outside its 64 x 40 image",
    ),
    "below": ((HEADER, f"{UID}.1,2,1,2,3,41"), "line 2: .*reaches outside"),
    "no area": ((HEADER, f"{UID}.1,2,3,2,3,4"), "line 2: .*is empty"),
    "no area in float32": ((HEADER, f"{UID}.1,2,3,2,3.00000001,4"), "line 2: .*is empty"),
    "slice beyond float": ((HEADER, f"{UID}.1,{'9' * 400},1,2,3,4"), "line 2: slice '9+' isn't a whole number"),
    "quote": ((HEADER, f'"{UID}.1,2,3,2,3,4'), "can't be read as CSV"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(series, table, name):
    lines, message = BAD[name]
    path = table(*lines)
    with pytest.raises(InputError, match=message) as error:
        read_boxes(path, series)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path, series):
    with pytest.raises(InputError, match=r"nowhere\.csv: there is no such file"):
        read_boxes(tmp_path / "nowhere.csv", series)
    (tmp_path / "boxes.xlsx").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(InputError, match=r"boxes\.xlsx: can't be read as CSV"):
        read_boxes(tmp_path / "boxes.xlsx", series)


def test_positions_that_tell_nothing(tmp_path, write_series, make_hu, table):
    """The slices of a coronal series have one z."""
    write_series(tmp_path / "ct", make_hu(4), orientation=(1, 0, 0, 0, 0, -1))
    path = table("series_uid,z_mm,x1,y1,x2,y2", f"{UID}.1,100,1,2,3,4")
    with pytest.raises(InputError, match=r"line 2: slices of series .* share their z_mm. To fix: use the column slice"):
        read_boxes(path, scan([tmp_path / "ct"]).series)


def test_the_documented_example(tmp_path, write_series, make_hu, table):
    text = Path(__file__).parents[3].joinpath("docs", "box_csv.md").read_text()
    example = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    write_series(tmp_path / "ct", np.zeros((43, 160, 328), np.int16), series_uid=f"{UID}.1")
    boxes = read_boxes(table(*example), scan([tmp_path / "ct"]).series)
    np.testing.assert_array_equal(boxes[f"{UID}.1"], [[41, 310, 127.5, 322, 141], [42, 309, 126, 323.5, 142]])


def test_an_image_named_by_an_identifier_of_several_is_refused(tmp_path, table, write_series, make_hu):
    """A box would land on any one of them."""

    def shared(z, dataset):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"

    write_series(tmp_path / "ct", make_hu(4), edit=shared)
    path = table("series_uid,sop_instance_uid,x1,y1,x2,y2", f"{UID}.1,1.2.3.4,1,2,3,4")
    with pytest.raises(InputError, match=r"line 2: series .* has 4 images 1\.2\.3\.4"):
        read_boxes(path, scan([tmp_path / "ct"]).series)
