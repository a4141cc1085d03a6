"""A denoiser for users: HU in, HU out."""

import copy

from torch import Tensor, nn

from lidnet_fast._plausibility import warn_of_hu
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.footprint import Reach, bytes_per_pixel, find_reach
from lidnet_fast.models.windowing import HUWindow


class HUDenoiser(nn.Module):
    """A denoiser network in the HU window that it was trained in.

    Args:
        network: windowed [N, 2 context + 1, H, W] -> windowed [N,1,H,W], the middle slice.
        window: the HU window that it works in; what lies beyond it is scaled with it, not clipped.
        envelope: what it was trained on; None where that is unknown.
        context: neighbouring slices that the network sees on each side of the one that it denoises.

    Values beyond the window's `denoised_range` (metal, padding) are shown to the network as the range's end, and pass
    unchanged. As in any module, `train` and `eval` decide whether dropout and BatchNorm train; `SliceDenoiser` computes
    in eval mode.

    Raises:
        TypeError: `window` is not an `HUWindow`.
    """

    def __init__(
        self, network: nn.Module, window: HUWindow, envelope: Envelope | None = None, context: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(window, HUWindow):
            raise TypeError(f"window must be an HUWindow, got {type(window).__name__}. To fix: HUWindow(low, high)")
        self.network, self.window, self.envelope, self.context = network, window, envelope, context

    def forward(self, hu: Tensor) -> Tensor:
        """Denoise low-dose images.

        On the CPU an `InputWarning` tells of values that can't be HU of a body.

        Args:
            hu: [N,1,H,W], HU, any real dtype; with a context [N, 2 context + 1, H, W], see `lidnet_fast.neighbours`.

        Returns:
            [N,1,H,W], HU, float32.

        Raises:
            TypeError: `hu` is not a Tensor.
            ValueError: `hu` has another shape, or the network returns another.
        """
        if not isinstance(hu, Tensor):
            raise TypeError(
                f"hu must be a Tensor [N,1,H,W], got {type(hu).__name__}. To fix: lidnet_fast.inference.SliceDenoiser "
                "takes arrays [N,H,W], or torch.from_numpy(hu)"
            )
        slices = 2 * self.context + 1
        if hu.dim() != 4 or hu.shape[1] != slices:
            raise ValueError(f"hu must be [N,{slices},H,W], got {list(hu.shape)}")
        warn_of_hu(hu)
        return self.denoise(hu)

    def denoise(self, hu: Tensor) -> Tensor:
        """As `forward`, of what `forward` has checked."""
        return self.window.denoise(self.network, hu, self.context)

    def bytes_per_pixel(self) -> int:
        """Most memory that activations take at one time, for each pixel of the input; in eval mode.

        Raises:
            ValueError, RuntimeError: the network fails on a small image.
        """
        return bytes_per_pixel(self, 2 * self.context + 1)

    def reach(self) -> Reach | None:
        """How far the network looks; None where what it makes of a pixel depends on the whole image or on its size.

        Finding it takes seconds for a deep network.
        """
        try:
            return find_reach(copy.deepcopy(self.network).cpu().eval(), 2 * self.context + 1)
        except (ValueError, RuntimeError):  # it doesn't take images of any size
            return None
