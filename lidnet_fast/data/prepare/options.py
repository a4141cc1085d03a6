"""What a user chooses when a store is prepared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lidnet_fast.data.lesions.insertion import Insertion
from lidnet_fast.data.prepare.report import check_report
from lidnet_fast.data.prepare.splits import check_fractions
from lidnet_fast.data.pseudonyms import Pseudonyms, chosen_pseudonyms
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How sources become a store.

    Attributes:
        boxes: lesion boxes: CSV (docs/box_csv.md), LUNA16's annotations.csv, LIDC-IDRI XML (a file or folder); None
            prepares a study without boxes, or with those that the data set itself brings.
        insert_lesions: where there are no annotations, how many lesions are put into each series, with their boxes
            (`lidnet_fast.data.lesions`); the store, reports and models say that they aren't real.
        readers: of LIDC-IDRI: how many readers must have outlined a nodule on a slice.
        low_dose: folder with low-dose CT of the same scans. A low-dose series belongs to the normal-dose series of the
            same patient with the same size, spacing and slice positions.
        low_dose_description: the low-dose CT lies among the sources: series whose SeriesDescription has this text in
            it, in capitals or not.
        simulate_dose: dose of the simulated low dose over that of the images, in (0, 1]. The store keeps the parameters
            only; training draws new noise for every sample.
        photons: of the simulation: incident photons per ray at the images' dose; None is `DoseSimulation`'s default.
        electronic_noise: of the simulation: variance of the electronic noise, photons squared; None as above.
        splits: CSV file with the columns patient_id, split; None takes the data set's own splits and draws the others.
        val_fraction: expected fraction of patients drawn for validation.
        test_fraction: expected fraction of patients drawn for testing; 1 makes a store for evaluation only.
        seed: of the draw, and of inserted lesions.
        resample: make tilted and unevenly spaced series regular (`lidnet_fast.data.prepare.resample`), not reject them.
        follow_links: follow links in the sources to wherever they lead; by default to inside the sources only.
        reformats: take reformats (coronal and sagittal sections, projections), which are skipped otherwise.
        pseudonymise: file with a secret key; patients and series get pseudonyms, the same for the same key.
        pseudonym_table: CSV file to be written: which pseudonym stands for whom.
        max_volume_gib: up to how many GiB a compressed volume may unpack; None for the usual limits of size and ratio.
        any_values: take volumes whose values don't look like HU: none is below -50.
        strict: refuse at the first series that can't be used, instead of leaving it out.
        report: CSV file for what was rejected and why.
        volume_format: how the store keeps its volumes, "blosc2" or "zarr"; see `StoreWriter`.
        workers: processes that read and write, by default one per core.
        dask: address of a Dask scheduler whose workers do it instead; they must see the same files.

    Raises:
        InputError: a value can't work, or a file isn't there; the message names the option and the value.
    """

    boxes: str | Path | None = None
    insert_lesions: int | None = None
    readers: int = 2
    low_dose: str | Path | None = None
    low_dose_description: str | None = None
    simulate_dose: float | None = None
    photons: float | None = None
    electronic_noise: float | None = None
    splits: str | Path | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0
    resample: bool = False
    follow_links: bool = False
    reformats: bool = False
    pseudonymise: str | Path | None = None
    pseudonym_table: str | Path | None = None
    max_volume_gib: float | None = None
    any_values: bool = False
    strict: bool = False
    report: str | Path | None = None
    volume_format: str = "blosc2"
    workers: int | None = None
    dask: str | None = None

    def __post_init__(self) -> None:
        self.simulation()
        self.insertion()
        self.pseudonyms()
        check_fractions(self.val_fraction, self.test_fraction)
        for table, present in ((self.boxes, Path.exists), (self.splits, Path.is_file)):
            if table is not None and not present(Path(table)):
                raise InputError(f"{table}: there is no such file")
        if self.report is not None:
            check_report(Path(self.report))

    def pseudonyms(self) -> Pseudonyms | None:
        """What makes the store's ids; None where they are the sources'."""
        return chosen_pseudonyms(self.pseudonymise, self.pseudonym_table)

    def insertion(self) -> Insertion | None:
        """Which lesions are inserted; None where there are none."""
        if self.insert_lesions is None:
            return None
        if self.boxes is not None:
            raise InputError(f"insert_lesions ({self.insert_lesions}) and boxes ({self.boxes}): give one of the two")
        return Insertion(self.insert_lesions, self.seed)

    def simulation(self) -> dict[str, Any] | None:
        """The parameters of the simulated low dose, as the store keeps them; None where it is measured or absent."""
        sources = ("low_dose", "low_dose_description", "simulate_dose")
        low_dose = [f"{name} ({getattr(self, name)})" for name in sources if getattr(self, name) is not None]
        if len(low_dose) > 1:
            raise InputError(f"{' and '.join(low_dose[:2])}: give one of the two")
        if self.low_dose_description is not None and not self.low_dose_description.strip():
            raise InputError("low_dose_description is empty")
        chosen = {"photons": self.photons, "electronic_noise": self.electronic_noise}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        if self.simulate_dose is None:
            if given:
                raise InputError(f"{next(iter(given))} needs simulate_dose. To fix: give both or neither")
            return None
        try:
            return DoseSimulation(dose_fraction=self.simulate_dose, **given).to_dict()
        except ValueError as error:
            raise InputError(f"simulate_dose: {error}") from error
