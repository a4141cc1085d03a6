import math

import pytest
import torch

from lidnet_fast.metrics import ImageQuality, image_quality
from lidnet_fast.models import HUWindow

WINDOW = HUWindow(-1000, 400)
NONE = torch.zeros(0, 4)


def pair(count=2, size=(40, 52), noise=60.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.randn(count, 1, 6, 6, generator=generator) * 500 - 300, size=size, mode="bicubic"
    )
    return smooth + torch.randn(smooth.shape, generator=generator) * noise, smooth


def test_constant_error_by_hand():
    """Everywhere 14 HU too high: a hundredth of the window."""
    reference = torch.zeros(1, 1, 20, 20)
    (score,) = image_quality(reference + 14, reference, WINDOW, [torch.tensor([[5.0, 5, 9, 9]])])
    assert score.psnr == pytest.approx(40, abs=1e-3)
    assert score.rmse_hu == pytest.approx(14, rel=1e-4)
    (lesion,) = score.lesions
    assert lesion.psnr == pytest.approx(40, abs=1e-3)
    assert lesion.bias_hu == pytest.approx(14)
    assert lesion.rmse_hu == pytest.approx(14)


def test_lesion_regions_by_hand():
    """Errors at chosen pixels: inside the box, in the grown margin, outside of both."""
    reference = torch.zeros(1, 1, 30, 30)
    image = reference.clone()
    image[0, 0, 10, 10] = 140  # in the box, which touches 4x4 pixels: 9..12
    image[0, 0, 7, 14] = -280  # in the box grown by 2: 7..14
    image[0, 0, 6, 15] = 1000  # outside
    box = torch.tensor([[9.5, 9.0, 12.2, 12.9]])
    (score,) = image_quality(image, reference, WINDOW, [box])
    (lesion,) = score.lesions
    assert lesion.psnr == pytest.approx(-10 * math.log10((0.1**2 + 0.2**2) / (8 * 8)), abs=1e-4)
    assert lesion.bias_hu == pytest.approx(140 / 16)


def test_lesions_at_the_edge_are_cut():
    reference = torch.zeros(1, 1, 20, 20)
    image = reference.clone()
    image[0, 0, 0, 0] = 140
    (score,) = image_quality(image, reference, WINDOW, [torch.tensor([[0.0, 0, 3, 3]])])
    assert score.lesions[0].psnr == pytest.approx(-10 * math.log10(0.01 / 25), abs=1e-4)
    assert score.lesions[0].bias_hu == pytest.approx(140 / 9)


def test_beyond_the_window_only_the_bias_counts():
    reference = torch.full((1, 1, 20, 20), 500.0)
    (score,) = image_quality(reference + 300, reference, WINDOW, [torch.tensor([[5.0, 5, 9, 9]])])
    assert score.psnr == 100 and score.rmse_hu == 0 and score.ssim == pytest.approx(1)
    assert score.lesions[0].bias_hu == pytest.approx(300)


def test_ssim_agrees_with_pytorch_msssim():
    from pytorch_msssim import ssim

    image, reference = pair(3)
    x, y = (WINDOW.scale(v).clamp(0, 1) for v in (image, reference))
    expected = ssim(x, y, data_range=1.0, size_average=False)
    scores = image_quality(image, reference, WINDOW, [NONE] * 3)
    assert [s.ssim for s in scores] == pytest.approx(expected.tolist(), abs=1e-5)
    assert 0.2 < float(expected.min()) < 0.99


def test_lesion_ssim_is_the_mean_of_local_values():
    """One pixel of the map is SSIM's formula on the 11x11 neighbourhood; a box's value is the mean over its pixels."""
    image, reference = pair(1)
    x, y = (WINDOW.scale(v).clamp(0, 1)[0, 0].double() for v in (image, reference))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    profile = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = torch.outer(profile, profile) / profile.sum() ** 2
    values = []
    for row in range(10, 18):
        for column in range(20, 30):
            a, b = (v[row - 5 : row + 6, column - 5 : column + 6] for v in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * a * a).sum() - ma**2, (weights * b * b).sum() - mb**2
            covariance = (weights * a * b).sum() - ma * mb
            values.append((2 * ma * mb + 1e-4) * (2 * covariance + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    (score,) = image_quality(image, reference, WINDOW, [torch.tensor([[22.0, 12, 28, 16]])])
    assert score.lesions[0].ssim == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


def test_averages_are_over_images_and_over_lesions():
    image, reference = pair(3)
    boxes = [torch.tensor([[5.0, 5, 12, 12], [20, 20, 30, 26]]), NONE, torch.tensor([[30.0, 8, 40, 20]])]
    quality = ImageQuality(WINDOW)
    quality.update(image[:2], reference[:2], boxes[:2])
    quality.update(image[2:], reference[2:], boxes[2:])
    assert quality.count == 3
    scores = image_quality(image, reference, WINDOW, boxes)
    lesions = [lesion for score in scores for lesion in score.lesions]
    assert len(lesions) == 3
    values = quality.compute()
    for key in ("psnr", "ssim", "rmse_hu"):
        assert values[key] == pytest.approx(sum(getattr(s, key) for s in scores) / 3)
    for key in ("psnr", "ssim", "rmse_hu", "bias_hu"):
        assert values[f"lesion_{key}"] == pytest.approx(sum(getattr(lesion, key) for lesion in lesions) / 3)
    quality.reset()
    assert quality.count == 0


def test_perfect_images():
    _, reference = pair()
    quality = ImageQuality(WINDOW)
    quality.update(reference, reference, [NONE, NONE])
    assert quality.compute() == {
        "psnr": 100.0,
        "ssim": pytest.approx(1),
        "rmse_hu": 0.0,
        "lesion_psnr": None,
        "lesion_ssim": None,
        "lesion_rmse_hu": None,
        "lesion_bias_hu": None,
    }


def test_integer_images():
    image, reference = (v.round() for v in pair())
    boxes = [torch.tensor([[5.0, 5, 12, 12]]), NONE]
    assert image_quality(image.short(), reference.short(), WINDOW, boxes) == image_quality(
        image, reference, WINDOW, boxes
    )


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        ImageQuality(WINDOW).compute()


@pytest.mark.parametrize(
    ("images", "references", "boxes", "message"),
    [
        (torch.zeros(1, 20, 20), torch.zeros(1, 20, 20), [NONE], r"images must have shape \[N, 1, H, W\]"),
        (torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 20, 21), [NONE], r"references must have the images' shape"),
        (torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20), [NONE], "at least 11 pixels .* got 10x20"),
        (torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 20, 20), [], "one tensor per image: got 0 for 1"),
        (
            torch.zeros(1, 1, 20, 30),
            torch.zeros(1, 1, 20, 30),
            [torch.tensor([[1.0, 1, 5, 5], [1, 1, 5, 21]])],
            r"boxes\[0\]\[1\] isn't within 30x20 pixels: \[1.0, 1.0, 5.0, 21.0\]",
        ),
        (
            torch.zeros(1, 1, 20, 20),
            torch.zeros(1, 1, 20, 20),
            [torch.tensor([[1.0, math.nan, 5, 5]])],
            r"boxes\[0\]\[0\] isn't within",
        ),
    ],
)
def test_bad_input(images, references, boxes, message):
    with pytest.raises(ValueError, match=message):
        image_quality(images, references, WINDOW, boxes)
