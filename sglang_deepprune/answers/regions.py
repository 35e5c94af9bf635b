"""Intervals and inequalities as one thing: a union of pieces of the real line.

`(-\\infty,4)`, `x<4`, `\\mathbb{R}\\setminus\\{1\\}`, `1\\le x<3 or x>5` become `Region`s. End
points stay strings, so that `\\sqrt{5}` works too; `merged` normalises a region whose end points
are all rational. This module reads and merges; `compare` decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

LOWEST, HIGHEST = r"-\infty", r"\infty"
_MAX_PIECES = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval. Infinite ends are `LOWEST` and `HIGHEST`, always open."""

    low: str
    high: str
    has_low: bool
    has_high: bool


@dataclass(frozen=True, slots=True)
class Region:
    pieces: tuple[Piece, ...]
    holes: tuple[str, ...] = ()
    name: str | None = None


_LINE = Piece(LOWEST, HIGHEST, False, False)
_ALL_REALS = frozenset(
    [r"\mathbb{R}", r"\mathbb R", r"\R", "all real numbers", "all reals", "every real number"]
)
_MEMBER = re.compile(r"([a-zA-Z]|\\[a-zA-Z]+)\\in(?![a-z])\s*(.*)", re.DOTALL)
_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)(.*?)\\?\}"
)
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-z])|[<>]")
_ABSOLUTE = re.compile(
    r"\|([a-zA-Z])([-+][^|<>\\]{1,20})?\|\s*(<|>|\\le|\\ge)(?![a-z])\s*([^<>|]+)"
)
_SYMBOL = re.compile(r"(?:[a-zA-Z]|\\(?!infty|pi)[a-zA-Z]+)(?:_\w)?(?:\(\w\))?")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def split_top(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split at separators outside all brackets."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        c = text[index]
        if c == "\\" and text[index + 1 : index + 2] in tuple("{}"):
            depth += 1 if text[index + 1] == "{" else -1
            index += 2
            continue
        depth += (c in "([{") - (c in ")]}")
        found = next((s for s in separators if depth == 0 and text.startswith(s, index)), None)
        if found is not None:
            parts.append(text[start:index])
            index = start = index + len(found)
        else:
            index += 1
    return [*parts, text[start:]]


def unwrap(text: str) -> str:
    """The inside of one pair of brackets that encloses the whole text, else the text."""
    for opening, closing in ((r"\{", r"\}"), (r"\langle", r"\rangle"), *map(tuple, _PAIRS)):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : len(text) - len(closing)]
            if _is_balanced(inner):
                return inner.strip()
    return text


_PAIRS = ("()", "[]", "{}")


def _is_balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def read_region(text: str) -> Region | None:
    """The region that a folded answer plainly denotes, or None."""
    name = None
    if (builder := _BUILDER.fullmatch(text)) is not None:
        text = builder[2].strip()
    if (member := _MEMBER.fullmatch(text)) is not None:
        name, text = member[1], member[2]
    if text.casefold() in {reals.casefold() for reals in _ALL_REALS}:
        return Region((_LINE,), name=name)
    base, *excluded = split_top(text, (r"\setminus", r"-\{"))
    if excluded and len(excluded) == 1:
        region = read_region(base.strip())
        holes = excluded[0].strip().removeprefix(r"\{").removesuffix(r"\}")
        points = tuple(hole.strip() for hole in split_top(holes, (",",)))
        return None if region is None else replace(region, holes=region.holes + points, name=name)
    pieces: list[Piece] = []
    holes_found: tuple[str, ...] = ()
    parts = split_top(text, (r"\cup", " or ", " oder ", r"\lor", r"\vee"))
    for part in parts[:_MAX_PIECES]:
        found = _interval(part.strip()) or _outside(part.strip()) or _inequality(part.strip())
        if found is None:
            found = _points(part.strip()) if len(parts) > 1 else None
        if found is None:
            return None
        pieces.extend(found.pieces)
        holes_found += found.holes
        name = name or found.name
    return Region(tuple(pieces), holes_found, name)


def _interval(text: str) -> Region | None:
    if len(text) < 5 or text[0] not in "([]" or text[-1] not in ")][":
        return None
    ends = split_top(text[1:-1], (",", ";"))
    if len(ends) != 2 or not all(_is_balanced(end) and end.strip() for end in ends):
        return None
    low, high = (end.strip().replace("+\\infty", "\\infty") for end in ends)
    return Region((Piece(low, high, text[0] == "[", text[-1] == "]"),))


def _outside(text: str) -> Region | None:
    """`|x-1|>2`: two rays."""
    match = _ABSOLUTE.fullmatch(text)
    if match is None or match[3] not in (">", r"\ge"):
        return None
    low, high = _around(match)
    has_ends = match[3] == r"\ge"
    rays = (Piece(LOWEST, low, False, has_ends), Piece(high, HIGHEST, has_ends, False))
    return Region(rays, name=match[1])


def _around(match: re.Match[str]) -> tuple[str, str]:
    """The ends of `|x-1|<2`."""
    if not match[2]:
        return f"-({match[4]})", match[4]
    return f"-({match[4]})-({match[2]})", f"({match[4]})-({match[2]})"


def _points(text: str) -> Region | None:
    if not (text.startswith(r"\{") and text.endswith(r"\}")):
        return None
    points = split_top(text[2:-2], (",",))
    return Region(tuple(Piece(point, point, True, True) for point in points))


def _inequality(text: str) -> Region | None:
    """`x<4`, `1\\le x<3`, `x>1 and x<3`, `x\\ne 2`, `|x|<3`: an intersection of bounds."""
    low, high, has_low, has_high = LOWEST, HIGHEST, False, False
    holes: list[str] = []
    names = set()
    for part in split_top(text, (",", " and ", " und ", r"\land", r"\wedge")):
        for name, relation, bound in _bounds(part.strip()):
            names.add(name)
            if relation == r"\ne":
                holes.append(bound)
            elif relation in ("<", r"\le") and high == HIGHEST:
                high, has_high = bound, relation == r"\le"
            elif relation in (">", r"\ge") and low == LOWEST:
                low, has_low = bound, relation == r"\ge"
            else:
                return None
    if len(names) != 1 or None in names:
        return None
    return Region((Piece(low, high, has_low, has_high),), tuple(holes), names.pop())


def _bounds(text: str) -> list[tuple[str | None, str, str]]:
    """(name, relation, bound) for each comparison of one chain; name None when it is unreadable."""
    relations = _RELATION.findall(text)
    sides = [side.strip() for side in _RELATION.split(text)]
    unreadable: list[tuple[str | None, str, str]] = [(None, "", "")]
    if (absolute := _ABSOLUTE.fullmatch(text)) is not None:
        if relations[0] not in ("<", r"\le"):
            return unreadable
        low, high = _around(absolute)
        return [
            (absolute[1], relations[0], high),
            (absolute[1], _FLIPPED[relations[0]], low),
        ]
    found: list[tuple[str | None, str, str]] = []
    for relation, left, right in zip(relations, sides, sides[1:], strict=False):
        if _SYMBOL.fullmatch(left) and not _SYMBOL.fullmatch(right) and right:
            found.append((left, relation, _plus(right)))
        elif _SYMBOL.fullmatch(right) and left:
            found.append((right, _FLIPPED[relation], _plus(left)))
        else:
            return unreadable
    return [bound for bound in found if bound[2] not in (LOWEST, HIGHEST)] or unreadable


def _plus(bound: str) -> str:
    return HIGHEST if bound == "+" + HIGHEST else bound


def merged(region: Region, exact: Callable[[str], Fraction | None]) -> object | None:
    """A normal form of a region with rational end points, or None. Open ends: see below."""
    spans: list[tuple[tuple[int, Fraction, int], tuple[int, Fraction, int]]] = []
    for piece in region.pieces:
        low, high = _edge(piece.low, exact), _edge(piece.high, exact)
        if low is None or high is None:
            return None
        # An edge sorts by place; 0 is just at the point, 1 just behind it, -1 just before it.
        start = (*low, 0 if piece.has_low else 1)
        end = (*high, 0 if piece.has_high else -1)
        if start <= end:
            spans.append((start, end))
    points = [_edge(hole, exact) for hole in region.holes]
    if None in points:
        return None
    return _union(_without(spans, [point for point in points if point is not None]))


_Edge = tuple[int, Fraction, int]


def _edge(text: str, exact: Callable[[str], Fraction | None]) -> tuple[int, Fraction] | None:
    if text in (LOWEST, HIGHEST):
        return (-1 if text == LOWEST else 1, Fraction(0))
    value = exact(text)
    return None if value is None else (0, value)


def _without(
    spans: list[tuple[_Edge, _Edge]], points: list[tuple[int, Fraction]]
) -> list[tuple[_Edge, _Edge]]:
    for point in points:
        at = (*point, 0)
        halves: list[tuple[_Edge, _Edge]] = []
        for start, end in spans:
            if start <= at <= end:
                halves += [(start, (*point, -1)), ((*point, 1), end)]
            else:
                halves.append((start, end))
        spans = [(start, end) for start, end in halves if start <= end]
    return spans


def _union(spans: list[tuple[_Edge, _Edge]]) -> tuple[tuple[_Edge, _Edge], ...]:
    joined: list[tuple[_Edge, _Edge]] = []
    for start, end in sorted(spans):
        previous = joined[-1][1] if joined else None
        touches = previous is not None and (
            start <= previous or (start[:2] == previous[:2] and start[2] - previous[2] <= 1)
        )
        if touches:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)
