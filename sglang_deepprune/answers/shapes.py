"""What kind of object an answer is: a value, a set, a tuple, named values, a region, a matrix.

`read` returns every sensible reading of a folded answer, the likeliest first: `3,5` is a decimal
comma or a list, `(1,2)` a pair or an open interval. Members stay strings; `compare` decides
whether two of them agree. Regions (intervals and inequalities) are read in `regions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from sglang_deepprune.answers.quantity import clock, is_compound, with_decimal_comma
from sglang_deepprune.answers.regions import Region, read_region, split_top, unwrap

MAX_MEMBERS = 64
MAX_NESTING = 4


@dataclass(frozen=True, slots=True)
class Value:
    """One number, expression, quantity, letter or phrase."""

    text: str


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers. A bare list agrees with a set, or with a tuple of the same order."""

    kind: Literal["set", "tuple", "list", "array"]
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """Values of variables, sorted by name; `is_set` when one name got several values."""

    names: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Equation:
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[str, ...], ...]
    is_determinant: bool = False


@dataclass(frozen=True, slots=True)
class Nothing:
    """The empty set, in signs or in words."""

    note: str = field(default="empty", compare=False)


Shape = Value | Many | Named | Equation | Matrix | Nothing | Region

_EMPTY_WORDS = frozenset(
    """∅, {}, \\{\\}, none, null, nil, nothing, empty set, the empty set, empty, no solution,
    no solutions, no real solution, no real solutions, no real roots, no such number, no roots,
    no such numbers, no integer solutions, there is no solution, there are no solutions,
    there are no real solutions, no such integer, no such integers, no values, no value,
    no possible values, no solution exists, no solutions exist, inconsistent, keine lösung,
    aucune solution, sin solución, 无解, 無解, 解なし""".replace("\n    ", " ").split(", ")
)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_NAME = re.compile(
    r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{[^{}]{1,12}\}))?(?:\^\{-1\})?'{0,2}(?:\((?:\w|\\[a-z]+)(?:,\w)*\))?"
)
_WORD_NAME = re.compile(r"[a-zA-Z]{2,20}")
_SEPARATORS = (
    "\\lor",
    " or ",
    " and ",
    " oder ",
    " und ",
    " ou ",
    " et ",
    " o ",
    " y ",
    " e ",
    "或",
    "和",
)
_LETTERS = re.compile(r"[A-J]{2,6}")
_SCALED_MATRIX = re.compile(r"(-|[^=,;]{1,40}?)(?:\\cdot)?(\\begin\{[pb]matrix\}.*)", re.DOTALL)
_TRANSPOSED = re.compile(r"(\(.*\))\^(?:T|\{?\\(?:top|intercal)\}?|\{T\})", re.DOTALL)
_ELEMENT_OF = re.compile(r"[a-zA-Z]\\in(?![a-z])\s*(\\\{.*\\\})", re.DOTALL)
_CONGRUENT = re.compile(r"[a-zA-Z]\\equiv\s*(.+ mod .+)")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?::\d+(?:\.\d+)?){2,8}")


@lru_cache(maxsize=4096)
def read(text: str) -> tuple[Shape, ...]:
    """All readings of a folded answer. Never empty."""
    if text.casefold() in _EMPTY_WORDS:
        return (Nothing(),)
    if is_compound(text):
        return (Value(text),)
    matrix = _MATRIX.fullmatch(unwrap(text) if "\\begin" in text else text)
    if matrix is not None and matrix[2].count("\\begin") == 0:
        return (_matrix(matrix[1], matrix[2]),)
    if "\\begin" in text and (scaled := _SCALED_MATRIX.fullmatch(text)) is not None:
        inner = read(scaled[2])
        if len(inner) == 1 and isinstance(inner[0], Matrix):
            factor = "-1" if scaled[1] == "-" else scaled[1]
            cells = tuple(tuple(f"({factor})({x})" for x in row) for row in inner[0].rows)
            return (Matrix(cells),)
    for pattern in (_TRANSPOSED, _ELEMENT_OF, _CONGRUENT):
        if (dressed := pattern.fullmatch(text)) is not None:
            return read(dressed[1].strip())
    if _RATIO.fullmatch(text) and clock(text) is None:
        first, *others = map(Fraction, text.split(":"))
        shares = tuple(str(other / first) for other in others) if first else ()
        return (Many("array", ("1", *shares)) if shares else Value(text),)
    text = text.split(r"\approx")[0 if not text.startswith(r"\approx") else 1].strip() or text
    readings: list[Shape] = [rows] if (rows := _nested_rows(text)) is not None else []
    if (equation := _equation(text)) is not None:
        return (equation,)
    if (region := read_region(text)) is not None:
        readings.append(region)
    if (many := _many(text)) is not None:
        readings.append(many)
    readings.extend(_ambiguous(text))
    return tuple(readings) or (Value(text),)


def _ambiguous(text: str) -> list[Shape]:
    if re.fullmatch(r"-?\d+,\d+", text):
        return [Value(text.replace(",", "."))]
    if (pointed := with_decimal_comma(text)) is not None:
        return [Value(pointed)]
    parts = split_top(text, (*_SEPARATORS, ";"))
    if len(parts) > 1 and all(re.fullmatch(r"-?\d+,\d+", part.strip()) for part in parts):
        return [Many("list", tuple(part.strip().replace(",", ".") for part in parts))]
    ratio = re.fullmatch(r"(\d+(?:\.\d+)?) ?: ?(\d+(?:\.\d+)?)", text)
    if ratio is not None and clock(text) is None:
        return [Value(f"{ratio[1]}/{ratio[2]}"), Value(text)]
    if _LETTERS.fullmatch(text) and "".join(sorted(set(text))) == text:
        return [Value(text), Many("list", tuple(text))]
    inner = unwrap(text)
    return [Value(inner)] if inner != text and len(split_top(inner, (",",))) == 1 else []


def _matrix(environment: str, body: str) -> Matrix:
    rows = [row.strip() for row in body.strip().removesuffix("\\\\").split("\\\\")]
    cells = tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows[:MAX_MEMBERS])
    return Matrix(cells, environment in ("vmatrix", "Vmatrix"))


def _nested_rows(text: str) -> Matrix | None:
    """`[[1,2],[3,4]]`: a matrix as a program would print it."""
    if not (text.startswith("[[") and text.endswith("]]")):
        return None
    rows = [unwrap(row.strip()) for row in split_top(text[1:-1], (",",))]
    return Matrix(tuple(tuple(split_top(row, (",",))) for row in rows[:MAX_MEMBERS]))


def members(text: str) -> list[str]:
    """Top-level members of `1, 2`, `1 and 2`, `1 or 2`, `1; 2`; one member when it is no list."""
    separators = (";",) if ";" in text else (",",)
    text = re.sub(r"^either\s+", "", text)
    parts = [text] if re.fullmatch(r"-?\d+,\d+", text) else split_top(text, separators)
    found: list[str] = []
    for part in parts[: MAX_MEMBERS + 1]:
        part = re.sub(r"^(?:and|or|und|oder|et|ou|y|o)\s+", "", part.strip())
        found.extend(piece.strip() for piece in split_top(part, _SEPARATORS))
    return [part for part in found if part]


def _many(text: str) -> Many | None:
    kind: Literal["set", "tuple", "list", "array"] = "list"
    inner = text
    for opening, closing, name in _ENCLOSURES:
        if text.startswith(opening) and text.endswith(closing):
            body = text[len(opening) : len(text) - len(closing)]
            if split_top(text, (",",)) == [text] and unwrap(text) == body:
                kind, inner = name, body
                break
    if kind == "list":
        is_pair = re.fullmatch(r"-?\d+,\d+", text)
        parts = text.split(",") if is_pair else members(text)
        is_prose = len(parts) > 1 and any(part.count(" ") > 4 for part in parts)
        if is_prose or _is_name_phrase(text):
            return None
    else:
        separator = ";" if len(split_top(inner, (";",))) > 1 else ","
        parts = [part.strip() for part in split_top(inner, (separator,))]
    parts = [branch for part in parts for branch in _signs(part)]
    if len(parts) > MAX_MEMBERS or (len(parts) < 2 and kind in ("list", "tuple")):
        return None
    return Many(kind, tuple(parts))


_ENCLOSURES: tuple[tuple[str, str, Literal["set", "tuple", "list", "array"]], ...] = (
    ("\\{", "\\}", "set"),
    ("{", "}", "set"),
    ("\\langle", "\\rangle", "tuple"),
    ("(", ")", "tuple"),
    ("[", "]", "array"),
)


def _is_name_phrase(text: str) -> bool:
    """`neither A and B are right`: prose that only looks like a list."""
    return text.count(" ") > 12 and "\\" not in text and not any(c.isdigit() for c in text)


def _signs(part: str) -> list[str]:
    """`2 \\pm x` stands for two values."""
    if r"\pm" not in part and r"\mp" not in part:
        return [part]
    plus = part.replace(r"\pm", "+").replace(r"\mp", "-")
    minus = part.replace(r"\pm", "-").replace(r"\mp", "+")
    return [re.sub(r"(^|=)\+", r"\1", plus), minus]


def _equation(text: str) -> Shape | None:
    """`x=1, y=2`, `(x,y)=(1,2)`, `x=1 or x=2`, `f(x)=...`, `2x-y+1=0`."""
    if "=" not in text or any(sign in text for sign in ("<", ">", r"\le", r"\ge", r"\ne")):
        return None
    parts = members(text)
    sides = [[side.strip() for side in split_top(part, ("=",))] for part in parts]
    if len(sides) == 1:
        return _single_equation(sides[0])
    if all(len(side) >= 2 and _name(side[0]) for side in sides):
        return _named([(side[0], side[-1]) for side in sides])
    # x = 1, 2 or x = 3 and 5: one name, several values.
    if len(sides[0]) == 2 and _name(sides[0][0]) and all(len(side) == 1 for side in sides[1:]):
        return _named([(sides[0][0], sides[0][1]), *((sides[0][0], side[0]) for side in sides[1:])])
    return None


def _single_equation(sides: list[str]) -> Shape | None:
    if len(sides) < 2 or not all(sides):
        return None
    names = split_top(unwrap(sides[0]), (",",))
    values = split_top(unwrap(sides[-1]), (",",))
    if len(names) > 1 and len(names) == len(values) and all(map(_name, names)):
        return _named(list(zip(names, values, strict=True)))
    if _name(sides[0]):
        return _named([(sides[0], sides[-1])])
    if _name(sides[-1]) and len(sides) == 2:
        return _named([(sides[1], sides[0])])
    if len(sides) == 2:
        return Equation(sides[0], sides[1])
    return Named((sides[0],), (sides[-1],))


def _name(text: str) -> bool:
    if text in (r"\pi", "e", "i"):
        return False
    return bool(_NAME.fullmatch(text) or _WORD_NAME.fullmatch(text))


def _named(pairs: list[tuple[str, str]]) -> Named:
    spread = [(name, value) for name, full in pairs for value in _signs(full)]
    spread.sort(key=lambda pair: pair[0])
    return Named(tuple(name for name, _ in spread), tuple(value for _, value in spread))
