"""The paper's shallow baseline: cosine of TF-IDF vectors over word unigrams and bigrams.

A cheap floor to compare judges with, not a good judge: on recorded traces its order of pairs inside
one question is hardly better than chance (docs/design.md). Document frequencies come from the texts
of one call, which is one trace and the members it is compared with; counts are hashed and kept, so
each text is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from sglang_deepprune.judges.vectors import VectorCache
from sglang_deepprune.types import Pair

_NUM_FEATURES = 2**20
_MAX_TEXTS = 2048  # 10 to 50 KB each


class SimilarityJudge:
    """Scores are in [0, 1] as they stand: counts are not negative. NaN: a text without words."""

    name = "similarity"

    def __init__(self) -> None:
        self._vectorizer = HashingVectorizer(
            n_features=_NUM_FEATURES,
            ngram_range=(1, 2),
            token_pattern=r"\w+",  # the default drops single digits, which are answers here
            stop_words="english",
            alternate_sign=False,
            norm=None,
            dtype=np.float32,
        )
        self._rows: VectorCache[sparse.csr_matrix] = VectorCache(self._vectorize, _MAX_TEXTS)

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32; see `Judge.score`."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        rows = self._rows.of(t.text for pair in pairs for t in (pair.left, pair.right))
        place = {text: i for i, text in enumerate(rows)}
        counts = sparse.vstack(list(rows.values()), format="csr")  # [num_texts, num_features]
        matrix = _weighted(counts)
        left = matrix[[place[pair.left.text] for pair in pairs]]
        right = matrix[[place[pair.right.text] for pair in pairs]]
        scores = np.asarray(left.multiply(right).sum(axis=1), dtype=np.float32).reshape(-1)
        scores = np.clip(scores, 0.0, 1.0)
        scores[(left.getnnz(axis=1) == 0) | (right.getnnz(axis=1) == 0)] = np.nan
        return scores

    def _vectorize(self, text: str) -> sparse.csr_matrix:
        """[1, num_features] float32, damped counts: 1 + log tf."""
        row = self._vectorizer.transform([text])
        row.data = 1.0 + np.log(row.data)
        row.sort_indices()  # a fixed order of summation: scores are the same to the last bit
        return row


def _weighted(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts times smoothed IDF, as scikit-learn's TfidfTransformer; rows of unit length."""
    num_texts, num_features = counts.shape
    seen = np.bincount(counts.indices, minlength=num_features)
    weighted = counts.copy()
    weighted.data *= (np.log((1 + num_texts) / (1 + seen[counts.indices])) + 1).astype(np.float32)
    return normalize(weighted, copy=False)
