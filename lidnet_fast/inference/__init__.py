"""Trained denoisers on whole studies: `denoise` is what `lidnet-fast denoise` runs."""

from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.models.files import load_denoiser, save_denoiser
from lidnet_fast.models.hu import HUDenoiser

from .denoise import DenoiseSummary, denoise
from .slices import SliceDenoiser

__all__ = [
    "Acquisition",
    "DenoiseSummary",
    "Envelope",
    "HUDenoiser",
    "SliceDenoiser",
    "denoise",
    "load_denoiser",
    "save_denoiser",
]
