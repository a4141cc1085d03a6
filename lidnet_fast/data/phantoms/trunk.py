"""What every slice of a trunk has: a vertebra, and the couch below."""

import math

import numpy as np

from lidnet_fast.data.phantoms.canvas import BASE, Canvas, Wobble, soft


def paint_couch(canvas: Canvas, top: float) -> None:
    """Paint the couch: a curved shell filled with foam, lowest in the middle, at y = ``top``."""
    scale = canvas.side / BASE
    window = canvas.window(canvas.side / 2, top - 20 * scale, canvas.side / 2, 45 * scale)
    x, y = canvas.grid(window)
    depth = y - top + (x - canvas.side / 2) ** 2 / (1366 * scale)
    canvas.paint((window, soft(5 * scale - np.abs(depth - 5 * scale), 1.4 * scale)), -680)
    canvas.paint((window, soft(3.5 * scale - np.abs(depth - 5 * scale), 1.4 * scale)), -965)


def paint_vertebra(canvas: Canvas, x: float, y: float, marrow: float) -> None:
    """Paint a vertebra around the middle of its body: body, canal, arch, transverse and spinous processes."""
    scale = canvas.side / BASE

    def ellipse(
        dx: float,
        dy: float,
        a: float,
        b: float,
        hu: float,
        angle: float = 0,
        wobble: Wobble = (),
        softness: float = 1.4,
    ) -> None:
        place = x + dx * scale, y + dy * scale
        shape = canvas.ellipse(*place, a * scale, b * scale, angle, wobble=wobble, softness=softness * scale)
        canvas.paint(shape, hu)

    body = ((2, 0.04, 0.0), (3, 0.04, math.pi / 2))
    ellipse(0, 29, 5, 26, 420)
    for sign in (-1, 1):
        ellipse(sign * 26, 24, 19, 6, 420, sign * 0.35)
        ellipse(sign * 26, 24, 16, 3.2, 220, sign * 0.35)
    ellipse(0, 20, 20, 17, 430)
    ellipse(0, 0, 27, 22, 400, wobble=body)
    ellipse(0, 0, 24.5, 19.5, marrow, wobble=body, softness=2)
    ellipse(0, 23, 12.5, 9.5, 35)
    ellipse(0, 23, 7, 5.5, 45)
