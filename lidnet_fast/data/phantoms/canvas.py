"""What phantoms are painted on, and with: soft-edged shapes and random texture.

Coordinates are x to the right (the patient's left) and y downwards (the patient's back), from the slice's corner.
"""

import math

import numpy as np
import scipy.fft
from numpy.typing import NDArray

BASE = 512
"""Units along the side of a slice of the chest, whose table of nodules is in pixels of 512x512 images."""

Image = NDArray[np.float32]
Window = tuple[slice, slice]
Shape = tuple[Window, Image]
"""A window of the slice, and the opacity of its pixels."""
Wobble = tuple[tuple[int, float, float], ...]


class Canvas:
    """A square slice in HU, on which soft-edged shapes are painted.

    Args:
        size: pixels per side.
        side: its length, in the unit of all coordinates and lengths.
    """

    def __init__(self, size: int, side: float = BASE) -> None:
        self.size, self.side = size, side
        self.unit = side / size
        self._centres: Image = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(self.unit)
        self.image: Image = np.full((size, size), -1000, dtype=np.float32)

    def window(self, x: float, y: float, reach_x: float, reach_y: float) -> Window:
        """Return the rows and columns within the given reach of a point, clipped to the slice (maybe to nothing)."""
        return self._span(y, reach_y), self._span(x, reach_x)

    def _span(self, centre: float, reach: float) -> slice:
        low = math.floor((centre - reach) / self.unit)
        high = math.ceil((centre + reach) / self.unit) + 1
        return slice(min(max(low, 0), self.size), min(max(high, 0), self.size))

    def grid(self, window: Window) -> tuple[Image, Image]:
        """Return x [1, w] and y [h, 1] of the window's pixel centres."""
        rows, columns = window
        return self._centres[None, columns], self._centres[rows, None]

    def paint(self, shape: Shape, hu: float | Image) -> None:
        """Paint ``hu`` over a window with the given opacity."""
        window, opacity = shape
        part = self.image[window]
        part += opacity * (hu - part)

    def ellipse(
        self,
        x: float,
        y: float,
        a: float,
        b: float,
        angle: float = 0.0,
        *,
        wobble: Wobble = (),
        softness: float = 1.4,
    ) -> Shape:
        """Return window and opacity of an ellipse with half axes a, b, a turned by ``angle`` from x towards y.

        ``wobble`` holds (k, amplitude, phase): the radius is multiplied by 1 + sum amplitude cos(k theta + phase).
        """
        cos, sin = math.cos(angle), math.sin(angle)
        grow = 1 + sum(abs(amplitude) for _, amplitude, _ in wobble)
        pad = softness + self.unit
        reach_x, reach_y = math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos)
        window = self.window(x, y, reach_x * grow + pad, reach_y * grow + pad)
        gx, gy = self.grid(window)
        u = ((gx - x) * cos + (gy - y) * sin) / a
        v = ((gy - y) * cos - (gx - x) * sin) / b
        radius = np.sqrt(u * u + v * v)
        if wobble:
            theta = np.arctan2(v, u)
            radius /= 1 + sum(amplitude * np.cos(k * theta + phase) for k, amplitude, phase in wobble)
        return window, soft((1 - radius) * min(a, b), softness)

    def segment(self, start: tuple[float, float], end: tuple[float, float], radii: tuple[float, float]) -> Shape:
        """Return window and opacity of a tapering tube between two points; thinner than a pixel, it fades."""
        (x0, y0), (x1, y1) = start, end
        reach = max(radii) + 1 + self.unit
        window = self.window((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2 + reach, abs(y1 - y0) / 2 + reach)
        gx, gy = self.grid(window)
        dx, dy = x1 - x0, y1 - y0
        px, py = gx - x0, gy - y0
        square = max(dx * dx + dy * dy, 1e-6)
        along = np.minimum(np.maximum(px * (dx / square) + py * (dy / square), 0), 1)
        px, py = px - along * dx, py - along * dy
        radius = radii[0] + along * (radii[1] - radii[0])
        opacity = soft(radius - np.sqrt(px * px + py * py), 1.3)
        return window, opacity * np.minimum(1, radius / 0.65) if min(radii) < 0.65 else opacity


def soft(inside: NDArray[np.floating], softness: float) -> Image:
    """Opacity of an edge from the distance inside it: linear from 0 to 1 over ``softness`` around the edge."""
    opacity = inside.astype(np.float32, copy=False) * np.float32(1 / softness)
    opacity += np.float32(0.5)
    np.maximum(opacity, 0, out=opacity)
    return np.minimum(opacity, 1, out=opacity)


def texture(rng: np.random.Generator, size: int) -> Image:
    """Draw a random field [size, size] of unit variance whose grain is mostly a few millimetres wide."""
    unit = BASE / size
    fy = scipy.fft.fftfreq(size, unit).astype(np.float32)[:, None]
    fx = scipy.fft.rfftfreq(size, unit).astype(np.float32)[None, :]
    amplitude = 1 / (1 + (fx * fx + fy * fy) * np.float32(14.0**2))
    amplitude[0, 0] = 0
    # White noise has unit variance per frequency; inner columns of the half spectrum stand for two frequencies.
    power = (2 * np.square(amplitude).sum() - np.square(amplitude[:, 0]).sum()) / size**2
    spectrum = scipy.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32)) * (amplitude / np.sqrt(power))
    return scipy.fft.irfft2(spectrum, s=(size, size))
