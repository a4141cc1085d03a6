"""What is assessed: trained denoisers, functions of a user's own, and the low-dose image as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lidnet_fast.assessment.scanner import Scan
from lidnet_fast.device import Device, Precision, autocast, choose_device, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.models.files import load_denoiser
from lidnet_fast.models.registry import construct, first_line, import_attribute, is_import_path

LOW_DOSE = "low dose"
"""Name of the arm that restores nothing."""


@dataclass(frozen=True)
class Arm:
    """One way of restoring low-dose images.

    Attributes:
        name: of the arm.
        restore: HU -> HU, float32 [N, 1, H, W].
        source: where it is from, for the record.
    """

    name: str
    restore: Callable[[Tensor], Any]
    source: str = ""

    @torch.no_grad()
    def __call__(self, images: Tensor, scan: Scan) -> Tensor:
        """Restore images [N, H, W], HU, of a scan.

        Raises:
            InputError: the arm fails, or what it returns has another shape or isn't finite.
        """
        shape = [len(images), 1, *images.shape[1:]]
        try:
            restored = torch.as_tensor(self.restore(images[:, None])).detach().float().cpu()
        except InputError:
            raise
        except Exception as error:  # whatever a user's own function raises
            raise InputError(f"model {self.name!r} failed on {shape}: {first_line(error)}") from error
        if list(restored.shape) != shape:
            raise InputError(f"model {self.name!r} must keep the images' shape {shape}, got {list(restored.shape)}")
        if not torch.isfinite(restored).all():
            raise InputError(f"model {self.name!r}: its images have values that aren't finite")
        return restored[:, 0]


def low_dose_arm() -> Arm:
    """The low-dose image as it is."""
    return Arm(LOW_DOSE, lambda images: images)


def model_arms(
    models: Sequence[str], *, device: Device = "auto", precision: Precision = "auto", trust_code: bool = False
) -> list[Arm]:
    """Arms from options [NAME=]MODEL.

    Args:
        models: what `load_denoiser` takes (folders of runs, `denoiser.pt`, `model.onnx`), or import paths
            "package.module:name" of a function, or of an `nn.Module` class that takes no arguments: HU in, HU out,
            float32 [N, 1, H, W].
        device: where networks run.
        precision: their arithmetic.
        trust_code: import the classes that model files name.

    Raises:
        InputError: a model can't be loaded, sees neighbouring slices, which scans of single slices don't have, or a
            name is taken.
    """
    on = choose_device(device)
    chosen = choose_precision(precision, on)
    arms: list[Arm] = []
    for option in models:
        name, _, place = option.rpartition("=")
        path = Path(place)
        if path.exists() or path.suffix in (".pt", ".onnx") or not is_import_path(place):
            network: Callable[[Tensor], Any] = load_denoiser(path, context=0, trust_code=trust_code).to(on)
            name = name or (path.name if path.is_dir() else path.stem)
        else:
            network = _imported(place, on)
            name = name or place.replace(":", ".").rpartition(".")[2]
        if name in {LOW_DOSE, *(arm.name for arm in arms)}:
            raise InputError(f"--model {option}: the name {name!r} is taken. To fix: give --model NAME={place}")

        def restore(images: Tensor, network: Callable[[Tensor], Any] = network) -> Any:
            with autocast(on, chosen):
                return network(images.to(on))

        arms.append(Arm(name, restore, place))
    return arms


def _imported(path: str, device: torch.device) -> Callable[[Tensor], Any]:
    """A function, or an instance of a class, that a user names by import path."""
    found = import_attribute("model", path)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return construct("model", path, found, {}).eval().to(device)
    if isinstance(found, type) or not callable(found):
        raise InputError(f"model {path!r}: must be a function or a torch.nn.Module class")
    return found
