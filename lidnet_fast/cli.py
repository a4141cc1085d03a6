"""The command line: `lidnet-fast COMMAND`, one function per command."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lidnet_fast.errors import InputError
from lidnet_fast.strangers_text import printable

USAGE = """usage: lidnet-fast COMMAND [OPTIONS]

commands:
  demo       train LIDnet and its controls on phantoms, and write a report
  prepare    turn CT (DICOM, .mhd, .nrrd, .nii, ...) and lesion boxes into a store to train on
  train      train detector, denoiser and both together on a store
  bench      measure how fast a configuration trains here, and what limits it
  evaluate   score a finished run, or images that any tool denoised, on the held-out patients
  assess     noise, resolution, detectability, and lesions that vanish or appear, of any denoisers
  export     write a store's held-out low-dose images for other tools to denoise
  denoise    denoise CT studies with a trained model: DICOM in, DICOM out
  info       what is installed and which implementations are used

lidnet-fast COMMAND --help says more.
"""

# System errors that a user can fix.
_OF_THE_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can fix ends as one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Processes that a command starts would look for every module in the working directory first.
    os.environ["PYTHONSAFEPATH"] = "1"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        import lidnet_fast

        print(lidnet_fast.__version__)
        return
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise InputError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
        if command != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"{command} runs in one process; only train runs under torchrun")
        COMMANDS[command](rest)
    except InputError as error:
        print(f"lidnet-fast: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"lidnet-fast: {printable(place)}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lidnet-fast: interrupted; the same command resumes from what is finished", file=sys.stderr)
        sys.exit(130)


def _parse(parser, arguments):  # type: ignore[no-untyped-def]
    """Parse with jsonargparse, whose errors become one line."""
    from jsonargparse import ArgumentError

    from lidnet_fast.trainer.stored import renaming

    try:
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError, OverflowError) as error:
        raise InputError(f"{_faulty_file(parser, arguments)}{error}{renaming(str(error))}") from error


def _faulty_file(parser, arguments):  # type: ignore[no-untyped-def]
    """The name of the file given with --config, if that is what can't be parsed; jsonargparse doesn't say."""
    from jsonargparse import ArgumentError

    for option, value in pairwise(arguments):
        if option == "--config" and Path(value).is_file():
            try:
                parser.parse_path(value)
            except (ArgumentError, ValueError, OverflowError):
                return f"{value}: "
    return ""


def _parser(command: str, description: str, **options):  # type: ignore[no-untyped-def]
    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'lidnet_fast[train]'") from error

    class HelpFormatter(DefaultHelpFormatter):
        """Shows defaults that are values: neither those of flags, nor what stands for "not given"."""

        def _get_help_string(self, action: argparse.Action) -> str:
            default = action.default
            not_given = default is None and "null" not in (self._get_type_str(action) or "")
            if not_given or default in ("", []) or action.nargs == 0:
                action.default = argparse.SUPPRESS
            try:
                return super()._get_help_string(action)
            finally:
                action.default = default

    options |= {"formatter_class": HelpFormatter, "exit_on_error": False, "allow_abbrev": False}
    return ArgumentParser(prog=f"lidnet-fast {command}", description=description, **options)


_SET_BY_MOST_RUNS = {
    *("out", "seed", "balance", "precision", "device", "devices", "data.store", "data.crop", "data.workers"),
    *("denoiser.name", "denoiser.options", "denoiser.steps", "denoiser.batch_size", "denoiser.learning_rate"),
    *("detector.name", "detector.steps", "detector.batch_size", "collaborate.steps", "collaborate.batch_size"),
    *("collaborate.objective.pixel", "collaborate.objective.roi_perceptual", "collaborate.objective.detection"),
    *("collaborate.objective.roi_extractor", "collaborate.objective.extractor"),
    *("collaborate.objective.extractor_weights", "evaluation.samples"),
}


def _run_parser(command: str, description: str, defaults: str | None = None):  # type: ignore[no-untyped-def]
    usage = f"lidnet-fast {command} [--config FILE] [OPTIONS]"
    epilog = f"All options: lidnet-fast {command} --help all; as a YAML file: lidnet-fast {command} --print_config"
    parser = _parser(command, description, usage=usage, epilog=epilog, add_help=False)
    from jsonargparse import set_parsing_settings

    from lidnet_fast.trainer.config import RunConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    nowhere = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}  # it is no key of the configuration
    words = "show the options that most runs set, or all, and exit"
    show_help = parser.add_argument(
        *("-h", "--help"), action=_Help, nargs="?", choices=["all"], metavar="all", help=words, **nowhere
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    own = {action.dest for action in parser._actions}
    parser.add_class_arguments(RunConfig)
    show_help.hidden = {action.dest for action in parser._actions} - own - _SET_BY_MOST_RUNS
    if defaults is not None:
        parser.default_config_files = [str(Path(__file__).parent / "trainer" / "configs" / defaults)]
    return parser


class _Help(argparse.Action):
    """`--help all` shows all options; `--help` leaves out those in `hidden`."""

    hidden: set[str]

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None) -> None:
        """Print the help and end."""
        for action in parser._actions:
            if value != "all" and action.dest in self.hidden:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def _add_device(parser, precision):  # type: ignore[no-untyped-def]
    """Where a command's networks run and in which arithmetic, as the configuration of a run has it."""
    from typing import get_args

    from lidnet_fast.device import Device, Precision

    add = parser.add_argument
    add("--device", choices=get_args(Device), default="auto", help="auto: the first GPU if there is one")
    add("--precision", choices=get_args(Precision), default=precision, help="auto: bfloat16 where hardware has it")


def _add_noise(parser, photons, otherwise):  # type: ignore[no-untyped-def]
    """The options of simulated noise; `photons` says what of, `otherwise` what stands before their defaults."""
    from lidnet_fast.data.simulation.dose import DoseSimulation

    helps = {
        "photons": f"{photons}; by default {otherwise}{DoseSimulation.photons:g}",
        "electronic_noise": "variance of the simulated scanner's electronic noise, photons squared; "
        f"by default {otherwise}{DoseSimulation.electronic_noise:g}",
    }
    for name, words in helps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=None, help=words)


def _add_pseudonymise(parser):  # type: ignore[no-untyped-def]
    add = parser.add_argument
    add("--pseudonymise", metavar="KEYFILE", default=None, help="ids of patients and series become keyed hashes")
    add("--pseudonym-table", metavar="FILE", default=None, help="CSV file to be written: which of them stand for whom")


def _prepare_process() -> None:
    """What every long command does first."""
    from lidnet_fast.runtime import keep_freed_memory

    keep_freed_memory()


def demo(arguments: Sequence[str]) -> None:
    """`lidnet-fast demo`."""
    parser = _run_parser("demo", "Train LIDnet and its controls on phantoms, and write a report.", "demo.yaml")
    parser.add_argument(
        "--quick", action="store_true", help="MSE and LIDnet only, half the samples, no independent judge"
    )
    parser.add_argument("--seeds", type=int, default=1, help="average over this many seeds, with intervals")
    # A folder of its own: the full demo would refuse to go on with a run of another configuration.
    parser.set_defaults(out="runs/demo_quick" if "--quick" in arguments else "runs/demo")
    options = _parse(parser, arguments)
    _prepare_process()
    from lidnet_fast.data.phantoms.study import Study
    from lidnet_fast.evaluation.demo import run_demo

    run_demo(_run_config(options), Study(), seeds=options.seeds, quick=options.quick)


def train(arguments: Sequence[str]) -> None:
    """`lidnet-fast train`."""
    parser = _run_parser("train", "Train detector, denoiser and both together; resumes an interrupted run.")
    config = _run_config(_parse(parser, arguments))
    from lidnet_fast.trainer import ranks

    if config.devices > 1 and config.num_nodes == 1 and not ranks.launched():
        ranks.launch(["train", *arguments], config)
        return
    _prepare_process()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems end jobs with it; as with Ctrl-C
    from lidnet_fast.trainer.run import train as train_run

    with ranks.one_speaks():
        run = train_run(config)
        if ranks.is_first():
            print(f"Trained networks: {run.out / 'collaborate'}; next: lidnet-fast evaluate {run.out}")


def bench(arguments: Sequence[str]) -> None:
    """`lidnet-fast bench`."""
    parser = _run_parser("bench", "Measure how fast a configuration trains here, what limits it and what to change.")
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long it may take")
    options = _parse(parser, arguments)
    _prepare_process()
    from lidnet_fast.trainer.bench import bench as run_bench

    run_bench(_run_config(options), options.seconds)


def evaluate(arguments: Sequence[str]) -> None:
    """`lidnet-fast evaluate`."""
    parser = _parser("evaluate", "Score on held-out patients: metrics.json, report.html, a table; docs/evaluate.md.")
    add = parser.add_argument
    add("run", type=str, nargs="?", default=None, help="folder of a finished run; without it, --images are compared")
    add("--denoiser", type=str, default=None, help="another denoiser.pt than the run's own")
    add("--samples", type=int, default=None, help="held-out samples; by default the run's, or 1000")
    add("--images", type=str, action="append", default=[], metavar="NAME=FOLDER", help="denoised images; repeatable")
    add("--store", type=str, default=None, help="another store than the run's, such as `lidnet-fast export` makes")
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add("--out", type=str, default=None, help="where results go; by default the run's folder, or runs/comparison")
    add("--assess", action="store_true", help="of a run: add columns of task-based image quality; docs/assess.md")
    _add_device(parser, precision="float32")
    add("--trust-code", action="store_true", help="import a denoiser's class that the run or its files name")
    options = _parse(parser, arguments)
    _prepare_process()
    from lidnet_fast.evaluation.compare import compare_images, evaluate_run, named_folders

    run, denoiser, out = (None if path is None else Path(path) for path in (options.run, options.denoiser, options.out))
    store = options.store
    images = named_folders(options.images)
    if run is not None:
        names = ("device", "precision", "trust_code", "max_volume_gib", "assess")
        chosen = {name: getattr(options, name) for name in names}
        evaluate_run(run, denoiser, options.samples, images=images, store=store, out=out, **chosen)
    elif store is None or not images or denoiser is not None:
        raise InputError("evaluate needs the folder of a run, or --store and --images")
    else:
        chosen = {name: getattr(options, name) for name in ("device", "max_volume_gib")}
        compare_images(store, images, out or Path("runs/comparison"), options.samples, **chosen)


def assess(arguments: Sequence[str]) -> None:
    """`lidnet-fast assess`."""
    parser = _parser("assess", "Measure denoisers' task-based image quality; see docs/assess.md.")
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="[NAME=]MODEL", help="run, .pt or import path; repeatable")
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
    add("--case-realisations", type=int, default=4, help="noise realisations of each case")
    add(
        "--false-alarm-rate", type=float, default=0.05, help="share of images where noise alone looks like an invention"
    )
    _add_noise(parser, "incident photons per ray at the full dose", otherwise="the store's, or ")
    add("--pixel-spacing", type=float, default=0.7, help="pixel spacing of the uniform phantom, mm")
    add("--batch-size", type=int, default=8, help="images denoised at a time")
    add("--seed", type=int, default=0, help="seed of phantoms, lesions and noise")
    _add_device(parser, precision="auto")
    add("--trust-code", action="store_true", help="import the denoiser's class that a model file names")
    options = vars(_parse(parser, arguments))
    _prepare_process()
    from lidnet_fast.assessment.assess import assess as assess_models
    from lidnet_fast.assessment.assess import export_scans
    from lidnet_fast.assessment.options import AssessOptions

    models, images, store, out, export_to = (options.pop(key) for key in ("model", "images", "store", "out", "export"))
    where = {name: options.pop(name) for name in ("device", "precision", "trust_code")}
    options |= {name: tuple(options[name]) for name in ("doses", "diameters", "contrasts", "edges")}
    chosen = AssessOptions(**options)
    if export_to is not None:
        print(printable(f"{export_to}: {export_scans(Path(export_to), chosen, store)} volumes to denoise"))
        return
    from lidnet_fast.evaluation.compare import named_folders

    assess_models(models, Path(out), chosen, images=named_folders(images), store=store, **where)
    print(printable(f"{Path(out) / 'assess.html'}"))


def export(arguments: Sequence[str]) -> None:
    """`lidnet-fast export`."""
    parser = _parser("export", "Write a split's low-dose images for other tools, and a store that holds them.")
    add = parser.add_argument
    add("store", type=str, help="the store's folder")
    add("out", type=str, help="the new folder: low_dose, normal_dose and store")
    add("--split", choices=["train", "val", "test"], default="test", help="split whose series are exported")
    add("--format", choices=["nifti", "dicom"], default="nifti", help="format of the images")
    add("--seed", type=int, default=0, help="seed of the noise, where the low dose is simulated")
    _add_pseudonymise(parser)
    options = vars(_parse(parser, arguments))
    from lidnet_fast.evaluation.export import export as export_split

    print(printable("\n".join(export_split(options.pop("store"), Path(options.pop("out")), **options))))


def prepare(arguments: Sequence[str]) -> None:
    """`lidnet-fast prepare`."""
    words = "Turn CT and lesion boxes into a store to train on. The same command resumes an interrupted one."
    parser = _parser("prepare", words)
    add = parser.add_argument
    add("sources", nargs="+", help="folders with normal-dose CT, searched with everything below them, or files")
    add("--out", required=True, help="the store's folder: a new one, which appears once it is complete")
    add("--boxes", default=None, help="lesion boxes: CSV (docs/box_csv.md), LUNA16's CSV, or LIDC-IDRI's XML")
    add("--insert-lesions", type=int, default=None, metavar="N", help="without boxes: put N lesions into each series")
    add("--readers", type=int, default=2, help="LIDC-IDRI: how many readers must agree on a nodule")
    add("--low-dose", default=None, help="folder with low-dose CT of the same scans")
    add("--low-dose-description", default=None, help="the low-dose series are those with this in their description")
    add("--simulate-dose", type=float, default=None, help="dose of a simulated low dose, as a fraction, such as 0.25")
    _add_noise(parser, "simulation: incident photons per ray at the images' dose", otherwise="")
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
    _add_pseudonymise(parser)
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add("--any-values", action="store_true", help="take volumes whose values don't look like HU: none below -50")
    add("--strict", action="store_true", help="stop at the first series that can't be used instead of leaving it out")
    add("--report", default=None, help="CSV file to be written: what was rejected and why")
    add("--format", default="blosc2", choices=["blosc2", "zarr"], help="format of the volumes; zarr for object storage")
    add("--workers", type=int, default=None, help="processes; by default one per core")
    add("--dask", default=None, help="address of a Dask scheduler whose workers do the work instead")
    options = vars(_parse(parser, arguments))
    from lidnet_fast.data.prepare.plan import prepare as prepare_store

    sources, out, volume_format = (options.pop(name) for name in ("sources", "out", "format"))
    _end(prepare_store(sources, out, volume_format=volume_format, **options))


def denoise(arguments: Sequence[str]) -> None:
    """`lidnet-fast denoise`."""
    parser = _parser("denoise", "Denoise CT studies with a trained model; resumes an interrupted call.")
    add = parser.add_argument
    add("source", metavar="IN", help="a folder with CT, searched with everything below it, or a file")
    add("out", metavar="OUT", help="a new folder, or one that this command made; for a volume also a file")
    add("--model", required=True, help="the folder of a run, or a denoiser.pt")
    _add_device(parser, precision="auto")
    add("--tile", type=int, default=None, help="side of tiles in pixels; by default whole slices if memory allows")
    add("--batch-size", type=int, default=None, help="most slices at a time; by default 1, on a GPU 8")
    add("--blend", type=float, default=1.0, help="share of the denoised image in the result, from 0 to 1")
    add("--follow-links", action="store_true", help="follow links in IN to outside of it, too")
    add("--reformats", action="store_true", help="take coronal and sagittal sections and projections, too")
    help_outside = "what becomes of series that lie outside of what the model was trained on"
    add("--outside", choices=["warn", "refuse", "accept"], default="warn", help=help_outside)
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add("--any-values", action="store_true", help="take volumes whose values don't look like HU: none below -50")
    add("--trust-code", action="store_true", help="import the denoiser's class that the model file names")
    options = vars(_parse(parser, arguments))
    _prepare_process()
    from lidnet_fast.inference import denoise as denoise_study

    _end(denoise_study(options.pop("source"), options.pop("out"), **options))


def _end(summary):  # type: ignore[no-untyped-def]
    """Say what a command did; name what couldn't be used, and end with exit status 2 where there is any."""
    print(printable("\n".join(summary.lines())))
    rejected = summary.account.rejected
    if rejected:
        print(*(f"lidnet-fast: {printable(fault.reason)}" for fault in rejected), sep="\n", file=sys.stderr)
        raise InputError(f"{summary.out}: {len(rejected)} series or files aren't in it, see above")


def info(arguments: Sequence[str]) -> None:
    """What is installed and which implementations are used; of an extractor, what its ROI windows bring."""
    parser = argparse.ArgumentParser(prog="lidnet-fast info", description=info.__doc__)
    add = parser.add_argument
    add(
        "--extractor",
        metavar="NETWORK[:LAYERS]",
        help="such as vgg19:relu3_4 or resnet18:layer1,layer2; vgg19 alone lists its layers",
    )
    add("--boxes", type=Path, help="CSV of lesion boxes, see docs/box_csv.md; by default LIDC-IDRI's")
    add("--image-size", type=int, default=512, help="side of the images in pixels")
    options = parser.parse_args(arguments)
    from lidnet_fast.info import describe, describe_extractor

    if options.extractor is None:
        print(describe())
    else:
        print(describe_extractor(options.extractor, options.boxes, options.image_size))


def _run_config(options):  # type: ignore[no-untyped-def]
    from lidnet_fast.trainer.config import from_options

    return from_options(options)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "bench": bench,
    "evaluate": evaluate,
    "assess": assess,
    "export": export,
    "denoise": denoise,
    "info": info,
}
