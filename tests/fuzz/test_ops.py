"""Random arguments of the public ops: both backends refuse them alike, or agree on values and gradients."""

import math

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

import lidnet_fast
from lidnet_fast import backend
from lidnet_fast.functional.pixel_losses import SMALLEST_SIDE
from lidnet_fast.functional.roi import CRITERIA, REDUCTIONS
from tests.fuzz.hostile import limits

pytestmark = pytest.mark.skipif("fused" not in backend.available(), reason="there are no kernels to compare")

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
COORDINATES = st.sampled_from([0.0, -0.0, 0.5, 1, 3, 7.99, 8, 16, -1, -5, 1e-40, 1e6, 1e30, -1e30, math.nan, math.inf])
ODD = st.sampled_from([0, -1, 1.5, True, "2", None, (2,), (2, 3), (1, 2, 3), (0, 1), 2**40])


def rarely(strategy, odd):
    return st.integers(0, 19).flatmap(lambda draw: odd if draw == 19 else strategy)


NUMBERS = rarely(
    st.sampled_from([1.0, 0.25, 0.5, 1, 1e-3]),
    st.sampled_from([0, -1.0, math.nan, math.inf, 1e-300, 1e300, 10**400, "x", True, None]),
)
DTYPES = rarely(st.sampled_from([*TOLERANCES, torch.float32]), st.just(torch.int32))


@st.composite
def tensors(draw, shape, dtype):
    """Values of ordinary size in an ordinary or odd layout."""
    seed = draw(st.integers(0, 9))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    layout = draw(st.sampled_from(["plain", "plain", "transposed", "strided", "expanded", "offset", "last"]))
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "offset":
        return torch.cat([values.new_zeros(3), values.ravel()])[3:].view(values.shape)
    if layout == "last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values


@st.composite
def boxes(draw, images, axes, side):
    """Boxes, most of them sound: inside, over the edges, far away, without area, huge."""
    count, columns = draw(st.integers(0, 4)), 2 * axes
    rows = []
    for _ in range(count):
        inside = st.floats(-2, side + 2, width=32)
        sound = draw(rarely(st.just(True), st.just(False)))
        corners = draw(st.lists(inside if sound else COORDINATES, min_size=columns, max_size=columns))
        if sound or draw(st.booleans()):
            pairs = [sorted((corners[axis], corners[axis + axes])) for axis in range(axes)]
            corners = [pair[end] for end in (0, 1) for pair in pairs]
        index = draw(rarely(st.integers(0, max(images - 1, 0)), st.sampled_from([-1, 99, 0.5, math.nan, 1e30])))
        rows.append([index, *corners])
    dtype = draw(rarely(st.sampled_from([torch.float32, torch.float64]), st.sampled_from([torch.int64, torch.float16])))
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, columns + 1)
    table = (table.nan_to_num(0) if dtype == torch.int64 else table).to(dtype)
    if draw(st.booleans()):
        return table
    return [table[table[:, 0] == image, 1:] for image in range(images)]


def run(name, call):
    """The result and the gradient, or the error, of one backend."""
    backend.use(name)
    try:
        with limits():
            return call()
    except (ValueError, TypeError) as error:
        return error
    finally:
        backend.use(None)


def check(call, dtype):
    """Both backends do the same; `call` returns a list of tensors."""
    expected, actual = run("reference", call), run("fused", call)
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        event(f"refused by {type(expected).__name__}")
        assert type(expected) is type(actual), (expected, actual)
        assert str(expected) == str(actual)
        return
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.shape == reference.shape
        assert ours.dtype == reference.dtype
        if reference.isfinite().all():
            assert ours.isfinite().all(), (ours, reference)
            error = (ours.double() - reference.double()).norm()
            assert error <= TOLERANCES[dtype] * max(float(reference.double().norm()), 1e-2), (ours, reference)
        else:
            torch.testing.assert_close(ours.isnan(), reference.isnan())


def with_gradient(function, input, *leaves):
    """Values of a function of tensors, and its gradients for a random upstream gradient."""
    leaf = input.detach().requires_grad_(input.is_floating_point())
    result = function(leaf)
    if not result.requires_grad:
        return [result]
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(result, leaf, upstream.to(result.dtype))
    return [result.detach(), gradient]


def shapes(axes, smallest=0, largest=12):
    sides = st.integers(max(smallest, 1), largest) if smallest else rarely(st.integers(1, largest), st.just(0))
    return st.tuples(rarely(st.integers(1, 3), st.just(0)), sides, *[sides] * axes)


@given(data=st.data())
def test_roi_perceptual_loss(data):
    axes = data.draw(st.sampled_from([2, 2, 3]))
    shape, dtype = data.draw(shapes(axes, largest=9)), data.draw(DTYPES)
    input, target = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    rois = data.draw(boxes(shape[0], axes, 9))
    count = len(rois) if isinstance(rois, torch.Tensor) else sum(map(len, rois))
    weights = data.draw(
        rarely(st.sampled_from([None, torch.linspace(0, 2, count)]), st.just(torch.full((count,), math.nan)))
    )
    options = {
        "output_size": data.draw(rarely(st.integers(1, 5), ODD)),
        "spatial_scale": data.draw(NUMBERS),
        "sampling_ratio": data.draw(rarely(st.integers(-1, 3), ODD)),
        "aligned": data.draw(rarely(st.booleans(), ODD)),
        "criterion": data.draw(rarely(st.sampled_from(CRITERIA), ODD)),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
        "box_weights": weights,
    }
    assume(not huge(rois, options))
    check(
        lambda: with_gradient(lambda leaf: lidnet_fast.roi_perceptual_loss(leaf, target, rois, **options), input), dtype
    )


def huge(rois, options):
    """Whether the caller asks for more work than there is time: an enormous number of bins or samples."""
    size = options["output_size"]
    largest = max((float(part.double().abs().nan_to_num(0, 0, 0).max()) for part in rois if part.numel()), default=0)
    scale = options.get("spatial_scale", 1.0)
    adaptive = (
        options["sampling_ratio"] in (-1, 0) and isinstance(scale, int | float) and largest * min(scale, 1e9) > 100
    )
    return adaptive or any(isinstance(value, int) and value > 100 for value in (size, options["sampling_ratio"]))


@given(data=st.data())
def test_roi_align(data):
    axes = data.draw(st.sampled_from([2, 2, 3]))
    shape, dtype = data.draw(shapes(axes, largest=9)), data.draw(DTYPES)
    input, rois = data.draw(tensors(shape, dtype)), data.draw(boxes(shape[0], axes, 9))
    options = {
        "output_size": data.draw(rarely(st.integers(1, 5), ODD)),
        "spatial_scale": data.draw(NUMBERS),
        "sampling_ratio": data.draw(rarely(st.integers(-1, 3), ODD)),
        "aligned": data.draw(rarely(st.booleans(), ODD)),
    }
    assume(not huge(rois, options))
    check(lambda: with_gradient(lambda leaf: lidnet_fast.roi_align(leaf, rois, **options), input), dtype)


@st.composite
def pyramids(draw):
    """Levels by name, the same again, their boxes and images' sizes."""
    images, channels, side = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([8, 12, 16]))
    dtype, count = draw(DTYPES), draw(st.integers(0, 3))
    first, second = (
        {str(n): draw(tensors((images, channels, side >> n, side >> n), dtype)) for n in range(count)} for _ in range(2)
    )
    odd_sizes = st.sampled_from([(0, 1), (1,), 3, (math.nan, 4), ("a", "b")])
    return first, second, draw(boxes(images, 2, 64)), [draw(rarely(st.just((side * 4, side * 4)), odd_sizes))] * images


@given(data=st.data(), op=st.sampled_from(["multiscale_roi_perceptual_loss", "multiscale_roi_align"]))
def test_pyramids(data, op):
    inputs, targets, rois, image_sizes = data.draw(pyramids())
    options = {
        "output_size": data.draw(rarely(st.integers(1, 4), ODD)),
        "sampling_ratio": data.draw(rarely(st.integers(-1, 3), ODD)),
        "canonical_scale": data.draw(NUMBERS),
        "canonical_level": data.draw(rarely(st.integers(-3, 6), ODD)),
    }
    further = [rois, image_sizes]
    if op == "multiscale_roi_perceptual_loss":
        options["reduction"] = data.draw(st.sampled_from(REDUCTIONS))
        further.insert(0, targets)
    assume(not huge(rois, options))

    def call():
        leaves = {name: level.detach().requires_grad_(level.is_floating_point()) for name, level in inputs.items()}
        result = getattr(lidnet_fast, op)(leaves, *further, **options)
        gradients = torch.autograd.grad(result.sum(), list(leaves.values()), materialize_grads=True)
        return [result.detach(), *gradients]

    check(call, next((level.dtype for level in inputs.values()), torch.float32))


@given(data=st.data())
def test_multi_loss(data):
    axes = data.draw(st.sampled_from([2, 2, 2, 3]))
    shape = data.draw(shapes(axes, largest=20 if axes == 2 else 13))
    dtype = data.draw(DTYPES)
    input, target = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    fitting = [name for name, side in SMALLEST_SIDE.items() if side <= min(shape[2:])] or ["l1"]
    names = data.draw(st.lists(rarely(st.sampled_from(fitting), st.sampled_from(["ms_ssim", "l2", 3])), max_size=4))
    weights = {name: data.draw(NUMBERS | st.just(-0.5)) for name in names}
    options = {
        "boxes": data.draw(boxes(shape[0], axes, 20)),
        "roi_weight": data.draw(st.just(1.0) | st.just(3.0) | NUMBERS),
        "data_range": data.draw(st.just(1.0) | NUMBERS),
    }
    extreme = [*weights.values(), options["roi_weight"], options["data_range"]]
    alone = st.sampled_from([("boxes",), ("roi_weight",)])
    for left_out in data.draw(rarely(st.sampled_from([(), ("boxes", "roi_weight")]), alone)):
        del options[left_out]
    assume(not any(isinstance(value, float) and abs(value) in (1e-300, 1e300) for value in extreme))
    check(
        lambda: with_gradient(lambda leaf: lidnet_fast.multi_loss(leaf, target, weights, **options).total, input), dtype
    )
    check(lambda: [lidnet_fast.multi_loss_jacobian(input, target, names, **options)], dtype)


@given(data=st.data())
def test_gradients(data):
    shape = tuple(data.draw(st.lists(rarely(st.integers(1, 7), st.just(0)), max_size=4)))
    dtype = data.draw(DTYPES)
    gradients = data.draw(tensors(shape, dtype)) if shape else torch.zeros((), dtype=dtype)
    per_sample = data.draw(rarely(st.booleans(), ODD))
    check(
        lambda: with_gradient(lambda leaf: lidnet_fast.gradient_gramian(leaf, per_sample=per_sample), gradients), dtype
    )
    count = data.draw(rarely(st.just(shape[0] if shape else 1), st.integers(0, 3)))
    coefficients = data.draw(tensors((count,), data.draw(DTYPES)))
    check(lambda: with_gradient(lambda leaf: lidnet_fast.combine_gradients(leaf, coefficients), gradients), dtype)


@given(data=st.data())
def test_roi_windows(data):
    axes = data.draw(st.sampled_from([2, 3]))
    shape, dtype = data.draw(shapes(axes, largest=6)), data.draw(DTYPES)
    images = data.draw(tensors(shape, dtype))
    size = data.draw(rarely(st.tuples(*[st.integers(1, max(side, 1)) for side in shape[2:]]), ODD))
    count = data.draw(st.integers(0, 4))
    places = st.integers(-1, 3) | st.sampled_from([0, 0, 0, 2**62, -(2**63)])
    rows = data.draw(st.lists(st.lists(places, min_size=axes + 1, max_size=axes + 1), min_size=count, max_size=count))
    corners = torch.tensor(rows, dtype=torch.int64).reshape(-1, axes + 1)
    if data.draw(st.booleans()) and isinstance(size, tuple) and len(size) == axes and min(shape) > 0:
        most = torch.tensor([shape[0] - 1, *(side - part for side, part in zip(shape[2:], size, strict=True))])
        corners = corners.clamp(torch.zeros_like(most), most.clamp(min=0))
    check(lambda: with_gradient(lambda leaf: lidnet_fast.roi_windows(leaf, corners, size), images), dtype)
