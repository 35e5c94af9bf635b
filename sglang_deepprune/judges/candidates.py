"""What a truncated trace says about each answer it may still give, by regular expressions.

Candidates are the lettered options of the prompt, or, for open answers, the results that the trace
has stated so far (numbers, boxed drafts, the right sides of equations). No model, no torch: 1 to 10
ms a trace on one core. Positions are in characters; "tail" is the last quarter of what was read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

MAX_RESULTS = 12  # stated results kept as candidates, the last ones
_CLOSE = 200  # characters from the end that count as "what it says now"

_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)
_WORD = re.compile(r"[a-z]{4,}|\d+(?:\.\d+)?")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
_BOXED = re.compile(r"\\boxed\{([^{}]{1,40})\}")
_EQUALS = re.compile(
    r"(?:=|\bis|\bequals|\bmakes|\bgives)\s*(?:\$\s*)?(-?\d+(?:,\d{3})*(?:\.\d+)?)(?![\w])"
)
_GOOD = re.compile(
    r"\b(?:correct|matches|match|best|fits|right|yes|indeed|therefore|thus|answer|choose|true)\b",
    re.I,
)
_BAD = re.compile(
    r"\b(?:incorrect|wrong|not|no|doesn't|isn't|false|unlikely|eliminated?|too|but|less|however)\b",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The answers a trace may still give, and what it says about each.

    Attributes
    ----------
    names : tuple[str, ...]
        Letters, or results in one canonical spelling. Candidates of two traces are the same answer
        when their names are equal.
    features : np.ndarray
        [num_candidates, NUM_FEATURES] float32.
    """

    names: tuple[str, ...]
    features: np.ndarray


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> text of the lettered options of a prompt; empty when there are fewer than two.

    The last run of lines "A. ...", "B. ..." in order counts: a question may quote other lists.
    """
    found: dict[str, str] = {}
    best: dict[str, str] = {}
    for letter, text in _OPTION_LINE.findall(prompt):
        if letter == "A":
            found = {}
        if letter == chr(ord("A") + len(found)):
            found[letter] = text.strip()
            if len(found) >= 2:
                best = dict(found)
    return best


def _log(count: float) -> float:
    return math.log1p(count)


def _mention_features(text: str, starts: list[int], ends: list[int]) -> list[float]:
    """How often, how lately and with which verdicts around it something was mentioned."""
    size = max(1, len(text))
    tail = size * 3 // 4
    in_tail = sum(start >= tail for start in starts)
    in_close = sum(start >= size - _CLOSE for start in starts)
    good = bad = last_good = last_bad = before_good = 0
    for start, end in zip(starts[-40:], ends[-40:], strict=True):
        line = text.find("\n", end)
        after = text[end : min(end + 80, line if line >= 0 else size)]
        last_good, last_bad = bool(_GOOD.search(after)), bool(_BAD.search(after))
        good, bad = good + last_good, bad + last_bad
        before_good += bool(_GOOD.search(text[max(0, start - 40) : start]))
    return [
        float(bool(starts)), _log(len(starts)), _log(in_tail), _log(in_close),
        starts[-1] / size if starts else -0.2, starts[0] / size if starts else 1.2,
        _log(good), _log(bad), _log(before_good), float(last_good), float(last_bad),
    ]  # fmt: skip


_NUM_MENTION = 11


def _ranked(columns: np.ndarray) -> np.ndarray:
    """Each feature less its mean over the candidates, and whether it is the greatest one."""
    centred = columns - columns.mean(axis=0, keepdims=True)
    top = columns.max(axis=0, keepdims=True)
    is_top = ((columns == top) & (columns != columns.min(axis=0, keepdims=True))).astype(np.float32)
    share = is_top / np.maximum(1, is_top.sum(axis=0, keepdims=True))
    return np.concatenate([centred, share], axis=1)


def _option_columns(text: str, options: dict[str, str]) -> np.ndarray:
    low = text.lower()
    tail = low[len(low) * 3 // 4 :]
    seen, seen_tail = _counts(low), _counts(tail)
    words = {letter: set(_WORD.findall(option.lower())) for letter, option in options.items()}
    spread: dict[str, int] = {}
    for own in words.values():
        for word in own:
            spread[word] = spread.get(word, 0) + 1
    rows = []
    for letter, option in options.items():
        # As a letter: "(C)", "C.", "C)", "option C", "**C**", "is C", "C is", "\boxed{C}".
        marks = [
            m.span()
            for m in re.finditer(
                rf"\({letter}\)|(?<![\w'])\*{{0,2}}{letter}\*{{0,2}}[.):,](?!\w)"
                rf"|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|is|be|to) \*{{0,2}}\(?{letter}\b"
                rf"|\b{letter} (?:is|seems|would|looks)\b|\\(?:boxed|text)\{{{letter}\}}",
                text,
            )
        ]
        row = _mention_features(text, [a for a, _ in marks], [b for _, b in marks])
        answers = [
            m.start()
            for m in re.finditer(
                rf"(?:[Aa]nswer(?: is)?|boxed)\W{{0,6}}(?:\(|\*|\{{|option )*{letter}\b", text
            )
        ]
        row += [_log(len(answers)), answers[-1] / len(text) if answers else -0.2]
        # As its text: verbatim, and by the words that few other options share.
        spans: list[int] = []
        needle = option.lower().rstrip(". ")
        place = low.find(needle) if len(needle) >= 2 else -1
        while place >= 0 and len(spans) < 200:
            spans.append(place)
            place = low.find(needle, place + len(needle))
        row += _mention_features(text, spans, [s + len(needle) for s in spans])
        weight = sum(1 / spread[w] for w in words[letter]) or 1.0
        row.append(sum((w in seen) / spread[w] for w in words[letter]) / weight)
        row.append(sum((w in seen_tail) / spread[w] for w in words[letter]) / weight)
        row.append(sum(_log(seen_tail.get(w, 0)) / spread[w] for w in words[letter]) / weight)
        sole = [w for w in words[letter] if spread[w] == 1]
        row.append(sum(_log(seen.get(w, 0)) for w in sole) / max(1, len(sole)))
        row.append(sum(_log(seen_tail.get(w, 0)) for w in sole) / max(1, len(sole)))
        rows.append(row)
    return np.asarray(rows, dtype=np.float32)


def _counts(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in _WORD.findall(text):
        counts[word] = counts.get(word, 0) + 1
    return counts


def option_candidates(text: str, options: dict[str, str]) -> Candidates:
    """The options of the prompt, each with what `text` (a truncated trace) says about it."""
    return Candidates(tuple(options), _ranked(_option_columns(text, options)))


def _canonical(number: str) -> str:
    value = number.replace(",", "")
    if "." in value:
        value = value.rstrip("0").rstrip(".")
    return value if value not in ("-0", "") else "0"


def result_candidates(text: str) -> Candidates:
    """The results that `text` states, the last `MAX_RESULTS` of them, oldest first."""
    size = max(1, len(text))
    spans: dict[str, list[tuple[int, int, int]]] = {}
    for kind, pattern in ((0, _NUMBER), (1, _EQUALS), (2, _BOXED)):
        for match in pattern.finditer(text):
            group = match.group(1) if kind else match.group(0)
            spans.setdefault(_canonical(group.strip()), []).append(
                (match.start(), match.end(), kind)
            )
    stated = {name: found for name, found in spans.items() if any(kind for _, _, kind in found)}
    names = sorted(stated, key=lambda name: max(stated[name]))[-MAX_RESULTS:]
    rows = []
    for place, name in enumerate(names):
        found = sorted(stated[name])
        plain = [(a, b) for a, b, kind in found if kind == 0]
        results = [(a, b) for a, b, kind in found if kind == 1]
        boxed = [a for a, _, kind in found if kind == 2]
        row = _mention_features(text, [a for a, _ in plain], [b for _, b in plain])
        row += [_log(len(boxed)), boxed[-1] / size if boxed else -0.2]
        row += _mention_features(text, [a for a, _ in results], [b for _, b in results])
        row += [
            float(place == len(names) - 1), float(place == len(names) - 2),
            1.0 / (len(names) - place), float(len(name)), float("." in name),
        ]  # fmt: skip
        rows.append(row)
    if not rows:
        return Candidates((), np.zeros((0, NUM_FEATURES), dtype=np.float32))
    return Candidates(tuple(names), _ranked(np.asarray(rows, dtype=np.float32)))


NUM_FEATURES = 2 * (2 * _NUM_MENTION + 7)
