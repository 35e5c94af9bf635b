"""Separates the reasoning of a trace from what follows it, for the marks that models use.

Knows `<think>` and its relatives, `[THINK]`, `◁think▷`, begin/end-of-thought tokens and the
`<|channel|>` style. A closing mark without an opening one (the chat template opened the block)
makes everything before it reasoning. A block that is never closed is a cut trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TAGS = r"(?:\w{1,12}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|scratchpad|reflection|analysis)"
_MARK = re.compile(
    rf"""
    (?P<open><{_TAGS}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>
        |<\|?channel\|?>\s*(?:analysis|thought|commentary)\b)
  | (?P<close></{_TAGS}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>
        |<\|?channel\|?>\s*final\b|<channel\|>)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CHANNEL = re.compile(r"<\|?channel\|?>", re.IGNORECASE)  # a mark with the word behind it
# What chat templates leave in a text: a border between sentences, never part of an answer.
_CONTROL = re.compile(r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</?s>|<(?:eos|bos|end_of_turn|start_of_turn)>")

_EMPHASIS = re.compile(r"</?(?:b|i|u|em|strong|mark|span|sup|sub)>|<br ?/?>")


@dataclass(frozen=True, slots=True)
class Split:
    """`outside`, latest first, is what was said outside; `inside` the closed blocks."""

    outside: tuple[str, ...]
    inside: str
    is_open: bool  # The last block was never closed.


def split_reasoning(text: str, *, starts_inside: bool = False) -> Split:
    """Cut a trace at its thinking marks."""
    outside: list[str] = []
    inside: list[str] = []
    is_open, position = starts_inside, 0
    for mark in _marks(text):
        if mark["open"] is not None and is_open:
            continue
        span = text[position : mark.start()]
        if mark["open"] is not None:
            outside.append(span)
        else:
            inside.extend(outside if not is_open else ())
            outside = [] if not is_open else outside
            inside.append(span)
        is_open, position = mark["open"] is not None, mark.end()
    if not is_open:
        outside.append(text[position:])
    said = tuple(without_control(part) for part in reversed(outside) if part.strip())
    return Split(said, without_control("\n".join(inside)), is_open)


def marks(text: str) -> list[bool]:
    """For each mark in the text, in order, whether it opens the thinking."""
    return [mark["open"] is not None for mark in _marks(text)]


def _marks(text: str) -> Iterator[re.Match[str]]:
    """Nothing is searched where no mark can begin."""
    return _MARK.finditer(text) if any(c in text for c in "<[◁") else iter(())


def begins_mark(token: str) -> bool:
    """Whether a token's text is a mark, or the first part of one that only its next word tells."""
    return bool(_MARK.fullmatch(token) or _CHANNEL.fullmatch(token))


def without_control(text: str) -> str:
    """Chat control tokens become line ends, and HTML's marks of emphasis nothing."""
    text = text.replace("&nbsp;", " ")
    return _EMPHASIS.sub("", _CONTROL.sub("\n", text)) if "<" in text else text
