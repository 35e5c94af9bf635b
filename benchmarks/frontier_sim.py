"""The server's own policies on recorded branches, in steps of one token.

`Server` runs groups as the coordinator does, with the very functions of the engine (`policy`,
`clustering`, `voting`) on real `Group`s: from event to event, not step by step. Each slot makes a
token a step, prefill is free, a stop takes effect at once.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from benchmarks.frontier_data import Branch, Draw
from sglang_deepprune import policy, tau
from sglang_deepprune.clustering import Score, place
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.group import Group, Sibling, State
from sglang_deepprune.types import ABSENT, JudgeTask, Trace
from sglang_deepprune.voting import Ballot, Tally

_JUDGE = ABSENT  # stands for a sibling in the judge's event: before the finishers of its step


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question under one policy."""

    answer: str | None
    tokens: float  # generated, by all siblings
    latency: float  # steps until it was answered
    kv: float  # token-steps of generated KV held


@dataclass(slots=True)
class Run:
    """A group, its branches, and who of it has a slot."""

    draw: Draw
    group: Group
    score: Score | None = None
    since: dict[int, int] = field(default_factory=dict)  # running sibling -> step of its slot
    counted_to: int = 0  # step up to which the group's age is counted
    answered_at: int | None = None

    def outcome(self) -> Outcome:
        assert self.answered_at is not None
        leader = self.group.tally.leader
        spent = [sibling.num_tokens for sibling in self.group.siblings.values()]
        return outcome_of(leader.answer if leader else None, spent, self.answered_at)


def outcome_of(answer: str | None, spent: Sequence[int], latency: int) -> Outcome:
    return Outcome(answer, sum(spent), latency, sum(tokens**2 for tokens in spent) / 2)


class Server:
    """Questions that arrive together, and their slots; None: enough for everybody."""

    def __init__(
        self,
        draws: Sequence[Draw],
        config: DeepPruneConfig,
        *,
        slots: int | None = None,
        fills: bool = False,
        is_client: bool = False,
        score: Score | None = None,
    ):
        """`fills`: free slots go to held siblings. `is_client`: who is claimed later queues at the
        end, as a client's next request does, not at its group's place."""
        self.slots = math.inf if slots is None else slots
        self.fills = fills
        self.is_client = is_client
        self.now = 0
        self.num_running = 0
        self.runs = [Run(draw, _group(i, draw, config), score) for i, draw in enumerate(draws)]
        self.events: list[tuple[int, int, int, int]] = []  # (step, run, sibling, slot since)
        self.waiting: list[tuple[int, int, int]] = []  # (step or 0, run, sibling)
        self.extras: dict[tuple[int, int], None] = {}  # (run, sibling), the oldest first

    def play(self) -> list[Outcome]:
        for number in range(len(self.runs)):
            self._replan(number)
        self._seat()
        while self.events:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                _, number, index, since = heappop(self.events)
                if index == _JUDGE:
                    self._judge(number)
                elif self.runs[number].since.get(index) == since:  # else it has been stopped
                    self._finish(number, index)
            self._seat()
        return [run.outcome() for run in self.runs]

    def _finish(self, number: int, index: int) -> None:
        run = self.runs[number]
        self._leave(number, index, State.FINISHED)
        sibling = run.group.siblings[index]
        sibling.answer, sibling.has_voted = run.draw.branches[index].answer, True
        run.group.tally.add(Ballot(sibling.answer, index))
        self._replan(number)

    def _judge(self, number: int) -> None:
        """Some siblings have reached the cut now, or ended before it: the judge places them."""
        run, group = self.runs[number], self.runs[number].group
        fresh = [one for one in group.siblings.values() if self._is_ripe(run, one)]
        if run.answered_at is not None or run.score is None or not fresh:
            return
        for sibling in fresh:
            sibling.is_submitted = True
        config = group.config
        task = JudgeTask(
            f"{run.draw.question.number}", 0, tuple(_trace(one, config) for one in fresh),
            tuple(_trace(group.siblings[i], config) for own in group.clusters for i in own),
            tuple(tuple(own) for own in group.clusters),
            tau.merge_tau(group), config.k, config.k1, config.seed,
        )  # fmt: skip
        for one in place(task, run.score)[0]:
            sibling = group.siblings[one.sibling]
            sibling.cluster = one.cluster
            sibling.has_verdict = one.cluster != ABSENT or not math.isnan(one.similarity)
            if one.cluster == len(group.clusters):
                group.clusters.append([])
            if one.cluster != ABSENT:
                group.clusters[one.cluster].append(one.sibling)
        self._replan(number)

    def _is_ripe(self, run: Run, sibling: Sibling) -> bool:
        if sibling.is_submitted:
            return False
        since = run.since.get(sibling.index)
        done = sibling.num_tokens + (self.now - since if since is not None else 0)
        return sibling.has_voted or (since is not None and done >= run.group.config.cut_tokens)

    def _replan(self, number: int) -> None:
        """Ask the policy; stop whom it stops, queue whom it starts: as the coordinator does."""
        run, group = self.runs[number], self.runs[number].group
        plan = policy.plan(group)
        group.is_released |= plan.reason == policy.OPEN_ENDED
        group.is_decided |= plan.decided
        for index in plan.stop:
            self._leave(number, index, State.DECIDED if plan.decided else State.PRUNED)
        for sibling in group.held[: plan.admit]:
            sibling.state = State.QUEUED
            turn = self.now if self.is_client else 0
            heappush(self.waiting, (turn, number, sibling.index))
        if run.answered_at is None and (group.is_decided or group.is_over):
            run.answered_at = self.now

    def _seat(self) -> None:
        """Slots for whoever waits, in turn; extras yield to them, and are started when none do."""
        while self.waiting:
            _, number, index = self.waiting[0]
            is_waiting = self.runs[number].group.siblings[index].state is State.QUEUED
            if is_waiting and self.num_running >= self.slots and not self._yield():
                return
            heappop(self.waiting)
            if is_waiting:
                self._start(number, index)
        if not self.fills or self.num_running >= self.slots:
            return
        groups = [run.group for run in self.runs if run.answered_at is None]
        order = policy.fill_order(groups)
        for group in order:
            number, index = int(group.group_id), group.held[0].index
            self.extras[number, index] = None
            self._start(number, index)
            if self.num_running >= self.slots:
                return

    def _start(self, number: int, index: int) -> None:
        run = self.runs[number]
        self._count_age(run)
        sibling = run.group.siblings[index]
        sibling.state = State.RUNNING
        run.since[index] = self.now
        self.num_running += 1
        left = run.draw.question.branches[run.draw.picked[index]].length - sibling.num_tokens
        heappush(self.events, (self.now + max(1, left), number, index, self.now))
        if run.score is not None and not sibling.is_submitted:
            ripe = self.now + max(0, run.group.config.cut_tokens - sibling.num_tokens)
            heappush(self.events, (ripe, number, _JUDGE, 0))

    def _leave(self, number: int, index: int, state: State) -> None:
        """A sibling's slot, where it has one, is free again."""
        run = self.runs[number]
        self._count_age(run)
        sibling = run.group.siblings[index]
        sibling.state = state
        self.extras.pop((number, index), None)
        since = run.since.pop(index, None)
        if since is not None:
            sibling.num_tokens += self.now - since
            self.num_running -= 1

    def _yield(self) -> bool:
        """The youngest extra waits again, with its tokens. Extras that their group has come to
        claim are none any more, the oldest first."""
        for number in {number for number, _ in self.extras}:
            own = [key for key in self.extras if key[0] == number]
            for key in own[: max(0, len(own) - policy.num_extras(self.runs[number].group))]:
                del self.extras[key]
        if not self.extras:
            return False
        self._leave(*next(reversed(self.extras)), State.HELD)
        return True

    def _count_age(self, run: Run) -> None:
        """A group's steps are those in which it had a slot."""
        if run.since:
            run.group.steps += self.now - run.counted_to
        run.counted_to = self.now


def _trace(sibling: Sibling, config: DeepPruneConfig) -> Trace:
    """No text: a judge of recordings knows its scores by sibling."""
    cut = "end" if sibling.has_voted else "tokens"
    return Trace(sibling.index, "", config.cut_tokens, cut, sibling.answer)


def _group(number: int, draw: Draw, config: DeepPruneConfig) -> Group:
    group = Group(str(number), draw.size, config, tally=Tally(operator.eq), is_closed=True)
    for sibling in group.siblings.values():
        sibling.state = State.HELD
    return group


def vote(answers: Sequence[str | None]) -> str | None:
    """Most votes; among equals the answer that comes first."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def outcome_of_all(branches: Sequence[Branch], latency: int) -> Outcome:
    """All of these ran to their end."""
    answer = vote([one.answer for one in branches])
    return outcome_of(answer, [one.length for one in branches], latency)
