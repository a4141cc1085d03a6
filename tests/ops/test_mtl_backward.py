import sys

import pytest
import torch
from torch import nn

from lidnet_fast import MultiLossOutput, mtl_backward

aggregation = pytest.importorskip("torchjd.aggregation")


def network_and_losses():
    """Three losses over a shared image; the last two also share what lies above it."""
    denoiser = nn.Conv2d(1, 1, 3, padding=1).double()
    detector = nn.Conv2d(1, 2, 3).double()
    shared = denoiser(torch.randn(2, 1, 6, 5, dtype=torch.float64))
    features = detector(shared).relu()
    losses = {"mse": (shared - 1).square().mean(), "roi": features.square().mean(), "detection": features.sin().sum()}
    return denoiser, detector, shared, losses


def gradients_at(shared, losses):
    return torch.stack([torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in losses.values()])


@pytest.mark.parametrize("as_mapping", [True, False])
@pytest.mark.parametrize(("weighting", "factor"), [("sum", 1.0), ("mean", 1 / 3)])
def test_sum_and_mean_are_plain_backward(assert_near, weighting, factor, as_mapping):
    denoiser, detector, shared, losses = network_and_losses()
    expected = torch.autograd.grad(factor * sum(losses.values()), denoiser.parameters(), retain_graph=True)
    output = mtl_backward(losses if as_mapping else list(losses.values()), shared, weighting)
    assert_near(output.weights, torch.full((3,), factor, dtype=torch.float64))
    for parameter, gradient in zip(denoiser.parameters(), expected, strict=True):
        assert_near(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in detector.parameters())


def test_statistics(assert_near):
    _, _, shared, losses = network_and_losses()
    gradients = gradients_at(shared, losses).flatten(1)
    output = mtl_backward(losses, shared)
    assert_near(output.gramian, gradients @ gradients.T)
    assert_near(output.norms, gradients.norm(dim=1))
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    assert_near(output.cosines, unit @ unit.T)


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "aligned_mtl", "imtl_g"])
def test_torchjd_weightings_by_name(assert_near, name):
    denoiser, _, shared, losses = network_and_losses()
    aggregator = {
        "mgda": aggregation.MGDA,
        "pcgrad": aggregation.PCGrad,
        "aligned_mtl": aggregation.AlignedMTL,
        "imtl_g": aggregation.IMTLG,
    }[name]()
    jacobian = gradients_at(shared, losses)
    torch.manual_seed(3)  # PCGrad draws an order
    expected = torch.autograd.grad(
        shared, denoiser.weight, aggregator(jacobian.flatten(1)).view_as(shared), retain_graph=True
    )
    torch.manual_seed(3)
    output = mtl_backward(losses, shared, name)
    assert_near(denoiser.weight.grad, expected[0], tolerance=1e-6)
    assert output.weights.shape == (3,)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_weightings_that_project_name_what_they_need(name):
    _, _, shared, losses = network_and_losses()
    try:
        aggregation.UPGradWeighting()
    except ImportError:
        with pytest.raises(ImportError, match="quadprog"):
            mtl_backward(losses, shared, name)
        return
    output = mtl_backward(losses, shared, name)
    # No loss rises along the combined gradient, to first order.
    assert (output.gramian @ output.weights >= -1e-6 * output.norms).all()


def test_callables(assert_near):
    denoiser, _, shared, losses = network_and_losses()
    seen = []

    def weigh(gramian):
        seen.append(gramian)
        return torch.tensor([2.0, 0.0, -1.0])

    jacobian = gradients_at(shared, losses)
    expected = torch.autograd.grad(shared, denoiser.weight, 2 * jacobian[0] - jacobian[2], retain_graph=True)
    output = mtl_backward(losses, shared, weigh)
    assert_near(denoiser.weight.grad, expected[0])
    assert torch.equal(seen[0], output.gramian)


def test_torchjd_instance_with_options():
    _, _, shared, losses = network_and_losses()
    output = mtl_backward(losses, shared, aggregation.ConstantWeighting(torch.tensor([1.0, 2.0, 3.0])))
    assert output.weights.tolist() == [1.0, 2.0, 3.0]


def test_shared_may_be_a_leaf_and_a_loss_may_have_no_gradient():
    shared = torch.randn(3, 4, requires_grad=True)
    output = mtl_backward([(2 * shared).sum(), (0 * shared).sum()], shared)
    assert torch.equal(shared.grad, torch.full((3, 4), 2.0))
    assert output.cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_half_precision_shared():
    shared = torch.randn(8, 4).bfloat16().requires_grad_()
    output = mtl_backward([shared.float().square().sum(), shared.float().sum()], shared)
    assert output.gramian.dtype == torch.float32
    assert shared.grad.dtype == torch.bfloat16
    assert torch.equal(shared.grad, (2 * shared.detach().float() + 1).bfloat16())


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "losses must hold at least one loss"),
        (lambda x: [x.sum(), x], ValueError, r"losses\[1\] must be a scalar, got shape \(2, 3\)"),
        (lambda x: {"mse": x.sum(), "roi": 3.0}, TypeError, r"losses\[roi\] must be a Tensor, got float"),
        (lambda x: {"mse": x.sum(), "roi": torch.tensor(1.0)}, ValueError, r"losses\[roi\] .*one without a graph"),
        (
            lambda x: [x.sum(), MultiLossOutput(x.sum(), {})],
            TypeError,
            r"losses\[1\] must be a Tensor, got MultiLossOutput. To fix: pass its .total",
        ),
        (lambda x: MultiLossOutput(x.sum(), {}), TypeError, r"must be several, .* To fix: pass \[its .total, further"),
        (
            lambda x: {"mse": x.sum(), "roi": torch.ones(2, requires_grad=True).sum()},
            ValueError,
            r"losses\[roi\] must depend on shared, got one that doesn't",
        ),
    ],
)
def test_bad_losses(losses, error, message):
    leaf = torch.ones(2, 3, requires_grad=True)
    shared = 2 * leaf
    with pytest.raises(error, match=message):
        mtl_backward(losses(shared) if callable(losses) else losses, shared)
    assert leaf.grad is None


def test_bad_shared():
    shared = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="shared must require a gradient"):
        mtl_backward([shared.sum()], torch.ones(2))
    with pytest.raises(TypeError, match="shared must be a Tensor, got list"):
        mtl_backward([shared.sum()], [shared])


@pytest.mark.parametrize(
    ("weighting", "error", "message"),
    [
        ("nash", ValueError, "weighting must be a callable or one of sum, mean, .*upgrad, got 'nash'"),
        (3, TypeError, "weighting must be a name or a callable, got int"),
        (lambda gramian: gramian, ValueError, r"weighting must give 1 weights, one per loss, got shape \(1, 1\)"),
        (aggregation.MGDA(), TypeError, "MGDA is an Aggregator, use MGDAWeighting"),
        (aggregation.MoDoWeighting(), TypeError, "MoDoWeighting can't work from the Gramian of one batch"),
    ],
)
def test_bad_weightings(weighting, error, message):
    shared = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        mtl_backward([shared.sum()], shared, weighting)
    assert shared.grad is None


def test_torchjd_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    shared = torch.ones(2, requires_grad=True)
    with pytest.raises(ImportError, match="weighting 'mgda' needs TorchJD: pip install torchjd"):
        mtl_backward([shared.sum()], shared, "mgda")
    assert mtl_backward([shared.sum()], shared, "mean").weights == 1
