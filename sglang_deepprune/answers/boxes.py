"""Finds `\\boxed{...}` and `\\fbox{...}` in one linear pass and joins the final group of them.

Echoes of the instruction (`\\boxed{}`, `\\boxed{your answer}`, a bare `\\boxed`) are no answers,
a box that is cut open or holds only a placeholder means that there is none, adjacent boxes are
one list, and repeated equal boxes are one answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sglang_deepprune.answers.canonical import canonical

# A group of boxes ends the trace; what lies far before it is work.
_MAX_CHARS = 65_536
_MAX_GROUP = 64
# The backspace is what a "\\b" becomes in a carelessly escaped string.
_PIECE = re.compile(
    r"\\?\x08?(?:(?<![a-zA-Z])|(?<=\x08))(?:f|frame)?b?ox(?:ed)?\s*\{|\\.|[{}]", re.S
)
_OPENER = re.compile(r"(?:\\|\x08|^)(?:boxed|fbox|framebox|oxed)\s*\{|^boxed\s*\{")
_NO_BRACE = re.compile(r"\\boxed\s*(-?\d[\d.,]*\d|-?\d)(?![\d{])")
_ECHO = re.compile(
    r"(?:\\text\w*\{|<|\[|`|\s)*(?:\.\.\.|…|\\[lc]?dots|(?:your|the|final|my|answer|result|here"
    r"|solution|choice|letter|number|value|option|[_ -]|ANSWER)+)?(?:\}|>|\]|`|\s)*",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"(?:\\text\w*\{|\s|\$)*(?:\?+|_+|(?:\\_)+|n/?a|unknown|tbd|todo|\\square|\\Box)(?:\}|\s|\$)*",
    re.I,
)
_WORD_JOIN = r"(?:and|or|und|oder|et|ou|y|o|e|和|或|及)"
_GAP = re.compile(
    rf"(?:\s|\$|[,;&、，]|\\[()\[\] ,;]|\\q?quad|\\text\{{\s*,?\s*{_WORD_JOIN}\s*\}}"
    rf"|\b{_WORD_JOIN}\b|[或和及]"
    # The marks of a list, whose items are the parts of one answer.
    r"|\n\s*(?:[-*•]|\d{1,2}[.)])\s|\(?\b(?:[a-h]|i{1,3}|iv)\)\s)*"
)
_NAMED = re.compile(r"(?<![a-zA-Z0-9])([a-zA-Z](?:_\w)?)\s*=\s*(?:\$|\\\(|\s)*$")
_NEGATED = re.compile(r"\b(?:not|nicht|instead\s+of)\s*\$?\s*$", re.IGNORECASE)
_OR = re.compile(r"\b(?:or|oder|ou)\b|或")


@dataclass(frozen=True, slots=True)
class Box:
    start: int
    end: int
    content: str


@dataclass(frozen=True, slots=True)
class Boxes:
    """`answer` is the raw text of the last group; `is_refused` when a box says there is none."""

    answer: str | None
    is_refused: bool = False
    end: int = 0


def read_boxes(text: str) -> Boxes:
    """The answer that the last group of boxes gives."""
    offset = max(0, len(text) - _MAX_CHARS)
    tail = text[offset:]
    if "box" not in tail and "oxed" not in tail:
        return Boxes(None)  # a tenth of the time, for most of what is cut
    found, is_cut = _scan(tail)
    if is_cut:
        return Boxes(None, is_refused=True)
    boxes = [box for box in found if not _ECHO.fullmatch(box.content[:80])]
    if not boxes:
        *_, bare = [None, *_NO_BRACE.finditer(tail)]
        return Boxes(None) if bare is None else Boxes(bare[1], end=offset + bare.end())
    meant = [box for box in boxes if not _NEGATED.search(tail[max(0, box.start - 12) : box.start])]
    boxes = meant or boxes
    if _PLACEHOLDER.fullmatch(boxes[-1].content[:80]):
        return Boxes(None, is_refused=True)
    return Boxes(_join(tail, boxes), end=offset + boxes[-1].end)


def is_placeholder(content: str) -> bool:
    """`?`, `N/A`, `unknown`: what stands where an answer should."""
    return len(content) <= 80 and _PLACEHOLDER.fullmatch(content) is not None


def _scan(text: str) -> tuple[list[Box], bool]:
    """Outermost complete boxes in order, and whether a box is still open at the end."""
    depths: list[tuple[int, int, int]] = []  # (depth at its brace, start, content start)
    boxes: list[Box] = []
    depth = 0
    for piece in _PIECE.finditer(text):
        token = piece[0]
        if token == "}":
            depth = max(0, depth - 1)
            while depths and depths[-1][0] >= depth:
                _, start, content = depths.pop()
                if not depths:
                    boxes.append(Box(start, piece.end(), text[content : piece.start()]))
        elif token.endswith("{") and token != "\\{":
            if len(token) > 1 and _OPENER.match(token):
                depths.append((depth, piece.start(), piece.end()))
            depth += 1
    return boxes, bool(depths)


def _join(text: str, boxes: list[Box]) -> str:
    """The last box together with the boxes that stand right before it."""
    group = [boxes[-1]]
    has_or = False
    names = [_name_before(text, boxes[-1])]
    for box in reversed(boxes[:-1][-_MAX_GROUP:]):
        gap = text[box.end : group[0].start]
        name = _name_before(text, box)
        bare_gap = _NAMED.sub("", gap) if names[0] and name else gap
        if len(gap) > 60 or not _GAP.fullmatch(bare_gap):
            break
        has_or = has_or or bool(_OR.search(gap))
        group.insert(0, box)
        names.insert(0, name)
    contents = [inner(box.content) for box in group]
    if len(group) > 1 and all(names) and len(set(names)) == len(names):
        return ", ".join(f"{name}={value}" for name, value in zip(names, contents, strict=True))
    distinct = list({canonical(content): content for content in reversed(contents)}.values())[::-1]
    return (" or " if has_or else ", ").join(distinct)


def _name_before(text: str, box: Box) -> str | None:
    named = _NAMED.search(text[max(0, box.start - 16) : box.start])
    return named[1] if named else None


def inner(content: str) -> str:
    """The content without boxes inside the box."""
    for _ in range(4):
        content = content.strip()
        opener = _OPENER.match(content)
        if opener is None or not content.endswith("}"):
            break
        content = content[opener.end() : -1]
    return content
