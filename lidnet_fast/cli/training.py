"""Commands that train: train, bench."""

from collections.abc import Sequence

from lidnet_fast.cli.options import parse, prepare_process, run_config, run_parser


def train(arguments: Sequence[str]) -> None:
    """`lidnet-fast train`."""
    parser = run_parser("train", "Train detector, denoiser and both together; resumes an interrupted run.")
    config = run_config(parse(parser, arguments))
    from lidnet_fast.trainer import ranks

    if config.devices > 1 and config.num_nodes == 1 and not ranks.launched():
        ranks.launch(["train", *arguments], config)
        return
    prepare_process()
    from lidnet_fast.trainer.run import train as train_run

    with ranks.one_speaks():
        run = train_run(config)
        if ranks.is_first():
            print(f"Trained networks: {run.out / 'collaborate'}; next: lidnet-fast evaluate {run.out}")


def bench(arguments: Sequence[str]) -> None:
    """`lidnet-fast bench`."""
    parser = run_parser("bench", "Measure how fast a configuration trains here, what limits it and what to change.")
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long it may take")
    options = parse(parser, arguments)
    prepare_process()
    from lidnet_fast.trainer.bench import bench as run_bench

    run_bench(run_config(options), options.seconds)
