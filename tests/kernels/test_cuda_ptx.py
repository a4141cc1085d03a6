"""The PTX that nvcc makes of kernels in csrc/cuda, run on the executor (ptx/extension.py)."""

import pytest
import torch

from tests.kernels.ptx.extension import Launches, nvcc

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
