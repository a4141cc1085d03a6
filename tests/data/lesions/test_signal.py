import math

import numpy as np
import pytest
import torch

from lidnet_fast.data.lesions.signal import Lesion, add_lesion, lesion_box, lesion_signal, lesion_slices
from lidnet_fast.data.simulation.projection import detector_count, reconstruct, view_angles

SPACING = (2.5, 0.7, 0.7)


def drawn(lesion, size=(96, 96), spacing=SPACING, z=None):
    image = np.zeros(size)
    window, patch = lesion_signal(lesion, size, spacing, z)
    image[window] += patch
    return image


def test_a_disc_is_what_the_simulated_scanner_reconstructs():
    """From its line integrals, 2 sqrt(R^2 - s^2), by filtered back-projection."""
    y, x, radius = 50.2, 44.8, 9.0
    angles = view_angles(360)
    detectors = detector_count(96, 96)
    # Detectors integrate over their width, which sampling the ideal line integrals alone would leave out.
    fine = (torch.arange(detectors * 16) - (detectors * 16 - 1) / 2) / 16
    across = (x - 47.5) * angles.cos() + (y - 47.5) * angles.sin()
    chords = 2 * (radius**2 - (fine - across[:, None]) ** 2).clamp(min=0).sqrt()
    sinogram = chords.reshape(len(angles), detectors, 16).mean(2)
    scanned = reconstruct(sinogram[None].float(), angles, 96, 96)[0].numpy()
    image = drawn(Lesion((0, y, x), 2 * radius * 0.7, 1.0))
    assert np.abs(scanned - image).max() < 0.06
    assert np.sqrt(np.mean((scanned - image)[20:76, 20:76] ** 2)) < 0.01


@pytest.mark.parametrize("elongation", [1.0, 1.5])
def test_area_times_contrast_is_kept(elongation):
    image = drawn(Lesion((0, 47.3, 50.9), 12.0, -80.0, elongation, 0.4))
    assert image.sum() * 0.49 == pytest.approx(-80 * math.pi * 36, rel=1e-3)
    assert image[47, 51] == pytest.approx(-80, rel=0.02)
    y, x = np.mgrid[:96, :96]
    assert (image * x).sum() / image.sum() == pytest.approx(50.9, abs=1e-3)
    assert (image * y).sum() / image.sum() == pytest.approx(47.3, abs=1e-3)


def test_an_ellipse_lies_along_its_angle():
    image = drawn(Lesion((0, 48, 48), 12.0, 1.0, 2.0, math.pi / 2))
    y, x = np.mgrid[:96, :96] - 48
    assert (image * y**2).sum() / (image * x**2).sum() == pytest.approx(4, rel=0.1)


def test_an_ellipsoid_keeps_its_volume_over_slices():
    lesion = Lesion((5.3, 48.0, 48.0), 11.0, 100.0, 1.3, 1.0)
    volume = np.zeros((12, 96, 96))
    add_lesion(volume, lesion, SPACING)
    assert volume.sum() * np.prod(SPACING) == pytest.approx(100 * 4 / 3 * math.pi * 5.5**3, rel=2e-3)
    touched = np.flatnonzero(np.abs(volume).max((1, 2)) > 0)
    assert touched.tolist() == list(lesion_slices(lesion, 12, 2.5))


def test_boxes_by_hand():
    lesion = Lesion((5.0, 20.0, 30.0), 10.0, 100.0)
    assert lesion_box(lesion, 5, SPACING) == pytest.approx(
        (30.5 - 5 / 0.7, 20.5 - 5 / 0.7, 30.5 + 5 / 0.7, 20.5 + 5 / 0.7)
    )
    x1, _, x2, _ = lesion_box(lesion, 6, SPACING)
    assert (x2 - x1) * 0.7 == pytest.approx(2 * math.sqrt(25 - 2.5**2))
    assert lesion_box(lesion, 7, SPACING) is None
    x1, y1, x2, y2 = lesion_box(Lesion((5, 20, 30), 10.0, 100.0, 2.0, math.pi / 2), 5, SPACING)
    assert (y2 - y1) / (x2 - x1) == pytest.approx(2)


def test_the_edge_of_a_slice_cuts_a_lesion():
    lesion = Lesion((0, 2.0, 94.0), 12.0, 100.0)
    assert drawn(lesion) == pytest.approx(drawn(Lesion((0, 34.0, 94.0), 12.0, 100.0), (128, 160))[32:, :96], abs=1e-4)


def test_integers_are_rounded():
    volume = np.full((1, 64, 64), -800, np.int16)
    add_lesion(volume, Lesion((0, 32, 32), 10.0, 250.4), SPACING)
    assert volume.dtype == np.int16 and volume[0, 0, 0] == -800
    assert volume[0, 32, 32] == pytest.approx(-550, abs=12)
