"""A split's images as files that other tools read, and a store with exactly those low-dose images."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lidnet_fast.data.pseudonyms import chosen_pseudonyms, write_table
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store, index_files
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, make_folder, whole_path
from lidnet_fast.progress import progress


def export(
    store: str | Path,
    out: Path,
    split: str = "test",
    format: str = "nifti",
    seed: int = 0,
    *,
    pseudonymise: str | Path | None = None,
    pseudonym_table: str | Path | None = None,
) -> list[str]:
    """Write `low_dose/` and `normal_dose/`, one file or folder per series, and `store/` with the same pairs and boxes.

    Where the store simulates its low dose, the noise of a slice is a pure function of the seed, the series' place in
    the store and the slice. The new store holds it as measured low dose, so that all who are compared on it have seen
    the same pixels.

    Args:
        store: where the series come from.
        out: the new folder; it appears whole or not at all.
        split: whose series.
        format: "nifti" (`<series_uid>.nii.gz`) or "dicom" (a folder per series); see `file_names`.
        seed: of simulated noise.
        pseudonymise: file with a secret key; names, headers and the new store have pseudonyms of patients and series.
            A store that was prepared with the same key has them already.
        pseudonym_table: CSV file to be written: which pseudonym stands for whom.

    Returns:
        What was written, as lines of text.

    Raises:
        InputError: `out` exists, the split is empty, or a series has no low dose.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; an export goes to a new folder")
    pseudonyms = chosen_pseudonyms(pseudonymise, pseudonym_table)
    source = Store(store)
    if pseudonyms is not None and source.pseudonyms == pseudonyms.fingerprint:
        if pseudonym_table is not None:
            raise InputError(f"{store}: has the pseudonyms of this key already, and not what they stand for")
        pseudonyms = None
    chosen = [index for index, info in enumerate(source.series) if info.split == split]
    if not chosen:
        raise InputError(f"{store}: the {split} split has no series")
    if source.simulation is None:
        for index in chosen:
            if not source.series[index].has_low_dose:
                raise InputError(f"{store}: series {source.series[index].series_uid} has no low dose to export")
    infos = {index: source.series[index] for index in chosen}
    split_record = source.split
    if pseudonyms is not None:
        infos = {index: pseudonyms.info(info) for index, info in infos.items()}
        infos = dict(sorted(infos.items(), key=lambda item: item[1].series_uid))  # nor does their order tell who is who
        split_record = pseudonyms.split(split_record)
    names = file_names([info.series_uid for info in infos.values()])
    write = _WRITERS[format]
    with (
        as_private_as(index_files(store)),
        whole_path(out) as work,
        StoreWriter(
            work / "store",
            split={"by": "export", "of": split_record},
            inserted_lesions=source.inserted_lesions,
            pseudonyms=source.pseudonyms if pseudonyms is None else pseudonyms.fingerprint,
        ) as writer,
    ):
        for (index, info), name in progress(list(zip(infos.items(), names, strict=True)), "exporting"):
            normal = np.stack([source.read(index, z) for z in range(info.shape[0])])
            low = low_dose_volume(source, index, normal, seed)
            boxes = [(z, *box) for z in range(info.shape[0]) for box in source.boxes(index, z).tolist()]
            rows = np.array(boxes, np.float32).reshape(-1, 5)
            writer.add_series(replace(info, has_low_dose=True), normal, rows, low)
            for kind, volume in (("low_dose", low), ("normal_dose", normal)):
                write(make_folder(work / kind) / name, volume, info, kind)
        if pseudonyms is not None and pseudonym_table is not None:
            write_table(Path(pseudonym_table), pseudonyms, [source.series[index] for index in chosen])
    return [
        f"{out / 'low_dose'}: {len(chosen)} series to denoise, of {len(source.series)} in the store",
        f"{out / 'normal_dose'}: the same at normal dose",
        f"{out / 'store'}: the store to evaluate on: "
        f"lidnet-fast evaluate RUN --store {out / 'store'} --images NAME=FOLDER",
    ]


# What every file system takes as it is, and isn't what `digest_name` makes.
_PLAIN_NAME = re.compile(
    r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))(?!.*-[0-9a-f]{16}$)[a-z0-9_]([a-z0-9._ -]{0,98}[a-z0-9_-])?",
    re.ASCII | re.IGNORECASE,
)


def file_names(series_uids: Sequence[str]) -> list[str]:
    """The name of each series' file or folder, without a suffix; different series have different names.

    A series' name is its id where every file system can have that and no other id is the same but for capitals, and
    `digest_name` of it elsewhere.
    """
    alike = Counter(uid.lower() for uid in series_uids)
    return [uid if _PLAIN_NAME.fullmatch(uid) and alike[uid.lower()] == 1 else digest_name(uid) for uid in series_uids]


def digest_name(name: str) -> str:
    """A plain name for any text: what is left of its beginning, and a digest of all of it."""
    return f"{plain_beginning(name) or 'series'}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def plain_beginning(name: str) -> str:
    """What is left of a text's beginning in the name of a file; it may be nothing."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:40].strip("._-")


def exported_patient_id(patient_id: str) -> str:
    """The PatientID of a series exported as DICOM: the patient's, where DICOM can hold it as one value."""
    fits = len(patient_id) <= 64 and "\\" not in patient_id and patient_id.isprintable()
    return patient_id if fits else digest_name(patient_id)


def exported_uid(series_uid: str, kind: str) -> str:
    """The SeriesInstanceUID of a series exported as DICOM; `kind` is "low_dose" or "normal_dose"."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=["lidnet_fast export", kind, series_uid])


def low_dose_volume(store: Store, index: int, normal: np.ndarray, seed: int) -> np.ndarray:
    """The low dose of a series as `export` writes it, int16 [Z, H, W] in HU; `normal` is its normal dose."""
    if store.simulation is None:
        return np.stack([store.read(index, z, low_dose=True) for z in range(len(normal))])
    simulation = DoseSimulation.from_dict(store.simulation)
    spacing = store.series[index].spacing[2]
    low = np.empty_like(normal)
    for z, hu in enumerate(normal):
        noisy = simulate_low_dose(
            torch.from_numpy(hu)[None].float(), spacing, simulation, [sample_generator(seed, index, z)]
        )
        low[z] = noisy[0].round().clamp(-32768, 32767).short().numpy()
    return low


def _write_nifti(path: Path, volume: np.ndarray, info: SeriesInfo, kind: str) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(volume)
    depth, height, width = info.spacing
    image.SetSpacing((width, height, depth or 1.0))
    image.SetOrigin(info.origin)
    image.SetDirection(info.axes.T.ravel().tolist())
    sitk.WriteImage(image, f"{path}.nii.gz", useCompression=True)


def _write_dicom(path: Path, volume: np.ndarray, info: SeriesInfo, kind: str) -> None:
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    make_folder(path)
    series_uid = exported_uid(info.series_uid, kind)
    normal = info.axes[2]
    for z, hu in enumerate(volume):
        position = np.array(info.origin) + z * info.spacing[0] * normal
        image = pydicom.Dataset()
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(z)])
        image.SeriesInstanceUID = series_uid
        image.StudyInstanceUID = generate_uid(entropy_srcs=["lidnet_fast export", info.series_uid])
        image.FrameOfReferenceUID = generate_uid(entropy_srcs=["lidnet_fast frame", info.series_uid])
        image.SpecificCharacterSet = "ISO_IR 192"
        image.PatientID, image.PatientName, image.Modality = exported_patient_id(info.patient_id), "", "CT"
        image.StudyDate = image.StudyTime = image.StudyID = image.AccessionNumber = ""
        image.PatientBirthDate = image.PatientSex = image.ReferringPhysicianName = ""
        image.SeriesDescription = kind.replace("_", " ")
        image.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        image.SeriesNumber, image.InstanceNumber = 1, z + 1
        image.ImagePositionPatient = [f"{value:.6f}"[:16] for value in position]
        image.ImageOrientationPatient = [f"{value:.10f}"[:16] for value in info.orientation]
        image.PixelSpacing = [f"{value:.8f}" for value in info.spacing[1:]]
        image.SliceThickness = f"{info.slice_thickness or info.spacing[0]:.6f}"
        if info.kernel:
            image.ConvolutionKernel = info.kernel
        if info.body_part:
            image.BodyPartExamined = info.body_part
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Rows, image.Columns = hu.shape
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = 1, 0, "HU"
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.set_pixel_data(hu, "MONOCHROME2", 16, generate_instance_uid=False)
        image.save_as(path / f"{z:04d}.dcm", enforce_file_format=True)


_WRITERS: dict[str, Callable[[Path, np.ndarray, SeriesInfo, str], None]] = {
    "nifti": _write_nifti,
    "dicom": _write_dicom,
}
