"""Commands that judge denoisers: evaluate, assess."""

from collections.abc import Sequence
from pathlib import Path

from lidnet_fast.cli.options import add_device, add_noise, command_parser, parse, prepare_process
from lidnet_fast.errors import InputError
from lidnet_fast.strangers_text import printable


def evaluate(arguments: Sequence[str]) -> None:
    """`lidnet-fast evaluate`."""
    parser = command_parser("evaluate", "Score on held-out patients, with a report; docs/evaluate.md.")
    add = parser.add_argument
    add("run", type=str, nargs="?", default=None, help="folder of a finished run; without it, --images are compared")
    add("--denoiser", type=str, default=None, help="another denoiser.pt than the run's own")
    add("--samples", type=int, default=None, help="held-out samples; by default the run's, or 1000")
    add("--images", type=str, action="append", default=[], metavar="NAME=FOLDER", help="denoised images; repeatable")
    add("--store", type=str, default=None, help="another store than the run's, such as `lidnet-fast export` makes")
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add(
        "--out",
        type=str,
        default=None,
        help="where results go; by default the run's folder or one in it, or runs/comparison",
    )
    add("--scans", action="store_true", help="of a run: add the FROC of whole scans by LUNA16's rules")
    add("--candidates", type=str, default=None, metavar="CSV", help="score this table of candidates in scans instead")
    add("--annotations", type=str, default=None, metavar="CSV", help="of --candidates: lesions, instead of a store's")
    add("--excluded", type=str, default=None, metavar="CSV", help="of --annotations: findings that don't count")
    add("--series-uids", type=str, default=None, metavar="FILE", help="of --annotations: all scans, one UID a line")
    add("--assess", action="store_true", help="of a run: add columns of task-based image quality; docs/assess.md")
    add_device(parser, precision="float32")
    add("--trust-code", action="store_true", help="import a denoiser's class that the run or its files name")
    options = parse(parser, arguments)
    prepare_process()
    from lidnet_fast.evaluation.evaluate import compare_images, evaluate_run, named_folders

    if options.candidates is not None:
        _evaluate_candidates(options)
        return
    for name in ("annotations", "excluded", "series_uids"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --candidates")
    run, denoiser, out = (None if path is None else Path(path) for path in (options.run, options.denoiser, options.out))
    store = options.store
    images = named_folders(options.images)
    if run is not None:
        names = ("device", "precision", "trust_code", "max_volume_gib", "assess", "scans")
        chosen = {name: getattr(options, name) for name in names}
        evaluate_run(run, denoiser, options.samples, images=images, store=store, out=out, **chosen)
    elif store is None or not images or denoiser is not None:
        raise InputError("evaluate needs the folder of a run, or --store and --images")
    else:
        chosen = {name: getattr(options, name) for name in ("device", "max_volume_gib")}
        compare_images(store, images, out or Path("runs/comparison"), options.samples, **chosen)


def _evaluate_candidates(options) -> None:  # type: ignore[no-untyped-def]
    """`lidnet-fast evaluate --candidates`."""
    from lidnet_fast.evaluation.evaluate import place_of_results, truth_of_run
    from lidnet_fast.evaluation.scans import Truth, evaluate_candidates

    for name in ("denoiser", "samples", "images", "scans", "assess"):
        if getattr(options, name):
            raise InputError(f"--{name} doesn't go with --candidates, which scores a table alone")
    run, store, annotations, series_uids = options.run, options.store, options.annotations, options.series_uids
    if annotations is not None or options.excluded is not None or series_uids is not None:
        if annotations is None or series_uids is None or run is not None or store is not None:
            raise InputError("--annotations and --series-uids go together, without a run or a store")
        excluded = None if options.excluded is None else Path(options.excluded)
        truth = Truth.of_tables(Path(annotations), Path(series_uids), excluded)
    elif run is None and store is None:
        raise InputError("--candidates needs the folder of a run, --store, or --annotations and --series-uids")
    else:
        truth = Truth.of_store(store) if run is None else truth_of_run(Path(run), store)
    candidates, out = Path(options.candidates), options.out
    if out is None:
        out = "runs/comparison" if run is None else place_of_results(Path(run), store=store, candidates=candidates)
    evaluate_candidates(candidates, truth, Path(out))


def assess(arguments: Sequence[str]) -> None:
    """`lidnet-fast assess`."""
    parser = command_parser("assess", "Measure denoisers' task-based image quality; see docs/assess.md.")
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="[NAME=]MODEL", help="run, .pt, .onnx or code; repeatable")
    add("--images", action="append", default=[], metavar="NAME=FOLDER", help="scans of --export, denoised; repeatable")
    add("--export", type=str, default=None, metavar="FOLDER", help="only write the scans, for other tools to denoise")
    add("--store", type=str, default=None, help="CT whose slices get lesions; by default chest phantoms")
    add("--out", type=str, default="runs/assess", help="folder for assess.json and assess.html")
    add(
        "--doses",
        type=float,
        nargs="+",
        default=[0.1, 0.25, 0.5, 1.0],
        help="doses of the scans, as fractions of the full dose",
    )
    add("--realisations", type=int, default=200, help="noise realisations of each uniform object")
    add(
        "--diameters", type=float, nargs="+", default=[3.0, 5.0, 8.0, 12.0], help="diameters of signals and lesions, mm"
    )
    add("--contrasts", type=float, nargs="+", default=[5.0, 10.0, 20.0, 40.0], help="contrasts of signals, HU")
    add(
        "--edges",
        type=float,
        nargs="+",
        default=[60.0, 150.0, 400.0, -800.0],
        help="contrasts of discs whose edges show the resolution, HU",
    )
    add(
        "--internal-noise",
        type=float,
        default=0.0,
        help="internal noise of observers: variance over that of each channel",
    )
    add("--cases", type=int, default=16, help="backgrounds with lesions; 0 leaves them out")
    add("--lesions-per-case", type=int, default=4, help="lesions inserted into each case")
    add(
        "--lesion-contrasts",
        type=float,
        nargs="+",
        default=None,
        metavar="HU",
        help="contrasts of these lesions, in soft tissue; by default 50 to 850 HU in lung, 8 to 100 in soft tissue",
    )
    add("--case-realisations", type=int, default=4, help="noise realisations of each case")
    add(
        "--false-alarm-rate", type=float, default=0.05, help="share of images where noise alone looks like an invention"
    )
    add_noise(parser, "incident photons per ray at the full dose", otherwise="the store's, or ")
    add("--pixel-spacing", type=float, default=0.7, help="pixel spacing of the uniform phantom, mm")
    add("--batch-size", type=int, default=8, help="images denoised at a time")
    add("--seed", type=int, default=0, help="seed of phantoms, lesions and noise")
    add_device(parser, precision="auto")
    add("--trust-code", action="store_true", help="import the denoiser's class that a model file names")
    options = vars(parse(parser, arguments))
    prepare_process()
    from lidnet_fast.assessment.assess import assess as assess_models
    from lidnet_fast.assessment.assess import export_scans
    from lidnet_fast.assessment.options import AssessOptions

    models, images, store, out, export_to = (options.pop(key) for key in ("model", "images", "store", "out", "export"))
    where = {name: options.pop(name) for name in ("device", "precision", "trust_code")}
    several = ("doses", "diameters", "contrasts", "edges", "lesion_contrasts")
    options |= {name: tuple(options[name]) for name in several if options[name] is not None}
    chosen = AssessOptions(**options)
    if export_to is not None:
        print(printable(f"{export_to}: {export_scans(Path(export_to), chosen, store)} volumes to denoise"))
        return
    from lidnet_fast.evaluation.evaluate import named_folders

    assess_models(models, Path(out), chosen, images=named_folders(images), store=store, **where)
    print(printable(f"{Path(out) / 'assess.html'}"))
