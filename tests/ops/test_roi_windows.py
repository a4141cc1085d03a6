import pytest
import torch

from lidnet_fast import backend, roi_windows

CORNERS = torch.tensor([[0, 0, 0], [1, 3, 4], [0, 2, 1], [1, 4, 4], [1, 3, 4]])  # overlapping, at edges, twice
CORNERS_3D = torch.tensor([[1, 0, 2, 1], [0, 2, 0, 3], [1, 1, 2, 2]])


def cut(images, corners, size):
    """Slice by slice, as a user would."""
    places = [tuple(slice(a, a + n) for a, n in zip(corner[1:], size, strict=True)) for corner in corners.tolist()]
    return torch.stack([images[(int(c[0]), slice(None), *p)] for c, p in zip(corners, places, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "corners", "size"),
    [((2, 3, 8, 10), CORNERS, (4, 6)), ((2, 1, 4, 6, 7), CORNERS_3D, (2, 3, 4)), ((2, 3, 8, 10), CORNERS, (4, 1))],
)
def test_values_and_gradients(assert_near, shape, corners, size, dtype):
    images = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    windows = roi_windows(images, corners, size)
    assert windows.dtype == dtype
    assert torch.equal(windows, cut(images, corners, size))
    upstream = torch.randn(windows.shape, dtype=torch.float64).to(dtype)
    windows.backward(upstream)
    exact = images.detach().double().requires_grad_()
    cut(exact, corners, size).backward(upstream.double())
    assert images.grad.dtype == dtype
    assert_near(images.grad, exact.grad, dtype)


@pytest.mark.parametrize("arrange", [lambda x: x.mT, lambda x: x[:, ::2, 1:], lambda x: x[:, :1].expand(-1, 3, -1, -1)])
def test_strided_images(arrange):
    images = arrange(torch.randn(2, 4, 9, 9))
    assert torch.equal(roi_windows(images, CORNERS, (3, 2)), cut(images, CORNERS, (3, 2)))
    layout = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(roi_windows(layout, CORNERS, (3, 2)), cut(images, CORNERS, (3, 2)))


def test_gradients_are_derivatives_twice():
    images = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[0, 1, 2], [0, 2, 3], [1, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: roi_windows(x, corners, (4, 3)), images)
    assert torch.autograd.gradgradcheck(lambda x: roi_windows(x, corners, (4, 3)).square(), images)


def test_fused_op_follows_the_rules():
    images = torch.randn(2, 2, 6, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.lidnet_fast.roi_windows, (images, CORNERS[:1], [2, 3]))
    torch.library.opcheck(
        torch.ops.lidnet_fast.roi_windows_backward, (torch.randn(1, 2, 2, 3), CORNERS[:1], [2, 2, 6, 7])
    )


def test_fused_op_compiles_whole():
    compiled = torch.compile(lambda x, c: roi_windows(x, c, (4, 6)).square().sum(), fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 8, 10, requires_grad=True)
    compiled(images, CORNERS).backward()
    expected = images.detach().clone().requires_grad_()
    cut(expected, CORNERS, (4, 6)).square().sum().backward()
    assert torch.allclose(images.grad, expected.grad)


def test_the_same_bits_on_any_number_of_threads(with_threads):
    images = torch.randn(3, 2, 40, 40, requires_grad=True)
    corners = torch.randint(0, 10, (60, 3)) % torch.tensor([3, 10, 10])
    upstream = torch.randn(60, 2, 31, 31)

    def gradient():
        return torch.autograd.grad(roi_windows(images, corners, (31, 31)), images, upstream)[0]

    first, *others = with_threads(gradient, (1, 2, 5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (0, 3, 8, 10)])
def test_no_windows(shape):
    images = torch.randn(shape, requires_grad=True)
    windows = roi_windows(images, torch.empty(0, 3, dtype=torch.int64), (4, 6))
    assert windows.shape == (0, 3, 4, 6)
    windows.sum().backward()
    assert torch.equal(images.grad, torch.zeros(shape))


def test_sums_of_half_gradients_are_rounded_once():
    images = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((300, 1, 2, 2), 1.0, dtype=torch.bfloat16)
    roi_windows(images, torch.zeros(300, 3, dtype=torch.int64), (2, 2)).backward(upstream)
    if backend.current() == "fused":
        assert torch.equal(images.grad, torch.full((1, 1, 2, 2), 300.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 10, dtype=torch.int16)}, TypeError, "images must be float32"),
        ({"images": torch.zeros(3, 8, 10)}, ValueError, r"images must be \[N, C, H, W\] or .* got shape \(3, 8, 10\)"),
        ({"corners": CORNERS.int()}, TypeError, "corners must be an int64 Tensor, got torch.int32"),
        ({"corners": [[0, 0, 0]]}, TypeError, "corners must be an int64 Tensor, got list"),
        ({"corners": CORNERS_3D}, ValueError, r"corners must have shape \[windows, 3\], got \(3, 4\)"),
        ({"size": (4, 0)}, ValueError, "size must be an int >= 1 or two of them"),
        ({"size": (4, 11)}, ValueError, r"size must be at most the images', \(8, 10\), got \(4, 11\)"),
        ({"size": (5, 6)}, ValueError, r"corners\[3\] must lie between 0 and \(1, 3, 4\) for windows of \(5, 6\), got"),
        ({"corners": torch.tensor([[2, 0, 0]])}, ValueError, r"corners\[0\] must lie between 0 and \(1, 4, 4\)"),
        ({"corners": torch.tensor([[0, -1, 0]])}, ValueError, r"corners\[0\] must lie .* got \(0, -1, 0\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"images": torch.zeros(2, 3, 8, 10), "corners": CORNERS, "size": (4, 6), **change}
    with pytest.raises(error, match=message):
        roi_windows(**arguments)
