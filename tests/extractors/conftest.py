import pytest
import torch

from lidnet_fast.extractors import windows


@pytest.fixture(autouse=True)
def _windows_pay(monkeypatch):
    """Networks and images of tests are so small that they would be computed as a whole."""
    monkeypatch.setattr(windows, "COST_PER_CALL", 0)
    monkeypatch.setattr(windows, "COST_PER_WEIGHT", 0)
    monkeypatch.setattr(windows, "WINDOW_PENALTY", 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
