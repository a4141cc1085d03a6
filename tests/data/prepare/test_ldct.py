"""TCIA's LDCT-and-Projection-data: full and low dose side by side, told apart by SeriesDescription."""

import numpy as np
import pytest
from pydicom.uid import SecondaryCaptureImageStorage, XRayRadiationDoseSRStorage

from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError

UID = "1.3.6.1.4.1.9590.100.1.2"


@pytest.fixture
def ldct(tmp_path, write_series, make_hu):
    """Two patients with both doses, projections and a dose report; one (a GE scanner's) without low-dose images."""
    root = tmp_path / "LDCT-and-Projection-data"
    volumes = {}

    def described(text, **values):
        def edit(z, dataset):
            dataset.SeriesDescription = text
            for keyword, value in values.items():
                setattr(dataset, keyword, value)
                if keyword == "SOPClassUID":
                    dataset.file_meta.MediaStorageSOPClassUID = value

        return edit

    for n, (patient, low) in enumerate([("C002", True), ("L004", True), ("C203", False)]):
        study = root / patient / f"12-23-2021-NA-NA-6246{n}"
        volumes[patient] = make_hu(4 + n, seed=n)
        write_series(
            study / "1.000000-Full dose images-67226",
            volumes[patient],
            series_uid=f"{UID}.{n}.1",
            patient_id=patient,
            edit=described("Full dose images"),
        )
        if low:
            write_series(
                study / "1.000000-Low Dose Images-39882",
                volumes[patient] + 7,
                series_uid=f"{UID}.{n}.2",
                patient_id=patient,
                edit=described("Low Dose Images"),
            )
        write_series(
            study / "1.000000-Full Dose Projections-24362",
            make_hu(2),
            series_uid=f"{UID}.{n}.3",
            patient_id=patient,
            edit=described("Full Dose Projections"),
        )
    study = root / "C002" / "dose"
    for n, kind in enumerate((SecondaryCaptureImageStorage, XRayRadiationDoseSRStorage)):
        write_series(study / str(n), make_hu(1), series_uid=f"{UID}.9.{n}", edit=described("Dose", SOPClassUID=kind))
    for n, image_type in enumerate((["DERIVED", "SECONDARY", "SCREEN SAVE"], ["DERIVED", "SECONDARY", "CT_SOM5 PROT"])):
        edit = described("Dose Report", ImageType=image_type)
        write_series(study / f"screen{n}", make_hu(1), series_uid=f"{UID}.8.{n}", edit=edit)
    return root, volumes


def test_the_documented_command(tmp_path, ldct):
    root, volumes = ldct
    summary = prepare(
        [root], tmp_path / "store", low_dose_description="low dose images", val_fraction=0, test_fraction=0
    )
    store = Store(tmp_path / "store")
    assert [info.patient_id for info in store.series] == ["C002", "L004"]
    for index, info in enumerate(store.series):
        assert info.has_low_dose
        for z in range(info.shape[0]):
            expected = volumes[info.patient_id][z]
            np.testing.assert_array_equal(store.read(index, z), np.maximum(expected, -1024))
            np.testing.assert_array_equal(store.read(index, z, low_dose=True), np.maximum(expected + 7, -1024))
    assert summary.skipped == {"CT projections": 6, "dose report": 3, "not CT": 1}
    (rejected,) = summary.rejected
    assert "no series there has the patient, size and slice positions of series" in rejected.reason
    assert "C203" in rejected.reason


def test_refused(tmp_path, ldct):
    root, _ = ldct
    with pytest.raises(InputError, match="of patient C203"):
        prepare([root], tmp_path / "store", low_dose_description="low dose images", strict=True)
    with pytest.raises(InputError, match="no series has 'quarter' in its SeriesDescription"):
        prepare([root], tmp_path / "store", low_dose_description="quarter")
    with pytest.raises(InputError, match="low_dose_description: every series has 'dose' in its SeriesDescription"):
        prepare([root], tmp_path / "store", low_dose_description="dose")
    with pytest.raises(InputError, match="low_dose_description is empty"):
        prepare([root], tmp_path / "store", low_dose_description=" ")
    with pytest.raises(
        InputError, match=r"low_dose_description \(low\) and simulate_dose \(0.5\): give one of the two"
    ):
        prepare([root], tmp_path / "store", low_dose_description="low", simulate_dose=0.5)
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
