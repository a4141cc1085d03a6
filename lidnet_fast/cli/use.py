"""Commands that use what was trained, and say what is installed: denoise, detect, publish, info."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lidnet_fast.cli.options import (
    add_device,
    command_parser,
    end,
    parse,
    prepare_process,
)
from lidnet_fast.strangers_text import printable


def denoise(arguments: Sequence[str]) -> None:
    """`lidnet-fast denoise`."""
    parser = command_parser("denoise", "Denoise CT studies with a trained model; resumes an interrupted call.")
    add = parser.add_argument
    _add_studies(parser, "a new folder, or one that this command made; for a volume also a file")
    add("--model", required=True, help="folder of a run or of publish, denoiser.pt, or model.onnx")
    add("--tile", type=int, default=None, help="side of tiles in pixels; by default whole slices if memory allows")
    add("--blend", type=float, default=1.0, help="share of the denoised image in the result, from 0 to 1")
    options = vars(parse(parser, arguments))
    prepare_process()
    from lidnet_fast.inference import denoise as denoise_study

    end(denoise_study(options.pop("source"), options.pop("out"), **options))


def detect(arguments: Sequence[str]) -> None:
    """`lidnet-fast detect`."""
    parser = command_parser("detect", "Find lesions in CT studies with a trained model; resumes an interrupted call.")
    add = parser.add_argument
    _add_studies(parser, "a new folder, or one that this command made")
    add("--model", required=True, help="the folder of a run, or a detector.pt")
    add("--denoise-first", action="store_true", help="look at the images that the run's denoiser makes")
    help_detector = "which of the run's; by default cotrained with --denoise-first, else frozen"
    add("--detector", choices=["frozen", "cotrained"], default=None, help=help_detector)
    add("--min-score", type=float, default=None, help="least score of a box; by default the detector's threshold")
    options = vars(parse(parser, arguments))
    prepare_process()
    from lidnet_fast.inference import detect as detect_lesions

    end(detect_lesions(options.pop("source"), options.pop("out"), **options))


def _add_studies(parser, help_out):  # type: ignore[no-untyped-def]
    """What the commands on folders of studies have in common."""
    add = parser.add_argument
    add("source", metavar="IN", help="a folder with CT, searched with everything below it, or a file")
    add("out", metavar="OUT", help=help_out)
    add_device(parser, precision="auto")
    add("--batch-size", type=int, default=None, help="most slices at a time; by default 1, on a GPU 8")
    add("--follow-links", action="store_true", help="follow links in IN to outside of it, too")
    add("--reformats", action="store_true", help="take coronal and sagittal sections and projections, too")
    help_outside = "what becomes of series that lie outside of what the model was trained on"
    add("--outside", choices=["warn", "refuse", "accept"], default="warn", help=help_outside)
    add("--max-volume-gib", type=float, default=None, help="largest compressed volume, unpacked; docs/datasets.md")
    add("--any-values", action="store_true", help="take volumes whose values don't look like HU: none below -50")
    add("--trust-code", action="store_true", help="import the denoiser's class that the model file names")


def publish(arguments: Sequence[str]) -> None:
    """`lidnet-fast publish`."""
    parser = command_parser("publish", "Write a denoiser as a folder for model hubs: safetensors, ONNX, a model card.")
    add = parser.add_argument
    add("model", metavar="RUN", help="the folder of a run, or a denoiser.pt")
    add("out", metavar="OUT", help="the new folder, which appears once it is complete")
    add("--trust-code", action="store_true", help="import the denoiser's class that the model file names")
    options = vars(parse(parser, arguments))
    from lidnet_fast.publication import publish as publish_model

    out = publish_model(options.pop("model"), options.pop("out"), **options)
    print(printable(f"{out}: published. Next: read {out / 'README.md'} and fill in its licence"))


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
