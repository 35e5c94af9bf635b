"""A judge for engine tests: what it does with a pair is written in the traces themselves.

Traces with the same marker (`<A>`, `<B>`, ...) are the same answer. `<NAN>`: no verdict for the
pair; `<RAISE>`, `<SHAPE>`, `<HANG>`, `<DIE>`, `<SLOW>`: the fault of that name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

import numpy as np

from sglang_deepprune.types import Pair

_MARK = re.compile(r"<([A-Z]+)>")


class MarkerJudge:
    name = "marker"

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for pair in pairs:
            left, right = (_MARK.findall(trace.text) for trace in (pair.left, pair.right))
            assert "\ufffd" not in pair.left.text + pair.right.text, "a broken character"
            both = {*left, *right}
            if "RAISE" in both:
                raise ValueError("told to")
            if "SHAPE" in both:
                return np.zeros((len(pairs) + 1, 2), dtype=np.float32)
            if "HANG" in both:
                time.sleep(3600)
            if "DIE" in both:
                os._exit(1)
            if "SLOW" in both:
                time.sleep(0.3)
            unknown = "NAN" in both or not left or not right
            scores.append(float("nan") if unknown else float(left[0] == right[0]))
        return np.array(scores, dtype=np.float32)


def make() -> MarkerJudge:
    return MarkerJudge()
