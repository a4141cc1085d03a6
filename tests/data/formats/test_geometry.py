"""Tilted and unevenly spaced series: found out, refused, or made regular."""

import re

import numpy as np
import pytest

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.geometry import Geometry
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.prepare.resample import resampling
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError

UID = "1.2.826.0.1.3680043.8.498"
TILT = np.radians(20)
TILTED = (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT))


def along_the_table(z, dataset):
    """Slices of a tilted gantry lie above each other along the table, not along their normal."""
    dataset.ImagePositionPatient = [-20, -30, f"{100 + 2.5 * z:.4f}"]


def at(*heights):
    def edit(z, dataset):
        dataset.ImagePositionPatient = [-20, -30, heights[z]]

    return edit


def a_lesion(hu, series, place, value):
    """Brighten the pixel nearest to a place on the slice nearest to it."""
    x, y, along = series.to_pixels(place[None])[0]
    z = int(np.argmin(np.abs(np.array(series.distances) - along)))
    shift = series.to_pixels(np.array(series.positions[z])[None])[0]
    y, x = round(y - shift[1]), round(x - shift[0])
    hu[z, y, x] = value
    return z, y, x


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_tilted_gantry(tmp_path, write_series, make_hu, mirrored):
    orientation = (-1, 0, 0, *TILTED[3:]) if mirrored else TILTED
    hu = make_hu(12)
    write_series(tmp_path / "ct", hu, orientation=orientation, edit=along_the_table)
    message = rf"series {UID}\.1 in .*ct: its slices are tilted by 20\.0 degrees \(gantry tilt\)\. To fix: --resample"
    with pytest.raises(InputError, match=message):
        scan([tmp_path / "ct"])
    (series,) = scan([tmp_path / "ct"], accept="resampleable").series
    # Three places in space; the same places again once the slices are moved.
    stored = series.read()
    places = [
        np.array(series.positions[z]) + 0.8 * x * series.axes[0] + 0.7 * y * series.axes[1]
        for z, y, x in ((0, 5, 7), (6, 30, 40), (11, 60, 3))
    ]
    marks = [a_lesion(stored, series, place, 3000 + n) for n, place in enumerate(places)]
    boxes = np.array([[z, x, y, x + 1, y + 1] for z, y, x in marks], np.float32)
    way = resampling(series, boxes)
    moved = way.volume(stored)
    assert moved.shape == way.shape
    assert way.shape[0] == 12
    # Sideways by 2.5 mm * sin(20 degrees) a slice, in columns of 0.7 mm.
    assert way.size[0] == 64 + round(11 * 2.5 * np.sin(TILT) / 0.7)
    assert way.size[1] == 64
    for n, (place, (z, *box)) in enumerate(zip(places, way.boxes(boxes), strict=True)):
        (found,) = np.argwhere(moved == 3000 + n)
        assert found.tolist() == [z, box[1], box[0]]
        again = np.array(way.origin) + found[::-1] * [0.8, 0.7, series.spacing[0]] @ series.axes
        # Half a pixel along each axis at most.
        assert np.abs((again - place) @ series.axes.T).max() <= 0.4
    covered = moved != -1024
    assert covered.sum() <= hu.size
    np.testing.assert_array_equal(moved[0][covered[0]], stored[0][stored[0] != -1024])


def test_prepare_tilted_with_boxes_and_low_dose(tmp_path, write_series, make_hu):
    hu = make_hu(6)
    write_series(tmp_path / "ct", hu, orientation=TILTED, edit=along_the_table)
    write_series(tmp_path / "low", hu + 9, series_uid=f"{UID}.2", orientation=TILTED, edit=along_the_table)
    write_series(tmp_path / "ct", make_hu(3), series_uid=f"{UID}.3")
    write_series(tmp_path / "low", make_hu(3), series_uid=f"{UID}.4")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"series_uid,slice,x1,y1,x2,y2\n{UID}.1,5,10,20,13,22\n{UID}.3,1,1,2,3,4\n")
    options = {"boxes": boxes, "low_dose": tmp_path / "low", "val_fraction": 0, "test_fraction": 0}
    summary = prepare([tmp_path / "ct"], tmp_path / "a", **options)
    assert [info.series_uid for info in Store(tmp_path / "a").series] == [f"{UID}.3"]
    assert [fault.series_uid for fault in summary.rejected] == [f"{UID}.1", f"{UID}.2"]
    prepare([tmp_path / "ct"], tmp_path / "b", resample=True, **options)
    store = Store(tmp_path / "b")
    assert [info.series_uid for info in store.series] == [f"{UID}.1", f"{UID}.3"]
    ((x1, y1, x2, y2),) = store.boxes(0, 5).astype(int)
    np.testing.assert_array_equal(store.read(0, 5)[y1:y2, x1:x2], hu[5, 20:22, 10:13])
    low, normal = store.read(0, 3, low_dose=True), store.read(0, 3)
    np.testing.assert_array_equal(low[normal > -1024], normal[normal > -1024] + 9)


def test_uneven_spacing(tmp_path, write_series, make_hu):
    """5 mm apart and then 2.5 mm, as heads are scanned."""
    hu = np.broadcast_to(np.array([0, 10, 20, 30, 35, 40, 45], np.int16)[:, None, None] * 2, (7, 16, 16))
    write_series(tmp_path / "ct", hu, edit=at(100, 105, 110, 115, 117.5, 120, 122.5))
    with pytest.raises(InputError, match=r"unevenly spaced, 2\.5 to 5 mm apart. To fix: --resample makes it regular"):
        find_series([tmp_path / "ct"], "", strict=True, resample=False)
    summary = prepare([tmp_path / "ct"], tmp_path / "store", resample=True, val_fraction=0, test_fraction=0)
    store = Store(tmp_path / "store")
    assert summary.slices["train"] == store.series[0].shape[0] == 7
    assert store.series[0].spacing[0] == pytest.approx(3.75)
    for z in range(7):
        np.testing.assert_array_equal(store.read(0, z), round(2 * 3.75 * 2 * z))
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"series_uid,slice,x1,y1,x2,y2\n{UID}.1,5,1,2,3,4\n")
    with pytest.raises(InputError, match="its boxes would be on no slice once that is mended"):
        prepare([tmp_path / "ct"], tmp_path / "again", boxes=boxes, resample=True)
    assert not (tmp_path / "again").exists()


def test_rounded_positions_are_even(tmp_path, write_series, make_hu):
    """0.625 mm, in positions of one decimal."""
    heights = [round(0.625 * z, 1) for z in range(9)]
    write_series(tmp_path, make_hu(9), edit=at(*heights))
    assert scan([tmp_path]).series[0].spacing[0] == pytest.approx(0.6, abs=0.05)


def test_a_slice_that_lies_beside_the_others(tmp_path, write_series, make_hu):
    def beside(z, dataset):
        dataset.ImagePositionPatient = [-20, -25 if z == 2 else -30, 100 + 2.5 * z]

    write_series(tmp_path, make_hu(5), edit=beside)
    with pytest.raises(InputError, match="its slices are shifted sideways"):
        scan([tmp_path])
    (series,) = scan([tmp_path], accept="resampleable").series
    way = resampling(series, np.empty((0, 5), np.float32))
    assert way.corners == ((0, 0), (0, 0), (7, 0), (0, 0), (0, 0))


BASE = {"shape": (5, 64, 48), "spacing": (2.5, 0.7, 0.8), "origin": (1.0, 2.0, 3.0), "orientation": (1, 0, 0, 0, 1, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spacing": (2.509, 0.7009, 0.7991), "origin": (1.09, 1.91, 3.09)}, None),
        ({"orientation": (1, 0.0009, 0, -0.0009, 1, 0)}, None),
        ({"spacing": (0.0, 0.7, 0.8)}, None),
        ({"shape": (4, 64, 48)}, r"its shape is \(5, 64, 48\), not \(4, 64, 48\)"),
        ({"spacing": (2.52, 0.7, 0.8)}, r"its spacing \(z, y, x\) is \(2.5, 0.7, 0.8\), not \(2.52"),
        ({"spacing": (2.5, 0.7, 0.802)}, r"its spacing \(z, y, x\)"),
        ({"origin": (1.0, 2.0, 3.2)}, r"its origin is \(1, 2, 3\), not \(1, 2, 3.2\)"),
        ({"orientation": (1, 0, 0, 0, 1, 0.002)}, "its orientation is"),
    ],
)
def test_one_comparison(change, message):
    """What a store knows of a series, against what a file or a store says of another."""
    one, other = Geometry(**BASE), SeriesInfo("1", "anna", "train", **{**BASE, **change})
    found = one.difference(other)
    assert (found is None) == (message is None)
    assert message is None or re.match(message, str(found))
    assert (other.difference(one) is None) == (message is None)


def test_slices_are_compared_one_by_one_where_both_sides_know_them(tmp_path, write_series, make_hu):
    uneven = (100, 102.5, 104, 107.5)
    for name, heights in (("even", (100, 102.5, 105, 107.5)), ("uneven", uneven), ("same", uneven)):
        write_series(tmp_path / name, make_hu(4), edit=at(*heights))
    even, uneven, same = (
        scan([tmp_path / name], accept="resampleable").series[0] for name in ("even", "uneven", "same")
    )
    assert uneven.difference(same) is None
    assert str(even.difference(uneven)) == "its place of a slice is (-20, -30, 105), not (-20, -30, 104)"
    # What a store knows is the first slice's place and the distance between slices, which are the same.
    kept = Geometry(shape=even.shape, spacing=even.spacing, origin=even.origin, orientation=even.orientation)
    assert kept.difference(uneven) is None
