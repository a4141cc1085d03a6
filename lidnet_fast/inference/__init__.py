"""Trained networks on whole studies: `denoise` and `detect` are what the commands of these names run."""

from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.models.files import load_denoiser, save_denoiser
from lidnet_fast.models.hu import HUDenoiser

from .denoise import DenoiseSummary, denoise
from .detect import DetectSummary, detect
from .slices import SliceDenoiser

__all__ = [
    "Acquisition",
    "DenoiseSummary",
    "DetectSummary",
    "Envelope",
    "HUDenoiser",
    "SliceDenoiser",
    "denoise",
    "detect",
    "load_denoiser",
    "save_denoiser",
]
