"""The rival that any saving has to beat: drawing fewer samples for the same tokens (cons@k).

From the recorded siblings of plain n>1: what a majority vote over a random k-subset scores, and
what it costs. Between two whole k the expectation is interpolated. Ties go to the class with the
lowest place in the subset, as in `voting.py`, whose order is random here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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


def is_same(a: str, b: str) -> bool:
    return compare(a, b) is True


def majority(
    answers: Sequence[str | None], same: Callable[[str, str], bool] = is_same
) -> str | None:
    """The most frequent answer; among equals the one that came first."""
    classes: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        for known in classes:
            if same(known[0], answer):
                known.append(answer)
                break
        else:
            classes.append([answer])
    return max(classes, key=len)[0] if classes else None


def cons_accuracy(question: Sampled, k: int, draws: int = 400, seed: int = 0) -> float:
    """Expected share of right votes over random k-subsets, drawn without replacement."""
    size = len(question.answers)
    rng = random.Random(f"{seed} {k} {question.gold} {question.tokens}")
    right = 0
    for _ in range(draws):
        chosen = [question.answers[i] for i in rng.sample(range(size), k)]
        winner = majority(chosen)
        right += winner is not None and is_same(winner, question.gold)
    return right / draws


def cons_at_tokens(questions: Sequence[Sampled], tokens: float) -> EqualTokens:
    """cons@k at `tokens` a question, averaged over the questions."""
    mean = sum(sum(q.tokens) / len(q.tokens) for q in questions) / len(questions)
    most = min(len(q.answers) for q in questions)
    k = min(max(tokens / mean, 1.0), float(most))
    low = min(int(k), most)
    high = min(low + 1, most)
    at_low, at_high = (
        sum(cons_accuracy(q, whole) for q in questions) / len(questions) for whole in (low, high)
    )
    return EqualTokens(k, at_low + (k - low) * (at_high - at_low))
