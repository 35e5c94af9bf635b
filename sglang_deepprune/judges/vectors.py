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


MAX_CHARS = 64_000_000  # of the texts whose vectors are kept


class VectorCache(Generic[V]):
    """Bounded, least recently used first out. `compute` maps one text to its vector.

    `max_chars` bounds what they take where a vector grows with its text: clients choose how long
    a cut is.
    """

    def __init__(self, compute: Callable[[str], V], max_items: int, max_chars: int = MAX_CHARS):
        self.compute = compute
        self.max_items = max_items
        self.max_chars = max_chars
        self._items: OrderedDict[bytes, tuple[V, int]] = OrderedDict()  # with the text's length
        self._num_chars = 0

    def __len__(self) -> int:
        return len(self._items)

    def of(self, texts: Iterable[str]) -> dict[str, V]:
        """The vector of every text, also when there are more texts than the bound."""
        return {text: self._one(text) for text in dict.fromkeys(texts)}

    def _one(self, text: str) -> V:
        data = text.encode("utf-8", "surrogatepass")
        key = hashlib.blake2b(data, digest_size=16).digest()
        known = self._items.get(key)
        if known is not None:
            self._items.move_to_end(key)
            return known[0]
        vector = self.compute(text)
        self._items[key] = vector, len(text)
        self._num_chars += len(text)
        while len(self._items) > self.max_items or self._num_chars > self.max_chars:
            _, (_, size) = self._items.popitem(last=False)
            self._num_chars -= size
        return vector
