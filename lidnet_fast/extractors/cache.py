"""Features of normal-dose windows, kept from one epoch to the next."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

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

    def features(self, keys: Sequence[Hashable], compute: Callable[[int], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Features of all keys, [len(keys), ...], from those kept or else from `compute`, and kept from then on.

        Each is computed by itself: how a batch rounds depends on its size, and so would results on what is kept.

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
                self._put(key, features)
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            rows.append(features)
        return {layer: torch.stack([features[layer] for features in rows]) for layer in rows[0]}

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
