"""What holds for the kernels beyond their agreement with the definition, which test_roi_perceptual*.py show."""

import weakref

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lidnet_fast import backend, multiscale_roi_perceptual_loss, reference, roi_perceptual_loss

pytestmark = pytest.mark.skipif("fused" not in backend.available(), reason="the extension isn't built")

OPTIONS = ([0.5], [3, 2], 2, True, "charbonnier")
BOXES = torch.tensor([[0, 1.5, 2, 20, 17], [1, 0, 0, 22, 18], [1, -4, 5, 9, 40], [0, 3, 3, 3, 3]])


@pytest.fixture(autouse=True)
def _backend():
    backend.use("fused")
    yield
    backend.use(None)


def features(*shape, dtype=torch.float32, channels_last=False):
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).contiguous(memory_format=form) for _ in range(2)]


def losses_and_gradient(input, target, boxes, upstream, *arguments, **options):
    leaf = input.detach().requires_grad_()
    losses = roi_perceptual_loss(leaf, target, boxes, *arguments, reduction="none", **options)
    return losses.detach(), torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))[0]


def expected_losses_and_gradient(input, target, boxes, upstream, size=7, scale=1.0, ratio=2, criterion="mse"):
    leaf = input.detach().double().requires_grad_()
    pooling = (boxes.double(), None, [scale], (size, size), ratio, True)
    losses = reference.roi_perceptual_loss([leaf], [target.double()], *pooling, criterion)
    return losses.detach(), torch.autograd.grad(losses, leaf, upstream.double())[0]


def many_boxes(count, images, width, height):
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 1.2 - 0.1 * width
    side = torch.tensor([width, height]) ** torch.rand(count, 2)
    index = torch.randint(images, (count, 1)).float()
    return torch.cat((index, corner, corner + side), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "height", "width"), [(8, 40, 33), (37, 19, 64), (70, 5, 7), (1, 30, 8)])
@pytest.mark.parametrize("ratio", [2, -1])
def test_shapes_that_do_and_do_not_fill_the_vectors(assert_near, dtype, channels_last, channels, height, width, ratio):
    input, target = features(2, channels, height, width, dtype=dtype, channels_last=channels_last)
    boxes, upstream = many_boxes(25, 2, width, height), torch.randn(25)
    losses, gradient = losses_and_gradient(input, target, boxes, upstream, sampling_ratio=ratio)
    expected = expected_losses_and_gradient(input, target, boxes, upstream, ratio=ratio)
    assert_near(losses, expected[0], dtype if dtype == torch.float64 else torch.float32)
    assert gradient.stride() == input.stride()
    assert_near(gradient, expected[1], dtype)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_boxes_than_a_block_lists_at_once(assert_near, channels_last):
    input, target = features(2, 11, 24, 20, channels_last=channels_last)
    boxes, upstream = many_boxes(2000, 2, 20, 24), torch.randn(2000)
    result = losses_and_gradient(input, target, boxes, upstream, sampling_ratio=4)
    expected = expected_losses_and_gradient(input, target, boxes, upstream, ratio=4)
    assert_near(result[0], expected[0], torch.float32)
    assert_near(result[1], expected[1], torch.float32)


def test_layouts_of_the_pair_may_differ(assert_near):
    (input, _), (_, target) = features(2, 40, 9, 12), features(2, 40, 9, 12, channels_last=True)
    upstream = torch.randn(len(BOXES))
    for a, b in ((input, target), (target, input)):
        result = losses_and_gradient(a, b, BOXES, upstream, 7, 0.5)
        expected = expected_losses_and_gradient(a, b, BOXES, upstream, scale=0.5)
        assert_near(result[0], expected[0], torch.float32)
        assert_near(result[1], expected[1], torch.float32)


def test_overlapping_boxes_in_half_precision_are_summed_in_float32(assert_near):
    """Summed in bfloat16, 3000 equal contributions would stop growing at 256 times the first."""
    input, target = features(1, 8, 8, 8, dtype=torch.bfloat16)
    boxes = torch.tensor([[0.0, 1, 1, 6, 6]]).repeat(3000, 1)
    _, gradient = losses_and_gradient(input, target, boxes, torch.ones(3000))
    _, expected = expected_losses_and_gradient(input, target, boxes, torch.ones(3000))
    assert_near(gradient, expected, torch.bfloat16)


@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_gives_the_same_bits(with_threads, channels_last):
    input, target = features(3, 50, 40, 40, channels_last=channels_last)
    boxes, upstream = many_boxes(60, 3, 40, 40), torch.randn(60)
    results = with_threads(lambda: losses_and_gradient(input, target, boxes, upstream, criterion="l1"), (1, 2, 3, 7))
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cell_of_the_gradient_is_written(dtype, channels_last):
    """Gradients are allocated empty: freed memory full of NaN mustn't shine through."""
    input, target = features(2, 33, 64, 64, dtype=dtype, channels_last=channels_last)
    boxes = torch.tensor([[1.0, 5, 5, 9, 9]])
    for _ in range(3):
        poison = [torch.full_like(input, torch.nan) for _ in range(4)]
        del poison
        _, gradient = losses_and_gradient(input, target, boxes, torch.ones(1))
        assert gradient.isfinite().all()
        assert not gradient[0].any()
        assert not gradient[1, :, 20:].any()


def test_features_are_free_once_the_loss_is_there():
    """The backward needs a value per box, channel and bin."""
    leaf, target = features(2, 8, 9, 12)
    copies = [leaf.requires_grad_() * 1, target.clone()]
    alive = [weakref.ref(copy) for copy in copies]
    loss = roi_perceptual_loss(*copies, BOXES, 3, 0.5, reduction="none")
    copies.clear()
    assert [one() for one in alive] == [None, None]
    assert sum(kept.numel() for kept in loss.grad_fn.saved_tensors if kept is not None) == 4 * 8 * 9 + BOXES.numel()
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(gradient, losses_and_gradient(leaf, target, BOXES, torch.ones(4), 3, 0.5)[1])


def test_nothing_is_kept_where_no_gradient_will_be():
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            called.append(op.name())
            return op(*arguments, **(options or {}))

    called = []
    input, target = features(2, 8, 9, 12)
    with torch.no_grad(), Ops():
        roi_perceptual_loss(input.requires_grad_(), target, BOXES, 3)
    assert [name for name in called if "roi" in name] == ["lidnet_fast::roi_perceptual_loss"]


def test_the_graph_can_be_walked_twice(assert_near):
    input, target = features(2, 8, 9, 12)
    leaf = input.requires_grad_()
    losses = roi_perceptual_loss(leaf, target, BOXES, 3, 0.5, reduction="none")
    first, second = (torch.autograd.grad(losses, leaf, torch.full((4,), f), retain_graph=True)[0] for f in (1.0, 3.0))
    assert_near(second, 3 * first, torch.float32)


def test_boxes_as_large_as_numbers_go_take_no_time_and_no_memory():
    input, target = features(1, 2, 8, 8)
    boxes = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30], [0, 1e9, 1e9, 2e9, 2e9], [0, -3e38, 0, 3e38, 3]])
    losses, gradient = losses_and_gradient(input, target, boxes, torch.ones(3), sampling_ratio=-1)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def op_arguments(dtype=torch.float32):
    (a, c), (b, d) = features(2, 5, 9, 12, dtype=dtype), features(2, 5, 18, 24, dtype=dtype)
    rois = BOXES.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [b.requires_grad_(), a.requires_grad_()], [d, c], rois, torch.tensor([0, 1, 1, 0]), [1.0, *OPTIONS[0]]


@pytest.mark.parametrize(("weights", "reduction"), [(None, "none"), (torch.arange(1.0, 5), "mean")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, weights, reduction):
    arguments = (*op_arguments(dtype), *OPTIONS[1:], weights, reduction)
    opcheck(torch.ops.lidnet_fast.roi_perceptual_loss.default, arguments)
    inputs, targets, *pooling, criterion, _, _ = arguments
    constant = [level.detach() for level in inputs]  # slopes have a derivative, but it is refused
    opcheck(
        torch.ops.lidnet_fast.roi_perceptual_loss_and_slopes.default,
        (constant, targets, *pooling, criterion, weights, reduction),
    )
    upstream = torch.randn(len(BOXES) if reduction == "none" else ())
    slopes = torch.randn(len(BOXES), 5, *OPTIONS[1])
    shapes = [side for level in inputs for side in level.shape]
    of_gradients = (shapes, [False, True], dtype)
    opcheck(
        torch.ops.lidnet_fast.roi_perceptual_loss_backward.default,
        (upstream, slopes, *pooling, weights, reduction, *of_gradients),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: BOXES.index_fill(1, torch.tensor([0]), 7)}, r"boxes\[0\] must have an integer batch index in \[0, 2\)"),
        ({2: BOXES * torch.nan}, r"boxes\[0\] must have an integer batch index"),
        ({2: BOXES.flip(1).index_fill(1, torch.tensor([0]), 0)}, r"boxes\[0\] must have finite, ordered coordinates"),
        ({2: BOXES.double()}, "rois must be float64 for float64 features, else float32"),
        ({3: torch.tensor([0, 1, 2, 0])}, r"box_levels\[2\] must be a level, got 2"),
        ({3: None}, "box_levels is needed for more than one level"),
        ({4: [1.0]}, "one entry per level"),
        ({5: [3, 3, 3]}, "output_size must have 2 entries"),
        ({8: "l3"}, "criterion must be .*got l3"),
    ],
)
def test_the_kernel_checks_what_compiled_code_could_not(change, message):
    """Values of boxes can't be looked at while torch.compile traces; memory stays safe all the same."""
    arguments = [*op_arguments(), *OPTIONS[1:]]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lidnet_fast.roi_perceptual_loss(*arguments, None, "none")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_pyramid_compiles_as_one_graph(assert_near, compiler):
    levels, targets = ({name: x.detach() for name, x in zip("ab", pair, strict=True)} for pair in op_arguments()[:2])

    def loss(a, b, boxes):
        return multiscale_roi_perceptual_loss(
            {"a": a, "b": b},
            targets,
            boxes,
            [(36, 48)] * 2,
            canonical_scale=16,
            canonical_level=1,
            box_weights=torch.arange(1.0, 5),
        )

    results = []
    for function in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in levels.values()]
        value = function(*leaves, BOXES * torch.tensor([1, 2, 2, 2, 2]))
        results.append((value, *torch.autograd.grad(value, leaves)))
    for ours, expected in zip(*results, strict=True):
        assert_near(ours, expected, torch.float32)


def test_export(assert_near):
    class Loss(torch.nn.Module):
        def forward(self, input, target, boxes):
            return roi_perceptual_loss(input, target, boxes, spatial_scale=0.5, criterion="l1")

    input, target = features(2, 3, 9, 12)
    program = torch.export.export(Loss(), (input, target, BOXES))
    assert "lidnet_fast.roi_perceptual_loss" in program.graph_module.print_readable(print_output=False)
    other = [x + 1 for x in (input, -target)]
    assert_near(program.module()(*other, BOXES), Loss()(*other, BOXES), torch.float32)


def test_autocast_takes_half_features_and_gives_float32():
    input, target = features(2, 3, 9, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = roi_perceptual_loss(input.requires_grad_(), target, BOXES, spatial_scale=0.5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert input.grad.dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    input, target = features(2, 3, 9, 12)
    loss = roi_perceptual_loss(input.requires_grad_(), target, BOXES)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"can't be differentiated twice.*roi_align"):
        gradient.sum().backward()


@pytest.mark.parametrize("batched", [0, 1, 2])
def test_vmap_of_one_argument(batched, assert_near):
    tensors = [*features(2, 3, 9, 12), BOXES]
    several = [tensors[batched], tensors[batched].flip(-1) if batched < 2 else tensors[batched].flip(0)]
    in_dims = tuple(0 if place == batched else None for place in range(3))
    calls = [[*tensors[:batched], one, *tensors[batched + 1 :]] for one in several]
    tensors[batched] = torch.stack(several)
    values = torch.vmap(roi_perceptual_loss, in_dims=in_dims)(*tensors)
    assert_near(values, torch.stack([roi_perceptual_loss(*arguments) for arguments in calls]), torch.float32)


def test_devices_without_kernels_run_on_the_definition():
    assert backend.implementation("roi_perceptual_loss", torch.device("cpu")) is not reference.roi_perceptual_loss
    assert backend.implementation("roi_perceptual_loss", torch.device("mps")) is reference.roi_perceptual_loss
