"""Classical denoisers of scikit-image, for `lidnet-fast assess --model benches.classical:non_local_means`."""

import numpy as np
from scipy import ndimage
from skimage import restoration
from torch import Tensor


def gaussian(images: Tensor) -> np.ndarray:
    """A Gaussian of one pixel, a linear filter."""
    return ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1))


def bilateral(images: Tensor) -> np.ndarray:
    """Means of neighbours within two pixels whose values differ by little against the image's noise."""
    return _each(images, lambda hu, noise: restoration.denoise_bilateral(hu.clip(0), 5, 2 * noise, 1.5))


def non_local_means(images: Tensor) -> np.ndarray:
    """Means of pixels within a window whose surroundings look alike."""
    return _each(
        images,
        lambda hu, noise: restoration.denoise_nl_means(hu, 5, 7, h=0.8 * noise, sigma=noise, fast_mode=True),
    )


def total_variation(images: Tensor) -> np.ndarray:
    """The image nearby that has little total variation."""
    return _each(images, lambda hu, noise: restoration.denoise_tv_chambolle(hu, weight=noise))


def _each(images: Tensor, denoise) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Denoise each image in units in which HU of -1000..1000 are 0..1, as scikit-image expects."""
    scaled = (images[:, 0].numpy() + 1000) / 2000
    # The median is of the noise: most pixels have no edge near.
    fine = np.abs(scaled - ndimage.gaussian_filter(scaled, (0, 2, 2)))
    denoised = [denoise(hu, float(np.median(one) / 0.6745)) for hu, one in zip(scaled, fine, strict=True)]
    return (np.stack(denoised)[:, None] * 2000 - 1000).astype(np.float32)
