"""Overlap of word trigrams: the plainest text judge, a floor for the others.

Dice coefficient of the two sets, over the same words that a trace is cut by. A pair's score depends
on its two texts alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sglang_deepprune.judges.vectors import VectorCache
from sglang_deepprune.types import Pair

_WORD = re.compile(r"\w+")
_MAX_TEXTS = 2048
_MAX_CHARS = 8_000_000  # a set takes up to 30 bytes a character: about 230 MB in all


class TrigramJudge:
    """NaN: a text of fewer than three words."""

    name = "trigrams"
    mixes_groups = True

    def __init__(self) -> None:
        self._sets: VectorCache[frozenset[tuple[str, ...]]] = VectorCache(
            _trigrams, _MAX_TEXTS, _MAX_CHARS
        )

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32 in [0, 1]; see `Judge.score`."""
        sets = self._sets.of(t.text for pair in pairs for t in (pair.left, pair.right))
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        for place, pair in enumerate(pairs):
            left, right = sets[pair.left.text], sets[pair.right.text]
            if left and right:
                scores[place] = 2 * len(left & right) / (len(left) + len(right))
        return scores


def _trigrams(text: str) -> frozenset[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False))
