"""Which network's features a perceptual loss reads, at which layers, and in which windows of the images."""

from .cache import FeatureCache
from .layers import LayerExtractor
from .networks import load_network
from .receptive_field import ReceptiveField, receptive_fields

__all__ = ["FeatureCache", "LayerExtractor", "ReceptiveField", "load_network", "receptive_fields"]
