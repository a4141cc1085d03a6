"""What a denoiser was trained on, and where a series lies outside it: a network is only known to work on the like."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np
from scipy import ndimage

from lidnet_fast._constants import TISSUES
from lidnet_fast.errors import InputError

_FEWEST_PIXELS = 400
_LAPLACIAN = np.outer([1.0, -2.0, 1.0], [1.0, -2.0, 1.0])
_SPACING_FACTOR, _NOISE_FACTOR, _HU_MARGIN = 1.25, 1.5, 200.0
"""How far a series may lie beyond what was trained on before it counts as outside."""

Range = tuple[float, float]
_RANGES = ("hu", "pixel_spacing", "slice_thickness", "slice_distance")


def noise_level(hu: np.ndarray) -> dict[str, float]:
    """Standard deviation of the noise in each tissue, robust against edges and vessels.

    The image is filtered by the difference of two Laplacians, which no linear structure passes (Immerkaer 1996,
    "Fast noise variance estimation"), and the median absolute value gives the deviation. Smooth reconstruction kernels
    therefore come out lower than the standard deviation in a region: compare only figures made by this function.

    Args:
        hu: one slice [H, W], HU.

    Returns:
        Name of a tissue in `TISSUES` -> HU; without those that cover fewer than 400 pixels.
    """
    hu = hu.astype(np.float32)
    smooth = ndimage.uniform_filter(hu, 5)
    filtered = np.abs(ndimage.convolve(hu, _LAPLACIAN.astype(np.float32)))
    levels = {}
    for tissue, (low, high) in TISSUES.items():
        inside = ndimage.minimum_filter((smooth > low) & (smooth < high), 5)
        if np.count_nonzero(inside) >= _FEWEST_PIXELS:
            # The median of |x| of a normal distribution is 0.6745 deviations; the filter's weights have norm 6.
            levels[tissue] = float(np.median(filtered[inside]) / 0.6745 / 6)
    return levels


@dataclass(frozen=True)
class Acquisition:
    """What is known of one series.

    Attributes:
        hu: 0.1st and 99.9th percentile, HU.
        pixel_spacing: mm, the larger of rows and columns.
        slice_thickness: mm.
        slice_distance: mm, the median between neighbouring slices.
        kernel: name of the reconstruction kernel (DICOM ConvolutionKernel).
        body_part: DICOM BodyPartExamined.
        noise: tissue -> HU, the median over slices of `noise_level`.

    What isn't known is None or empty.
    """

    hu: Range | None = None
    pixel_spacing: float | None = None
    slice_thickness: float | None = None
    slice_distance: float | None = None
    kernel: str = ""
    body_part: str = ""
    noise: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def measured(cls, slices: Sequence[np.ndarray], **known: Any) -> Self:
        """Measure HU and noise on slices [H, W] in HU; `known` are the other attributes."""
        levels = [noise_level(hu) for hu in slices]
        noise = {
            tissue: float(np.median([found[tissue] for found in levels if tissue in found]))
            for tissue in TISSUES
            if any(tissue in found for found in levels)
        }
        ends = [np.percentile(hu, (0.1, 99.9)) for hu in slices]
        hu = (float(min(low for low, _ in ends)), float(max(high for _, high in ends))) if ends else None
        return cls(hu=hu, noise=noise, **known)


@dataclass(frozen=True)
class Envelope:
    """The range of what a denoiser was trained on; attributes as of `Acquisition`, None or empty where unknown.

    Attributes:
        slice_distance: of networks that see neighbouring slices; None of others, to which it means nothing.
        inserted_lesions: whether the lesions that it was trained for were inserted, none of them a patient's own.
    """

    hu: Range | None = None
    pixel_spacing: Range | None = None
    slice_thickness: Range | None = None
    slice_distance: Range | None = None
    kernels: tuple[str, ...] = ()
    body_parts: tuple[str, ...] = ()
    noise: Mapping[str, Range] = field(default_factory=dict)
    inserted_lesions: bool = False

    @classmethod
    def around(cls, trained: Sequence[Acquisition]) -> Self:
        """The smallest envelope that holds all of these series."""

        def spread(values: Sequence[float | None]) -> Range | None:
            known = [value for value in values if value is not None]
            return (min(known), max(known)) if known else None

        noise = {tissue: spread([one.noise.get(tissue) for one in trained]) for tissue in TISSUES}
        hu = [one.hu for one in trained if one.hu is not None]
        return cls(
            hu=(min(low for low, _ in hu), max(high for _, high in hu)) if hu else None,
            pixel_spacing=spread([one.pixel_spacing for one in trained]),
            slice_thickness=spread([one.slice_thickness for one in trained]),
            slice_distance=spread([one.slice_distance for one in trained]),
            kernels=tuple(sorted({one.kernel for one in trained} - {""})),
            body_parts=tuple(sorted({one.body_part for one in trained} - {""})),
            noise={tissue: ends for tissue, ends in noise.items() if ends is not None},
        )

    def outside(self, series: Acquisition) -> list[str]:
        """Where a series lies outside, one phrase each; what is unknown on either side says nothing.

        Lengths may differ by a quarter, noise by half, and HU by 200 before they count.
        """
        found = []
        for name, trained, value in (
            ("pixel spacing", self.pixel_spacing, series.pixel_spacing),
            ("slice thickness", self.slice_thickness, series.slice_thickness),
            ("slice distance", self.slice_distance, series.slice_distance),
        ):
            if trained and value and not trained[0] / _SPACING_FACTOR <= value <= trained[1] * _SPACING_FACTOR:
                found.append(f"{name} {value:.3g} mm (trained on {_text(trained)} mm)")
        for tissue, ends in self.noise.items():
            level = series.noise.get(tissue)
            if level is not None and not ends[0] / _NOISE_FACTOR <= level <= ends[1] * _NOISE_FACTOR:
                found.append(f"noise in {tissue} {level:.3g} HU (trained on {_text(ends)} HU)")
        if self.noise and series.noise and not self.noise.keys() & series.noise.keys():
            found.append(f"{' and '.join(series.noise)} (trained on {' and '.join(self.noise)})")
        if (
            self.hu
            and series.hu
            and not (self.hu[0] - _HU_MARGIN <= series.hu[0] and series.hu[1] <= self.hu[1] + _HU_MARGIN)
        ):
            found.append(f"values of {_text(series.hu)} HU (trained on {_text(self.hu)} HU)")
        for name, names, one in (
            ("kernel", self.kernels, series.kernel),
            ("body part", self.body_parts, series.body_part),
        ):
            if names and one and one not in names:
                found.append(f"{name} {one} (trained on {', '.join(names)})")
        return found

    def described(self) -> dict[str, str]:
        """What is known, for people: name with unit -> range or names."""
        ranges = {
            "HU": self.hu,
            "pixel spacing, mm": self.pixel_spacing,
            "slice thickness, mm": self.slice_thickness,
            "slice distance, mm": self.slice_distance,
            **{f"noise in {tissue}, HU": ends for tissue, ends in self.noise.items()},
        }
        names = {"kernels": self.kernels, "body parts": self.body_parts}
        texts = {name: _text(ends) for name, ends in ranges.items() if ends is not None}
        return texts | {name: ", ".join(values) for name, values in names.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as a model file keeps them; without a slice distance, older versions read it, too."""
        values = asdict(self)
        if self.slice_distance is None:
            del values["slice_distance"]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """What `to_dict` made.

        Raises:
            InputError: it is something else; the message names the entry.
        """
        if not isinstance(values, Mapping) or set(values) - {entry.name for entry in fields(cls)}:
            raise InputError("its envelope has unknown entries")

        def ends(name: str, value: Any) -> Range | None:
            if value is None:
                return None
            if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is float for end in value)):
                raise InputError(f"its envelope.{name} can't be {value!r}"[:300])
            return (value[0], value[1])

        def names(name: str) -> tuple[str, ...]:
            value = values.get(name, ())
            if not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
                raise InputError(f"its envelope.{name} can't be {value!r}"[:300])
            return tuple(value)

        noise = values.get("noise", {})
        if not isinstance(noise, Mapping) or set(noise) - set(TISSUES):
            raise InputError(f"its envelope.noise can't be {noise!r}"[:300])
        inserted = values.get("inserted_lesions", False)
        if not isinstance(inserted, bool):
            raise InputError(f"its envelope.inserted_lesions can't be {inserted!r}"[:300])
        checked = {tissue: ends(f"noise.{tissue}", value) for tissue, value in noise.items()}
        return cls(
            **{name: ends(name, values.get(name)) for name in _RANGES},
            kernels=names("kernels"),
            body_parts=names("body_parts"),
            noise={tissue: value for tissue, value in checked.items() if value is not None},
            inserted_lesions=inserted,
        )


def _text(ends: Range) -> str:
    low, high = (f"{end:.3g}" if abs(end) < 1000 else f"{end:.0f}" for end in ends)
    return low if low == high else f"{low}..{high}"
