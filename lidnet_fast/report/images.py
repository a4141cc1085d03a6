"""HU arrays to text for the page, as pictures and as values, and the crops around lesions."""

import base64
import io
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

# Blue below zero, near-black at zero (calm next to dark CT images), orange above; readable with red-green blindness.
DIVERGING: dict[float, tuple[int, int, int]] = {
    -1.0: (150, 214, 255),
    -0.5: (34, 112, 190),
    0.0: (13, 15, 18),
    0.5: (196, 92, 22),
    1.0: (255, 214, 140),
}
"""Colours of differences, at multiples of the scale's end."""


def packed_hu(image: ArrayLike) -> str:
    """A HU array [H,W] as text that `panels.js` unpacks: rounded to int16, first all low bytes, then all high bytes
    (which compress well apart from each other), deflated, base64."""
    hu = np.clip(np.rint(image), -32768, 32767).astype("<i2")
    planes = hu.view(np.uint8).reshape(-1, 2).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


def gray_png(image: ArrayLike, window: tuple[float, float]) -> str:
    """A HU array [H,W] as an 8-bit grey PNG data URI: the window's lower end is black, its upper end white."""
    low, high = window
    scaled = (np.asarray(image, dtype=np.float32) - low) / (high - low)
    return _data_uri(Image.fromarray(_to_bytes(scaled)))


def difference_png(image: ArrayLike, limit: float) -> str:
    """A difference in HU [H,W] as a PNG data URI in the diverging map, saturated at -`limit` and +`limit`."""
    picture = Image.fromarray(_to_bytes(np.asarray(image, dtype=np.float32) / (2 * limit) + 0.5)).convert("P")
    ramp = np.linspace(-1, 1, 256)
    channels = np.array(list(DIVERGING.values()), dtype=np.float64).T
    palette = np.stack([np.interp(ramp, list(DIVERGING), channel) for channel in channels], axis=1)
    picture.putpalette(palette.round().astype(np.uint8).tobytes())
    return _data_uri(picture)


def difference_gradient() -> str:
    """The diverging map as a CSS gradient, for the scale next to the panels."""
    stops = ", ".join(f"rgb{colour} {(position + 1) * 50:g}%" for position, colour in DIVERGING.items())
    return f"linear-gradient(to right, {stops})"


def difference_limit(images: Sequence[NDArray[np.float32]]) -> float:
    """One colour limit in HU for all difference images: their 99th percentile of magnitude, rounded up to 1, 2 or 5."""
    magnitude = max((float(np.percentile(np.abs(image), 99)) for image in images), default=0.0)
    exponent = 10.0 ** np.floor(np.log10(max(magnitude, 1.0)))
    return float(next(step * exponent for step in (1, 2, 5, 10) if step * exponent >= magnitude))


def lesion_crop(box: ArrayLike, shape: tuple[int, int]) -> tuple[int, int, int]:
    """The square (x, y, side) in pixels around a lesion: three times its box, at least 32, shifted into the image."""
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float64).tolist()
    height, width = shape
    side = min(max(32, round(3 * max(x2 - x1, y2 - y1))), height, width)
    x = round((x1 + x2 - side) / 2)
    y = round((y1 + y2 - side) / 2)
    return min(max(x, 0), width - side), min(max(y, 0), height - side), side


def _to_bytes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
