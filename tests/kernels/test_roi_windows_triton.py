"""The Triton kernels of roi_windows against slicing: where they run says conftest.py."""

from contextlib import nullcontext

import pytest
import torch

kernels = pytest.importorskip("lidnet_fast.kernels.roi_windows")
pytestmark = pytest.mark.interpreter

CASES = {
    "images": ((2, 3, 8, 10), [[0, 0, 0], [1, 3, 4], [0, 2, 1], [1, 4, 4], [1, 3, 4]], (4, 6)),
    "volumes": ((2, 2, 4, 6, 7), [[1, 0, 2, 1], [0, 2, 0, 3], [1, 1, 2, 2]], (2, 3, 4)),
    "several blocks": ((1, 1, 40, 60), [[0, 1, 2], [0, 3, 5]], (35, 50)),
}
ALLOCATIONS = ((torch.Tensor, "new_empty"), (torch, "cat"))


@pytest.fixture(params=CASES)
def case(request, device):
    shape, corners, size = CASES[request.param]
    return shape, torch.tensor(corners, device=device), size


def slices(corner, size):
    image, *place = corner.tolist()
    return (image, slice(None), *(slice(a, a + n) for a, n in zip(place, size, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(case, device, dtype):
    shape, corners, size = case
    torch.manual_seed(0)
    images = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    windows = kernels.roi_windows(images, corners, size)
    assert torch.equal(windows, torch.stack([images[slices(corner, size)] for corner in corners]))
    upstream = torch.randn(windows.shape, dtype=torch.float64).to(dtype).to(device)
    gradient = kernels.roi_windows_backward(upstream, corners, shape)
    expected = torch.zeros(shape, dtype=torch.float64, device=device)
    for corner, of_window in zip(corners, upstream, strict=True):
        expected[slices(corner, size)] += of_window
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(gradient, kernels.roi_windows_backward(upstream, corners, shape))


KINDS = {"images": ((2, 3, 9, 11), [(4, 6), (9, 11), (2, 3)]), "volumes": ((2, 2, 4, 6, 7), [(2, 3, 4), (4, 6, 7)])}


@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 2, 0), (1, 0, 2), (3, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("of", KINDS)
def test_windows_of_several_kinds_and_both_images(of, counts, device):
    """One launch cuts all, one adds all up."""
    shape, sizes = KINDS[of]
    counts = list(counts[: len(sizes)])
    generator = torch.Generator().manual_seed(0)
    images, targets = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    most = [[shape[0] - 1, *(a - n for a, n in zip(shape[2:], size, strict=True))] for size in sizes]
    corners = [
        torch.cat([torch.randint(m + 1, (count, 1), generator=generator) for m in of_kind], 1)
        for of_kind, count in zip(most, counts, strict=True)
    ]
    flat, together = [side for size in sizes for side in size], torch.cat(corners).to(device)
    windows = kernels.windows_of_pair(images, targets, together, counts, flat)
    kinds = list(zip(corners, sizes, strict=True))
    expected = [
        torch.stack([source[slices(corner, size)] for corner in of_kind])
        if len(of_kind)
        else source.new_empty(0, shape[1], *size)
        for source in (images, targets)
        for of_kind, size in kinds
    ]
    assert all(map(torch.equal, windows, expected))
    alone = kernels.windows_of_pair(images, None, together, counts, flat)
    assert all(map(torch.equal, alone, expected[: len(sizes)]))
    upstream = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(device) for w in alone]
    gradient = torch.zeros_like(images)
    for (of_kind, size), grads in zip(kinds, upstream, strict=True):
        for corner, of_window in zip(of_kind, grads, strict=True):
            gradient[slices(corner, size)] += of_window
    assert torch.equal(kernels.windows_of_pair_backward(upstream, together, counts, flat, shape), gradient)


def test_memory(case, device, recorded, watched):
    """No access outside the tensors, no pixel stored twice, and nothing read that isn't needed but corners."""
    shape, corners, size = case
    images = torch.randn(shape, device=device)
    with recorded(*ALLOCATIONS) as allocated, watched(lambda: [images, corners, *allocated]) as traffic:
        windows = kernels.roi_windows(images, corners, size)
        assert traffic.stored == windows.nbytes
        gradient = kernels.roi_windows_backward(windows, corners, shape)
    assert traffic.stored == windows.nbytes + gradient.nbytes


def test_windows_that_would_leave_the_images_stay_inside(recorded, watched, device):
    images = torch.randn(2, 1, 6, 7, device=device)
    corners = torch.tensor([[9, 1, 1], [-3, 1, 1], [0, -5, 99], [1, 2**40, -(2**40)]], device=device)
    with recorded(*ALLOCATIONS) as allocated, watched(lambda: [images, corners, *allocated]):
        windows = kernels.roi_windows(images, corners, (3, 4))
        kernels.roi_windows_backward(windows, corners, images.shape)
    assert torch.equal(windows[2], images[0, :, :3, 3:])


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch, case, device):
    """Which needn't be the current one."""
    shape, corners, size = case
    guarded = []
    monkeypatch.setattr(kernels, "on_device", lambda tensor: guarded.append(tensor.data_ptr()) or nullcontext())
    images = torch.randn(shape, device=device)
    windows = kernels.roi_windows(images, corners, size)
    kernels.roi_windows_backward(windows, corners, shape)
    assert guarded == [images.data_ptr(), windows.data_ptr()]


def test_no_windows(device):
    corners = torch.empty(0, 3, dtype=torch.int64, device=device)
    assert kernels.roi_windows(torch.zeros(1, 2, 5, 5, device=device), corners, (2, 2)).shape == (0, 2, 2, 2)
    gradient = kernels.roi_windows_backward(torch.zeros(0, 2, 2, 2, device=device), corners, (1, 2, 5, 5))
    assert torch.equal(gradient, torch.zeros(1, 2, 5, 5, device=device))
