"""From a trained denoiser to a folder that model hubs, other tools and `lidnet-fast denoise` read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lidnet_fast.comparison.config import DEVELOPMENT_SEEDS
from lidnet_fast.comparison.tables import columns, judges_in, rows_of_cell
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import flatten
from lidnet_fast.evaluation.evaluate import DENOISED
from lidnet_fast.files import as_private_as, whole_path, write_text
from lidnet_fast.models.files import denoiser_file, fingerprint, load_denoiser, read_network
from lidnet_fast.models.onnx import write_onnx
from lidnet_fast.models.published import CONFIG, ONNX, WEIGHTS, is_published, write_published
from lidnet_fast.publication.card import Results, model_card
from lidnet_fast.report.data import Metric
from lidnet_fast.trainer.stored import read_stored
from lidnet_fast.urls import is_url

_SUMMED = (CONFIG, ONNX, WEIGHTS)
"""All but the card, whose licence is to be filled in."""


def publish(model: str | Path, out: str | Path, *, trust_code: bool = False) -> Path:
    """Write `config.json`, `model.safetensors`, `model.onnx`, `README.md` (a model card) and `SHA256SUMS`.

    The card says what the run knows: data and dose, if its store is still there, the metrics of `evaluate`, and the
    envelope. No file holds a path or an id of a patient.

    Args:
        model: the folder of a run, or a `denoiser.pt`.
        out: the new folder; it appears whole or not at all.
        trust_code: import the class that the model file names by import path.

    Returns:
        `out`.

    Raises:
        InputError: `out` exists, the model can't be read, or ONNX can't express it: the message names the operator.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already. To fix: choose a new folder")
    file = denoiser_file(model)
    if is_published(file) or file.suffix == ".onnx":
        raise InputError(f"{model}: is published already. To fix: give the folder of a run, or a denoiser.pt")
    denoiser = load_denoiser(file, trust_code=trust_code)
    content = read_network(file, "denoiser")
    run = file.resolve().parents[1] if file.parent.name == "collaborate" else None
    trained = content.get("trained")
    card = model_card(
        out.resolve().name,
        content["network"],
        denoiser.window,
        denoiser.envelope,
        denoiser.context,
        trained if isinstance(trained, dict) else {},
        None if run is None else _data(run),
        None if run is None else _results(run, file),
    )
    with as_private_as([file]), whole_path(out) as folder:
        folder.mkdir()
        write_published(folder, content)
        write_onnx(folder / ONNX, denoiser)
        write_text(folder / "README.md", card)
        sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in _SUMMED]
        write_text(folder / "SHA256SUMS", "".join(sums))
    return out


def _data(run: Path) -> Store | None:
    """The run's store, where it is still on this machine."""
    path = run / "config.yaml"
    place = read_stored(path).get("data.store") if path.exists() else None
    if not isinstance(place, str) or is_url(place):
        return None
    try:
        return Store(place)
    except InputError:
        return None


def _results(run: Path, file: Path) -> Results | None:
    """What `evaluate` wrote of the run itself; of a judged cell of a comparison, its record."""
    if run.parent.name == "arms" and len(run.parents) > 4:
        rows, samples = rows_of_cell(run)
        if rows:
            return _of_cell(run, rows, samples)
    path = run / "metrics.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.get("own"), content.get("denoiser")) != (True, fingerprint(file)):
            raise ValueError("of another denoiser or store, or of an older version, which didn't say")
        scans = content.get("scans", {})
        rows = {name: _row(values, scans.get(name, {})) for name, values in content["arms"].items()}
        samples = content["samples"]
        return Results({DENOISED: rows.pop(DENOISED), **rows}, DENOISED, samples)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: doesn't say that its results are this model's. To fix: lidnet-fast evaluate {run}"
        ) from error


def _of_cell(cell: Path, rows: dict[str, dict[str, Metric]], samples: int) -> Results:
    """A cell's own record beside those of its seed's other arms; a comparison's tables are of several seeds."""
    seed = cell.parents[2].name.removeprefix("seed")
    chosen = seed.isdigit() and int(seed) >= DEVELOPMENT_SEEDS
    return Results(
        rows,
        cell.name,
        samples,
        columns(judges_in(rows[cell.name])),
        of="validation patients, which ways of training were chosen on" if chosen else "held-out patients",
        interval="95 % intervals over patients, which say nothing of another training",
    )


def _row(values: dict[str, Any], scans: dict[str, Any]) -> dict[str, Any]:
    """One arm's flat metrics, those of whole scans by detector among them; JSON has lists for (mean, low, high)."""
    flat = {**flatten(values), **{f"{detector}_cpm": found["cpm"] for detector, found in scans.items()}}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
