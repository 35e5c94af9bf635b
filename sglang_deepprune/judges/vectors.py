"""Vectors of the texts seen lately, so that a judge reads each text once and not once a pair.

Follows what clustering asks: one trace after another is compared with members that were compared
before, so the same few hundred texts come back in call after call. Keys are digests: the texts
themselves are not kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

V = TypeVar("V")


class VectorCache(Generic[V]):
    """Bounded, least recently used first out. `compute` maps one text to its vector."""

    def __init__(self, compute: Callable[[str], V], max_items: int):
        self.compute = compute
        self.max_items = max_items
        self._items: OrderedDict[bytes, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def of(self, texts: Iterable[str]) -> dict[str, V]:
        """The vector of every text, also when there are more texts than the bound."""
        return {text: self._one(text) for text in dict.fromkeys(texts)}

    def _one(self, text: str) -> V:
        data = text.encode("utf-8", "surrogatepass")
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        vector = self._items[key] = self.compute(text)
        if len(self._items) > self.max_items:
            self._items.popitem(last=False)
        return vector
