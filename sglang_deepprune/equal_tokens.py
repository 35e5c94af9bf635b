"""The rival that any saving has to beat: drawing fewer samples for the same tokens (cons@k).

From the recorded siblings of plain n>1: what a majority vote over a random k-subset scores, and
what it costs. Pure and exact: subsets are counted, not drawn, and a count takes polynomial time
also where every sibling answers differently. The vote's tie rule (lowest sibling index) is taken
over siblings in random order, where each of the tied answers wins equally often. An abstention
takes a place and has no vote. Every question gets the same k, as a user would set n; between two
whole k tokens and accuracy are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_deepprune.answers import compare


@dataclass(frozen=True, slots=True)
class Sampled:
    """The plain siblings of one question."""

    answers: tuple[str | None, ...]  # None: no answer
    tokens: tuple[int, ...]
    gold: str


@dataclass(frozen=True, slots=True)
class EqualTokens:
    """cons@k where its expected tokens equal the given ones."""

    k: float
    accuracy: float


def is_same(a: str | None, b: str | None) -> bool:
    """Equal for certain; no answer equals nothing."""
    return a is not None and b is not None and compare(a, b) is True


def answer_classes(answers: Sequence[str | None]) -> list[tuple[str, int]]:
    """(first of the class, members), by equivalence; abstentions are in none."""
    classes: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for place, (known, count) in enumerate(classes):
            if known == answer or is_same(known, answer):
                classes[place] = (known, count + 1)
                break
        else:
            classes.append((answer, 1))
    return classes


def cons_accuracy(question: Sampled, k: int) -> float:
    """P(the majority of k random siblings is right), drawn without replacement."""
    size = len(question.answers)
    if not 1 <= k <= size:
        raise ValueError(f"k must be 1 to {size}, got {k}")
    classes = answer_classes(question.answers)
    sizes = [count for _, count in classes]
    silent = size - sum(sizes)
    hits = 0.0
    for place, (answer, members) in enumerate(classes):
        if is_same(answer, question.gold):
            others = sizes[:place] + sizes[place + 1 :]
            hits += sum(
                math.comb(members, votes) * _won(others, silent, votes, k - votes)
                for votes in range(1, min(members, k) + 1)
            )
    return hits / math.comb(size, k)


def _won(others: Sequence[int], silent: int, votes: int, rest: int) -> float:
    """Ways to draw `rest` siblings so that no other class has more than `votes`; a way with t
    others at `votes` counts 1/(t + 1)."""
    ways = {(0, 0): 1}  # (classes at `votes`, siblings drawn) -> ways
    for members in others:
        grown: dict[tuple[int, int], int] = {}
        for (tied, drawn), count in ways.items():
            for more in range(min(members, votes, rest - drawn) + 1):
                key = (tied + (more == votes), drawn + more)
                grown[key] = grown.get(key, 0) + count * math.comb(members, more)
        ways = grown
    return sum(
        count * math.comb(silent, rest - drawn) / (tied + 1)
        for (tied, drawn), count in ways.items()
    )


def cons_at_tokens(questions: Sequence[Sampled], tokens: float) -> EqualTokens:
    """cons@k at `tokens` a question, averaged over the questions; k is held within 1 and n."""
    mean = sum(sum(q.tokens) / len(q.tokens) for q in questions) / len(questions)
    most = min(len(q.answers) for q in questions)
    k = min(max(tokens / mean, 1.0), float(most))
    low = min(int(k), most)
    high = min(low + 1, most)
    at_low, at_high = (
        sum(cons_accuracy(q, whole) for q in questions) / len(questions) for whole in (low, high)
    )
    return EqualTokens(k, at_low + (k - low) * (at_high - at_low))
