"""Features of normal-dose windows, kept from one epoch to the next."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["FeatureCache"]


class FeatureCache:
    """Features of windows by key, the least recently used dropped first.

    Args:
        most_bytes: What all features together may hold.

    Attributes:
        bytes: What they hold.
        hits: Features found since the cache was made.
        misses: Features not found.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._weights: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found something; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def keep_for(self, weights: Iterable[Tensor]) -> None:
        """Empty the cache if these aren't, unchanged, the weights that its features were computed with."""
        state = tuple(number for weight in weights for number in (weight.data_ptr(), weight._version))
        if state != self._weights:
            self._entries.clear()
            self.bytes = 0
            self._weights = state

    def missing(self, keys: Sequence[Hashable]) -> list[int]:
        """Indices of the keys that nothing is kept for."""
        absent = [number for number, key in enumerate(keys) if key not in self._entries]
        self.misses += len(absent)
        self.hits += len(keys) - len(absent)
        return absent

    def merge(
        self, keys: Sequence[Hashable], absent: Sequence[int], computed: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Features of all keys, [len(keys), ...], from those kept and those `computed` for the indices `absent`.

        What was computed is kept from now on.
        """
        fresh = {
            keys[number]: {layer: features[row] for layer, features in computed.items()}
            for row, number in enumerate(absent)
        }
        of_keys = [fresh.get(key) or self._entries[key] for key in keys]
        result = {layer: torch.stack([features[layer] for features in of_keys]) for layer in of_keys[0]}
        for key, features in fresh.items():
            self._put(key, {layer: tensor.clone() for layer, tensor in features.items()})
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)
        return result

    def _put(self, key: Hashable, features: dict[str, Tensor]) -> None:
        size = _bytes(features)
        if size > self.most_bytes:
            return
        self._entries[key] = features
        self.bytes += size
        while self.bytes > self.most_bytes:
            self.bytes -= _bytes(self._entries.popitem(last=False)[1])


def _bytes(features: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in features.values())
