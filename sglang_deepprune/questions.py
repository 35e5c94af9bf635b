"""What the answer fence is asked for all groups, and what of it is asked no more."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_deepprune.actions import Command
from sglang_deepprune.answers import Fence
from sglang_deepprune.group import Group
from sglang_deepprune.types import FenceResult
from sglang_deepprune.voting import Question


class Questions:
    """Of one scheduler process. The leader asks; the others, without a fence, ask nothing.

    Parameters
    ----------
    fence : Fence | None
        The leader's only.
    failed : list[Command]
        Where the answer goes of what could not even be asked.
    """

    def __init__(self, fence: Fence | None, failed: list[Command]):
        self.fence = fence
        self.asked: dict[int, FenceResult] = {}  # fence ticket -> the question, unanswered
        self._failed = failed

    def ask(self, group: Group, questions: Sequence[Question]) -> None:
        """A fence that cannot be asked answers "not shown", by the same broadcast: to raise
        here would split the ranks."""
        if self.fence is None:
            return
        for question in questions:
            asked = FenceResult(group.group_id, group.epoch, question.low, question.high)
            try:
                self.asked[self.fence.ask(question.left, question.right)] = asked
            except OSError:
                self._failed.append(asked)

    def poll(self) -> list[FenceResult]:
        """What is answered by now; also with nothing asked: see `tidy`."""
        found = []
        if self.fence is not None:
            for ticket, is_same in self.fence.poll():
                asked = self.asked.pop(ticket, None)
                if asked is not None:
                    found.append(asked.answered(is_same))
        return found

    def tidy(self) -> None:
        """Leader, while no group lives: a pair that is in flight for a group that has ended is held
        to its second all the same. Unasked, a hung child would compute without end."""
        if self.fence is not None:
            self.fence.poll()

    def drop_moot(self, group: Group) -> None:
        """What a merge has answered is asked no more."""
        still = {(question.low, question.high) for question in group.tally.open_questions}
        self._unask(
            [
                ticket
                for ticket, one in self.asked.items()
                if one.group_id == group.group_id and (one.low, one.high) not in still
            ]
        )

    def forget(self, group_id: str) -> None:
        """The group is gone."""
        self._unask([ticket for ticket, one in self.asked.items() if one.group_id == group_id])

    def _unask(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            del self.asked[ticket]
        if self.fence is not None and tickets:
            self.fence.drop(tickets)
