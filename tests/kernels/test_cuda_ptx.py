"""The PTX that nvcc makes of kernels in csrc/cuda, run on the executor (ptx/extension.py)."""

import shutil

import pytest
import torch

from tests.kernels.ptx.extension import SOURCES, Launches, nvcc

pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc() is None, reason="needs nvcc")]


def boxes(count, sides):
    """At random, many of them with edges on pixels' centres, some outside, and one that isn't a number."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(sides[::-1], dtype=torch.float64)
    lower = (torch.rand(count, len(sides), generator=generator, dtype=torch.float64) * 1.4 - 0.2) * scale
    size = torch.rand(count, len(sides), generator=generator, dtype=torch.float64) * 12
    corners = torch.cat((lower, lower + size), 1)
    corners[::2] = (2 * corners[::2]).round() / 2
    corners[count // 2, 0] = torch.nan
    return torch.cat((torch.randint(2, (count, 1), generator=generator), corners), 1)


def covered(rois, shape):
    """As the mask is defined: the pixel's centre is in a box, its upper ends excluded."""
    mask, axes = torch.zeros(shape, dtype=torch.bool), rois.shape[1] // 2
    for roi in rois.double():
        inside = torch.ones(shape[1:], dtype=torch.bool)
        for axis in range(axes):
            centre = torch.arange(shape[3 - axis]).double() + 0.5
            along = (roi[1 + axis] <= centre) & (centre < roi[1 + axis + axes])
            inside &= along.view([-1 if dim == 2 - axis else 1 for dim in range(3)])
        mask[int(roi[0])] |= inside
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "shape"), [(300, (2, 1, 70, 45)), (30, (2, 5, 40, 33)), (1, (2, 1, 1, 1))])
def test_mask_of_boxes(count, shape, dtype):
    """More boxes than a block looks at together, tiles that the image's edge cuts."""
    rois = boxes(count, shape[1:] if shape[1] > 1 else shape[2:]).to(dtype)
    mask, inside = Launches().covered(rois, shape)
    expected = covered(rois, shape)
    assert torch.equal(mask, expected.to(torch.uint8))
    assert inside.sum() == expected.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 10000), (7, 300)])
def test_gramian(shape, dtype):
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = gradients.double() @ gradients.double().T
    error = (Launches().gramian(gradients).double() - exact).norm() / exact.norm()
    assert error <= (1e-14 if dtype == torch.float64 else 1e-6)


def check_scales(dtype, launches):
    """Against autograd, of planes that are alike, unlike, and of contrast below 0 at a scale, whose gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    windows, blocks = [90000, 20000, 4000, 700, 36], [300, 70, 16, 4, 1]
    means = torch.rand(5, 2, 4, generator=generator, dtype=torch.float64) * torch.tensor([0, 1e-7, 0.9, 0.9])
    means[3, 1, 3] = 1.2
    shares = [torch.rand(2, 4, count, generator=generator, dtype=torch.float64) for count in blocks]
    sums = [
        mean[..., None] * count * share / share.sum(-1, keepdim=True)
        for mean, count, share in zip(means, windows, shares, strict=True)
    ]
    similarities, weights = launches.scales(sums, windows, 0.7, dtype)
    # 1 - SSIM counts at the last scale, 1 - contrast-structure at the others.
    leaf = torch.cat((means[:4, 1], means[4:, 0])).requires_grad_()
    exponents = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], dtype=torch.float64)
    expected = ((1 - leaf).relu() ** exponents[:, None]).prod(0)
    torch.testing.assert_close(similarities, expected.detach(), rtol=1e-14, atol=0)
    (slopes,) = torch.autograd.grad(0.7 * (1 - expected[:3]).sum() / 4, leaf)
    slopes = slopes / torch.tensor(windows, dtype=torch.float64)[:, None]
    assert expected[3] == 0
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(weights.double(), slopes, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales(dtype):
    check_scales(dtype, Launches())


MUTANTS = {
    "contrast at the last scale": ("cuda/multi_loss_values.cu", "j < kScales - 1 ? a.blocks[j]", "true ? a.blocks[j]"),
    "powers in float32": ("multi_loss.h", "std::pow(means[j]", "powf(means[j]"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant, tmp_path):
    name, original, mutated = MUTANTS[mutant]
    sources = shutil.copytree(SOURCES.parent, tmp_path / "csrc")
    text = (sources / name).read_text()
    assert text.count(original) == 1
    (sources / name).write_text(text.replace(original, mutated))
    with pytest.raises(AssertionError):
        check_scales(torch.float64, Launches(sources=sources / "cuda"))
