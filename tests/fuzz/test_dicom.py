"""Damaged DICOM files end as a sound series, a rejection with a reason or an `InputError`."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from tests.data.conftest import SYNTAXES, save, slice_dataset
from tests.fuzz.hostile import NUMBERS, damaged, input_errors, limits

KEYWORDS = [
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("NumberOfFrames", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PhotometricInterpretation"),
    *("PlanarConfiguration", "Modality", "ImageType", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"),
    *("StudyInstanceUID", "PatientID", "SeriesDescription", "SpecificCharacterSet", "PixelData"),
    *("MeasurementUnitsCodeSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
GROUPS = KEYWORDS[-2:]


def hu(z):
    return np.random.default_rng(z).integers(-1000, 2000, (32, 32), np.int16)


def single(z, syntax):
    return slice_dataset(
        hu(z),
        series_uid="1.2.3",
        patient_id="anna",
        position=(-20, -30, 100 + 2.5 * z),
        orientation=(1, 0, 0, 0, 1, 0),
        spacing=(2.5, 0.7, 0.8),
        slope=1,
        intercept=-1024,
        number=z,
        syntax=syntax,
    )


def group(macro, **values):
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return {macro: Sequence([item])}


def dataset_of(**values):
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def multi_frame():
    image = single(0, ExplicitVRLittleEndian)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    image.NumberOfFrames = 3
    image.PixelData = b"".join(single(z, ExplicitVRLittleEndian).PixelData for z in range(3))
    shared = {
        **group("PixelMeasuresSequence", PixelSpacing=[0.7, 0.8], SliceThickness=2.5),
        **group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        **group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU"),
    }
    image.SharedFunctionalGroupsSequence = Sequence([dataset_of(**shared)])
    frames = [group("PlanePositionSequence", ImagePositionPatient=[-20, -30, 100 + 2.5 * z]) for z in range(3)]
    image.PerFrameFunctionalGroupsSequence = Sequence([dataset_of(**frame) for frame in frames])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(image, keyword)
    return image


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Content of sound files by name: small ones of every syntax, a multi-frame one, and real ones."""
    folder = tmp_path_factory.mktemp("seeds")
    for syntax in SYNTAXES:
        save(single(1, syntax), folder / syntax.keyword)
    save(multi_frame(), folder / "multi-frame")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "bad_sequence.dcm"):
        found[name] = Path(get_testdata_file(name, download=False)).read_bytes()
    return found


def check_ingest(content, neighbours=True):
    """Read a file, between two sound slices of its series, in every way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if neighbours:
            save(single(0, ExplicitVRLittleEndian), folder / "0.dcm")
            save(single(2, ExplicitVRLittleEndian), folder / "2.dcm")
        (folder / "1.dcm").write_bytes(content)
        for strict, accept in ((True, "regular"), (False, "resampleable")):
            with limits(), input_errors():
                found = scan([folder], strict=strict, accept=accept)
                assert all(rejected.reason for rejected in found.rejected)
                for series in found.series:
                    check_series(series)


def check_series(series):
    assert np.isfinite(series.positions).all()
    assert np.isfinite(series.orientation).all()
    assert np.isfinite(series.spacing).all()
    assert min(series.spacing) >= 0
    assert min(series.shape) >= 1
    with input_errors():
        volume = series.read()
        assert volume.dtype == np.int16
        assert volume.shape == series.shape
        assert volume.min() >= LOWEST_HU


def test_the_seeds_are_sound(seeds):
    for name, content in seeds.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "a").write_bytes(content)
            (series,) = scan([Path(folder)]).series
            assert series.read().shape == series.shape, name


@given(data=st.data())
def test_damaged_bytes(seeds, data):
    name = data.draw(st.sampled_from(sorted(seeds)))
    check_ingest(data.draw(damaged(seeds[name], 4000)), neighbours=data.draw(st.booleans()))


TEXTS = st.sampled_from(NUMBERS) | st.lists(st.sampled_from(NUMBERS), max_size=7).map("\\".join) | st.text(max_size=8)
COUNTS = st.lists(st.sampled_from([0, 1, 7, 8, 12, 16, 17, 32, 64, 4096, 65535]), min_size=1, max_size=2)
VALUES = {
    "US": COUNTS.map(lambda counts: np.array(counts, "<u2").tobytes()),
    "UN": st.binary(max_size=12),
    "FD": st.sampled_from([0.0, -1.0, 1e300, np.nan, np.inf]).map(lambda value: np.array(value).tobytes()),
}


@st.composite
def changed_header(draw, dataset):
    """The dataset with some values replaced by bytes that have the type that they should have or another one."""
    groups = [item for keyword in GROUPS for item in dataset.get(keyword, [])]
    places = [dataset, *(item for macros in groups for macro in macros for item in macro.value)]
    for _ in range(draw(st.integers(1, 3))):
        keyword = draw(st.sampled_from(KEYWORDS))
        tag, place = Tag(tag_for_keyword(keyword)), draw(st.sampled_from(places))
        if draw(st.integers(0, 5)) == 0:
            place.pop(tag, None)
            continue
        usual = dictionary_VR(keyword)
        vr = draw(st.sampled_from(["US" if usual.startswith("US") else usual, "LO", "UN", "FD"]))
        value = draw(VALUES.get(vr, TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))))
        place[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    return dataset


@given(data=st.data())
def test_changed_headers(data):
    syntax = data.draw(st.sampled_from([*SYNTAXES[:2], RLELossless, JPEG2000Lossless, None]))
    dataset = multi_frame() if syntax is None else single(1, ExplicitVRLittleEndian)
    if syntax is not None:
        if syntax in (RLELossless, JPEG2000Lossless):
            dataset.compress(syntax, generate_instance_uid=False)
        else:
            dataset.file_meta.TransferSyntaxUID = syntax
    dataset = data.draw(changed_header(dataset))
    with tempfile.NamedTemporaryFile() as file:
        try:
            dataset.save_as(file.name, enforce_file_format=True)
        except Exception:  # pydicom can't write everything that it reads
            return
        check_ingest(Path(file.name).read_bytes(), neighbours=data.draw(st.booleans()))


@settings(max_examples=max(1, settings.default.max_examples // 6))
@given(data=st.data())
def test_prepare(seeds, data):
    """A store appears whole or not at all."""
    name = data.draw(st.sampled_from(sorted(seeds)))
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder, "ct"), Path(folder, "store")
        root.mkdir()
        save(single(0, ExplicitVRLittleEndian), root / "0.dcm")
        save(single(2, ExplicitVRLittleEndian), root / "2.dcm")
        (root / "1.dcm").write_bytes(data.draw(damaged(seeds[name], 4000)))
        with limits(), input_errors():
            prepare([root], out, workers=1, simulate_dose=0.5, val_fraction=0, test_fraction=0, resample=True)
        if out.exists():
            store = Store(out)
            assert all(store.read(n, 0).dtype == np.int16 for n in range(len(store.series)))
