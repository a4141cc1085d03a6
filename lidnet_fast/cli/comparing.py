"""Commands that compare ways of training: compare, demo."""

from collections.abc import Sequence
from pathlib import Path

from lidnet_fast.cli.options import parse, prepare_process, run_config, run_parser
from lidnet_fast.errors import InputError


def compare(arguments: Sequence[str]) -> None:
    """`lidnet-fast compare`."""
    words = "Train denoisers with several objectives, and judge them all alike; docs/compare.md. Resumes."
    embedded = None if any(argument.split("=")[0] == "--config" for argument in arguments) else "demo.yaml"
    parser = run_parser("compare", words, embedded)
    from lidnet_fast.comparison.config import Matrix

    parser.add_class_arguments(Matrix)
    add = parser.add_argument
    add("--study", action="append", default=[], help="embedded study to compare on: chest, liver, head; repeatable")
    add("--cells", default=None, metavar="I/N", help="do the I-th of N shares of the cells only, and no tables")
    add("--collect", action="store_true", help="only make the tables of what is there, and name what is missing")
    add("--assess", action="store_true", help="add columns of task-based image quality; docs/assess.md")
    parser.set_defaults(out="runs/compare")
    options = parse(parser, arguments)
    if options.cells and (options.collect or options.assess):
        raise InputError("--cells excludes --collect and --assess: tables are made of all cells")
    prepare_process()
    from lidnet_fast.comparison.cells import parse_share
    from lidnet_fast.comparison.compare import compare as compare_cells
    from lidnet_fast.comparison.config import Comparison, matrix_of

    share = None if options.cells is None else parse_share(options.cells)
    comparison = Comparison(run_config(options), matrix_of(options, options.study))
    compare_cells(comparison, Path(options.out), share=share, only_collect=options.collect, assess=options.assess)


def demo(arguments: Sequence[str]) -> None:
    """`lidnet-fast demo`."""
    parser = run_parser("demo", "Train LIDnet and its controls on phantoms, and write a report.", "demo.yaml")
    words = "mse and lidnet only, half the samples, no independent judge"
    parser.add_argument("--quick", action="store_true", help=words)
    parser.add_argument("--seeds", type=int, default=1, help="average over this many seeds")
    # A folder of its own: the full demo would refuse to go on with a run of another configuration.
    parser.set_defaults(out="runs/demo_quick" if "--quick" in arguments else "runs/demo")
    options = parse(parser, arguments)
    prepare_process()
    from lidnet_fast.comparison.compare import compare as compare_cells
    from lidnet_fast.comparison.config import demo_of

    comparison = demo_of(run_config(options), options.seeds, quick=options.quick)
    compare_cells(comparison, Path(options.out))
