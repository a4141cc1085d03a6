"""Lesions that a denoiser takes away: how much of a known lesion is left, and which survive."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

SURVIVES = 0.5
"""Share of its contrast from which a lesion counts as surviving."""


def retained_contrast(present: ArrayLike, absent: ArrayLike, signal: ArrayLike) -> Floats:
    """The share of a lesion's contrast that is left: the difference of twins, projected onto the lesion.

    Twins are restored from the same image with the same noise, one with the lesion and one without. 1 is what nothing
    denoised keeps, to rounding, whatever the noise; 0 is a lesion without a trace.

    Args:
        present: [K, H, W], restored with the lesion, HU.
        absent: [K, H, W], the restored twins without.
        signal: [H, W], what the lesion added before, HU.
    """
    template = np.asarray(signal, np.float64)
    difference = np.asarray(present, np.float64) - np.asarray(absent, np.float64)
    if difference.shape[1:] != template.shape:
        raise ValueError(f"present and absent must be [K, *{template.shape}], got {difference.shape}")
    return np.tensordot(difference, template, 2) / np.square(template).sum()


def survival(
    retained: ArrayLike, threshold: float = SURVIVES, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """The fraction of lesions that keep at least `threshold` of their contrast, with its exact binomial interval.

    Args:
        retained: [n], of `retained_contrast`; lesions are taken as independent.
        threshold: share of the contrast.
        confidence: of the interval (Clopper-Pearson, scipy).

    Returns:
        (fraction, low, high); None without a lesion.
    """
    values = np.asarray(retained, np.float64)
    if not values.size:
        return None
    kept = int((values >= threshold).sum())
    low, high = stats.binomtest(kept, values.size).proportion_ci(confidence)
    return kept / values.size, float(low), float(high)
