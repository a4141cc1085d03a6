"""The picture of docs/studies.md: one field of view of each embedded study at both doses: python -m tools.studies."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lidnet_fast.data.phantoms.study import STUDIES, Study, make_study
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.data.store.reader import Store

SEED = 103
SIDE = 256
"""Pixels of a field of view."""
SHOWN = 320
"""Pixels of its picture."""


def fields_of_view(study: Study, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low dose and normal dose [S, S] in HU around the slice's lesions, and their boxes [n, 4]."""
    make_study(folder, replace(study, patients=(("train", 1),)), SEED, workers=1)
    store = Store(folder)
    z = max(range(store.series[0].shape[0]), key=lambda z: len(store.boxes(0, z)))
    boxes = store.boxes(0, z)
    normal = torch.from_numpy(store.read(0, z)).float()[None]
    simulation = DoseSimulation.from_dict(store.simulation or {})
    low = simulate_low_dose(normal, store.series[0].spacing[1], simulation, [sample_generator(SEED, 0, z)])
    middle = (boxes[:, :2].min(0) + boxes[:, 2:].max(0)) / 2
    x, y = np.clip(middle - SIDE / 2, 0, np.array(normal.shape[:0:-1]) - SIDE).astype(int)
    window = (0, slice(y, y + SIDE), slice(x, x + SIDE))
    return low[window].numpy(), normal[window].numpy(), boxes - np.tile([x, y], 2)


def grey(hu: np.ndarray, study: Study) -> Image.Image:
    """A picture in the study's window."""
    share = study.window.clamp(study.window.scale(torch.from_numpy(hu)))
    return Image.fromarray((share * 255).byte().numpy()).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)


def main() -> None:
    """Write docs/studies.png: low dose above normal dose with the lesions' boxes."""
    page = Image.new("RGB", (SHOWN * len(STUDIES), 2 * SHOWN))
    for column, (name, study) in enumerate(STUDIES.items()):
        with tempfile.TemporaryDirectory() as folder:
            low, normal, boxes = fields_of_view(study, Path(folder) / name)
        page.paste(grey(low, study), (SHOWN * column, 0))
        below = grey(normal, study).convert("RGB")
        for x1, y1, x2, y2 in boxes * (SHOWN / SIDE):
            ImageDraw.Draw(below).rectangle((x1 - 4, y1 - 4, x2 + 3, y2 + 3), outline=(255, 205, 60))
        page.paste(below, (SHOWN * column, SHOWN))
    page.quantize(48).save(Path(__file__).parents[1] / "docs" / "studies.png", optimize=True)


if __name__ == "__main__":
    main()
