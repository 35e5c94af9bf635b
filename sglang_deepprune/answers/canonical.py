"""The normal form of an answer: equal strings mean the same answer.

Words are folded in case and article, numbers to the shortest exact fraction, everything else to
one spelling (`folding`). Pure, cached, and bounded: an oversized answer becomes its digest.
"""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction
from functools import lru_cache

from sglang_deepprune.answers.exact import Inexact, rational
from sglang_deepprune.answers.expression import Unreadable, parse
from sglang_deepprune.answers.folding import MAX_CHARS, fold, words

_MAX_DIGITS = 200
_LABELS = re.compile(r"[A-J]{2,6}")
PHRASE = re.compile(r"[^\W\d_]+(?:[ '.-]+[^\W\d_]+)*[.!]?")
_FORMULA = re.compile(r"(?=.{0,80}\d)(?:[A-Z][a-z]?(?: ?_?\d{1,2})?(?<=\w) ?){2,40}(?<! )")  # H_2O
_ARTICLE = re.compile(
    r"(?:the|an|a(?!\s+(?:and|or|und|oder|et|ou|y)\b)|der|die|das|le|la|el)\s+(?=\w{2})"
)
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen twenty"
        )
    )
}
_TENS = {
    word: 10 * tens
    for tens, word in enumerate(words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)
}
_NUMBER_WORDS |= {word: str(value) for word, value in _TENS.items()}
_NUMBER_WORDS |= {
    f"{tens}{mark}{unit}": str(value + int(_NUMBER_WORDS[unit]))
    for tens, value in _TENS.items()
    for unit in words("one two three four five six seven eight nine")
    for mark in "- "
}
_SYNONYMS = _NUMBER_WORDS | {
    "infinity": r"\infty",
    "+\\infty": r"\infty",
    "negative infinity": r"-\infty",
    "dne": "undefined",
    "does not exist": "undefined",
    "not defined": "undefined",
    "null set": "∅",
    "noon": "12:00 pm",
    "midnight": "12:00 am",
    "infinitely many solutions": "infinitely many",
    "all integers": r"\mathbb{Z}",
    "integers": r"\mathbb{Z}",
    "one hundred": "100",
    "one half": "1/2",
    "half": "1/2",
    "one third": "1/3",
    "one quarter": "1/4",
}


def canonical(answer: str) -> str:
    """The normal form of an answer; equal forms are the same answer. Bounded on any input."""
    if len(answer) > MAX_CHARS:  # and kept in no cache
        return "sha256:" + hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()
    return _canonical(answer)


@lru_cache(maxsize=4096)
def _canonical(answer: str) -> str:
    text = fold(answer)
    is_labels = _LABELS.fullmatch(text) and "".join(sorted(set(text))) == text
    if PHRASE.fullmatch(text) and len(text) > 1 and not is_labels:
        text = text.casefold()
        text = _ARTICLE.sub("", text, count=1).rstrip(".!")
        return _SYNONYMS.get(text, text)
    if _FORMULA.fullmatch(text):
        return text.replace("_", "").replace(" ", "")
    if (letter := re.fullmatch(r"\(([A-J])\)", text)) is not None:
        return letter[1]
    if (value := exact_value(text)) is not None and not re.search(r"[%°]", text):
        digits = (value.numerator.bit_length() + value.denominator.bit_length()) * 0.302
        return str(value) if digits < _MAX_DIGITS else text
    return _SYNONYMS.get(text, text)


@lru_cache(maxsize=4096)
def exact_value(text: str) -> Fraction | None:
    """The rational number that a folded string denotes, or None."""
    try:
        return rational(parse(text))
    except (Unreadable, Inexact, RecursionError):
        return None
