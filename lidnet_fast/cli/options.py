"""What the commands share: parsers, groups of options, and how a command begins and ends."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

from lidnet_fast.errors import InputError
from lidnet_fast.strangers_text import printable


def parse(parser, arguments):  # type: ignore[no-untyped-def]
    """Parse with jsonargparse, whose errors become one line."""
    from jsonargparse import ArgumentError

    from lidnet_fast.trainer.stored import renaming

    try:
        return parser.parse_args(_with_lists(parser, arguments))
    except (ArgumentError, ValueError, OverflowError) as error:
        raise InputError(f"{_faulty_file(parser, arguments)}{error}{renaming(str(error))}") from error


def _with_lists(parser, arguments):  # type: ignore[no-untyped-def]
    """`--seeds 0 1 2` as `--seeds [0,1,2]`, which is how jsonargparse takes lists."""
    words = list(arguments)
    lists = [action for action in parser._actions if get_origin(getattr(action, "_typehint", None)) is list]
    for option in {name for action in lists for name in action.option_strings} & {*words}:
        start = words.index(option) + 1
        end = next((place for place in range(start, len(words)) if words[place].startswith("-")), len(words))
        if end > start and not words[start].startswith("["):
            words[start:end] = [f"[{','.join(words[start:end])}]"]
    return words


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


def command_parser(command: str, description: str, **options):  # type: ignore[no-untyped-def]
    """A command's parser: jsonargparse's, with the defaults in its help."""
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


SET_BY_MOST_RUNS = {
    *("out", "seed", "balance", "precision", "device", "devices", "data.store", "data.crop", "data.workers"),
    *("denoiser.name", "denoiser.options", "denoiser.steps", "denoiser.batch_size", "denoiser.learning_rate"),
    *("detector.name", "detector.steps", "detector.batch_size", "collaborate.steps", "collaborate.batch_size"),
    *("collaborate.objective.pixel", "collaborate.objective.roi_perceptual", "collaborate.objective.detection"),
    *("collaborate.objective.roi_extractor", "collaborate.objective.extractor"),
    *("collaborate.objective.extractor_weights", "evaluation.samples"),
}


def run_parser(command: str, description: str, defaults: str | None = None):  # type: ignore[no-untyped-def]
    """The parser of a command that takes a run's configuration; `defaults` is a file of `trainer/configs`."""
    usage = f"lidnet-fast {command} [--config FILE] [OPTIONS]"
    epilog = f"All options: lidnet-fast {command} --help all; as a YAML file: lidnet-fast {command} --print_config"
    parser = command_parser(command, description, usage=usage, epilog=epilog, add_help=False)
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
    show_help.hidden = {action.dest for action in parser._actions} - own - SET_BY_MOST_RUNS
    if defaults is not None:
        parser.default_config_files = [str(Path(__file__).parents[1] / "trainer" / "configs" / defaults)]
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


def add_device(parser, precision):  # type: ignore[no-untyped-def]
    """Where a command's networks run and in which arithmetic, as the configuration of a run has it."""
    from lidnet_fast.device import Device, Precision

    add = parser.add_argument
    add("--device", choices=get_args(Device), default="auto", help="auto: the first GPU if there is one")
    add("--precision", choices=get_args(Precision), default=precision, help="auto: bfloat16 where hardware has it")


def add_noise(parser, photons, otherwise):  # type: ignore[no-untyped-def]
    """The options of simulated noise; `photons` says what of, `otherwise` what stands before their defaults."""
    from lidnet_fast.data.simulation.dose import DoseSimulation

    helps = {
        "photons": f"{photons}; by default {otherwise}{DoseSimulation.photons:g}",
        "electronic_noise": "variance of the simulated scanner's electronic noise, photons squared; "
        f"by default {otherwise}{DoseSimulation.electronic_noise:g}",
    }
    for name, words in helps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=None, help=words)


def add_pseudonymise(parser):  # type: ignore[no-untyped-def]
    """The options of pseudonyms; docs/privacy.md."""
    add = parser.add_argument
    add("--pseudonymise", metavar="KEYFILE", default=None, help="ids of patients and series become keyed hashes")
    add("--pseudonym-table", metavar="FILE", default=None, help="CSV file to be written: which of them stand for whom")


def prepare_process() -> None:
    """What every long command does first."""
    from lidnet_fast.runtime import keep_freed_memory

    keep_freed_memory()


def run_config(options):  # type: ignore[no-untyped-def]
    """The configuration among the options that `run_parser` parsed."""
    from lidnet_fast.trainer.config import from_options

    return from_options(options)


def end(summary):  # type: ignore[no-untyped-def]
    """Say what a command did; name what couldn't be used, and end with exit status 2 where there is any."""
    print(printable("\n".join(summary.lines())))
    rejected = summary.account.rejected
    if rejected:
        print(*(f"lidnet-fast: {printable(fault.reason)}" for fault in rejected), sep="\n", file=sys.stderr)
        raise InputError(f"{summary.out}: {len(rejected)} series or files aren't in it, see above")
