"""Judge `probe`: the serving model itself, asked for its answer in the middle of each trace.

The engine takes the readings (`patches/probe.py`), `probing.ProbeDesk` gates them and hands on
traces that carry one; what is left here is arithmetic. Outside a server no trace carries a reading,
and every pair is without a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_deepprune.answers import compare
from sglang_deepprune.types import Pair, Trace


class ProbeJudge:
    """P(same) of two readings: p_i p_j where they agree, else 0.

    Where they agree the rest of both distributions may agree too, where they differ one may still
    come round: both are left out, because nothing is known about where that rest lies. NaN: a trace
    without a reading or an answer, or two answers that the fast comparison cannot tell apart.

    Parameters
    ----------
    text : str
        The closing text, which the engine appends to a trace; of no use here.
    """

    name = "probe"
    mixes_groups = True

    def __init__(self, text: str = "") -> None:
        self.text = text

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32 in [0, 1]; see `Judge.score`."""
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        for place, pair in enumerate(pairs):
            left, right = _belief(pair.left), _belief(pair.right)
            if left is None or right is None:
                continue
            is_same = compare(left[0], right[0])
            if is_same is not None:
                scores[place] = left[1] * right[1] if is_same else 0.0
        return scores


def _belief(trace: Trace) -> tuple[str, float] | None:
    """(answer, its probability); a finished trace has said it."""
    if trace.answer is not None:
        return trace.answer, 1.0
    return None if trace.reading is None else (trace.reading.answer, trace.reading.probability)
