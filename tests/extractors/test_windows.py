import numpy as np
import pytest
import torch
from torch import nn

from lidnet_fast.extractors import LayerExtractor
from lidnet_fast.extractors.receptive_field import LayerGraph
from lidnet_fast.extractors.windows import MOST_WINDOWS, WindowPlanner
from tests.extractors.networks import networks

NETWORKS = networks()
SIDES = (96, 101)


def planner(name="pooling", sides=SIDES, layers=None):
    network, known = NETWORKS[name]
    extractor = LayerExtractor(network, layers or known)
    return WindowPlanner(LayerGraph(extractor), sides)


def random_boxes(count, images=2, sides=SIDES, seed=0, largest=20.0):
    generator = np.random.default_rng(seed)
    low = generator.uniform(-10, np.array(sides[::-1]) + 5, (count, 2))
    high = low + generator.uniform(0, largest, (count, 2))
    return np.hstack((generator.integers(0, images, (count, 1)), low, high))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "volumes"])
def test_windows_hold_the_boxes_and_lie_in_the_image(name):
    planned = planner(name)
    boxes = random_boxes(40)
    plan = planned.plan(boxes, 2)
    for number, box in enumerate(boxes):
        if plan.window_of_box[number] < 0:
            assert int(box[0]) in plan.whole
            continue
        window = plan.windows[plan.window_of_box[number]]
        assert window.image == box[0]
        for axis, stretch, low, high in zip(planned.axes, window.stretches, box[2:0:-1], box[4:2:-1], strict=True):
            pixels = axis.needed(stretch)[axis.graph.image]
            assert 0 <= pixels.start < pixels.stop <= axis.pixels
            for node, cells in axis.wanted(stretch).items():
                stride, last = float(axis.graph.strides[node][axis.axis]), axis.sizes[node] - 1
                assert cells.start <= np.clip(np.floor(low / stride - 0.5), 0, last)
                assert cells.stop > np.clip(np.floor(high / stride - 0.5) + 1, 0, last)


@pytest.mark.parametrize("name", ["pooling", "residual", "u-net", "cropping", "reflect"])
def test_windows_of_one_kind_have_one_shape(name):
    planned = planner(name)
    shapes = {}
    for seed in range(30):
        for window in planned.plan(random_boxes(4, seed=seed), 2).windows:
            needed = [axis.needed(s) for axis, s in zip(planned.axes, window.stretches, strict=True)]
            shape = [{node: cells.stop - cells.start for node, cells in of_axis.items()} for of_axis in needed]
            assert shapes.setdefault(window.kind, shape) == shape


def test_windows_have_few_sizes():
    """Of one pixel to the whole of a large image."""
    for name in NETWORKS:
        if name != "volumes":
            assert len(planner(name, sides=(1024, 1024)).axes[0].buckets) <= 60


def test_boxes_apart_have_windows_of_their_own_and_boxes_together_share_one():
    boxes = np.array([[0, 10, 10, 14, 14], [0, 12, 11, 16, 15], [0, 70, 70, 75, 76], [1, 12, 11, 16, 15]], float)
    plan = planner().plan(boxes, 2)
    assert plan.window_of_box.tolist() == [0, 0, 1, 2]
    assert [window.image for window in plan.windows] == [0, 0, 1]
    assert 0 < plan.relative_cost < 0.2


def test_the_same_box_many_times_is_one_window():
    boxes = np.tile(np.array([[0, 30, 30, 40, 40.0]]), (1000, 1))
    assert len(planner().plan(boxes, 1).windows) == 1


def test_more_boxes_than_can_be_compared():
    boxes = random_boxes(3 * MOST_WINDOWS, images=1, sides=(4000, 4000), largest=4)
    plan = planner(sides=(4000, 4000)).plan(boxes, 1)
    assert len(plan.windows) <= MOST_WINDOWS
    assert (plan.window_of_box >= 0).all() or plan.whole


def test_merging_lowers_the_cost():
    planned = planner()
    for seed in range(10):
        boxes = random_boxes(12, images=1, seed=seed)
        together = planned.plan(boxes, 1).relative_cost
        apart = sum(planned.plan(boxes[number : number + 1], 1).relative_cost for number in range(len(boxes)))
        assert together <= apart + 1e-9


def test_lesions_that_cover_the_image_have_it_computed_as_a_whole():
    boxes = np.array([[1, 2, 2, 99, 94], [0, 5, 5, 9, 9]], float)
    plan = planner().plan(boxes, 2)
    assert list(plan.whole) == [1]
    assert "windows for 1 boxes would cost 1.00 of the whole image" in plan.whole[1]
    assert plan.window_of_box.tolist() == [-1, 0]
    assert 0.5 < plan.relative_cost < 0.6


def test_cost_grows_with_lesions_not_with_the_image():
    boxes = np.array([[0, 40, 40, 50, 50]], float)
    small, large = planner(sides=(128, 128)), planner(sides=(1024, 1024))
    of_small, of_large = (p.plan(boxes, 1).relative_cost * p.whole_cost for p in (small, large))
    assert of_small == pytest.approx(of_large)
    two = np.vstack((boxes, boxes + np.array([0, 300, 300, 300, 300])))
    assert large.plan(two, 1).relative_cost * large.whole_cost == pytest.approx(2 * of_large)


def test_no_boxes():
    plan = planner().plan(np.empty((0, 5)), 3)
    assert (plan.windows, plan.whole, plan.relative_cost) == ([], {}, 0.0)


def test_images_that_leave_no_cell():
    with pytest.raises(ValueError, match="images of 3 pixels along an axis are too small for '1', '3': no cell"):
        planner(sides=(3, 64))


def test_alignment_of_finer_layers_than_the_image():
    extractor = LayerExtractor(nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv2d(1, 1, 3, padding=1)), ["1"])
    planned = WindowPlanner(LayerGraph(extractor), (20, 20))
    assert planned.axes[0].alignment == 1
    window = planned.plan(np.array([[0, 5.0, 5, 9, 9]]), 1).windows[0]
    assert planned.axes[0].needed(window.stretches[0])[planned.axes[0].graph.image].start in (3, 4)
    assert torch.is_tensor(extractor(torch.rand(1, 1, 20, 20))["1"])
