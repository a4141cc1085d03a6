"""The planner in C++ (csrc/planner/) plans what the definition plans, to the last window."""

import numpy as np
import pytest
from torchvision.models import vgg19

from lidnet_fast import backend
from lidnet_fast.extractors import LayerExtractor
from lidnet_fast.extractors.receptive_field import LayerGraph
from lidnet_fast.extractors.windows import MOST_WINDOWS, WindowPlanner
from tests.extractors.networks import networks

MISSING = backend.missing_kernels()["window planner"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def graphs():
    vgg = vgg19()
    graphs = [LayerGraph(LayerExtractor(vgg, layers)) for layers in (["relu3_4"], ["relu2_2", "relu4_4"])]
    return graphs + [LayerGraph(LayerExtractor(network, layers)) for network, layers in networks().values()]


def random_case(graph, generator):
    """A planner, and arguments of `plan`."""
    axes = len(graph.alignment)
    sides = generator.integers(48, 900 if axes == 2 else 90, axes)
    planner = WindowPlanner(graph, sides.tolist())
    if generator.random() < 0.7:  # windows, whatever they cost
        planner.whole_cost = float("inf")
    images = int(generator.integers(1, 5))
    count = int(generator.integers(0, 40)) if generator.random() < 0.95 else 2 * MOST_WINDOWS
    low = generator.uniform(-10, sides[::-1] + 5, (count, axes))
    if generator.random() < 0.3:  # ties
        low = np.round(low)
    high = low + generator.uniform(0, generator.choice([2, 20, 60]), (count, axes))
    rois = np.hstack((generator.integers(0, images, (count, 1)), low, high))
    return planner, (rois, images, generator.random() < 0.5, generator.random() < 0.7)


def planned(planner, *arguments):
    """What the definition plans, and what the extension does; arrays as lists."""
    plans = []
    for name in ("reference", "fused"):
        with backend.use(name):
            plan = planner.plan(*arguments)
        cost = plan.relative_cost if np.isfinite(planner.whole_cost) else None
        plans.append((plan.windows, plan.window_of_box.tolist(), plan.window_of_box.dtype, plan.whole, cost))
    return plans


@pytest.mark.parametrize("cases", [pytest.param(range(100)), pytest.param(range(100, 2000), marks=pytest.mark.slow)])
def test_plans_are_equal(graphs, cases):
    windows = 0
    for seed in cases:
        generator = np.random.default_rng(seed)
        planner, arguments = random_case(graphs[seed % len(graphs)], generator)
        definition, extension = planned(planner, *arguments)
        assert definition == extension, seed
        windows += len(extension[0])
    assert windows > 5 * len(cases)


def test_the_definition_runs_where_it_is_chosen(graphs, monkeypatch):
    planner = WindowPlanner(graphs[0], (96, 96))
    boxes = np.array([[0, 10.0, 10, 20, 20]])
    monkeypatch.setattr(planner, "_plan", lambda *arguments: pytest.fail("the definition"))
    assert len(planner.plan(boxes, 1).windows) == 1
    monkeypatch.undo()
    monkeypatch.setattr(WindowPlanner, "_extension", property(lambda planner: pytest.fail("the extension")))
    with backend.use("reference"):
        assert len(planner.plan(boxes, 1).windows) == 1


def test_boxes_without_a_place_have_windows_within_the_image(graphs):
    """Losses refuse them before they plan."""
    planner = WindowPlanner(graphs[0], (512, 512))
    planner.whole_cost = float("inf")
    for place in (np.nan, np.inf, -np.inf, 1e300):
        plan = planner.plan(np.array([[0, place, place, place, place], [0, 5, 5, place, place]]), 1)
        for window in plan.windows:
            for axis, stretch in zip(planner.axes, window.stretches, strict=True):
                assert 0 <= stretch.start < stretch.stop <= axis.units


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 7)])
def test_boxes_of_another_shape_are_refused(graphs, shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \[K, 5\]"):
        WindowPlanner(graphs[0], (96, 96)).plan(np.zeros(shape), 1)
