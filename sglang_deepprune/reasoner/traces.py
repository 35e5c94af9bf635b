"""Writes a reasoning trace for a question: visible steps, checks, wrong turns, restarts.

A trace is text the tokenizer encodes word by word:
`<think> ... </think> thus the answer is \\boxed{168}`. Traces of one question differ in order
(from the left, from the right, any), in wording, and in where they doubt themselves. With `missed`
at zero every trace is right: each wrong step is found by a check and put right. Training data lets
some wrong steps pass, as real reasoners do, so that siblings disagree for reasons one can read.
"""

from __future__ import annotations

import random
import re

from sglang_deepprune.reasoner.questions import Question, Term, expression, parse_terms

# The field's marks of reasoning that the evaluation counts; the traces use a few more connectives.
REASONING_WORDS = frozenset(
    "wait thus since so but check hmm therefore alternatively hence because however maybe".split()
)

_OPENINGS = ("okay", "first", "let us see", "hmm let us see", "so let us think", "now")
_ORDERS = {
    "left": ("go from the left", "start from the left", "take it in order"),
    "right": ("go from the right", "start from the right", "take it backwards"),
    "any": ("take any order", "pick one by one"),
}
_LEADS = (
    "so",
    "thus",
    "then",
    "now",
    "therefore",
    "hence",
    "next",
    "so then",
    "thus now",
    "but so",
)
_LEAD_WEIGHTS = (28, 18, 10, 8, 10, 8, 4, 5, 5, 4)
_PRODUCT_LEADS = ("since", "because", "but since", "so since", "hmm since")
_CHECKS = ("wait check", "hmm check", "but check", "hmm wait check", "wait maybe check", "so check")
_PASSED = ("so right", "thus right", "so fine", "okay so go on", "thus fine", "yes so correct")
_CAUGHT = ("hmm so not", "but then not", "wait so not", "however not", "oh thus not")
_RESTARTS = ("alternatively", "hmm alternatively", "but wait alternatively", "maybe alternatively")
_ENDS = ("so the total is", "thus the total is", "therefore the total is", "hence the sum is")
_MUSINGS = ("hmm okay .", "wait but fine .", "so far so good .", "hmm but go on .", "maybe okay .")

_PHRASES = (
    _OPENINGS + _LEADS + _PRODUCT_LEADS + _CHECKS + _PASSED + _CAUGHT + _RESTARTS + _ENDS + _MUSINGS
)
_GLUE = "What is thus the answer is start with again and same take"
WORDS = tuple(
    sorted(
        {w for p in _PHRASES + sum(_ORDERS.values(), ()) for w in p.split() if w.isalpha()}
        | set(_GLUE.split())
    )
)

THINK, END_THINK, BOX = "<think>", "</think>", "\\boxed{"
_WORD = re.compile(r"[a-z]+")

CHECK_RATE = 0.24  # chance that a step is checked although nothing is wrong
MUSE_RATE = 0.10
ABANDON_RATE = 0.10  # chance that a trace drops its first order half way and starts again
SECOND_PASS_RATE = 0.25  # chance that a short question is added up twice
SHORT_TERMS = 6


def write_trace(
    question: Question, rng: random.Random, *, slip: float = 0.05, missed: float = 0.0
) -> str:
    """A trace of `question`; `slip` is the chance of a wrong step, `missed` that it goes unseen."""
    return _Writer(question, rng, slip, missed).write()


def count_reasoning_words(text: str) -> int:
    """How many words of `text` are in REASONING_WORDS."""
    return sum(word in REASONING_WORDS for word in _WORD.findall(text))


class _Writer:
    """The state of one trace while it is written."""

    def __init__(self, question: Question, rng: random.Random, slip: float, missed: float) -> None:
        self.terms = parse_terms(question.prompt)
        self.rng = rng
        self.slip = slip
        self.missed = missed
        self.parts: list[str] = []

    def write(self) -> str:
        rng = self.rng
        self.parts += [THINK, rng.choice(_OPENINGS)]
        order = self._choose_order()
        if rng.random() < ABANDON_RATE and len(self.terms) > 3:
            self._add_up(order, rng.randint(2, (len(self.terms) + 1) // 2 + 1))
            self.parts.append(rng.choice(_RESTARTS))
            order = self._choose_order(order)
        total = self._add_up(order)
        if rng.random() < SECOND_PASS_RATE and len(self.terms) <= SHORT_TERMS:
            total = self._second_pass(order, total)
        self.parts += [rng.choice(_ENDS), f"{total} .", END_THINK]
        self.parts.append(f"thus the answer is {BOX}{total}}}")
        return " ".join(self.parts)

    def _choose_order(self, other_than: str = "") -> str:
        # Any order means remembering which of many terms are used: a few steps of it are plenty.
        free = 1.5 if len(self.terms) <= SHORT_TERMS else 0.5
        weights = {"left": 4.0, "right": 2.0, "any": free}
        weights.pop(other_than, None)
        order = self.rng.choices(list(weights), list(weights.values()))[0]
        return order

    def _second_pass(self, order: str, total: int) -> int:
        self.parts += ["but", "check again"]
        again = self._add_up(self._choose_order(order))
        self.parts.append("so same ." if again == total else f"hmm so not {total} but {again} .")
        return again

    def _add_up(self, order: str, limit: int | None = None) -> int:
        """Write the running total over the terms, at most `limit` of them; the last total."""
        self.parts.append(f"{self.rng.choice(_ORDERS[order])} .")
        pending = list(reversed(self.terms)) if order == "right" else list(self.terms)
        total = -1
        for _ in range(len(pending) if limit is None else limit):
            term = pending.pop(self._next_index(pending, max(total, 0)) if order == "any" else 0)
            total = self._first(term) if total < 0 else self._step(total, term)
            if self.rng.random() < MUSE_RATE:
                self.parts.append(self.rng.choice(_MUSINGS))
        return total

    def _next_index(self, pending: list[Term], total: int) -> int:
        fits = [i for i, term in enumerate(pending) if total + term.sign * term.size >= 0]
        return self.rng.choice(fits or range(len(pending)))

    def _first(self, term: Term) -> int:
        if term.right is not None:
            return self._product(term)
        self.parts.append(f"start with {term.left} .")
        return term.left

    def _product(self, term: Term) -> int:
        self.parts.append(self.rng.choice(_PRODUCT_LEADS))
        return self._equation(expression(term), term.size)

    def _step(self, total: int, term: Term) -> int:
        size = term.size if term.right is None else self._product(term)
        self.parts.append(self.rng.choices(_LEADS, _LEAD_WEIGHTS)[0])
        sign = "-" if term.sign < 0 else "+"
        return self._equation(f"{total} {sign} {size}", total + term.sign * size)

    def _equation(self, left: str, right: int) -> int:
        """Write `left = right`, perhaps wrong, perhaps checked; the value the trace keeps."""
        rng = self.rng
        wrong = rng.random() < self.slip
        # A missed slip may send a later total below zero; traces have no negative numbers.
        shown = max(_slipped(right, rng) if wrong else right, 0)
        self.parts.append(f"{left} = {shown} .")
        noticed = rng.random() >= self.missed if wrong else rng.random() < CHECK_RATE
        if not noticed:
            return shown
        right = max(right, 0)
        self.parts.append(f"{rng.choice(_CHECKS)} {left} = {right}")
        if right == shown:
            self.parts.append(f"{rng.choice(_PASSED)} .")
        else:
            self.parts.append(f"{rng.choice(_CAUGHT)} {shown} but {right} .")
        return right


def _slipped(value: int, rng: random.Random) -> int:
    """A wrong result of the kinds people make: a lost carry, a neighbour, a digit misread."""
    offset = rng.choice((10, 10, 10, 1, 1, 2, 20, 9, 11))
    slipped = value + rng.choice((-1, 1)) * offset
    return slipped if slipped >= 0 else value + offset
