"""Decides in microseconds whether two answers are the same, where plain rules can decide.

Beyond equal canonical strings it uses exact rational arithmetic and the rules for shapes (sets,
tuples, intervals, names) and units. True and False are certain, None means that only the slow
path (`equivalence`) can tell. No sympy, no I/O, no clock: every tensor-parallel rank gets the
same result, so a vote may act on it in its own step.
`decide` is shared with the slow path, which passes a stronger comparer for bare expressions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from sglang_deepprune.answers.canonical import PHRASE, canonical, exact_value
from sglang_deepprune.answers.expression import Unreadable, parse
from sglang_deepprune.answers.quantity import Comparer, Decision, agree
from sglang_deepprune.answers.regions import HIGHEST, LOWEST, Piece, Region, merged
from sglang_deepprune.answers.shapes import Equation, Many, Matrix, Named, Nothing, Shape, Value
from sglang_deepprune.answers.shapes import read as read_shapes

_MAX_NESTING = 4
_CHARS_A_PAIR = 64  # more of them are more work
# What a question asks for: a sum of names, a named quantity.
_ASKED = re.compile(
    r"[a-z](?:_\w)?(?:\+[a-z](?:_\w)?)+|[A-Z]{2,3}|m?\\angle ?[A-Z]{1,3}|\|[A-Z]{2}\|"
    r"|\\(?:overline|frac|int|lim|sum|prod|sin|cos|tan)(?![a-zA-Z]).{1,80}|[A-Z]\([^()]{1,40}\)"
)
_LETTER = re.compile(r"\(?([A-Ja-j])\)?")
_LABELLED = re.compile(r"\(([A-J])\) ?\S.*|([A-J])\) ?\S.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rules:
    """How bare expressions and equations are compared: fast here, with sympy in `equivalence`."""

    expressions: Comparer
    equations: Callable[[Equation, Equation], Decision]
    # Work of one decision, in pairs of short texts (about 50 microseconds): nested sets would
    # otherwise cost seconds.
    max_work: int = 400
    # Characters of an answer's canonical form that are read at all; longer ones are the fence's.
    max_chars: int = 600


@dataclass(slots=True)
class Allowance:
    """Work that several decisions may share; what is not decided within it is not decided."""

    left: int


def compare(a: str, b: str, allowance: Allowance | None = None) -> bool | None:
    """True or False when that is certain, None when only the slow path can tell. Symmetric."""
    return decide(a, b, FAST, allowance)


def decide(a: str, b: str, rules: Rules, allowance: Allowance | None = None) -> Decision:
    """Canonical forms first, then every pair of readings."""
    left, right = sorted((canonical(a), canonical(b)))
    if left == right:
        return True
    if left.startswith("sha256:") or right.startswith("sha256:"):
        return None
    if max(len(left), len(right)) > rules.max_chars:
        return None
    left, right = _labels(left, right)
    granted = rules.max_work if allowance is None else min(rules.max_work, allowance.left)
    work = _Work(rules.expressions, rules.equations, granted)
    decision = _match_texts(left, right, work, 0)
    if allowance is not None:
        allowance.left -= granted - max(0, work.num_left)
    return decision


@dataclass(slots=True)
class _Work:
    """One decision's rules and what is left of its work."""

    expressions: Comparer
    equations: Callable[[Equation, Equation], Decision]
    num_left: int


def _labels(left: str, right: str) -> tuple[str, str]:
    """`(C) 12` next to a bare `C` is the option's label with its text."""
    forms = [left, right]
    for index, other in ((0, right), (1, left)):
        labelled = _LABELLED.fullmatch(forms[index])
        if labelled is not None and _LETTER.fullmatch(other):
            forms[index] = labelled[1] or labelled[2]
    return forms[0], forms[1]


def _match_texts(a: str, b: str, work: _Work, depth: int) -> Decision:
    if a == b:
        return True
    work.num_left -= 1 + (len(a) + len(b)) // _CHARS_A_PAIR
    if depth > _MAX_NESTING or work.num_left < 0:
        return None
    return _any(match(x, y, work, depth) for x in read_shapes(a) for y in read_shapes(b))


def _any(decisions: Iterable[Decision]) -> Decision:
    seen: Decision = False
    for decision in decisions:
        if decision is True:
            return True
        if decision is None:
            seen = None
    return seen


def _all(decisions: Iterable[Decision]) -> Decision:
    seen: Decision = True
    for decision in decisions:
        if decision is False:
            return False
        if decision is None:
            seen = None
    return seen


def match(x: Shape, y: Shape, work: _Work, depth: int = 0) -> Decision:
    """Whether two shapes are the same answer."""
    if _RANK[type(x)] > _RANK[type(y)]:
        x, y = y, x

    def texts(a: str, b: str) -> Decision:
        return _match_texts(canonical(a), canonical(b), work, depth + 1)

    if isinstance(y, Named):
        return _match_named(x, y, work, depth)
    if isinstance(x, Value) and isinstance(y, Value):
        return agree(x.text, y.text, work.expressions)
    if isinstance(x, Nothing) or isinstance(y, Nothing):
        return isinstance(x, Nothing) and isinstance(y, Nothing)
    if isinstance(x, Many) and isinstance(y, Many):
        return _match_many(x, y, texts)
    if isinstance(x, Region) and isinstance(y, Region):
        return _match_regions(x, y, texts)
    if isinstance(x, Matrix) and isinstance(y, Matrix):
        return _match_matrices(x, y, texts)
    if isinstance(x, Many) and isinstance(y, Matrix):
        return _match_vector(x, y, texts)
    if isinstance(y, Equation):
        return _match_equation(x, y, work, texts)
    return False


_RANK: dict[type, int] = {
    kind: rank for rank, kind in enumerate((Value, Nothing, Many, Region, Matrix, Equation, Named))
}


def _match_many(x: Many, y: Many, texts: Comparer) -> Decision:
    kinds = {x.kind, y.kind}
    if "array" in kinds and kinds - {"array", "list"}:
        return False
    if kinds == {"set", "tuple"}:
        return False
    if "tuple" in kinds or kinds == {"array"}:
        if len(x.members) != len(y.members):
            return False
        return _all(texts(a, b) for a, b in zip(x.members, y.members, strict=True))
    covered = _covered(x.members, y.members, texts)
    return False if covered is False else _all([covered, _covered(y.members, x.members, texts)])


def _covered(members: Sequence[str], others: Sequence[str], texts: Comparer) -> Decision:
    """Whether each of the members is one of the others. Equal spellings need no pair of them."""
    known = {canonical(other) for other in others}
    left = [member for member in members if canonical(member) not in known]
    return _all(_any(texts(member, other) for other in others) for member in left)


def _match_equation(x: Shape, y: Equation, work: _Work, texts: Comparer) -> Decision:
    if isinstance(x, Equation):
        return work.equations(x, y)
    # `2+2=4` as an answer says 4, and so does `m+n=4`; `x^2=4` does not, nor `2x-y=0`.
    is_sum = isinstance(x, Value) and (
        exact_value(canonical(y.left)) is not None or bool(_ASKED.fullmatch(y.left))
    )
    return texts(x.text, y.right) if isinstance(x, Value) and is_sum else False


def _match_named(x: Shape, y: Named, work: _Work, depth: int) -> Decision:
    def texts(a: str, b: str) -> Decision:
        return _match_texts(canonical(a), canonical(b), work, depth + 1)

    if isinstance(x, Named):
        return _match_names(x, y, texts)
    if len(y.names) == 1 and isinstance(x, Equation):
        return work.equations(x, Equation(y.names[0], y.values[0]))
    if len(y.names) == 1 and depth <= _MAX_NESTING:
        return _any(match(x, s, work, depth + 1) for s in read_shapes(canonical(y.values[0])))
    if isinstance(x, Many):
        # x_1=2, x_2=3 are the roots, in any order.
        is_one_name = len({name.partition("_")[0] for name in y.names}) == 1
        return _match_many(x, Many("list" if is_one_name else "tuple", y.values), texts)
    return False


def _match_names(x: Named, y: Named, texts: Comparer) -> Decision:
    if x.names != y.names and {name.partition("_")[0] for name in (*x.names, *y.names)} in (
        {x.names[0]}, {y.names[0]},
    ):  # fmt: skip
        return _match_many(Many("list", x.values), Many("list", y.values), texts)
    if set(x.names) != set(y.names):
        is_function = any("(" in name for name in (*x.names, *y.names))
        return None if is_function and len(x.names) == len(y.names) == 1 else False
    if len(set(x.names)) == 1:
        return _match_many(Many("list", x.values), Many("list", y.values), texts)
    if x.names != y.names:
        return None
    return _all(texts(a, b) for a, b in zip(x.values, y.values, strict=True))


def _match_matrices(x: Matrix, y: Matrix, texts: Comparer) -> Decision:
    if x.is_determinant != y.is_determinant or list(map(len, x.rows)) != list(map(len, y.rows)):
        return False
    rows = zip(x.rows, y.rows, strict=True)
    return _all(texts(a, b) for left, right in rows for a, b in zip(left, right, strict=True))


def _match_vector(x: Many, y: Matrix, texts: Comparer) -> Decision:
    flat = [cell for row in y.rows for cell in row]
    is_vector = len(y.rows) == 1 or all(len(row) == 1 for row in y.rows)
    if x.kind != "tuple" or not is_vector or len(flat) != len(x.members):
        return False
    return _all(texts(a, b) for a, b in zip(x.members, flat, strict=True))


def _match_regions(x: Region, y: Region, texts: Comparer) -> Decision:
    if x.name and y.name and x.name != y.name:
        return False
    left, right = merged(x, _edge_value), merged(y, _edge_value)
    if left is not None and right is not None:
        return left == right

    def pieces(a: Piece, b: Piece) -> Decision:
        if (a.has_low, a.has_high) != (b.has_low, b.has_high):
            return False
        return _all(ends(p, q) for p, q in ((a.low, b.low), (a.high, b.high)))

    def ends(p: str, q: str) -> Decision:
        return p == q if {p, q} & {LOWEST, HIGHEST} else texts(p, q)

    if len(x.pieces) != len(y.pieces) or len(x.holes) != len(y.holes):
        return False if left is None and right is None else None
    holes = _all(_any(texts(p, q) for q in y.holes) for p in x.holes)
    return _all([holes, *(_any(pieces(p, q) for q in y.pieces) for p in x.pieces)])


def _edge_value(text: str) -> Fraction | None:
    return exact_value(canonical(text))


def _fast_expressions(a: str, b: str) -> Decision:
    a, b = canonical(a), canonical(b)
    if a == b:
        return True
    letters = _LETTER.fullmatch(a), _LETTER.fullmatch(b)
    if letters[0] and letters[1]:
        return letters[0][1].upper() == letters[1][1].upper()
    plain = _is_plain(a), _is_plain(b)
    if all(plain):
        return exact_value(a) == exact_value(b) if plain == ("number", "number") else False
    if "phrase" in plain:
        other = b if plain[0] == "phrase" else a
        return False if _is_readable(other) else None
    return None


def _is_plain(text: str) -> str | None:
    """Numbers, single letters and words decide at once; everything else needs algebra."""
    if exact_value(text) is not None:
        return "number"
    if len(text) == 1 and text.isalpha():
        return "letter"
    is_phrase = len(text) > 3 or (len(text) == 3 and text.isalpha()) or text in ("no", "ja", "si")
    return "phrase" if is_phrase and PHRASE.fullmatch(text) else None


@lru_cache(maxsize=4096)
def _is_readable(text: str) -> bool:
    try:
        parse(text)
    except (Unreadable, RecursionError):
        return False
    return True


def _fast_equations(x: Equation, y: Equation) -> Decision:
    same = sorted((canonical(x.left), canonical(x.right))) == sorted(
        (canonical(y.left), canonical(y.right))
    )
    return True if same else None


FAST = Rules(_fast_expressions, _fast_equations)
