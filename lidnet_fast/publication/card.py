"""The model card: what a stranger must know of a denoiser before using it, in the form that model hubs read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

import yaml

from lidnet_fast import __version__
from lidnet_fast.data.store.index import SPLITS
from lidnet_fast.data.store.reader import Store
from lidnet_fast.evaluation.results import COLUMNS, format_metric, present_columns
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.onnx import OPSET, TOLERANCE_HU
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.report.data import Column, Metric
from lidnet_fast.strangers_text import printable
from lidnet_fast.trainer.stored import flattened

_TRAINING = (
    r"data\.crop|seed|precision|(denoiser|detector|collaborate)\.(name|steps|batch_size)|collaborate\.objective\..*"
)
"""Keys of a run's configuration that the card shows."""


@dataclass(frozen=True)
class Results:
    """Metrics of the model and of what it was compared with.

    Attributes:
        rows: arm -> metric -> value.
        arm: which of them the model is.
        samples: how many fields of view were looked at; None where that is unknown.
        columns: the metrics that are shown.
        of: whose images they are.
        interval: what the intervals in brackets are.
    """

    rows: Mapping[str, Mapping[str, Metric]]
    arm: str
    samples: int | None = None
    columns: Sequence[Column] = COLUMNS
    of: str = "held-out patients"
    interval: str = "95 % intervals"


def model_card(
    name: str,
    network: Mapping[str, Any],
    window: HUWindow,
    envelope: Envelope | None,
    context: int,
    trained: Mapping[str, Any],
    data: Store | None,
    results: Results | None,
) -> str:
    """A card as Markdown with YAML front matter.

    Args:
        name: of the model.
        network: its name and options.
        window: the HU window that it works in.
        envelope: what it was trained on; None where that is unknown, as of the others.
        context: neighbouring slices on each side that it sees.
        trained: the run's configuration in plain types; empty where it is unknown.
        data: the run's store.
        results: of its evaluation.
    """
    options = ", ".join(f"{option}={value}" for option, value in network["options"].items())
    return Template((files(__package__) / "card.md").read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(name, results),
        name=printable(name),
        network=printable(f"{network['name']}{f' ({options})' if options else ''}"),
        software=__version__,
        seen=_seen(context),
        slices=2 * context + 1,
        window=f"{window.low:g}..{window.high:g}",
        opset=OPSET,
        tolerance=TOLERANCE_HU,
        data=_data(data),
        envelope=_envelope(envelope),
        training=_training(trained),
        results=_results(results),
    )


def _front_matter(name: str, results: Results | None) -> str:
    about: dict[str, Any] = {
        "library_name": "lidnet_fast",
        "pipeline_tag": "image-to-image",
        "tags": ["medical-imaging", "ct", "low-dose-ct", "denoising", "onnx"],
    }
    if results is not None:
        row = results.rows[results.arm]
        means = {key: value[0] if isinstance(value, tuple) else value for key, value in row.items()}
        metrics = [
            {"type": column.key, "name": f"{column.label} {column.group}", "value": means[column.key]}
            for column in present_columns({results.arm: row}, results.columns)
        ]
        task = {"type": "image-to-image", "name": "Low-dose CT denoising"}
        dataset = {"type": "private", "name": results.of}
        about["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)


def _seen(context: int) -> str:
    if not context:
        return "slice by slice"
    return (
        f"each slice with {context} on either side of it as channels, in the order of their positions along the cross "
        "product of row and column direction; beyond the ends of a series, its end slices are repeated"
    )


def _data(store: Store | None) -> str:
    if store is None:
        return "Not known: the store that it was trained on wasn't at hand when this was written. Fill in."
    index = store.index
    rows = []
    for number, split in enumerate(SPLITS):
        mine = index.split == number
        counts = (
            len(set(index.patient_id[mine])),
            mine.sum(),
            index.shape[mine, 0].sum(),
            mine[index.box_series].sum(),
        )
        rows.append([split, *map(str, counts)])
    dose = "measured."
    if store.simulation is not None:
        fraction, photons = store.simulation["dose_fraction"], store.simulation["photons"]
        dose = f"simulated, {fraction:.3g} of the dose of the images, theirs {photons:.3g} photons per ray."
    lesions = "" if store.inserted_lesions is None else " The lesions were inserted: none of them is a patient's own."
    return f"{_table(['split', 'patients', 'series', 'slices', 'lesion boxes'], rows)}\n\nLow dose: {dose}{lesions}"


def _envelope(envelope: Envelope | None) -> str:
    if envelope is None:
        return "Not known: compare your images with its training data yourself."
    table = _table(["", "range"], envelope.described().items())
    return f"{table}\n\n`lidnet-fast denoise` warns of series that lie outside of this."


def _training(trained: Mapping[str, Any]) -> str:
    if not trained:
        return "Not known. Fill in."
    rows = [(key, str(value)) for key, value in flattened(trained).items() if re.fullmatch(_TRAINING, key)]
    return f"{_table(['key of `config.json`', 'value'], rows)}\n\n`config.json` has the whole configuration."


def _results(results: Results | None) -> str:
    if results is None:
        return "Not measured: `lidnet-fast evaluate RUN` hadn't been run when this was written."
    rows, columns = results.rows, present_columns(results.rows, results.columns)
    values = [
        [
            " ".join(filter(None, (column.label, column.group, column.unit and f"({column.unit})"))),
            *(format_metric(column, row.get(column.key)) for row in rows.values()),
        ]
        for column in columns
    ]
    table = _table(["", *rows], values)
    samples = "" if results.samples is None else f"{results.samples} fields of view of "
    said = f"On {samples}{results.of}; this model is *{printable(results.arm)}*. In brackets: {results.interval}."
    # Each detector's columns explain who it is after what they measure.
    judges = {column.group: column.help.partition(" By ")[2] for column in columns if " By " in column.help}
    listed = "\n".join(f"- {printable(judge)}: {who}" for judge, who in judges.items())
    return "\n\n".join(filter(None, [said, table, listed]))


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[printable(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
