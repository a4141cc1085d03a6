"""Denoisers, lesion detectors, and the HU window they work in."""

from lidnet_fast.models.denoisers import DENOISERS, build_denoiser
from lidnet_fast.models.detectors import DETECTORS, build_detector
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow

__all__ = ["DENOISERS", "DETECTORS", "HUWindow", "LesionDetector", "NetworkConfig", "build_denoiser", "build_detector"]
