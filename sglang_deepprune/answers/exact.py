"""Exact values of expression trees: rational numbers within a size bound, and residues beyond it.

`rational` evaluates with Python integers only while every intermediate fits `MAX_BITS`, so it
is safe in a decode step. `residue` evaluates modulo a prime, which decides `9^{9^{9^9}}` or
`10^{10000000}+1` without ever writing them out: different residues prove a difference, equal
residues under three large primes (with symbols at fixed pseudo-random points, Schwartz-Zippel)
an equality but for a chance below 1e-50. Neither touches floats.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from functools import cache, lru_cache

from sglang_deepprune.answers.expression import Tree

MAX_BITS = 32_768
MAX_FACTORIAL = 2_500
MAX_ROOT_BITS = 4_096  # of a number whose cube root and so on is taken, digit by digit
# Mersenne primes: the totients of p - 1, needed for exponents of exponents, are smooth.
PRIMES = (2**61 - 1, 2**89 - 1, 2**127 - 1)


class Inexact(ValueError):
    """The tree has no exact value of the wanted kind within the bounds."""


def rational(tree: Tree) -> Fraction:
    """The exact rational value of a tree without symbols."""
    value = _rational(tree)
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Inexact("too large")
    return value


def _rational(tree: Tree) -> Fraction:
    kind = tree[0]
    if kind == "num":
        return Fraction(tree[1])
    if kind == "neg":
        return -rational(tree[1])
    if kind == "add":
        return rational(tree[1]) + rational(tree[2])
    if kind == "mul":
        return rational(tree[1]) * rational(tree[2])
    if kind == "div":
        return _divide(rational(tree[1]), rational(tree[2]))
    if kind == "pow":
        return _power(rational(tree[1]), rational(tree[2]))
    if kind == "root":
        return _root(rational(tree[1]), rational(tree[2]))
    if kind == "abs":
        return abs(rational(tree[1]))
    if kind == "fact":
        return _factorial(_small(rational(tree[1])))
    if kind == "choose":
        return _choose(_small(rational(tree[1])), _small(rational(tree[2])))
    if kind == "fn" and tree[1] in ("floor", "ceil"):
        return Fraction(getattr(math, tree[1])(rational(tree[2])))
    raise Inexact(kind)


def _divide(top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise Inexact("division by zero")
    return top / bottom


def _small(value: Fraction) -> int:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Inexact("factorial of a large or broken number")
    return int(value)


@lru_cache(maxsize=64)
def _factorial(value: int) -> Fraction:
    return Fraction(math.factorial(value))


@lru_cache(maxsize=64)
def _choose(size: int, count: int) -> Fraction:
    return Fraction(math.comb(size, count))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise Inexact("power of zero")
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(exponent) * bits > MAX_BITS and base not in (0, 1, -1):
        raise Inexact("too large")
    return base ** (int(exponent) if base not in (1, -1) else int(exponent) % 2)


def _root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 2 <= degree <= 64 or value < 0:
        raise Inexact("root")
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    if degree > 2 and bits > MAX_ROOT_BITS:
        raise Inexact("root of a large number")
    return Fraction(
        _integer_root(value.numerator, int(degree)), _integer_root(value.denominator, int(degree))
    )


def _integer_root(value: int, degree: int) -> int:
    root = math.isqrt(value) if degree == 2 else _newton_root(value, degree)
    if root**degree != value:
        raise Inexact("irrational")
    return root


def _newton_root(value: int, degree: int) -> int:
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // degree)
    while True:
        following = ((degree - 1) * guess + value // guess ** (degree - 1)) // degree
        if following >= guess:
            return guess
        guess = following


def residue(tree: Tree, prime: int) -> int:
    """The value modulo a prime, symbols at points fixed by their names."""
    kind = tree[0]
    if kind == "num":
        value: Fraction = tree[1]
        return value.numerator * _inverse(value.denominator, prime) % prime
    if kind == "sym" and tree[1] not in ("i", "oo"):
        digest = hashlib.sha256(f"{tree[1]}/{prime}".encode()).digest()
        return int.from_bytes(digest, "big") % prime
    if kind == "neg":
        return -residue(tree[1], prime) % prime
    if kind in ("add", "mul"):
        left, right = residue(tree[1], prime), residue(tree[2], prime)
        return (left + right if kind == "add" else left * right) % prime
    if kind == "div":
        return residue(tree[1], prime) * _inverse(residue(tree[2], prime), prime) % prime
    if kind == "pow":
        return _power_residue(tree, prime)
    if kind in ("fact", "choose"):
        return residue(("num", rational(tree)), prime)
    if kind == "root":
        return residue(("num", rational(tree)), prime)
    raise Inexact(kind)


def _inverse(value: int, modulus: int) -> int:
    try:
        return pow(value, -1, modulus)
    except ValueError:
        raise Inexact("division by zero") from None


def _power_residue(tree: Tree, prime: int) -> int:
    base, exponent = residue(tree[1], prime), tree[2]
    is_inverse = exponent[0] == "neg"
    if is_inverse:
        exponent = exponent[1]
    power = pow(base, _reduced(exponent, prime - 1), prime) if base else 0
    return _inverse(power, prime) if is_inverse else power


def _reduced(tree: Tree, totient: int) -> int:
    """An exponent that acts like the tree's value for a modulus with this totient."""
    try:
        value = rational(tree)
    except Inexact:
        # Euler's theorem in its general form holds from the modulus's bit length on.
        return _integer_residue(tree, totient) + totient
    if value.denominator != 1:
        raise Inexact("broken exponent")
    return int(value) if value < totient else int(value) % totient + totient


def _integer_residue(tree: Tree, modulus: int) -> int:
    """A huge non-negative integer expression modulo any number."""
    kind = tree[0]
    if kind == "num" and tree[1].denominator == 1 and tree[1] >= 0:
        return int(tree[1]) % modulus
    if kind == "add":
        return (_integer_residue(tree[1], modulus) + _integer_residue(tree[2], modulus)) % modulus
    if kind == "mul":
        return _integer_residue(tree[1], modulus) * _integer_residue(tree[2], modulus) % modulus
    if kind == "pow":
        exponent = _reduced(tree[2], _totient(modulus))
        if exponent < 0:
            raise Inexact("broken exponent")
        return pow(_integer_residue(tree[1], modulus), exponent, modulus)
    if kind == "fact":
        return math.factorial(_small(rational(tree[1]))) % modulus
    raise Inexact(kind)


@cache
def _totient(value: int) -> int:
    from sympy import totient

    return int(totient(value))
