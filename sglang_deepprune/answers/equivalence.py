"""The slow path: whether two answers are the same, with computer algebra. For child processes.

May take arbitrarily long on hostile input, so nobody calls it outside a `Child` that can be
killed (see `fence`). Uses the shape rules of `compare` with a stronger comparer for bare
expressions: residues modulo three primes (no number is ever written out), then sympy, then
Math-Verify for what our own grammar cannot read. Symmetric in its arguments. A float only ever
shows a difference (at 40 digits); equality is always shown exactly.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from typing import Any

import sympy

from sglang_deepprune.answers.canonical import canonical
from sglang_deepprune.answers.compare import FAST, Rules, decide
from sglang_deepprune.answers.exact import PRIMES, Inexact, rational, residue
from sglang_deepprune.answers.expression import Tree, Unreadable, parse
from sglang_deepprune.answers.quantity import Decision
from sglang_deepprune.answers.shapes import Equation

_MEMORY_BYTES = 4 << 30
_DIGITS = 40
_MAX_DEPTH = 12  # of brackets, for Math-Verify
_TOLERANCE = sympy.Float("1e-30", _DIGITS)
_POINTS = (sympy.Rational(7, 3), sympy.Rational(11, 5), sympy.Rational(17, 7))
# The logarithm of the base that a bare `log` leaves open: 10 in one book, e in the next.
_UNSTATED_BASE = sympy.Symbol("log-of-base", positive=True)
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}


def make_comparer(memory_bytes: int = _MEMORY_BYTES) -> Callable[[tuple[str, str]], bool]:
    """The child's factory: loads the algebra, bounds the memory, and answers `(a, b)` requests."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    # Loads Math-Verify: its half a second must not be some pair's.
    equivalent(r"\int_0^1 x dx", r"\sum_{k=1}^{2} k")
    return lambda pair: equivalent(*pair)


def equivalent(a: str, b: str) -> bool:
    """True when the answers are shown to be the same; False when different or not shown."""
    return decide(a, b, SLOW) is True


def _expressions(a: str, b: str) -> Decision:
    fast = FAST.expressions(a, b)
    if fast is not None:
        return fast
    a, b = sorted((canonical(a), canonical(b)))
    try:
        return _same_trees(parse(a), parse(b))
    except (Unreadable, RecursionError):
        return _math_verify(a, b)


def _same_trees(x: Tree, y: Tree) -> bool:
    try:
        return all(residue(x, prime) == residue(y, prime) for prime in PRIMES)
    except (Inexact, RecursionError):
        pass
    try:
        return _is_zero(_to_sympy(x), _to_sympy(y))
    except Inexact:
        return False


def _is_zero(x: Any, y: Any) -> bool:
    """Whether x - y vanishes: first try to refute it with numbers, then prove it."""
    if x == y:
        return True
    if x.has(sympy.oo, sympy.zoo, sympy.nan) or y.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    difference = x - y
    symbols = sorted(difference.free_symbols, key=str)
    shifts = range(3) if symbols else range(1)
    for shift in shifts:
        point = {s: _POINTS[(i + shift) % 3] + i for i, s in enumerate(symbols)}
        value = difference.subs(point).evalf(_DIGITS)
        scale = 1 + abs(x.subs(point).evalf(15))
        if value.is_number and value.is_finite and abs(value) > _TOLERANCE * scale:
            return False
    return bool(sympy.simplify(difference) == 0 or difference.equals(0) is True)


def _to_sympy(tree: Tree) -> Any:
    kind = tree[0]
    if kind == "num":
        return sympy.Rational(tree[1].numerator, tree[1].denominator)
    if kind == "sym":
        return _CONSTANTS.get(tree[1], sympy.Symbol(tree[1]))
    if kind == "pow":
        return _power(tree)
    if kind == "choose":
        return sympy.expand_func(sympy.binomial(*map(_to_sympy, tree[1:])))
    if kind == "fact":
        value = rational(tree)
        return sympy.Rational(value.numerator, value.denominator)
    if kind == "fn":
        return _function(tree[1], _to_sympy(tree[2]))
    x, *rest = [_to_sympy(child) for child in tree[1:]]
    if kind in ("neg", "abs"):
        return -x if kind == "neg" else sympy.Abs(x)
    if kind == "root":
        is_odd = rest[0].is_Integer and rest[0] % 2 == 1 and x.is_real and x.is_negative
        return -sympy.root(-x, rest[0]) if is_odd else sympy.root(x, rest[0])
    if kind == "log":
        return sympy.log(x, rest[0])
    (y,) = rest
    if kind == "div" and y == 0:
        raise Inexact("division by zero")
    return {"add": x + y, "mul": x * y}[kind] if kind != "div" else x / y


def _power(tree: Tree) -> Any:
    base, exponent = _to_sympy(tree[1]), _to_sympy(tree[2])
    is_numeric = base.is_number and exponent.is_number
    # sympy would write such a number out; the residues have had their chance.
    if is_numeric and exponent.is_Rational and abs(exponent) > 10_000:
        raise Inexact("too large")
    return base**exponent


def _function(name: str, x: Any) -> Any:
    if name == "log":
        return sympy.log(x) / _UNSTATED_BASE
    names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "ceil": "ceiling"}
    return getattr(sympy, names.get(name, name))(x)


def _equations(x: Equation, y: Equation) -> Decision:
    """Two equations are the same when one is a non-zero constant times the other."""
    if FAST.equations(x, y):
        return True
    try:
        first, second = (
            ("add", parse(canonical(e.left)), ("neg", parse(canonical(e.right)))) for e in (x, y)
        )
    except (Unreadable, RecursionError):
        return False
    try:
        return all(_is_multiple(first, second, prime) for prime in PRIMES)
    except (Inexact, RecursionError):
        pass
    try:
        ratio = sympy.simplify(_to_sympy(first) / _to_sympy(second))
    except Inexact:
        return False
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _is_multiple(x: Tree, y: Tree, prime: int) -> bool:
    points = [(residue(_at(x, n), prime), residue(_at(y, n), prime)) for n in range(3)]
    if any(0 in point for point in points):
        raise Inexact("a root")
    (a, b), *others = points
    return all(a * d % prime == b * c % prime for c, d in others)


def _at(tree: Tree, point: int) -> Tree:
    """The tree with its symbols renamed, hence at another pseudo-random point."""
    if tree[0] == "sym":
        return ("sym", f"{tree[1]}@{point}")
    return tuple(_at(part, point) if isinstance(part, tuple) else part for part in tree)


def _math_verify(a: str, b: str) -> bool:
    """Integrals, sums and other notation that our grammar leaves alone. Both directions agree.

    It leaves out what it does not know (the subscript of 101_2, the 万 of 3万), and takes time
    exponential in the depth of braces: neither is put to it.
    """
    if not all(map(_is_notation, (a, b))):
        return False
    try:
        from math_verify import parse as mv_parse
        from math_verify import verify as mv_verify
    except ImportError:
        return False
    # We bring our own time limit, which is what its warnings ask for.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [mv_parse(f"${text}$", parsing_timeout=None) for text in (a, b)]
    if not all(items and isinstance(items[0], sympy.Basic) for items in parsed):
        return False
    first, second = (items[:1] for items in parsed)
    return all(
        mv_verify(gold, target, float_rounding=30, timeout_seconds=None)
        for gold, target in ((first, second), (second, first))
    )


def _is_notation(text: str) -> bool:
    """Whether an answer is LaTeX of sensible depth, or plain enough to be read by ourselves."""
    if not text.isascii() or _depth(text) > _MAX_DEPTH:
        return False
    try:
        parse(text)
    except (Unreadable, RecursionError):
        return "\\" in text
    return True


def _depth(text: str) -> int:
    deepest = depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return deepest


SLOW = Rules(_expressions, _equations, max_work=1_000_000, max_chars=1_000_000)
