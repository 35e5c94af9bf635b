"""Plain fewer samples, as a curve: what cons@k spends and how often it is right. Pure.

`expected_accuracy` is exact: over all subsets of k recorded traces, by the counts of answers in
them (multivariate hypergeometric), not by sampling. The vote's tie rule (lowest sibling index) is
taken over traces in random order, where each of the tied answers wins equally often: 1/ties. An
abstention takes a trace's place and has no vote; a subset of abstentions alone is wrong.

k is a number of traces a question; a question with fewer than k recorded ones gives all it has.
Tokens and accuracy between two whole k are interpolated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_deepprune.answers import compare
from sglang_deepprune.voting import Ballot, Tally


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was recorded of one question."""

    answers: tuple[str | None, ...]  # [n]
    tokens: tuple[int, ...]  # [n]
    gold: str


@dataclass(frozen=True, slots=True)
class Point:
    """cons@k over all questions."""

    k: float
    tokens: float  # sum over questions
    accuracy: float  # mean over questions


def is_right(answer: str | None, gold: str) -> bool:
    return answer is not None and compare(answer, gold) is True


def winner(answers: Sequence[str | None]) -> tuple[str | None, bool]:
    """The vote of all siblings by the server's rule, and whether the tie rule decided it."""
    tally = Tally()
    for index, answer in enumerate(answers):
        tally.add(Ballot(answer, index))
    leader = tally.leader
    return (leader.answer if leader else None), bool(tally.ties)


def expected_accuracy(answers: Sequence[str | None], gold: str, k: int) -> float:
    """P(the majority of k of these traces is right), over subsets of them."""
    if not 1 <= k <= len(answers):
        raise ValueError(f"k must be 1 to {len(answers)}, got {k}")
    classes = Counter(answer for answer in answers if answer is not None)
    right = [is_right(answer, gold) for answer in classes]
    sizes = list(classes.values())
    silent = len(answers) - sum(sizes)
    share = 0
    hits = 0.0
    for drawn, ways in _draws(sizes, silent, k):
        share += ways
        most = max(drawn, default=0)
        if most:
            tied = [good for count, good in zip(drawn, right, strict=True) if count == most]
            hits += ways * sum(tied) / len(tied)
    assert share == math.comb(len(answers), k)
    return hits / share


def _draws(sizes: Sequence[int], silent: int, k: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """How many of each class a subset of k can hold, and the number of such subsets."""
    if not sizes:
        if k <= silent:
            yield (), math.comb(silent, k)
        return
    for first in range(min(sizes[0], k) + 1):
        for rest, ways in _draws(sizes[1:], silent, k - first):
            yield (first, *rest), ways * math.comb(sizes[0], first)


@dataclass(frozen=True, slots=True)
class Curves:
    """cons@k of each question, k = 1 to the most traces that a question has."""

    tokens: np.ndarray  # [num_questions, num_k] float64, expected
    accuracy: np.ndarray  # [num_questions, num_k] float64, expected

    @classmethod
    def of(cls, questions: Sequence[Sampled]) -> Curves:
        most = max(len(one.answers) for one in questions)
        tokens = np.zeros((len(questions), most))
        accuracy = np.zeros_like(tokens)
        for row, one in enumerate(questions):
            size = len(one.answers)
            for k in range(1, most + 1):
                mine = min(k, size)
                tokens[row, k - 1] = mine * sum(one.tokens) / size
                accuracy[row, k - 1] = (
                    expected_accuracy(one.answers, one.gold, k)
                    if k <= size
                    else accuracy[row, k - 2]
                )
        return cls(tokens, accuracy)

    def pick(self, rows: Sequence[int] | np.ndarray) -> Curves:
        """The curves of these questions, repeated ones included."""
        return Curves(self.tokens[rows], self.accuracy[rows])

    @property
    def points(self) -> list[Point]:
        """cons@k over all questions, for whole k."""
        total, mean = self.tokens.sum(axis=0), self.accuracy.mean(axis=0)
        return [Point(k + 1, float(total[k]), float(mean[k])) for k in range(len(total))]

    def at_tokens(self, tokens: float) -> Point:
        """The point at so many tokens over all questions; an end of the curve beyond it."""
        total, mean = self.tokens.sum(axis=0), self.accuracy.mean(axis=0)
        k = float(np.interp(tokens, total, np.arange(1, len(total) + 1)))
        spent = float(np.clip(tokens, total[0], total[-1]))
        return Point(k, spent, float(np.interp(tokens, total, mean)))


def gain_interval(
    curves: Curves, tokens: Sequence[float], right: Sequence[bool], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval, over questions, of a policy's accuracy less cons@k's at its tokens.

    `tokens`, `right`: what the policy spent on each question, and whether its answer was right.
    """
    spent, hits = np.asarray(tokens, dtype=float), np.asarray(right, dtype=float)
    generator = np.random.default_rng(seed)
    gains = []
    for _ in range(draws):
        rows = generator.integers(len(spent), size=len(spent))
        base = curves.pick(rows).at_tokens(float(spent[rows].sum()))
        gains.append(float(hits[rows].mean()) - base.accuracy)
    low, high = np.percentile(gains, [2.5, 97.5])
    return float(low), float(high)
