"""The tables of docs/loss_weights.md, measured on phantoms: python -m tools.loss_weights."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import lidnet_fast
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.lidc import boxes_of_slices
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.extractors.networks import load_network, outline_network
from lidnet_fast.info import lesions_in_view
from lidnet_fast.models import HUWindow, build_detector

WINDOW = HUWindow()
PIXEL_TERMS = ("l1", "mse", "charbonnier", "ssim", "ms_ssim", "edge", "tv")
EXTRACTOR_LAYERS = ("relu1_2", "relu2_2", "relu3_4", "relu4_4")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
Images = tuple[Tensor, Tensor, list[Tensor]]


def scan(dose_fraction: float) -> Images:
    """Low dose and normal dose of four phantom slices of 256 x 256, [4, 1, H, W] in HU, and their lesions' boxes."""
    phantom = ChestPhantom(image_size=256, slices=4)
    patient = phantom.make_patient(np.random.default_rng(0))

    def at_dose(hu: Tensor, fraction: float, photons: float, seed: int) -> Tensor:
        generators = [sample_generator(seed, 0, z) for z in range(len(hu))]
        simulation = DoseSimulation(dose_fraction=fraction, photons=photons)
        return simulate_low_dose(hu, phantom.pixel_spacing, simulation, generators)

    normal = at_dose(torch.from_numpy(patient.volume), 1 / 20, 2e6, seed=0)
    low = at_dose(normal, dose_fraction, 1e5, seed=1)
    boxes = [torch.from_numpy(patient.boxes[patient.boxes[:, 0] == z, 1:]) for z in range(len(normal))]
    grown = [of_slice + torch.tensor([-2.0, -2.0, 2.0, 2.0]) for of_slice in boxes]
    return low[:, None], normal[:, None], grown


def pixel_terms(images: Images, hu: bool) -> Iterator[tuple[float, float]]:
    """Each term's value, and the norm of its gradient as a multiple of that of l1."""
    low, normal, _ = images
    if not hu:
        low, normal = WINDOW.scale(low), WINDOW.scale(normal)
    data_range = WINDOW.width if hu else 1.0
    values = lidnet_fast.multi_loss(low, normal, dict.fromkeys(PIXEL_TERMS, 1.0), data_range=data_range).terms
    norms = lidnet_fast.multi_loss_jacobian(low, normal, PIXEL_TERMS, data_range=data_range).flatten(1).norm(dim=1)
    for value, norm in zip(values.values(), norms, strict=True):
        yield value.item(), (norm / norms[0]).item()


def feature_terms(images: Images) -> Iterator[tuple[str, float, float, float]]:
    """Name, value, value divided by the features' variance, and that one's gradient as a multiple of that of l1."""
    low, normal, boxes = images
    low, normal = (WINDOW.clamp(WINDOW.scale(hu)) for hu in (low, normal))
    length = lidnet_fast.multi_loss_jacobian(low, normal, ["l1"]).norm()
    low.requires_grad_()
    torch.manual_seed(0)
    vgg = load_network("vgg19")
    detector = build_detector("faster_rcnn_resnet18_fpn").eval()
    pairs = []
    for layer in EXTRACTOR_LAYERS:
        loss = lidnet_fast.ROIPerceptualLoss(vgg, layer, halo="whole", **IMAGENET)
        (features,) = loss.extractor(normal).values()
        pairs.append((f"VGG19 {layer}", loss(low, normal, boxes), features))
    features, targets = detector.features(low), detector.features(normal)
    for level in list(targets)[:2]:
        scale = 1 / detector.feature_strides[level]
        loss = lidnet_fast.roi_perceptual_loss(features[level], targets[level].detach(), boxes, 7, scale)
        pairs.append((f"detector, level {level}", loss, targets[level].detach()))
    for name, value, features in pairs:
        normalised = value / features.var((0, 2, 3)).mean()
        (gradient,) = torch.autograd.grad(normalised, low, retain_graph=True)
        yield name, value.item(), normalised.item(), (gradient.norm() / length).item()


def window_costs(layer: str, side: int) -> float:
    """Cost of windows as a share of whole images of `side` pixels a side, in batches of four around LIDC's lesions."""
    loss = lidnet_fast.ROIPerceptualLoss(outline_network("vgg19"), layer)
    slices = boxes_of_slices()
    drawn = [slices[number] for number in np.random.default_rng(0).permutation(len(slices))[:200]]
    boxes = [torch.from_numpy(of_slice) for of_slice in lesions_in_view(drawn, side)]
    plans = [loss.plan((side, side), boxes[first : first + 4]) for first in range(0, len(boxes), 4)]
    return float(np.mean([plan.relative_cost for plan in plans]))


def tables() -> str:
    """The page's tables, in its order."""
    quarter, fiftieth = scan(0.25), scan(0.02)
    lines = ["| term | [0, 1], 25 % | [0, 1], 2 % | HU, 25 % | gradient in [0, 1], 25 % | 2 % | gradient in HU, 25 % |"]
    lines.append("| --- |" + " ---: |" * 6)
    measured = (pixel_terms(quarter, False), pixel_terms(fiftieth, False), pixel_terms(quarter, True))
    for term, *cells in zip(PIXEL_TERMS, *measured, strict=True):
        values, norms = zip(*cells, strict=True)
        lines.append(f"| {term} | " + " | ".join(f"{number:.2g}" for number in (*values, *norms)) + " |")
    lines += ["", "| features of | value, 25 % | 2 % | divided, 25 % | 2 % | gradient, 25 % | 2 % |"]
    lines.append("| --- |" + " ---: |" * 6)
    for (name, *first), (_, *second) in zip(feature_terms(quarter), feature_terms(fiftieth), strict=True):
        numbers = (number for pair in zip(first, second, strict=True) for number in pair)
        lines.append(f"| {name} | " + " | ".join(f"{number:.2g}" for number in numbers) + " |")
    sides = (64, 128, 256, 512)
    lines += ["", "| VGG19 | " + " | ".join(f"{side} x {side}" for side in sides) + " |"]
    lines.append("| --- |" + " ---: |" * len(sides))
    for layer in EXTRACTOR_LAYERS:
        lines.append(f"| {layer} | " + " | ".join(f"{window_costs(layer, side):.2g}" for side in sides) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
