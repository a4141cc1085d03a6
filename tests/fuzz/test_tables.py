"""Damaged lesion tables end as boxes inside their images or an `InputError`."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lidnet_fast.data.annotations import read_annotations
from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.deeplesion import scan_deeplesion
from lidnet_fast.data.formats.dicom.series import CTSeries
from lidnet_fast.data.prepare.splits import read_splits
from lidnet_fast.errors import InputError
from tests.fuzz.hostile import NUMBERS, changed_table, damaged, input_errors, limits

SERIES = CTSeries(
    series_uid="1.2.3",
    patient_id="anna",
    files=(Path("a.mhd"),),
    positions=tuple((-20.0, -30.0, 100 + 2.5 * z) for z in range(4)),
    shape=(4, 64, 48),
    spacing=(2.5, 0.7, 0.8),
    orientation=(1, 0, 0, 0, 1, 0),
    sop_instance_uids=tuple(f"1.2.3.{z}" for z in range(4)),
)
BOXES = [
    "series_uid,slice,x1,y1,x2,y2\n1.2.3,0,1,2,30,40\n1.2.3,3,0.5,2,48,64\n",
    "series_uid,z_mm,x1,y1,x2,y2\n1.2.3,100,1,2,30,40\n1.2.3,107.5,0.5,2,48,64\n",
    "series_uid,sop_instance_uid,x1,y1,x2,y2\n1.2.3,1.2.3.1,1,2,30,40\n",
    "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,-10,-15,104,8\n1.2.4,1,2,3,4\n",
]
SPLITS = "patient_id,split\nanna,train\nbert,val\n"
DEEPLESION = (
    "File_name,Bounding_boxes,Possibly_noisy,Spacing_mm_px_,Train_Val_Test\n"
    '000001_01_01_005.png,"5, 6, 17.5, 18",0,"0.5, 0.5, 5",1\n'
    '000001_01_01_006.png,"5, 6, 17.5, 18",0,"0.5, 0.5, 5",1\n'
)
LIDC = """<?xml version="1.0" encoding="UTF-8"?>
<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>1.2.3</SeriesInstanceUid></ResponseHeader>
""" + "".join(
    f"""<readingSession><unblindedReadNodule><roi><imageZposition>{z}</imageZposition><imageSOP_UID>{uid}</imageSOP_UID>
<inclusion>TRUE</inclusion><edgeMap><xCoord>10</xCoord><yCoord>12</yCoord></edgeMap>
<edgeMap><xCoord>20</xCoord><yCoord>25</yCoord></edgeMap></roi></unblindedReadNodule></readingSession>"""
    for z, uid in ((100, "1.2.3.0"), (100, ""), (102.5, "1.2.3.1"))
) + "</LidcReadMessage>"  # fmt: skip


def check_boxes(boxes, shape):
    boxes = np.asarray(boxes)
    depth, height, width = shape
    assert np.isfinite(boxes).all()
    z, corners = boxes[:, 0], boxes[:, 1:]
    assert (z == np.floor(z)).all()
    assert ((z >= 0) & (z < depth)).all()
    assert (corners[:, :2] >= 0).all()
    assert (corners[:, :2] < corners[:, 2:]).all()
    assert (corners[:, 2:] <= [width, height]).all()


def read(content, suffix, reader):
    with tempfile.NamedTemporaryFile(suffix=suffix) as file, limits(), input_errors():
        Path(file.name).write_bytes(content)
        return reader(Path(file.name))


def check_annotations(content, suffix):
    found = read(content, suffix, lambda path: read_annotations(path, [SERIES]))
    for boxes in (found or {}).values():
        check_boxes(boxes, SERIES.shape)


@given(content=st.sampled_from(BOXES).flatmap(changed_table))
def test_boxes(content):
    check_annotations(content, ".csv")
    found = read(content, ".csv", lambda path: read_boxes(path, [SERIES]))
    for boxes in (found or {}).values():
        check_boxes(boxes, SERIES.shape)


@given(content=changed_table(SPLITS))
def test_splits(content):
    found = read(content, ".csv", lambda path: read_splits(path, ["anna"]))
    assert found is None or found["anna"] in ("train", "val", "test")


@given(content=changed_table(DEEPLESION), extra=st.sampled_from(["007", "²", "9" * 200, "٣"]))
def test_deeplesion(content, extra):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "000001_01_01")
        folder.mkdir()
        for stem in ("005", "006", extra):
            Image.fromarray(np.full((32, 24), 33000, np.uint16)).save(folder / f"{stem}.png")
        Path(name, "DL_info.csv").write_bytes(content)
        with limits(), input_errors():
            for series in scan_deeplesion(Path(name)).series:
                check_boxes(np.reshape(series.boxes, (-1, 5)), series.shape)
                assert np.isfinite(series.positions).all()
                assert np.isfinite(series.spacing).all()
                assert series.read().shape == series.shape


@st.composite
def changed_xml(draw):
    text = LIDC
    for old in draw(st.lists(st.sampled_from(["100", "102.5", "10", "12", "20", "25", "UTF-8", "1.2.3.0", "TRUE"]))):
        text = text.replace(f">{old}<", f">{draw(st.sampled_from(NUMBERS)) or '&amp;'}<", 1)
    text = text.replace("UTF-8", draw(st.sampled_from(["UTF-8", "UTF-16", "utf-7", "latin-1", "no-such", "big5", ""])))
    return draw(st.just(text.encode()) | damaged(text.encode()))


@given(content=changed_xml())
def test_lidc(content):
    check_annotations(content, ".xml")


def test_entities_cannot_explode(tmp_path):
    """Of the quadratic kind: one long entity, named often."""
    bomb = LIDC.replace("<Lidc", f'<!DOCTYPE x [<!ENTITY e "{"ha" * 50000}">]><Lidc', 1)
    bomb = bomb.replace(">10<", f">{'&e;' * 50000}<", 1)
    path = tmp_path / "a.xml"
    path.write_text(bomb)
    with limits(), pytest.raises(InputError, match=r"a\.xml: can't be read as LIDC-IDRI XML"):
        read_annotations(path, [SERIES])


def test_entities_do_not_read_files(tmp_path):
    (tmp_path / "secret").write_text("12")
    path = tmp_path / "a.xml"
    path.write_text(
        LIDC.replace("<Lidc", f'<!DOCTYPE x [<!ENTITY e SYSTEM "{tmp_path}/secret">]><Lidc', 1).replace(">10<", ">&e;<")
    )
    with pytest.raises(InputError, match=r"a\.xml: can't be read as LIDC-IDRI XML"):
        read_annotations(path, [SERIES])
