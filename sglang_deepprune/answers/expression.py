"""Reads the LaTeX that models write as a final answer into a small tree; evaluates nothing.

A tree is a nested tuple: `("num", Fraction)`, `("sym", name)`, `("neg", x)`, `("add", x, y)`,
`("mul", x, y)`, `("div", x, y)`, `("pow", x, y)`, `("root", x, n)`, `("fact", x)`, `("abs", x)`,
`("choose", n, k)`, `("log", x, base)` or `("fn", name, x)`; a `log` without a base stays one.
Numbers are exact: decimals, `2 2/3`, `0.\\overline{6}`, `6.02e23`. Whatever is not plainly an
expression raises `Unreadable`: a word must never become a product of its letters. Length and
depth are bounded.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from sglang_deepprune.answers.folding import words

Tree = tuple[Any, ...]

MAX_CHARS = 600
MAX_DEPTH = 40
# 10^9999 is written out as a number; beyond that a power stays a power.
MAX_EXPONENT = 5_000


class Unreadable(ValueError):
    """The string is not an expression of the grammar above."""


FUNCTIONS = frozenset(
    words("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln log floor ceil")
)
_CONSTANT_WORDS = {"pi": "pi", "infty": "oo", "e": "e"}
_GREEK = frozenset(
    words(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "phi chi psi omega Delta Omega Gamma Lambda Phi Psi Sigma Theta ell hbar"
    )
)
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<repeat>\d+\.\d*(?:\\overline\{\d+\}|\(\d+\)))
  | (?P<tail>\d+\.\d+\.\.\.)
  | (?P<mixed>\d+(?:\s+\d+/\d+(?![\d.])|\s*\\frac\{\d+\}\{\d+\}))
  | (?P<scientific>\d+(?:\.\d+)?[eE][+-]?\d+)
  | (?P<number>\d+(?:\.\d+)?)
  | (?P<command>\\[a-zA-Z]+|\\[{}|])
  | (?P<word>[a-zA-Z]+)
  | (?P<mark>[-+*/^_(){}\[\]|!°%])
    )""",
    re.VERBOSE,
)
_BRACKETS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_FACTOR_START = frozenset(["repeat", "tail", "mixed", "scientific", "number", "command", "word"])


def parse(text: str) -> Tree:
    """The tree of a folded answer string."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    reader = _Reader(_tokens(text))
    tree = reader.sum()
    if reader.peek() is not None:
        raise Unreadable(f"stray {reader.peek()}")
    return tree


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise Unreadable(text[position])
        position = match.end()
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "word":
            tokens.extend(_letters(value))
        else:
            tokens.append((kind, value))
    return tokens


def _letters(word: str) -> list[tuple[str, str]]:
    """`xy` is a product, `sin` a function; four letters that are no name are a word of prose."""
    for name in (word, word[:-1] if len(word) > 2 else word):
        if name in FUNCTIONS or name in ("pi", "sqrt"):
            rest = word[len(name) :]
            return [("command", "\\" + name), *(("word", letter) for letter in rest)]
    if len(word) > 3:
        raise Unreadable(word)
    return [("word", letter) for letter in word]


class _Reader:
    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self) -> str | None:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else None

    def take(self, expected: str | None = None) -> tuple[str, str]:
        if self.position >= len(self.tokens):
            raise Unreadable("ends early")
        token = self.tokens[self.position]
        if expected is not None and token[1] != expected:
            raise Unreadable(f"{token[1]} for {expected}")
        self.position += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()[1]
            right = self.product()
            tree = ("add", tree, ("neg", right) if sign == "-" else right)
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            mark = self.peek()
            if mark in (r"\cdot", "*"):
                self.take()
                tree = ("mul", tree, self.signed())
            elif mark == "/":
                self.take()
                tree = ("div", tree, self.signed())
            elif self._starts_factor():
                tree = ("mul", tree, self.power())
            else:
                return tree

    def _starts_factor(self) -> bool:
        if self.position >= len(self.tokens):
            return False
        kind, value = self.tokens[self.position]
        if kind in ("number", "repeat", "scientific", "mixed", "tail"):
            return self.tokens[self.position - 1][1] in (")", "}")
        return (kind in _FACTOR_START and value not in (r"\}", r"\|", r"\cdot")) or value in "({["

    def signed(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        sign = self.peek()
        if sign in ("+", "-"):
            self.take()
        tree: Tree = self.signed() if sign in ("+", "-") else self.power()
        self.depth -= 1
        return ("neg", tree) if sign == "-" else tree

    def power(self) -> Tree:
        tree = self.postfix(self.atom())
        if self.peek() == "^":
            self.take()
            tree = self.postfix(("pow", tree, self.script()))
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while self.peek() in ("!", "°", "%"):
            mark = self.take()[1]
            if mark == "!":
                tree = ("fact", tree)
            elif mark == "%":
                tree = ("div", tree, ("num", Fraction(100)))
            else:
                tree = ("div", ("mul", tree, ("sym", "pi")), ("num", Fraction(180)))
        return tree

    def script(self) -> Tree:
        """What stands after `^`: a group, or one signed atom (which may be a power itself)."""
        if self.peek() == "{":
            return self.group()
        return self.signed()

    def group(self) -> Tree:
        opening = self.take()[1]
        if opening not in _BRACKETS:
            raise Unreadable(opening)
        tree = self.sum()
        self.take(_BRACKETS[opening])
        return tree

    def atom(self) -> Tree:
        if self.peek() in _BRACKETS:
            return self.group()
        kind, value = self.take()
        if kind == "word":
            return self.symbol(value)
        if kind == "command":
            return self.command(value[1:])
        if value == "|":
            tree = self.sum()
            self.take("|")
            return ("abs", tree)
        if kind == "mark":
            raise Unreadable(value)
        return ("num", number(kind, value))

    def symbol(self, name: str) -> Tree:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.take()
                name += "_"
                while self.peek() not in ("}", None):
                    name += self.take()[1]
                self.take("}")
            else:
                name += "_" + self.take()[1]
        return ("sym", _CONSTANT_WORDS.get(name, name))

    def command(self, name: str) -> Tree:
        if name == "frac":
            return ("div", self.group(), self.group())
        if name == "binom":
            return ("choose", self.group(), self.group())
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name == "lg":
            return ("log", self.argument(), ("num", Fraction(10)))
        if name in _CONSTANT_WORDS or name in _GREEK:
            return self.symbol(_CONSTANT_WORDS.get(name, name))
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.take("\\r" + name[1:])
            return ("fn", {"lfloor": "floor", "lceil": "ceil"}[name], tree)
        raise Unreadable(name)

    def root(self) -> Tree:
        degree: Tree = ("num", Fraction(2))
        if self.peek() == "[":
            degree = self.group()
        return ("root", self.group(), degree)

    def function(self, name: str) -> Tree:
        exponent = base = None
        if self.peek() == "_":
            self.take()
            base = self.group() if self.peek() == "{" else self.atom()
        if self.peek() == "^":
            self.take()
            exponent = self.script()
        inverse = "arc" + name
        if exponent == ("neg", ("num", Fraction(1))) and inverse in FUNCTIONS:
            name, exponent = inverse, None  # \\sin^{-1} x is the arcsine
        tree: Tree = ("fn", name, self.argument())
        if base is not None:
            tree = ("log", tree[2], base)
        return tree if exponent is None else ("pow", tree, exponent)

    def argument(self) -> Tree:
        """`sin(x+1)`, or without brackets the product that follows: `sin 2x`, `log 5`."""
        if self.peek() in _BRACKETS:
            return self.group()
        tree = self.power()
        while self._starts_factor() and self.peek() not in _BRACKETS:
            if self.tokens[self.position][1][1:] in FUNCTIONS:
                break
            tree = ("mul", tree, self.power())
        return tree


def number(kind: str, value: str) -> Fraction:
    """The exact value of a number token."""
    if kind == "mixed":
        whole, top, bottom = map(int, re.findall(r"\d+", value))
        if bottom == 0 or top >= bottom:
            raise Unreadable(value)
        return whole + Fraction(top, bottom)
    if kind == "scientific":
        mantissa, exponent = re.split("[eE]", value)
        if abs(int(exponent)) > MAX_EXPONENT:
            raise Unreadable(value)
        power = Fraction(10 ** abs(int(exponent)))
        return Fraction(mantissa) * (power if int(exponent) >= 0 else 1 / power)
    if kind == "repeat":
        before, fixed, cycle = re.findall(r"\d+|(?<=\.)(?=[\\(])", value)
        return _repeating(before, fixed, cycle)
    if kind == "tail":
        before, digits = value.removesuffix("...").split(".")
        for size, count in ((1, 3), (2, 2), (3, 2), (6, 2)):
            if digits.endswith(digits[-size:] * count):
                return _repeating(before, digits[:-size], digits[-size:])
        raise Unreadable(value)
    return Fraction(value)


def _repeating(whole: str, fixed: str, cycle: str) -> Fraction:
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Fraction(f"{whole}.{fixed or 0}") + Fraction(tail)
