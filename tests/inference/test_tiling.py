import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lidnet_fast.extractors import receptive_fields
from lidnet_fast.inference.tiling import in_tiles, spans
from lidnet_fast.models.footprint import Reach, bytes_per_pixel, find_reach
from tests.inference.conftest import random_network


class Causal(nn.Module):
    """Looks ahead of itself along the rows only, further than behind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, (1, 5))

    def forward(self, x):
        return self.conv(F.pad(x, (3, 1)))


class Pooled(nn.Module):
    """Reflecting padding, dilation, pooling, nearest up-sampling: nothing that torch.fx was asked about."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(1, 4, 3, padding=2, dilation=2, padding_mode="reflect")
        self.coarse = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")

    def forward(self, x):
        height, width = x.shape[-2:]
        features = F.gelu(self.fine(x))
        pooled = self.coarse(F.max_pool2d(F.pad(features, (0, -width % 4, 0, -height % 4), mode="replicate"), 4))
        return x + F.interpolate(pooled, scale_factor=4)[..., :height, :width].mean(1, keepdim=True)


class WholeImage(nn.Module):
    def forward(self, x):
        return x - 0.1 * x.mean((-1, -2), keepdim=True)


class Vignette(nn.Module):
    """Every pixel on its own, but each in another way."""

    def forward(self, x):
        return x * torch.linspace(0.5, 1, x.shape[-1])


NETWORKS = {
    "small": (lambda: random_network("small", channels=6, layers=4), Reach(4, 4, 1)),
    # Ten 5x5 convolutions reach two pixels each.
    "redcnn": (lambda: random_network("redcnn", channels=6), Reach(20, 20, 1)),
    "unet": (lambda: random_network("unet", channels=4, levels=3, blocks=1), None),
    "default unet": (lambda: random_network("unet", channels=2), None),
    "pixel": (lambda: nn.Conv2d(1, 1, 1), Reach(0, 0, 1)),
    "causal": (Causal, Reach(3, 1, 1)),
    "pooled": (Pooled, None),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_tiles_give_the_whole(name):
    make, expected = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    reach = find_reach(network)
    assert reach is not None
    if expected is not None:
        assert reach == expected
    for size, side in (((237, 301), 64), ((240, 256), 100), ((65, 400), 33), ((24, 24), 7)):
        images = torch.rand(2, 1, *size)
        whole = network(images)
        assert (in_tiles(network, images, side, reach) - whole).abs().max() <= 1e-5, (size, side)


@torch.inference_mode()
def test_too_little_overlap_shows():
    """The comparison above can fail."""
    network = random_network("unet", channels=4, levels=3, blocks=1)
    reach, images = find_reach(network), torch.rand(1, 1, 128, 128)
    for wrong in (Reach(4, 4, 4), Reach(reach.before, reach.after, 3)):
        assert (in_tiles(network, images, 50, wrong) - network(images)).abs().max() > 1e-4


def test_reach_is_the_receptive_field_of_the_graph():
    network = random_network("small", channels=4, layers=5)
    (field,) = receptive_fields(network, "add").values()
    assert find_reach(network) == Reach(field.after[0], field.before[0], field.alignment[0])


@pytest.mark.parametrize("network", [WholeImage(), Vignette(), nn.GroupNorm(1, 1)], ids=lambda n: type(n).__name__)
def test_what_has_no_finite_reach(network):
    assert find_reach(network.eval()) is None


def test_spans_cover_everything_once():
    for size in (1, 7, 64, 100, 513):
        for side in (1, 8, 30, 600):
            for reach in (Reach(0, 0, 1), Reach(5, 3, 1), Reach(12, 20, 8)):
                covered = []
                for span in spans(size, side, reach):
                    covered += range(span.core.start, span.core.stop)
                    assert span.window.start % reach.alignment == 0
                    assert span.window.start <= max(0, span.core.start - reach.before)
                    assert span.window.stop >= min(size, span.core.stop + reach.after)
                    assert span.inner.stop - span.inner.start == span.core.stop - span.core.start
                    assert span.window.start + span.inner.start == span.core.start
                    assert span.core.stop - span.core.start <= -(-side // reach.alignment) * reach.alignment
                assert covered == list(range(size))


def test_bytes_per_pixel():
    # Alive at once: the input, 16 channels, and 16 channels of ReLU.
    network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)).eval()
    assert bytes_per_pixel(network) == pytest.approx(4 * 33, abs=1)
