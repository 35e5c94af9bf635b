"""Seeded questions with exact answers: sums of products, from three terms to twenty.

Owns the question's text form and its arithmetic; `traces.py` writes the reasoning, nothing here
imports torch. What makes a level hard is what a tiny model cannot do reliably: many terms to keep
track of, subtraction, and products computed in one go. Two-digit products are meant to be out of
reach, so that hopeless questions exist as they do on real benchmarks.

Every partial sum from the left and from the right is at least zero, so a trace may go either way
without negative numbers.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

DIFFICULTIES = ("easy", "middle", "hard", "hopeless")
MIXED = "mixed"
MAX_TERMS = 32
_TERM = re.compile(r"([+-])\s*(\d+)(?:\s*\*\s*(\d+))?")


@dataclass(frozen=True, slots=True)
class Question:
    """One question as a user would type it, its exact answer, and the level it was drawn from."""

    prompt: str
    answer: str
    difficulty: str


class Term(NamedTuple):
    """One summand of a question: `sign * left`, or `sign * left * right` for a product."""

    sign: int
    left: int
    right: int | None = None

    @property
    def size(self) -> int:
        """The summand without its sign."""
        return self.left if self.right is None else self.left * self.right


class _Level(NamedTuple):
    terms: tuple[int, int]  # fewest and most summands
    high: int  # largest plain summand
    minus: float  # chance of a minus sign
    products: tuple[tuple[int, int, int, int], ...]  # ranges of both factors, one row a product


_SMALL = (2, 9, 2, 9)
_MEDIUM = (12, 49, 3, 9)
_LARGE = (13, 39, 13, 39)
_LEVELS = {
    "easy": _Level((3, 4), 50, 0.15, ()),
    "middle": _Level((5, 7), 60, 0.2, ()),
    "hard": _Level((9, 12), 70, 0.2, (_SMALL,)),
    "hopeless": _Level((13, 17), 99, 0.3, (_SMALL, _LARGE)),
}


def questions(seed: int, count: int, difficulty: str | int = MIXED) -> list[Question]:
    """`count` questions, the same for the same seed.

    `difficulty` is a level's name, `mixed` (all levels in turn), or the number of terms.
    """
    rng = random.Random(f"{seed}/{difficulty}")
    return [draw(rng, _level_name(difficulty, i), _num_terms(difficulty)) for i in range(count)]


def draw(rng: random.Random, difficulty: str, num_terms: int | None = None) -> Question:
    """One question of a level, with the level's number of terms unless one is given."""
    level = _LEVELS[difficulty]
    count = rng.randint(*level.terms) if num_terms is None else num_terms
    while True:
        terms = _draw_terms(rng, level, count)
        values = [term.sign * term.size for term in terms]
        if min(accumulate(values)) >= 0 and min(accumulate(reversed(values))) >= 0:
            return Question(_prompt(terms), str(sum(values)), difficulty)


def parse_terms(prompt: str) -> list[Term]:
    """The summands of a question's prompt, in order."""
    expression = prompt.partition(" is ")[2]
    return [
        Term(-1 if sign == "-" else 1, int(left), int(right) if right else None)
        for sign, left, right in _TERM.findall(f"+ {expression}")
    ]


def _level_name(difficulty: str | int, index: int) -> str:
    if difficulty == MIXED:
        return DIFFICULTIES[index % len(DIFFICULTIES)]
    if isinstance(difficulty, str):
        if difficulty not in _LEVELS:
            raise ValueError(f"difficulty {difficulty!r}: use one of {MIXED}, {DIFFICULTIES}")
        return difficulty
    if not 2 <= difficulty <= MAX_TERMS:
        raise ValueError(f"difficulty {difficulty}: the number of terms is 2 to {MAX_TERMS}")
    return next((n for n in DIFFICULTIES if difficulty <= _LEVELS[n].terms[1]), DIFFICULTIES[-1])


def _num_terms(difficulty: str | int) -> int | None:
    return None if isinstance(difficulty, str) else difficulty


def _draw_terms(rng: random.Random, level: _Level, count: int) -> list[Term]:
    plain = count - len(level.products)
    terms = [Term(1, rng.randint(10, level.high)) for _ in range(plain)]
    terms += [Term(1, rng.randint(a, b), rng.randint(c, d)) for a, b, c, d in level.products]
    rng.shuffle(terms)
    # The ends stay positive: a trace starts at either of them.
    inner = range(1, count - 1)
    signs = [-1 if i in inner and rng.random() < level.minus else 1 for i in range(count)]
    return [term._replace(sign=sign) for term, sign in zip(terms, signs, strict=True)]


def _prompt(terms: list[Term]) -> str:
    parts = []
    for i, term in enumerate(terms):
        sign = "- " if term.sign < 0 else "+ " if i else ""
        parts.append(sign + expression(term))
    return f"What is {' '.join(parts)} ?"


def expression(term: Term) -> str:
    """The summand as written, without its sign."""
    return str(term.left) if term.right is None else f"{term.left} * {term.right}"
