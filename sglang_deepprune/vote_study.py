"""What a judge's clustering does to the vote of recorded siblings, beside its rivals.

Every sibling starts at once and emits a token a step (`eager`); the rules are the engine's own
(`clustering.place`, `policy.decided`). Rivals: fewer siblings, and the decided stop alone, both at
the tokens of what they are compared with. Judge tokens are not counted here: they come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_deepprune import policy
from sglang_deepprune.clustering import place
from sglang_deepprune.equal_tokens import answer_classes, is_same
from sglang_deepprune.types import JudgeTask, Pair, Trace

EPS = 0.05  # of the decided stop, as in `balanced`
_DRAWS = 24  # random subsets a size


@dataclass(frozen=True, slots=True)
class Case:
    """One question at one cut.

    Attributes
    ----------
    classes : tuple[int | None, ...]
        [n] class of each sibling's answer; None abstains.
    gold : int | None
        Class of the right answer; None where nobody gave it or it is not known.
    tokens : tuple[int, ...]
        [n] length of each trace.
    traces : tuple[Trace, ...]
        [n] truncated traces.
    scores : np.ndarray
        [n, n] float32 P(same answer), symmetric.
    """

    classes: tuple[int | None, ...]
    gold: int | None
    tokens: tuple[int, ...]
    traces: tuple[Trace, ...]
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Outcome:
    """A vote: its winner (a class), the tokens it took, and whether the right answer had a vote."""

    winner: int | None
    tokens: float
    has_right: bool


def class_ids(answers: Sequence[str | None]) -> tuple[int | None, ...]:
    """[n] class of each answer under our equivalence."""
    known = [first for first, _ in answer_classes(answers)]
    return tuple(
        None if answer is None
        else next(i for i, first in enumerate(known) if first == answer or is_same(first, answer))
        for answer in answers
    )  # fmt: skip


def everybody(case: Case) -> Outcome:
    """Plain n>1."""
    return _vote(case, range(len(case.tokens)), sum(case.tokens))


def decided_alone(case: Case, siblings: Sequence[int]) -> Outcome:
    """The decided stop over `siblings`, which run side by side."""
    return _decide(case, siblings, 0.0)


def clustered(case: Case, tau: float, *, with_decided: bool) -> Outcome:
    """The paper's rule: K2 = ceil(n/4) of the largest cluster run on, the rest stops at the cut."""
    kept = keep(case, tau)
    stopped = [i for i in range(len(case.tokens)) if i not in kept]
    spent = float(sum(min(case.tokens[i], case.traces[i].num_tokens) for i in stopped))
    if with_decided:
        return _decide(case, kept, spent)
    return _vote(case, kept, spent + sum(case.tokens[i] for i in kept))


def keep(case: Case, tau: float) -> list[int]:
    """Siblings that run on. All singletons: the first K3 = K2 of them."""
    size = len(case.tokens)

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        return np.array([case.scores[p.left.sibling, p.right.sibling] for p in pairs], np.float32)

    task = JudgeTask("study", 0, case.traces, (), (), tau, 32, 10, 0)
    clusters: dict[int, list[int]] = {}
    unknown = []
    for one in place(task, score)[0]:
        if one.cluster >= 0:
            clusters.setdefault(one.cluster, []).append(one.sibling)
        elif math.isnan(one.similarity):
            unknown.append(one.sibling)  # no verdict: nothing may stop it
    quota = -(-size // 4)
    largest = max(clusters.values(), key=len, default=[])
    first = largest if len(largest) > 1 else [c[0] for c in clusters.values()]
    return sorted([*first[:quota], *unknown])


def equal_tokens(curve: np.ndarray, tokens: float) -> np.ndarray:
    """[num_questions] figure of a rival whose mean tokens are `tokens`.

    Parameters
    ----------
    curve : np.ndarray
        [num_sizes, num_questions, 2] float64: figure and tokens, sizes ascending. Between two
        sizes both are interpolated; outside, the nearest size counts.
    """
    means = curve[:, :, 1].mean(axis=1)
    place_ = float(np.interp(tokens, means, np.arange(len(means))))
    low = int(place_)
    high = min(low + 1, len(means) - 1)
    share = place_ - low
    return np.asarray((1 - share) * curve[low, :, 0] + share * curve[high, :, 0])


def rival_curve(cases: Sequence[Case], *, with_decided: bool, seed: int = 0) -> np.ndarray:
    """[n, num_questions, 2]: P(same winner as all n) and tokens of random subsets of each size."""
    most = min(len(case.tokens) for case in cases)
    curve = np.zeros((most, len(cases), 2))
    for column, case in enumerate(cases):
        rng = np.random.default_rng((seed, column))
        wanted = everybody(case).winner
        for size in range(1, most + 1):
            found = []
            for _ in range(_DRAWS):
                drawn = rng.permutation(len(case.tokens))[:size].tolist()
                one = (
                    decided_alone(case, drawn) if with_decided
                    else _vote(case, drawn, sum(case.tokens[i] for i in drawn))
                )  # fmt: skip
                found.append((one.winner == wanted, one.tokens))
            curve[size - 1, column] = np.mean(found, axis=0)
    return curve


def _vote(case: Case, siblings: Sequence[int], tokens: float) -> Outcome:
    votes = [case.classes[i] for i in sorted(siblings) if case.classes[i] is not None]
    winner = max(votes, key=votes.count, default=None)  # ties: the lowest sibling
    return Outcome(winner, float(tokens), case.gold is not None and case.gold in votes)


def _decide(case: Case, siblings: Sequence[int], spent: float) -> Outcome:
    order = sorted(siblings, key=lambda i: (case.tokens[i], i))
    counts: dict[int, int] = {}
    for place_, sibling in enumerate(order):
        own = case.classes[sibling]
        if own is not None:
            counts[own] = counts.get(own, 0) + 1
        a, b = (sorted(counts.values(), reverse=True) + [0, 0])[:2]
        remaining = len(order) - place_ - 1
        if policy.decided(a, b, place_ + 1, remaining, EPS):
            now = case.tokens[sibling]
            spent += sum(min(case.tokens[i], now) for i in order)
            return _vote(case, order[: place_ + 1], spent)
    return _vote(case, order, spent + sum(case.tokens[i] for i in order))
