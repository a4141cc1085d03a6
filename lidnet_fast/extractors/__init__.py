"""Which network's features a perceptual loss reads, at which layers, and in which windows of the images."""

from .cache import FeatureCache
from .layers import LayerExtractor, layer_names
from .networks import load_network
from .receptive_field import ReceptiveField, receptive_fields

__all__ = ["FeatureCache", "LayerExtractor", "ReceptiveField", "layer_names", "load_network", "receptive_fields"]
