"""Commands that turn files into stores, and stores into files: prepare, export."""

from collections.abc import Sequence
from pathlib import Path

from lidnet_fast.cli.options import add_noise, add_pseudonymise, command_parser, end, parse
from lidnet_fast.strangers_text import printable


def prepare(arguments: Sequence[str]) -> None:
    """`lidnet-fast prepare`."""
    words = "Turn CT and lesion boxes into a store to train on. The same command resumes an interrupted one."
    parser = command_parser("prepare", words)
    add = parser.add_argument
    add("sources", nargs="+", help="folders with normal-dose CT, searched with everything below them, or files")
    add("--out", required=True, help="the store's folder: a new one, which appears once it is complete")
    add("--boxes", default=None, help="lesion boxes: CSV (docs/box_csv.md), LUNA16's CSV, or LIDC-IDRI's XML")
    add("--insert-lesions", type=int, default=None, metavar="N", help="without boxes: put N lesions into each series")
    add("--readers", type=int, default=2, help="LIDC-IDRI: how many readers must agree on a nodule")
    add("--low-dose", default=None, help="folder with low-dose CT of the same scans")
    add("--low-dose-description", default=None, help="the low-dose series are those with this in their description")
    add("--simulate-dose", type=float, default=None, help="dose of a simulated low dose, as a fraction, such as 0.25")
    add_noise(parser, "simulation: incident photons per ray at the images' dose", otherwise="")
    add("--splits", default=None, help="CSV with the columns patient_id, split; without it, patients are drawn")
    add("--val-fraction", type=float, default=0.1, help="expected fraction of patients drawn for validation")
    add("--test-fraction", type=float, default=0.1, help="expected fraction drawn for testing; 1: for evaluation only")
    add("--seed", type=int, default=0, help="seed of the draw, and of inserted lesions")
    add(
        "--resample",
        action="store_true",
        help="make tilted and unevenly spaced series regular, not reject them",
    )
    add("--follow-links", action="store_true", help="follow links in the sources to outside of them, too")
    add("--reformats", action="store_true", help="take coronal and sagittal sections and projections, too")
    add_pseudonymise(parser)
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add("--any-values", action="store_true", help="take volumes whose values don't look like HU: none below -50")
    add("--strict", action="store_true", help="stop at the first series that can't be used instead of leaving it out")
    add("--report", default=None, help="CSV file to be written: what was rejected and why")
    add("--format", default="blosc2", choices=["blosc2", "zarr"], help="format of the volumes; zarr for object storage")
    add("--workers", type=int, default=None, help="processes; by default one per core")
    add("--dask", default=None, help="address of a Dask scheduler whose workers do the work instead")
    options = vars(parse(parser, arguments))
    from lidnet_fast.data.prepare.plan import prepare as prepare_store

    sources, out, volume_format = (options.pop(name) for name in ("sources", "out", "format"))
    end(prepare_store(sources, out, volume_format=volume_format, **options))


def export(arguments: Sequence[str]) -> None:
    """`lidnet-fast export`."""
    parser = command_parser("export", "Write a split's low-dose images for other tools, and a store that holds them.")
    add = parser.add_argument
    add("store", type=str, help="the store's folder")
    add("out", type=str, help="the new folder: low_dose, normal_dose and store")
    add("--split", choices=["train", "val", "test"], default="test", help="split whose series are exported")
    add("--format", choices=["nifti", "dicom"], default="nifti", help="format of the images")
    add("--seed", type=int, default=0, help="seed of the noise, where the low dose is simulated")
    add_pseudonymise(parser)
    options = vars(parse(parser, arguments))
    from lidnet_fast.evaluation.export import export as export_split

    print(printable("\n".join(export_split(options.pop("store"), Path(options.pop("out")), **options))))
