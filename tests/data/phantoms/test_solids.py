import math

import numpy as np
import pytest

from lidnet_fast.data.phantoms.canvas import Canvas
from lidnet_fast.data.phantoms.solids import Ellipsoid, Solid, Tube

SIDE, SIZE = 100.0, 200


def volume(solid: Solid, thickness: float = 0.5) -> float:
    """Of a body, mm^3: the sum of its sections."""
    canvas = Canvas(SIZE, SIDE)
    sections = [solid.cut(canvas, z, thickness) for z in np.arange(-40, 40, 0.5)]
    return sum(float(opacity.sum()) for _, opacity in sections) * canvas.unit**2 * 0.5


def test_bodies_have_their_volumes_however_thick_the_slices():
    ellipsoid = Ellipsoid((50, 48, 1), (14, 9, 11), 0.7)
    tube = Tube((35, 40, -12), (60, 58, 9), (4, 4))
    length = math.dist(tube.start, tube.end)
    for thickness in (0.5, 5.0):
        assert volume(ellipsoid, thickness) == pytest.approx(4 / 3 * math.pi * 14 * 9 * 11, rel=0.03)
        assert volume(tube, thickness) == pytest.approx(math.pi * 16 * length + 4 / 3 * math.pi * 64, rel=0.03)


def test_a_tube_in_the_plane_and_one_across_it():
    canvas = Canvas(SIZE, SIDE)
    _, along = Tube((30, 50, 0), (70, 50, 0), (3, 3)).cut(canvas, 0, 0.1)
    assert along.sum() * canvas.unit**2 == pytest.approx(40 * 6 + math.pi * 9, rel=0.03)
    _, across = Tube((50, 50, -20), (50, 50, 20), (3, 3)).cut(canvas, 0, 0.1)
    assert across.sum() * canvas.unit**2 == pytest.approx(math.pi * 9, rel=0.05)


def test_what_fills_a_slice_in_part_is_faint():
    canvas = Canvas(SIZE, SIDE)
    plate = Ellipsoid((50, 50, 0), (20, 20, 0.8))
    thin, thick = (plate.cut(canvas, 0, thickness)[1].max() for thickness in (0.5, 6))
    assert thin == 1
    assert thick < 0.5


@pytest.mark.parametrize("solid", [Ellipsoid((50, 50, 0), (9, 9, 4)), Tube((50, 50, -3), (55, 50, 3), (2, 1))])
def test_bodies_end(solid):
    canvas = Canvas(SIZE, SIDE)
    for z in (-30, 30):
        window, opacity = solid.cut(canvas, z, 3)
        assert opacity.max(initial=0) == 0
        canvas.paint((window, opacity), 100)
    assert (canvas.image == -1000).all()


def test_moving_turns_around_the_axis_and_then_shifts():
    turned = Ellipsoid((10, 0, 5), (3, 2, 1), 0.1).moved(1, 2, math.pi / 2)
    assert turned.centre == pytest.approx((1, 12, 5))
    assert turned.angle == pytest.approx(0.1 + math.pi / 2)
    tube = Tube((1, 0, 0), (0, 1, 4), (1, 1)).moved(0, 0, math.pi)
    assert tube.start == pytest.approx((-1, 0, 0))
    assert tube.end == pytest.approx((0, -1, 4))
