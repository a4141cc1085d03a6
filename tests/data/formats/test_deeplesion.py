"""DeepLesion in its published layout."""

import numpy as np
import pytest
from PIL import Image

from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError

HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
)


def line(folder, key, box, split=1, noisy=0, spacing="0.488281, 0.488281, 5"):
    patient, study, series = folder.split("_")
    return (
        f'{folder}_{key:03d}.png,{int(patient)},{int(study)},{int(series)},{key},"233.537, 95.0204, 234.057, 106.977",'
        f'"{box}","6.6, 4.9","0.44666, 0.283794, 0.434454",3,{noisy},"103, 115","{spacing}","512, 512",'
        f'"-175, 275",F,62,{split}'
    )


@pytest.fixture
def deeplesion(tmp_path, make_hu):
    """Writes folders of slices and the table; returns HU by folder and slice."""

    def write(slices, lines):
        hu = {}
        for n, (folder, numbers) in enumerate(slices.items()):
            (tmp_path / "DL" / "Images_png" / folder).mkdir(parents=True)
            for number, values in zip(numbers, make_hu(len(numbers), seed=n), strict=True):
                hu[folder, number] = values
                image = Image.fromarray((values.astype(np.int32) + 32768).astype(np.uint16))
                image.save(tmp_path / "DL" / "Images_png" / folder / f"{number:03d}.png")
        (tmp_path / "DL" / "DL_info.csv").write_text("\n".join([HEADER, *lines]) + "\n")
        return tmp_path / "DL", hu

    return write


def test_the_documented_command(tmp_path, deeplesion):
    folder, hu = deeplesion(
        {"000001_01_01": range(103, 108), "000001_02_01": [8, 9, 10, 40, 41, 90], "000007_01_02": [5]},
        [
            line("000001_01_01", 105, "10.5, 20.25, 30, 40"),
            line("000001_01_01", 105, "1, 2, 3, 4"),
            line("000001_01_01", 106, "1, 2, 3, 4", noisy=1),
            line("000001_02_01", 9, "-3, 50, 20, 70.5"),
            line("000001_02_01", 41, "5, 6, 7, 8"),
            line("000007_01_02", 5, "5, 6, 7, 8", split=3, spacing="0.7, 0.8, 1"),
            line("000009_01_01", 5, "5, 6, 7, 8", split=2),
        ],
    )
    summary = prepare([folder], tmp_path / "store", simulate_dose=0.25)
    store = Store(tmp_path / "store")
    assert [(info.series_uid, info.patient_id, info.split) for info in store.series] == [
        ("000001_01_01_103-107", "000001", "train"),
        ("000001_02_01_008-010", "000001", "train"),
        ("000001_02_01_040-041", "000001", "train"),
        ("000007_01_02_005-005", "000007", "test"),
    ]
    for index, (name, first) in enumerate([("000001_01_01", 103), ("000001_02_01", 8), ("000001_02_01", 40)]):
        for z in range(store.series[index].shape[0]):
            np.testing.assert_array_equal(store.read(index, z), np.maximum(hu[name, first + z], -1024))
    assert store.boxes(0, 2).tolist() == [[10.5, 20.25, 30, 40], [1, 2, 3, 4]]
    assert store.boxes(1, 1).tolist() == [[0, 50, 20, 64]]
    assert store.boxes(2, 1).tolist() == [[5, 6, 7, 8]]
    assert summary.boxes == {"train": 4, "val": 0, "test": 1}
    assert store.series[0].spacing == pytest.approx((5, 0.488281, 0.488281))
    assert store.series[3].spacing == pytest.approx((1, 0.8, 0.7))
    assert store.split["given"] == {"000001": "train", "000007": "test"}


def test_a_patient_in_two_splits(tmp_path, deeplesion):
    folders = {"000001_01_01": [3], "000001_02_01": [3]}
    lines = [line("000001_01_01", 3, "1, 2, 3, 4"), line("000001_02_01", 3, "1, 2, 3, 4", split=3)]
    with pytest.raises(InputError, match="the data set puts patient 000001 into train and test"):
        prepare([deeplesion(folders, lines)[0]], tmp_path / "store")


FOLDER = "000001_01_01"
BAD = {
    "column": (HEADER.replace("Possibly_noisy", "noisy"), "DL_info.csv, line 1: column Possibly_noisy is missing"),
    "name": (line(FOLDER, 4, "1, 2, 3, 4").replace(f"{FOLDER}_004", "a"), "line 2: File_name 'a.png' isn't like"),
    "number": (
        line(FOLDER, 4, "1, 2, 3, 4").replace("_004", "_²"),
        "line 2: File_name '000001_01_01_².png' isn't like",
    ),
    "huge": (line(FOLDER, 4, "1, 2, 3, 4", spacing="1, 1, 1e308"), "has no usable geometry"),
    "box": (line(FOLDER, 4, "1, 2, 3"), "line 2: Bounding_boxes '1, 2, 3' isn't 4 numbers"),
    "spacing": (line(FOLDER, 4, "1, 2, 3, 4", spacing="0, 1, 1"), "line 2: Spacing_mm_px_ .* isn't positive"),
    "split": (line(FOLDER, 4, "1, 2, 3, 4", split=4), "line 2: Train_Val_Test '4' isn't 1, 2 or 3"),
    "short": (f"{FOLDER}_004.png,1", "line 2: Bounding_boxes None isn't 4 numbers"),
    "elsewhere": (line("000002_01_01", 4, "1, 2, 3, 4"), "has DL_info.csv and none of the images that it lists"),
    "no such slice": (line(FOLDER, 9, "1, 2, 3, 4"), "line 2: there is no such image in 000001_01_01"),
    "outside": (line(FOLDER, 4, "70, 2, 80, 4"), "line 2: the box .* lies outside its image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(tmp_path, deeplesion, name):
    text, expected = BAD[name]
    folder, _ = deeplesion({FOLDER: [3, 4, 5]}, [text])
    if name == "column":
        (folder / "DL_info.csv").write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        prepare([folder], tmp_path / "store", strict=True)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DL"]


def test_bad_images_are_rejected(tmp_path, deeplesion):
    folders = {f"00000{n}_01_01": [3, 4, 5] for n in range(1, 6)}
    folder, _ = deeplesion(folders, [line(name, 4, "1, 2, 3, 4") for name in folders])
    images = folder / "Images_png"
    whole = (images / "000001_01_01" / "004.png").read_bytes()
    (images / "000001_01_01" / "004.png").write_bytes(whole[:600])
    Image.new("L", (64, 64)).save(images / "000002_01_01" / "004.png")
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(images / "000003_01_01" / "005.png")
    (images / "000004_01_01" / "003.png").write_bytes(b"")
    summary = prepare([folder], tmp_path / "store", report=tmp_path / "rejected.csv")
    assert [info.patient_id for info in Store(tmp_path / "store").series] == ["000005"]
    report = (tmp_path / "rejected.csv").read_text()
    assert len(summary.rejected) == 4
    for expected in ("004.png: can't be read as PNG", "pixels of mode L", "[32, 64] pixels", "003.png: can't be read"):
        assert expected in report
