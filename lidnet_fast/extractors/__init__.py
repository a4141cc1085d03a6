"""Which network's features a perceptual loss reads, and at which layers."""

from .layers import LayerExtractor

__all__ = ["LayerExtractor"]
