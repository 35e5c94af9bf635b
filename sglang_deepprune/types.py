"""The data that crosses a process, rank or thread: frozen, plain values, nothing live.

Import-light on purpose: child processes and the tokenizer side load this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ABSENT = -1  # "no such sibling / cluster / step" where an int is wanted


@dataclass(frozen=True, slots=True)
class SiblingKey:
    """Who a request is within its group. Rides in `sampling_params.custom_params`."""

    group_id: str
    index: int  # 0 <= index < size; ABSENT for a member of a client-side group
    size: int  # siblings of the group; 0 = open-ended client-side group


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe answered in the middle of a trace (judge `probe`)."""

    answer: str  # as extracted from the box that it filled
    probability: float  # of the box, in (0, 1]: product over its tokens, the closing one included


@dataclass(frozen=True, slots=True)
class Trace:
    """What a judge may read of one sibling."""

    sibling: int
    text: str  # truncated: up to and including the cut
    num_tokens: int  # tokens of `text`
    cut: str  # "words" | "tokens" | "end": why the text stops where it does
    answer: str | None = None  # the final answer of a sibling that has finished, as extracted
    prompt: str = ""  # the prompt's end, special tokens left out; "" when it is not known
    reading: Reading | None = None  # judge `probe` alone


@dataclass(frozen=True, slots=True)
class Pair:
    """One question to a judge: do these two traces reach the same answer?"""

    left: Trace
    right: Trace
    group_id: str = ""  # whose they are; a judge may forget what it kept for a group that ends


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where the greedy clustering put one trace."""

    sibling: int
    cluster: int  # index into the group's clusters; ABSENT = no verdict, left out
    similarity: float  # sim(t_i, c_j) of the best cluster; NaN when nothing was compared


@dataclass(frozen=True, slots=True)
class JudgeTask:
    """One group's window: place `traces`, in order, into `clusters`."""

    group_id: str
    epoch: int  # verdicts of another epoch are dropped
    traces: tuple[Trace, ...]  # the new ones
    members: tuple[Trace, ...]  # every trace that is in a cluster already
    clusters: tuple[tuple[int, ...], ...]  # sibling indices
    tau: float
    max_clusters: int  # K
    num_compared: int  # K1
    seed: int
    compare: str = "full"  # "full" | "sequential" | "exclusive": how many members are asked
    compare_error: float = 0.0  # of the latter two
    window: int = 0  # of the group's: its result bears the same number


@dataclass(frozen=True, slots=True)
class JudgeResult:
    """A task's outcome. `error` set: no verdict, prune nothing."""

    group_id: str
    epoch: int
    assignments: tuple[Assignment, ...] = ()
    num_pairs: int = 0  # pairs that the judge scored
    num_tokens: int = 0  # tokens of the texts that it read, per pair as read
    elapsed_ms: float = 0.0
    error: str | None = None
    window: int = 0  # the task's


@dataclass(frozen=True, slots=True)
class FenceResult:
    """What the answer fence found out about one open question of a group's tally."""

    group_id: str
    epoch: int
    low: int  # the two answer classes
    high: int
    is_same: bool | None = None  # None: not shown within the limit

    def answered(self, is_same: bool | None) -> FenceResult:
        return replace(self, is_same=is_same)


@dataclass(frozen=True, slots=True)
class Expire:
    """The fence took too long for a group that is over: its open questions count as different."""

    group_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Close:
    """No further member joins this client-side group: its time is out."""

    group_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Fill:
    """Rows are free: so many held siblings of the group may start beyond its claim."""

    group_id: str
    epoch: int
    count: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the serving model itself where these siblings stand (judge `probe`)."""

    group_id: str
    epoch: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy wants for one group. A pure function of the group's state makes it."""

    stop: tuple[int, ...] = ()  # sibling indices to end now
    admit: int = 0  # held siblings to start (lazy admission)
    decided: bool = False  # the vote can no longer change (within eps)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """One sibling in the reply. JSON names: schema/record.schema.json."""

    index: int
    state: str
    tokens: int
    answer: str | None = None
    cluster: int | None = None
    similarity: float | None = None
    pruned_at: int | None = None  # output tokens when it was stopped

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The only thing about a group that reaches the client. JSON names: the schema file."""

    group_id: str
    active: bool
    reason: str  # why the group ended as it did, or why it is not active
    preset: str = ""
    size: int = 0
    settled: bool = True
    answer: str | None = None  # the vote's winner, as the winning sibling wrote it
    winner: int | None = None  # sibling whose text carries the answer
    votes: tuple[tuple[str, int], ...] = ()  # (answer, votes), in the order of the tie rule
    tie: bool = False
    abstentions: int = 0
    windows: int = 0
    judge_calls: int = 0
    judge_ms: float = 0.0
    judge_tokens: int = 0
    clusters: tuple[tuple[int, ...], ...] = ()
    generated_tokens: int = 0
    saved_tokens_at_most: int = 0
    choices: tuple[ChoiceRecord, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Votes become objects so that answers need not be unique keys."""
        body = {name: getattr(self, name) for name in self.__slots__}
        body["votes"] = [{"answer": answer, "votes": votes} for answer, votes in self.votes]
        body["clusters"] = [list(cluster) for cluster in self.clusters]
        body["choices"] = [choice.to_json() for choice in self.choices]
        return body
