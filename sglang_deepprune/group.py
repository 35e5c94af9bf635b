"""A group: the siblings of one prompt and where each of them stands. No I/O, no clock, no engine.

A sibling's life: EXPECTED -> (HELD ->) QUEUED -> RUNNING -> one of the end states, once. One that
started beyond its group's claim may be sent back to HELD. A doomed sibling has its end state chosen
(`doom`) while the engine still has to end it. Policies read this state and answer with a Plan; only
the coordinator changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.types import ABSENT
from sglang_deepprune.voting import Tally


class State(str, Enum):
    """Where a sibling stands. The end states are the names that clients see."""

    EXPECTED = "expected"  # of the group, but not seen by the scheduler yet
    HELD = "held"  # has arrived, and waits within its group: no row, no KV, in no queue
    QUEUED = "queued"  # in the scheduler's queue, no token so far
    RUNNING = "running"  # has generated at least one token
    FINISHED = "finished"  # ran to its natural end
    PRUNED = "pruned"  # stopped by a judge's verdict
    DECIDED = "decided"  # stopped because the vote was decided
    NOT_STARTED = "not_started"  # the group was settled before it was prefilled
    ABORTED = "aborted"  # by the client, a time-out or the server
    FAILED = "failed"  # refused or ended by an error of its own

    @property
    def is_end(self) -> bool:
        return self not in _LIVE


_LIVE = frozenset({State.EXPECTED, State.HELD, State.QUEUED, State.RUNNING})
_STARTED = frozenset({State.QUEUED, State.RUNNING})


@dataclass(slots=True)
class Sibling:
    """One trace of the group."""

    index: int
    state: State = State.EXPECTED
    num_tokens: int = 0  # generated so far
    is_submitted: bool = False  # its truncated trace went to the judge
    has_verdict: bool = False  # the judge placed it, or found every cluster taken
    cluster: int = ABSENT
    similarity: float | None = None
    doom: State | None = None  # the end state it is about to reach
    pruned_at: int | None = None  # tokens generated when it was doomed
    answer: str | None = None  # as extracted, once finished
    is_given_up: bool = False  # not seen when the group's time was out; its place is still its own
    has_voted: bool = False  # its ballot (an abstention too) is in

    @property
    def is_live(self) -> bool:
        """May still generate: neither ended nor about to be ended."""
        return self.doom is None and self.state in _LIVE

    @property
    def is_started(self) -> bool:
        """Queued or running, with its vote still to come."""
        return self.state in _STARTED and self.doom is None and not self.has_voted


@dataclass(slots=True)
class Group:
    """All siblings of one request, or of the requests that named one client-side group."""

    group_id: str
    size: int  # 0: open-ended
    config: DeepPruneConfig
    siblings: dict[int, Sibling] = field(default_factory=dict)
    clusters: list[list[int]] = field(default_factory=list)  # sibling indices, in joining order
    tally: Tally = field(default_factory=Tally)
    epoch: int = 0  # verdicts asked in an earlier epoch are dropped
    steps: int = 0  # decode steps seen
    windows: int = 0  # windows handed to the judge
    judge_calls: int = 0
    judge_tokens: int = 0
    judge_ms: float = 0.0
    is_decided: bool = False
    is_released: bool = False  # runs to its end untouched: open-ended, or of two weight versions
    is_closed: bool = False  # accepts no further members
    is_greedy: bool = False  # at temperature 0: its siblings are one and the same trace
    reason: str = ""

    def __post_init__(self) -> None:
        for index in range(self.size):
            self.siblings[index] = Sibling(index)

    @property
    def live(self) -> list[Sibling]:
        return [sibling for sibling in self.siblings.values() if sibling.is_live]

    @property
    def num_live(self) -> int:
        return sum(sibling.is_live for sibling in self.siblings.values())

    @property
    def num_started(self) -> int:
        return sum(sibling.is_started for sibling in self.siblings.values())

    @property
    def held(self) -> list[Sibling]:
        """Siblings that wait for a claim: those with tokens first, then by index."""
        found = [s for s in self.siblings.values() if s.state is State.HELD and s.is_live]
        return sorted(found, key=lambda sibling: (-sibling.num_tokens, sibling.index))

    @property
    def has_held(self) -> bool:
        return any(s.state is State.HELD and s.is_live for s in self.siblings.values())

    @property
    def num_voted(self) -> int:
        """Ballots in, abstentions included."""
        return self.tally.num_votes

    @property
    def mean_length(self) -> float:
        """Mean tokens of the siblings that have voted; 0 before the first vote."""
        if not self.num_voted:
            return 0.0
        lengths = [sibling.num_tokens for sibling in self.siblings.values() if sibling.has_voted]
        return sum(lengths) / len(lengths)

    @property
    def is_over(self) -> bool:
        """Every sibling has reached its end state."""
        return not any(sibling.state in _LIVE for sibling in self.siblings.values())

    @property
    def generated_tokens(self) -> int:
        return sum(sibling.num_tokens for sibling in self.siblings.values())
