"""What passes between the engine side and the coordinator, within one process.

The engine tells of `End`s and, from the leader's broadcast, `Command`s; it is answered with
`Action`s, with an `Admission` for who arrives, and with a `Retired` for who has ended. What crosses
a process or a rank is in `types.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_deepprune.group import State
from sglang_deepprune.types import (
    ChoiceRecord,
    Close,
    Expire,
    FenceResult,
    GroupRecord,
    JudgeResult,
    Probe,
)

Command = JudgeResult | FenceResult | Close | Expire | Probe


@dataclass(frozen=True, slots=True)
class Stop:
    """End this sibling now; `state` is what it will be called."""

    group_id: str
    index: int
    state: State


@dataclass(frozen=True, slots=True)
class Start:
    """Queue this held sibling now: at its group's place, or last after it was shed for KV."""

    group_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Ask a copy of this running sibling for its answer. `epoch`: the group's, for `probed`."""

    group_id: str
    index: int
    epoch: int


Action = Stop | Start | Fork


@dataclass(frozen=True, slots=True)
class End:
    """A sibling has reached its natural end. `is_cut`: by its token limit."""

    index: int
    output_ids: Sequence[int]
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """What becomes of a sibling that arrives: queued, held, or ended before it starts."""

    index: int
    is_held: bool = False
    end: State | None = None


@dataclass(frozen=True, slots=True)
class Retired:
    """What a sibling's last output carries. `is_pending`: hold it until the vote is counted."""

    choice: ChoiceRecord
    group: GroupRecord | None = None
    is_pending: bool = False
