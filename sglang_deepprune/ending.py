"""The end of a trace, which is searched for an answer, and whether it begins in the thinking.

An answer stands at a trace's end, and to decode more than the end would cost a step: so TAIL_TOKENS
are read, and less of each where many end at once (`tail_tokens`). What stands there is an
intermediate value if a thinking block is open around it, and the mark that opened or closed the
block may lie far in front. It is looked for in the ids, where a mark is a token of its own (set
against runs of ids, about half a millisecond for 30,000 tokens); else in so much text as a step can
spare, and only where the trace began with thinking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sglang_deepprune.answers.reasoning import begins_mark, marks

TAIL_TOKENS = 2048
_WHOLE_TAILS = 8  # an object is as long as so many tails, at most
_TOKEN_CHARS = 16  # a token may be a run of a hundred spaces
TAIL_CHARS = TAIL_TOKENS * _TOKEN_CHARS
STEP_TOKENS = 16_384  # shared by all that end in one step: a few milliseconds
LEAST_TAIL_TOKENS = 256
LEAST_CUT_TOKENS = 64  # of a trace that was cut off: few of them say anything
_MARK_TOKENS = 16  # a mark at most, token by token
_MOST_LOOKS = 16  # tokens that only look like a mark, decoded before the walk gives up
_RUN_TOKENS = 1024  # walked one by one where a mark may stand among them
_START_TOKENS = 64  # of a trace, in which a model opens its thinking
_MOST_BLOCKS = 4  # tails, decoded for a mark of several tokens, about 6 ms


@dataclass(frozen=True, slots=True)
class Ending:
    """What `answers.extract` is to read. `is_inside`: it begins within an open thinking block."""

    text: str
    is_inside: bool


def tail_tokens(num_ends: int, is_cut: bool) -> int:
    """How much is read of a trace that ends in one step with others; the same on every rank."""
    least = LEAST_CUT_TOKENS if is_cut else LEAST_TAIL_TOKENS
    return max(least, min(TAIL_TOKENS, STEP_TOKENS // max(1, num_ends)))


class EndingReader:
    """Reads the ends of traces.

    Parameters
    ----------
    decode : Callable[[Sequence[int]], str]
        Ids -> text, control tokens included.
    mark_ids : Collection[int]
        As `mark_ids_of` finds them; empty: all marks are spelled in several tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], mark_ids: Collection[int] = ()):
        self._decode = decode
        self._mark_ids = frozenset(mark_ids)

    def read(
        self,
        output_ids: Sequence[int],
        *,
        starts_inside: bool,
        is_whole: bool = False,
        tail: int = TAIL_TOKENS,
    ) -> Ending | None:
        """The end of a trace.

        Parameters
        ----------
        output_ids : Sequence[int]
            [num_tokens] all of it.
        starts_inside : bool
            The prompt has opened the thinking block.
        is_whole : bool
            What stands outside the thinking is wanted from its beginning: half a JSON object holds
            other objects, whose fields are no answer. None then: it is too long, eight tails or
            TAIL_CHARS.
        tail : int
            Tokens of the end, at most TAIL_TOKENS.
        """
        cut = max(0, len(output_ids) - tail)
        is_inside, start = starts_inside, 0
        if cut:
            is_inside, start = self._at(output_ids, cut, starts_inside, tail)
        if is_whole and not is_inside:
            cut = start
            if len(output_ids) - cut > _WHOLE_TAILS * tail:
                return None
        text = self._decode(output_ids[cut:])
        chars = TAIL_CHARS if is_whole else tail * _TOKEN_CHARS
        if len(text) <= chars:
            return Ending(text, is_inside)
        *_, last = [is_inside, *marks(text[:-chars])]
        return None if is_whole and not last else Ending(text[-chars:], last)

    def _at(self, ids: Sequence[int], cut: int, starts_inside: bool, tail: int) -> tuple[bool, int]:
        """Whether the thinking is open at `cut`; and where the mark that says so stands, or a place
        not far in front of it."""
        for place in islice(self._places(ids, cut), _MOST_LOOKS):
            found = marks(self._decode(ids[place : place + _MARK_TOKENS]))
            if found:
                return found[0], place
        is_inside, spelled = starts_inside, marks(self._decode(ids[:_START_TOKENS]))
        if spelled:
            is_inside = spelled[-1]
        if not is_inside or (self._mark_ids and not spelled):
            return is_inside, 0
        for block in range(_MOST_BLOCKS):
            end = cut - block * tail
            if end <= 0:
                break
            start = max(0, end - tail)
            found = marks(self._decode(ids[start : end + _MARK_TOKENS]))
            if found:
                return found[-1], start
        return True, 0

    def _places(self, ids: Sequence[int], cut: int) -> Iterator[int]:
        """Where a mark, or what may begin one, stands in front of `cut`: the last one first.

        Many siblings may end in one step: Python itself walks only where there is something.
        """
        for end in range(cut, 0, -_RUN_TOKENS) if self._mark_ids else ():
            start = max(0, end - _RUN_TOKENS)
            if not self._mark_ids.isdisjoint(ids[start:end]):
                yield from (i for i in range(end - 1, start - 1, -1) if ids[i] in self._mark_ids)


def mark_ids_of(tokenizer: Any) -> frozenset[int]:
    """The tokens of a tokenizer that are a mark of the thinking, or begin one ("<|channel|>")."""
    try:
        added = tokenizer.get_added_vocab()
    except (AttributeError, NotImplementedError):  # not one of transformers' own
        return frozenset()
    return frozenset(index for text, index in added.items() if begins_mark(str(text)))
