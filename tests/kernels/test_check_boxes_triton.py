"""The Triton kernel that checks boxes against the checks on the CPU: where it runs says conftest.py."""

import pytest
import torch
from torch import Tensor

from lidnet_fast._checks import WEIGHTS_RULE, boxes_rule, largest_coordinate
from lidnet_fast.functional._boxes import check_boxes

kernels = pytest.importorskip("lidnet_fast.kernels.check_boxes")
pytestmark = pytest.mark.interpreter

IMAGES, SCALE, AREAS = 3, 4.0, (30.0, 500.0)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HOSTILE = [-0.0, 1e-30, 1.5, 2.999, 3, -1, 65504, 8.6e37, 1e38, 1e300, torch.nan, torch.inf, -torch.inf]


@pytest.fixture(autouse=True)
def _seed(poisoned):
    torch.manual_seed(0)


def random_boxes(count: int, axes: int = 2) -> Tensor:
    lower = 40 * torch.rand(count, axes, dtype=torch.float64) - 5
    index = torch.randint(IMAGES, (count, 1))
    return torch.cat((index, lower, lower + 60 * torch.rand(count, axes) ** 2), 1)


def both(boxes, device, *, weights=None, wide=False, areas=()):
    """Boxes and levels of the kernel and of the CPU; each is the message of an error where there is one."""
    axes = (boxes if isinstance(boxes, Tensor) else boxes[0]).shape[1] // 2
    features = torch.empty(IMAGES, 1, *[8] * axes, dtype=torch.float64 if wide else torch.float32)
    dtype, rules = features.dtype, [boxes_rule(axes), WEIGHTS_RULE]
    parts = [boxes] if isinstance(boxes, Tensor) else boxes
    try:
        on_device = [part.to(device) for part in parts], None if weights is None else weights.to(device)
        largest = largest_coordinate(dtype, SCALE)
        rois, levels = kernels.check_boxes(*on_device, IMAGES, largest, list(areas), rules, dtype)
        ours = rois.cpu(), levels.cpu()
    except Exception as error:  # the interpreter's and the executor's differ
        ours = next((rule for rule in rules if rule in str(error)), None)
        if ours is None:
            raise
    try:
        rois, _, levels = check_boxes(boxes, features, SCALE, box_weights=weights, level_areas=areas)
        expected = rois, torch.empty(0, dtype=torch.int64) if levels is None else levels
    except ValueError as error:
        expected = rules["box_weights" in str(error)]
    return ours, expected


def check(*arguments, **options):
    ours, expected = both(*arguments, **options)
    assert not isinstance(expected, str)
    for here, there in zip(ours, expected, strict=True):
        assert here.dtype == there.dtype
        assert torch.equal(here, there)


@pytest.mark.filterwarnings("ignore::lidnet_fast.InputWarning")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_boxes_of_every_dtype(device, dtype, wide):
    boxes = random_boxes(140).to(dtype)  # two programs
    boxes[:, 3:] = torch.maximum(boxes[:, 3:], boxes[:, 1:3])
    weights = torch.randn(140).to(dtype)
    check(boxes, device, weights=weights, wide=wide, areas=AREAS)


@pytest.mark.filterwarnings("ignore::lidnet_fast.InputWarning")
@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 130, 1), (1, 0, 0), (0, 0, 0)])
def test_lists(device, counts):
    check([random_boxes(count)[:, 1:].float().contiguous() for count in counts], device, areas=AREAS)


@pytest.mark.filterwarnings("ignore::lidnet_fast.InputWarning")
def test_lists_of_views_of_dtypes_and_of_many_images(device, monkeypatch):
    boxes = random_boxes(6)
    check([boxes[:1, 1:].float(), boxes[1:1, 1:], boxes[1:, 1:].half()], device)
    check(list(boxes.float()[:, 1:].split([1, 2, 3])), device)
    monkeypatch.setattr(kernels, "_MOST_IMAGES", 2)
    check(list(boxes.float()[:, 1:].split([1, 2, 3])), device, weights=torch.ones(6), areas=AREAS)


@pytest.mark.filterwarnings("ignore::lidnet_fast.InputWarning")
def test_volumes(device):
    boxes = random_boxes(9, axes=3)
    check(boxes.float(), device)
    check(list(boxes.float()[:, 1:].split([4, 0, 5])), device)


def test_levels_of_squares_of_just_the_canonical_side(device):
    """They belong to the upper level, as in torchvision, in whatever arithmetic."""
    sides = torch.tensor([7.0, 14, 28, 56, 112, 224, 13.999, 27.998, 0])
    boxes = torch.stack([torch.zeros(9), *[torch.full((9,), 3.0)] * 2, *[3 + sides] * 2], 1)
    areas = [(side * 2**-1e-6) ** 2 for side in (14, 28, 56)]
    for wide in (False, True):
        _, levels = both(boxes, device, wide=wide, areas=areas)[0]
        assert levels.tolist() == [0, 1, 2, 3, 3, 3, 0, 1, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed assertion ends what the process can do on a GPU")
@pytest.mark.filterwarnings("ignore::lidnet_fast.InputWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_hostile_values_are_refused_where_the_cpu_refuses_them(device, wide, as_list):
    refused = set()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        boxes, weights = random_boxes(3), torch.ones(3, dtype=torch.float64)
        place = int(torch.randint(18, (), generator=generator))
        value = HOSTILE[number % len(HOSTILE)]
        (boxes.view(-1) if place < 15 else weights)[min(place, 17) % (15 if place < 15 else 3)] = value
        boxes = boxes if wide else boxes.float()
        ours, expected = both(list(boxes[:, 1:].split(1)) if as_list else boxes, device, weights=weights, wide=wide)
        assert isinstance(ours, str) == isinstance(expected, str), (boxes, weights)
        if isinstance(expected, str):
            assert ours == expected
            refused.add(expected)
        else:
            assert torch.equal(ours[0], expected[0])
    assert refused == {boxes_rule(2), WEIGHTS_RULE}


@pytest.mark.parametrize("as_list", [False, True])
def test_memory(device, recorded, watched, as_list):
    """No access outside the tensors, no element stored twice, each value loaded and stored once."""
    boxes, weights = random_boxes(130).float().to(device), torch.rand(130, device=device)
    parts = [part.contiguous() for part in boxes[:, 1:].split([1, 128, 1])] if as_list else [boxes]
    rules = [boxes_rule(2), WEIGHTS_RULE]
    with (
        recorded((torch.Tensor, "new_empty")) as allocated,
        watched(lambda: [*parts, weights, *allocated]) as traffic,
    ):
        rois, levels = kernels.check_boxes(parts, weights, IMAGES, 1e30, list(AREAS), rules, torch.float32)
    assert traffic.loaded == sum(part.nbytes for part in parts) + weights.nbytes
    assert traffic.stored == rois.nbytes + levels.nbytes
