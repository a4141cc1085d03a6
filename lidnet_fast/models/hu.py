"""A denoiser for users: HU in, HU out."""

from torch import Tensor, nn

from lidnet_fast._plausibility import warn_of_hu
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.windowing import HUWindow


class HUDenoiser(nn.Module):
    """A denoiser network in the HU window that it was trained in.

    Args:
        network: windowed [N,1,H,W] -> windowed [N,1,H,W].
        window: the HU window that it works in; what lies beyond it is scaled with it, not clipped.
        envelope: what it was trained on; None where that is unknown.

    Values beyond the window's `denoised_range` (metal, padding) are shown to the network as the range's end, and pass
    unchanged. As in any module, `train` and `eval` decide whether dropout and BatchNorm train; `SliceDenoiser` computes
    in eval mode.

    Raises:
        TypeError: `window` is not an `HUWindow`.
    """

    def __init__(self, network: nn.Module, window: HUWindow, envelope: Envelope | None = None) -> None:
        super().__init__()
        if not isinstance(window, HUWindow):
            raise TypeError(f"window must be an HUWindow, got {type(window).__name__}. To fix: HUWindow(low, high)")
        self.network, self.window, self.envelope = network, window, envelope

    def forward(self, hu: Tensor) -> Tensor:
        """Denoise low-dose images.

        On the CPU an `InputWarning` tells of values that can't be HU of a body.

        Args:
            hu: [N,1,H,W], HU, any real dtype.

        Returns:
            [N,1,H,W], HU, float32.

        Raises:
            TypeError: `hu` is not a Tensor.
            ValueError: `hu` is not [N,1,H,W], or the network returns another shape.
        """
        if not isinstance(hu, Tensor):
            raise TypeError(
                f"hu must be a Tensor [N,1,H,W], got {type(hu).__name__}. To fix: lidnet_fast.inference.SliceDenoiser "
                "takes arrays [N,H,W], or torch.from_numpy(hu)"
            )
        if hu.dim() != 4 or hu.shape[1] != 1:
            raise ValueError(f"hu must be [N,1,H,W], got {list(hu.shape)}")
        warn_of_hu(hu)
        return self.window.denoise(self.network, hu)
