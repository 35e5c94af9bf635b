"""What a judge reads of a group's traces: cut as they grow, so many tokens a decode step.

To read is to decode, and it happens in the engine's own step: one step decodes READ_TOKENS for all
groups, and what is left over follows in the next ones, in turn. Tokens are counted, not seconds:
every rank cuts the same traces at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from sglang_deepprune.config import MOST_CUT_TOKENS
from sglang_deepprune.group import Group
from sglang_deepprune.truncation import CUT_SLACK, Cut, make_cut
from sglang_deepprune.types import Trace

READ_TOKENS = 4096  # that one decode step decodes for the judge, about 3 ms
MOST_CUTS = 8  # traces of a group that one decode step cuts
JUDGED_CHARS = 16_000_000  # of a group's traces: each window hands all of them over, 8 ms to pack
Item = TypeVar("Item")


class TraceReader:
    """The truncated traces of one group, and what is still to be read of it.

    Attributes
    ----------
    traces : dict[int, Trace]
        One a sibling that has reached the cut, or has ended before it.
    unread : dict[int, list[int]]
        The ids of siblings that have ended and could not be read in their last step.
    prompt : str
        What a judge may read of the prompt; goes into each trace.
    is_behind : bool
        Running siblings have reached the cut that the last step had no tokens left for.
    has_more : bool
        The last step ended in the middle of the group.
    """

    def __init__(self, group: Group, read: Callable[[Sequence[int]], str]):
        self.group = group
        self.traces: dict[int, Trace] = {}
        self.unread: dict[int, list[int]] = {}
        self.prompt = ""
        self.is_behind = False
        self.has_more = False
        self._read = read
        self._cuts: dict[int, Cut] = {}
        self._next = 0  # the sibling at which reading goes on
        self._num_chars = 0  # of the traces

    @property
    def fresh(self) -> list[int]:
        """Siblings whose trace the judge has not been handed."""
        siblings = self.group.siblings
        return [index for index in sorted(self.traces) if not siblings[index].is_submitted]

    def advance(self, outputs: Mapping[int, Sequence[int]], left: int) -> int:
        """Cut what has become long enough, and what has ended, as far as `left` tokens go.

        `outputs`: {running sibling: its ids}. Returns what is left of the tokens. Each step begins
        where the last one ended: whoever has much to read keeps nobody else from being read.
        """
        num_before = len(self.traces)
        self.is_behind = self.has_more = False
        for index in in_turn([*self.unread, *outputs], self._next):
            sibling = self.group.siblings[index]
            is_end = index in self.unread
            is_done = not sibling.is_live or sibling.is_submitted or index in self.traces
            if is_done and not is_end:
                continue
            if left <= 0 or len(self.traces) - num_before >= MOST_CUTS:
                self.is_behind, self.has_more, self._next = bool(outputs), True, index
                break
            ids = self.unread[index] if is_end else outputs[index]
            left -= self._advance_one(index, ids, is_end, left)
        return left

    def ended(self, index: int, output_ids: Sequence[int], answer: str | None) -> Trace | None:
        """A sibling has voted. Its trace, if it was cut before; else it is read in the next steps,
        unless the judge needs it no more."""
        if index in self.traces:
            self.traces[index] = replace(self.traces[index], answer=answer)
            return self.traces[index]
        if not self.group.siblings[index].is_submitted:
            self.unread[index] = list(output_ids[: MOST_CUT_TOKENS + CUT_SLACK])
        return None

    def drop(self, index: int) -> None:
        """A sibling is gone; one that has voted may still have to be read."""
        if index not in self.unread:
            self._cuts.pop(index, None)

    def _advance_one(self, index: int, output_ids: Sequence[int], is_end: bool, most: int) -> int:
        """Look for one sibling's cut, and keep what stands before it. Returns what it cost."""
        cut = self._cuts.get(index)
        if cut is None:
            cut = self._cuts[index] = make_cut(self.group.config, self._read)
        before = cut.num_decoded
        point = cut.advance(output_ids, most)
        if point is None and is_end and not cut.is_behind:
            point = cut.end(output_ids)
        self.is_behind = self.is_behind or (cut.is_behind and not is_end)
        if point is not None:
            text = cut.text(output_ids, point)
            sibling = self.group.siblings[index]
            self._num_chars += len(text)
            if self._num_chars <= JUDGED_CHARS:
                answer = sibling.answer if is_end else None
                self.traces[index] = Trace(
                    index, text, point.num_tokens, point.kind, answer, self.prompt
                )
            else:
                sibling.is_submitted = True  # and without a verdict
            if is_end:
                del self.unread[index], self._cuts[index]
        return cut.num_decoded - before + 1


def in_turn(items: Sequence[Item], first: Item) -> Sequence[Item]:
    """The items in a circle, from the first one on, if it is one of them."""
    if first not in items:
        return items
    place = items.index(first)
    return [*items[place:], *items[:place]]
