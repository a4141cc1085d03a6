"""lidnet_fast: lesion-aware CT denoising (LIDnet, arXiv:2104.08845) for PyTorch."""

__version__ = "0.1.0"
