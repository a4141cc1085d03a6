"""Features of normal-dose windows, kept from one epoch to the next."""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["FeatureCache"]


class FeatureCache:
    """Features of windows by key, the least recently used dropped first. A copy, or one from a pickle, is empty.

    Args:
        cache_mib: What all features together may hold, in MiB.

    Attributes:
        hits: Features found since the cache was made.
        misses: Features not found.
    """

    def __init__(self, cache_mib: float) -> None:
        from cachetools import LRUCache

        self.cache_mib = cache_mib
        self.hits = self.misses = 0
        self._entries: LRUCache[Hashable, dict[str, Tensor]] = LRUCache(cache_mib * 2**20, getsizeof=_bytes)
        self._weights: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[float]]:
        return FeatureCache, (self.cache_mib,)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """What all features together hold."""
        return int(self._entries.currsize)

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found something; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def keep_for(self, weights: Iterable[Tensor]) -> None:
        """Empty the cache if these aren't, unchanged, the weights that its features were computed with."""
        weights = list(weights)
        if len(weights) != len(self._weights) or not all(map(_is_unchanged, weights, self._weights)):
            self._entries.clear()
            self._weights = [(weakref.ref(weight), weight.data_ptr(), _version(weight)) for weight in weights]

    def features(self, keys: Sequence[Hashable], compute: Callable[[int], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Features of all keys, [len(keys), ...], from those kept or else from `compute`, and kept from then on.

        Each is computed by itself: how a batch rounds depends on its size, and then results would depend on what is
        kept.

        Args:
            keys: What is wanted; the same key has to mean the same features.
            compute: The index of a key -> layer -> its features [1, ...].
        """
        rows = []
        for number, key in enumerate(keys):
            features = self._entries.get(key)
            if features is None:
                self.misses += 1
                features = {layer: batch[0].clone() for layer, batch in compute(number).items()}
                if _bytes(features) <= self._entries.maxsize:
                    self._entries[key] = features
            else:
                self.hits += 1
            rows.append(features)
        return {layer: torch.stack([features[layer] for features in rows]) for layer in rows[0]}


def _bytes(features: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in features.values())


def _is_unchanged(weight: Tensor, state: tuple[weakref.ref[Tensor], int, int]) -> bool:
    # The tensor itself too: another may lie at the same address once the first is gone.
    reference, address, version = state
    return reference() is weight and weight.data_ptr() == address and _version(weight) == version >= 0


def _version(weight: Tensor) -> int:
    """How often the tensor was changed in place; -1 for inference tensors, which don't count it."""
    return -1 if weight.is_inference() else weight._version
