"""The CUDA kernels' own source, run on the CPU by an emulator that checks what they do to shared memory."""

import contextlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lidnet_fast import reference
from tests.kernels.emulated import build, load

WEIGHTS = {"l1": 0.7, "mse": -3.0, "charbonnier": 1.3, "ssim": 0.5, "edge": 0.2, "tv": 0.1}
BOXES = torch.tensor([[0, 1.5, 2, 9, 7.5], [0, 4, 4, 30, 6], [1, -4, 5, 9, 40], [0, 3, 3, 3, 3]])
# More than a block looks at together.
MANY_BOXES = torch.cat((BOXES, torch.tensor([[n % 2, n % 37, n % 29, n % 37 + 1.5, n % 29 + 1] for n in range(280)])))
VOLUME_BOXES = torch.tensor([[0, 1.5, 2, 3, 9, 7.5, 8], [0, 4, 4, 0, 30, 6, 2], [1, -4, 5, -4, 9, 40, 40]])
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


@pytest.fixture(scope="module")
def emulation():
    prebuilt = os.environ.get("LIDNET_FAST_EMULATED")
    try:
        return load(prebuilt or build())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(
    autouse=True,
    params=[0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)],
    ids=["ascending", "descending", "random"],
)
def _order(request, emulation):
    torch.manual_seed(0)
    emulation.reset(request.param)
    yield
    assert emulation.error() == ""


def images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.rand(shape, dtype=torch.float64)
    return (target + 0.1 * torch.randn(shape, dtype=torch.float64)).to(dtype), target.to(dtype)


def emulated(input, target, weights, rois=None, roi_weight=1.0, data_range=1.0):
    arguments = (list(weights), list(weights.values()), rois, roi_weight, data_range, True)
    return torch.ops.lidnet_fast_emulated.multi_loss(input, target, *arguments)


def defined(input, target, weights, rois=None, roi_weight=1.0, data_range=1.0):
    leaf = input.double().requires_grad_()
    options = (None if rois is None else rois.double(), roi_weight, data_range)
    total, values = reference.multi_loss(leaf, target.double(), list(weights), list(weights.values()), *options)
    return total.detach(), values.detach(), torch.autograd.grad(total, leaf)[0]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("shape", "dtype", "boxes"),
    [
        ((1, 1, 11, 11), torch.float32, None),
        ((2, 2, 45, 75), torch.float32, BOXES),
        ((2, 1, 33, 43), torch.float64, MANY_BOXES.double()),
        ((2, 1, 42, 20), torch.float16, BOXES),
        ((1, 1, 43, 42), torch.bfloat16, None),
        ((2, 1, 12, 13, 35), torch.float32, VOLUME_BOXES),
        ((1, 2, 11, 17, 11), torch.float64, VOLUME_BOXES[:2].double()),
    ],
)
def test_total_values_and_gradients(shape, dtype, boxes):
    pair = images(*shape, dtype=dtype)
    options = (boxes, 3.0, 0.8)
    ours, theirs = emulated(*pair, WEIGHTS, *options), defined(*pair, WEIGHTS, *options)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_near(actual, expected, dtype)
    jacobian = torch.ops.lidnet_fast_emulated.multi_loss_jacobian(*pair, list(WEIGHTS), *options)
    for name, row in zip(WEIGHTS, jacobian, strict=True):
        assert_near(row, defined(*pair, {name: 1.0}, *options)[2], dtype)


def test_volumes_slab_by_slab(emulation):
    """The same, bit by bit, whether a batch's six slices of windows are worked on at once or two of them."""
    pair = images(2, 1, 13, 11, 12)
    at_once = emulated(*pair, {"ssim": 1.0})
    launches, usual = emulation.launches(), emulation.set_slab(2 * 4 * (4 * 11 * 12 + 3 * 1 * 2))
    in_twos = emulated(*pair, {"ssim": 1.0})
    emulation.set_slab(usual)
    assert emulation.launches() - launches == launches + 2 * 3
    for actual, expected in zip(in_twos, at_once, strict=True):
        assert torch.equal(actual, expected)


def peak_of_allocations(function):
    """The most bytes that were allocated at once on the CPU while `function` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del kept
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("_order", [0], indirect=True)
@pytest.mark.parametrize(("with_gradient", "most"), [(True, 69e6), (False, 20e6)])
def test_memory_for_a_volume(emulation, with_gradient, most):
    """Beside the gradient itself; the images are 16.8 MB each. Nothing is computed, so the emulation is as fast."""
    emulation.reset(dry=True)
    pair = torch.empty(2, 1, 1, 64, 256, 256)
    gradient_bytes = with_gradient * pair[0].nbytes
    arguments = (list(WEIGHTS), list(WEIGHTS.values()), None, 1.0, 1.0, with_gradient)
    peak = peak_of_allocations(lambda: torch.ops.lidnet_fast_emulated.multi_loss(*pair, *arguments))
    assert gradient_bytes < peak <= gradient_bytes + most


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 2), (1, 1, 2, 70), (1, 1, 1, 2, 3)])
def test_sides_below_the_window(shape):
    smallest = {"ssim": 11, "edge": 3, "tv": 2}
    weights = {name: weight for name, weight in WEIGHTS.items() if min(shape[2:]) >= smallest.get(name, 1)}
    pair = images(*shape)
    for actual, expected in zip(emulated(*pair, weights), defined(*pair, weights), strict=True):
        assert_near(actual, expected, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "_order"), [(torch.float64, 2), (torch.float16, 1)], indirect=["_order"])
def test_all_scales(dtype):
    weights = {"ms_ssim": 2.0, "l1": 1.0, "ssim": 0.5}
    pair = images(1, 2, 161, 166, dtype=dtype)
    for actual, expected in zip(emulated(*pair, weights), defined(*pair, weights), strict=True):
        assert_near(actual, expected, dtype)
    jacobian = torch.ops.lidnet_fast_emulated.multi_loss_jacobian(*pair, list(weights), None, 1.0, 1.0)
    assert_near(jacobian[0], defined(*pair, {"ms_ssim": 1.0})[2], dtype)


def test_values_without_a_gradient():
    pair = images(1, 1, 20, 40)
    arguments = (list(WEIGHTS), list(WEIGHTS.values()), None, 1.0, 1.0, False)
    total, values, gradient = torch.ops.lidnet_fast_emulated.multi_loss(*pair, *arguments)
    assert gradient.numel() == 0
    for actual, expected in zip((total, values), defined(*pair, WEIGHTS), strict=False):
        assert_near(actual, expected, torch.float32)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_nan_reaches_the_value_of_its_term(name):
    input, target = images(1, 1, 30, 70)
    input[0, 0, 20, 60] = torch.nan
    total, _, gradient = emulated(input, target, {name: 1.0})
    assert total.isnan()
    assert gradient[0, 0, 20, 60].isnan()
    assert gradient[0, 0, :8].isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1, 1), (4, 3, 70), (9, 2, 33, 21), (3, 2, 17000)])
def test_gramian_and_combination(dtype, shape):
    gradients = torch.randn(shape, dtype=torch.float64).to(dtype)
    rows = gradients.double().flatten(1)
    gramian = torch.ops.lidnet_fast_emulated.gradient_gramian(gradients, False)
    assert_near(gramian, rows @ rows.T, dtype)
    if len(shape) > 2:
        per_sample = torch.ops.lidnet_fast_emulated.gradient_gramian(gradients, True)
        assert_near(per_sample, torch.einsum("tn...,un...->ntu", gradients.double(), gradients.double()), dtype)
    coefficients = torch.randn(shape[0], dtype=gramian.dtype)
    combined = torch.ops.lidnet_fast_emulated.combine_gradients(gradients, coefficients)
    exact = (coefficients.double() @ rows).view(shape[1:])
    assert_near(combined, exact.to(dtype).double() if dtype in (torch.float16, torch.bfloat16) else exact, dtype)


@pytest.mark.parametrize("_order", [0], indirect=True)
def test_every_barrier_is_needed(emulation):
    """The checks find the race that leaving out any one of the barriers makes, whatever the order."""
    pair, volumes = images(1, 1, 45, 40), images(1, 1, 12, 13, 12)

    def everything():
        emulated(*pair, WEIGHTS, MANY_BOXES[MANY_BOXES[:, 0] == 0].repeat(2, 1), 2.0)
        emulated(*volumes, WEIGHTS)
        torch.ops.lidnet_fast_emulated.gradient_gramian(torch.randn(3, 50), False)

    everything()
    places = emulation.barriers()
    assert len(places) > 5
    found = {}
    for place in places:
        emulation.reset(skipped=place)
        with contextlib.suppress(RuntimeError):
            everything()
        found[place] = emulation.error()
    emulation.reset()
    assert [place for place, error in found.items() if "race" not in error and "never written" not in error] == []


@pytest.mark.slow
@pytest.mark.parametrize("_order", [0], indirect=True)
def test_no_access_leaves_a_tensor():
    """The other tests under AddressSanitizer, which sees every access to memory."""
    library = build(["-fsanitize=address", "-O1", "-g"])
    names = ("libasan.so", "libstdc++.so.6")
    preloaded = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {
        **os.environ,
        "LIDNET_FAST_EMULATED": str(library),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
    }
    selected = ["-m", "not slow", "-k", "not barrier", __file__]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
