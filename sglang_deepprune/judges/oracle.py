"""Judge that knows the recorded answers: the upper bound of any judge, for studies and tests.

PATH is JSON lines: `{"text_prefix": str, "answer": str | null}`, one row a recorded trace; further
keys are ignored, null is a trace that gave no answer. `text_prefix` is the beginning of the
recorded text, long enough to tell the traces of a recording apart (200 characters mostly are).
A trace is the row with the longest start in common: a row whose whole prefix begins the trace, or,
for a trace shorter than that, rows that begin with the trace. Rows that tie with different answers
are no verdict. Two answers are the same if `answers.compare` shows it at once, without sympy; an
abstention is the same as nothing, another abstention included.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from sglang_deepprune.answers import compare
from sglang_deepprune.types import Pair


class _Unknown:
    """No row, or rows that disagree. A type of its own, as None is an abstention."""


_UNKNOWN: Final = _Unknown()


class OracleJudge:
    """NaN: a trace that the recording does not hold, or holds twice with different answers."""

    name = "oracle"

    def __init__(self, path: str) -> None:
        self._answers: dict[str, str | None | _Unknown] = {}
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._add(*_row(line, number))
        self._prefixes = sorted(self._answers)
        self._lengths = sorted({len(prefix) for prefix in self._prefixes}, reverse=True)
        self._same: dict[tuple[str, str], bool] = {}  # few answers, many pairs

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """[num_pairs] float32 of 0, 1 and NaN; see `Judge.score`."""
        texts = {trace.text for pair in pairs for trace in (pair.left, pair.right)}
        known = {text: self.answer_of(text) for text in texts}
        return np.array(
            [self._compare(known[pair.left.text], known[pair.right.text]) for pair in pairs],
            dtype=np.float32,
        )

    def answer_of(self, text: str) -> str | None | _Unknown:
        """The recorded answer of the trace that begins like `text`."""
        for length in self._lengths:
            if length <= len(text) and text[:length] in self._answers:
                return self._answers[text[:length]]
        if not text:
            return _UNKNOWN
        first = bisect.bisect_left(self._prefixes, text)
        longer: list[str] = []
        for prefix in self._prefixes[first:]:
            if not prefix.startswith(text):
                break
            longer.append(prefix)
        return _agreed(self._answers[prefix] for prefix in longer)

    def _add(self, prefix: str, answer: str | None) -> None:
        if prefix in self._answers:
            self._answers[prefix] = _agreed((self._answers[prefix], answer))
        else:
            self._answers[prefix] = answer

    def _compare(self, left: str | None | _Unknown, right: str | None | _Unknown) -> float:
        if isinstance(left, _Unknown) or isinstance(right, _Unknown):
            return float("nan")
        if left is None or right is None:
            return 0.0
        key = (left, right) if left <= right else (right, left)
        if key not in self._same:
            self._same[key] = compare(*key) is True
        return float(self._same[key])


def _agreed(answers: Iterable[str | None | _Unknown]) -> str | None | _Unknown:
    """The one answer that all rows give, else unknown."""
    distinct = set(answers)
    return distinct.pop() if len(distinct) == 1 else _UNKNOWN


def _row(line: str, number: int) -> tuple[str, str | None]:
    """One line's prefix and answer. Errors name the line and never quote it."""
    try:
        row = json.loads(line)
        prefix, answer = row["text_prefix"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"line {number}: expected an object with text_prefix, answer") from error
    if not isinstance(prefix, str) or not prefix or not isinstance(answer, (str, type(None))):
        raise ValueError(f"line {number}: text_prefix is a text, answer is a text or null")
    return prefix, answer
