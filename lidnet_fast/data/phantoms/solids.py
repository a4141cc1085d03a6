"""Bodies in space that the slices of a patient cut, so that what is on one slice goes on in the next.

Points are (x, y, z) in mm, z towards the patient's feet.
"""

import dataclasses
import math
from typing import Protocol, Self

import numpy as np

from lidnet_fast.data.phantoms.canvas import Canvas, Shape, Wobble, soft

Point = tuple[float, float, float]

_PLANES = (-1 / 3, 0.0, 1 / 3)
"""Where in its thickness a slice is sampled: what ends in a slice is faint there, as partial volume is."""

_NOTHING: Shape = ((slice(0, 0), slice(0, 0)), np.zeros((0, 0), np.float32))


class Solid(Protocol):
    """A body that has a section in every plane."""

    def moved(self, x: float, y: float, turn: float = 0.0) -> Self:
        """Return the body turned around the z axis by ``turn`` (radians, from x towards y), then moved in its plane."""

    def cut(self, canvas: Canvas, z: float, thickness: float, softness: float = 1.2) -> Shape:
        """Return the section of the slice around the plane z, with edges as wide as ``softness``, mm."""


@dataclasses.dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, lobed if it wobbles.

    Attributes:
        centre: mm.
        axes: half axes, mm; the first is turned by ``angle`` from x towards y.
        angle: radians.
        wobble: harmonics of its outline, as :meth:`Canvas.ellipse` has them.
        twist: radians by which they turn from the equator to a pole, so that sections differ in shape.
    """

    centre: Point
    axes: Point
    angle: float = 0.0
    wobble: Wobble = ()
    twist: float = 0.0

    def moved(self, x: float, y: float, turn: float = 0.0) -> Self:
        """Return the body turned around the z axis by ``turn`` (radians, from x towards y), then moved in its plane."""
        return dataclasses.replace(self, centre=_moved(self.centre, x, y, turn), angle=self.angle + turn)

    def cut(self, canvas: Canvas, z: float, thickness: float, softness: float = 1.2) -> Shape:
        """Return the section of the slice around the plane z, with edges as wide as ``softness``, mm."""
        (x, y, middle), (a, b, c) = self.centre, self.axes
        if abs(z - middle) > c + thickness / 2 + softness:
            return _NOTHING
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        grow = 1 + sum(abs(amplitude) for _, amplitude, _ in self.wobble)
        pad = softness + canvas.unit
        reach_x, reach_y = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        window = canvas.window(x, y, reach_x * grow + pad, reach_y * grow + pad)
        gx, gy = canvas.grid(window)
        u = ((gx - x) * cos + (gy - y) * sin) / a
        v = ((gy - y) * cos - (gx - x) * sin) / b
        square = u * u + v * v
        outline: np.ndarray | float = 1.0
        if self.wobble:
            theta = np.arctan2(v, u)
            turn = self.twist * (z - middle) / c
            outline = 1 + sum(size * np.cos(k * theta + phase + k * turn) for k, size, phase in self.wobble)
        opacity = np.zeros(square.shape, np.float32)
        for plane in _PLANES:
            w = (z + plane * thickness - middle) / c
            opacity += soft((1 - np.sqrt(square + w * w) / outline) * min(a, b, c), softness)
        return window, opacity / np.float32(len(_PLANES))


@dataclasses.dataclass(frozen=True)
class Tube:
    """A tapering tube with round ends.

    Attributes:
        start: mm.
        end: mm.
        radii: at start and end, mm.
    """

    start: Point
    end: Point
    radii: tuple[float, float]

    def moved(self, x: float, y: float, turn: float = 0.0) -> Self:
        """Return the body turned around the z axis by ``turn`` (radians, from x towards y), then moved in its plane."""
        start, end = (_moved(point, x, y, turn) for point in (self.start, self.end))
        return dataclasses.replace(self, start=start, end=end)

    def cut(self, canvas: Canvas, z: float, thickness: float, softness: float = 1.2) -> Shape:
        """Return the section of the slice around the plane z, with edges as wide as ``softness``, mm."""
        (x0, y0, z0), (x1, y1, z1) = self.start, self.end
        reach = max(self.radii) + softness
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        # The stretch of the axis from which the slice is within reach.
        limits = sorted((z + sign * (reach + thickness / 2) - z0) / dz for sign in (-1, 1)) if dz else (0.0, 1.0)
        first, last = max(limits[0], 0.0), min(limits[1], 1.0)
        if first > last or (not dz and abs(z - z0) > reach + thickness / 2):
            return _NOTHING
        middle, half = (first + last) / 2, (last - first) / 2
        pad = reach + canvas.unit
        window = canvas.window(x0 + middle * dx, y0 + middle * dy, abs(half * dx) + pad, abs(half * dy) + pad)
        gx, gy = canvas.grid(window)
        px, py = gx - x0, gy - y0
        flat = px * dx + py * dy
        square = max(dx * dx + dy * dy + dz * dz, 1e-6)
        opacity = np.zeros(flat.shape, np.float32)
        for plane in _PLANES:
            pz = z + plane * thickness - z0
            along = np.clip((flat + pz * dz) / square, 0, 1)
            distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2 + (pz - along * dz) ** 2)
            opacity += soft(self.radii[0] + along * (self.radii[1] - self.radii[0]) - distance, softness)
        return window, opacity / np.float32(len(_PLANES))


def _moved(point: Point, x: float, y: float, turn: float) -> Point:
    cos, sin = math.cos(turn), math.sin(turn)
    return cos * point[0] - sin * point[1] + x, sin * point[0] + cos * point[1] + y, point[2]


@dataclasses.dataclass(frozen=True)
class Part:
    """A body that is painted over what lies around it.

    Attributes:
        solid: its form.
        hu: its density.
        softness: width of its edges, mm.
        hosts: whether lesions may grow in it.
    """

    solid: Solid
    hu: float
    softness: float = 1.2
    hosts: bool = False
