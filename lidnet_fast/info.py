"""`lidnet-fast info`: what runs here, what is missing for more, and what windows of an extractor bring."""

import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import lidnet_fast
from lidnet_fast import backend
from lidnet_fast.errors import InputError
from lidnet_fast.runtime import machine_facts

_BATCH, _MOST_SLICES = 4, 400
_TRAIN_PACKAGES = ("lightning", "torchmetrics", "faster-coco-eval", "torchjd", "pydicom", "blosc2", "pillow")


def describe() -> str:
    """The lines that `lidnet-fast info` prints."""
    facts = machine_facts()
    lines = [f"lidnet_fast {lidnet_fast.__version__}"]
    lines += [f"  {name:<12} {value}" for name, value in facts.items()]
    lines.append(f"  {'torchvision':<12} {_version('torchvision')}")
    lines.append(f"  {'triton':<12} {_version('triton')}")
    lines.append(f"ops: {backend.current()} ({backend.reason()}); available: {', '.join(backend.available())}")
    lines += [f"  {device}: {missing or 'kernels ready'}" for device, missing in backend.missing_kernels().items()]
    missing = [name for name in _TRAIN_PACKAGES if _version(name) == "not installed"]
    if missing:
        lines.append(f"trainer: {', '.join(missing)} not installed. To fix: pip install 'lidnet_fast[train]'")
    else:
        lines.append("trainer: complete")
    return "\n".join(lines)


def describe_extractor(extractor: str, boxes: Path | None, image_size: int) -> str:
    """Receptive fields of layers, and what windows cost around lesions: the lines of `lidnet-fast info --extractor`.

    Args:
        extractor: "vgg19:relu3_4", or several layers with commas between; "vgg19" lists its layers instead.
        boxes: A box file (docs/box_csv.md); None for slices of LIDC-IDRI.
        image_size: Side of the images in pixels.

    Raises:
        InputError: For an unknown network or layer, a layer without a finite receptive field, or a faulty box file.
    """
    from lidnet_fast.extractors import LayerExtractor, receptive_fields
    from lidnet_fast.extractors.networks import network_and_layers, node_names, outline_network
    from lidnet_fast.extractors.receptive_field import LayerGraph
    from lidnet_fast.extractors.windows import WindowPlanner

    if ":" not in extractor:
        return "\n".join(_layers(extractor))
    try:
        name, layers = network_and_layers(extractor)
    except ValueError as error:
        raise InputError(f"--extractor {error}") from error
    try:
        network = outline_network(name)
        nodes = dict(zip(layers, node_names(network, layers), strict=True))
        fields = receptive_fields(network, nodes.values())
        graph = LayerGraph(LayerExtractor(network, nodes.values()))
        planner = WindowPlanner(graph, (image_size, image_size))
    except ValueError as error:
        raise InputError(f"--extractor {extractor}: {error}") from error
    lines = []
    for layer, node in nodes.items():
        field = fields[node]
        lines += [
            f"{name} {layer}" + ("" if node == layer else f" ({node})"),
            f"  {'stride':<16} {_sides(field.stride)} pixels",
            f"  {'receptive field':<16} {_sides(field.size)} pixels",
            f"  {'halo':<16} {_sides(field.before)} pixels before a cell, {_sides(field.after)} behind it",
            f"  {'alignment':<16} {_sides(field.alignment)} pixels",
        ]
    slices, source = _slices_with_lesions(boxes)
    slices = lesions_in_view(slices, image_size)
    plans = [planner.plan(batch, _BATCH) for batch in _batches(slices)]
    cost = float(np.mean([plan.relative_cost for plan in plans]))
    whole = sum(len(plan.whole) for plan in plans)
    side = np.sqrt(np.concatenate([(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in slices]))
    lines += [
        f"windows on {image_size} x {image_size}, around lesions of {source}, median side {np.median(side):.1f} pixels",
        f"  {'expected cost':<16} {cost:.1%} of whole images, a gain of {1 / cost:.0f}x, in batches of {_BATCH} images "
        "with lesions; those without cost nothing",
        f"  {'planned whole':<16} {whole} of {_BATCH * len(plans)} images",
    ]
    return "\n".join(lines)


def _layers(name: str) -> list[str]:
    """A network's layers in their order, each once with all of its names."""
    from lidnet_fast.extractors.networks import outline_network, paper_names
    from lidnet_fast.extractors.tracing import trace

    try:
        network = outline_network(name)
        traced = trace(network)
    except ValueError as error:
        raise InputError(f"--extractor {name}: {error}") from error
    of_paper = {layer: traced.nodes[node] for layer, node in paper_names(network).items()}
    names: dict[object, list[str]] = {node: [] for node in traced.graph.nodes}
    for layer, node in (of_paper | traced.nodes).items():
        if node.op != "placeholder":  # the input is no layer
            names[node].append(layer)
    layers = [(first, f" ({', '.join(others)})" if others else "") for first, *others in filter(None, names.values())]
    title = f"{name}: {len(layers)} layers, other names in parentheses; --extractor {name}:{layers[0][0]} describes one"
    return [title, *(f"  {first}{others}" for first, others in layers)]


def _slices_with_lesions(path: Path | None) -> tuple[list[np.ndarray], str]:
    """Boxes [n, 4] of each slice that has some, a sample of at most `_MOST_SLICES`, and where they are from."""
    if path is None:
        from lidnet_fast.data.phantoms.lidc import boxes_of_slices

        slices, source = boxes_of_slices(), "LIDC-IDRI"
    else:
        from lidnet_fast.data.annotations.boxes import COLUMNS, SLICE_COLUMNS
        from lidnet_fast.data.annotations.csv import number, read_rows

        column, rows = read_rows(path, COLUMNS, SLICE_COLUMNS)
        if not rows:
            raise InputError(f"{path}: there are no boxes in it")
        places = [f"{row['series_uid']} {row[str(column)]}" for _, row in rows]
        _, slice_of_box = np.unique(places, return_inverse=True)
        corners = np.array([[number(row, name, f"{path}, line {line}") for name in COLUMNS[1:]] for line, row in rows])
        slices, source = [corners[slice_of_box == place] for place in range(slice_of_box.max() + 1)], str(path)
    drawn = np.random.default_rng(0).permutation(len(slices))[:_MOST_SLICES]
    return [slices[number] for number in drawn], f"{len(drawn)} slices of {source}"


def lesions_in_view(slices: Sequence[np.ndarray], side: int) -> list[np.ndarray]:
    """Boxes [n, 4] of each slice in an image of `side` pixels a side: around a lesion, where the slice is larger."""
    from lidnet_fast.data.samples.fields_of_view import boxes_in_view, draw_origin

    rng = np.random.default_rng(0)
    whole = max(side, math.ceil(max(boxes.max() for boxes in slices)))
    origins = [draw_origin(rng, rng.choice(boxes), (whole, whole), (side, side)) for boxes in slices]
    return [boxes_in_view(boxes, (*origin, side, side)) for boxes, origin in zip(slices, origins, strict=True)]


def _batches(slices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rois [K, 5] of full batches; the slices are repeated where there are too few."""
    count = max(len(slices) // _BATCH, 1) * _BATCH
    filled = [slices[number % len(slices)] for number in range(count)]
    rois = [np.insert(boxes, 0, number % _BATCH, axis=1) for number, boxes in enumerate(filled)]
    return [np.concatenate(rois[first : first + _BATCH]) for first in range(0, count, _BATCH)]


def _sides(values: Sequence[object]) -> str:
    return " x ".join(map(str, values))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
