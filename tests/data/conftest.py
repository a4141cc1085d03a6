"""DICOM files written by the tests."""

import random

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
)
SYNTAXES_OF_GDCM = {JPEGLosslessSV1: "JPEGLosslessProcess14_1", JPEGLSLossless: "JPEGLSLossless"}


def slice_dataset(hu, *, series_uid, patient_id, position, orientation, spacing, slope, intercept, number, syntax):
    stored = np.rint((hu.astype(np.float64) - intercept) / slope).astype(np.int16)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = f"{series_uid}.1"
    dataset.SeriesInstanceUID = series_uid
    dataset.PatientID = patient_id
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = [f"{value:.6f}"[:16] for value in position]
    dataset.ImageOrientationPatient = [f"{value:.10f}"[:16] for value in orientation]
    dataset.PixelSpacing = list(spacing[1:])
    dataset.SliceThickness = spacing[0]
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelData = (stored.byteswap() if syntax == ExplicitVRBigEndian else stored).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save(dataset, path):
    """Write in the transfer syntax that the file's meta header names, compressing where that is needed."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in (RLELossless, JPEG2000Lossless):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax in SYNTAXES_OF_GDCM:
        import gdcm

        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(path, enforce_file_format=True)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, SYNTAXES_OF_GDCM[syntax])))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetFileName(str(path))
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
        return
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def write_series():
    """Write a volume as one DICOM file per slice, the files' names in random order; return them in slice order."""

    def write(
        folder,
        volume,
        *,
        series_uid="1.2.826.0.1.3680043.8.498.1",
        patient_id="anna",
        origin=(-20.0, -30.0, 100.0),
        orientation=(1, 0, 0, 0, 1, 0),
        spacing=(2.5, 0.7, 0.8),
        slope=1,
        intercept=-1024,
        syntax=ExplicitVRLittleEndian,
        suffix=".dcm",
        edit=None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        normal = np.cross(orientation[:3], orientation[3:])
        names = [f"{series_uid.split('.')[-1]}_{n:04d}{suffix}" for n in range(len(volume))]
        random.Random(0).shuffle(names)
        for z, hu in enumerate(volume):
            dataset = slice_dataset(
                hu,
                series_uid=series_uid,
                patient_id=patient_id,
                position=np.array(origin) + z * spacing[0] * normal,
                orientation=orientation,
                spacing=spacing,
                slope=slope,
                intercept=intercept,
                number=int(names[z][-8:-4] if suffix else names[z][-4:]),
                syntax=syntax,
            )
            if edit:
                edit(z, dataset)
            save(dataset, folder / names[z])
        return [folder / name for name in names]

    return write


@pytest.fixture
def make_hu():
    """A smooth random volume of CT numbers, int16 [Z, H, W] within -1000..2000."""

    def make(depth=4, height=64, width=64, seed=0):
        rng = np.random.default_rng(seed)
        coarse = rng.uniform(-1000, 2000, (depth, height // 8, width // 8))
        return np.kron(coarse, np.ones((1, 8, 8))).round().astype(np.int16) + rng.integers(
            0, 9, (depth, height, width), np.int16
        )

    return make
