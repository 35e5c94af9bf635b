"""A live group with what is kept around it: its traces, its limits, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_deepprune.group import Group, State
from sglang_deepprune.reading import TraceReader


@dataclass(slots=True)
class Run:
    """A group and what the coordinator needs around it."""

    group: Group
    reader: TraceReader
    max_new_tokens: int
    is_client_side: bool = False
    starts_in_reasoning: bool = False
    in_flight: frozenset[int] = frozenset()  # siblings of the task that the judge has now
    asked_s: float = 0.0  # when it was handed over
    over_s: float | None = None  # since when its last output waits for the fence
    touched_s: float = 0.0
    order: int = 0  # the engine's: when the group's first sibling arrived

    @property
    def is_awaited(self) -> bool:
        """Members may still come: an open group, or siblings that nobody has sent yet."""
        group = self.group
        return not group.is_closed or any(
            sibling.state is State.EXPECTED for sibling in group.siblings.values()
        )
