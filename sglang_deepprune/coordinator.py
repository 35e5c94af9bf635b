"""The one object the engine side holds: admit, observe, vote, poll, apply, retire.

Owns every group from its first sibling to its record, and takes the vote, once. It knows no engine:
it is told what happened and answers with `Stop`s and `Start`s. Nothing here blocks. The halves are
apart, as in SGLang's beam search: what all ranks see (tokens, aborts) is acted on by all ranks
alike; what rests on a clock, a judge or the answer fence is gathered by the leader in `poll`,
broadcast by the engine and acted on in `apply`, so that every rank decides the same at the same
step. What passes to the judge and back is its `handover`'s, what passes to the fence `questions`'.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sglang_deepprune import policy
from sglang_deepprune.actions import Action, Admission, Command, End, Retired, Start, Stop
from sglang_deepprune.answers import Fence, extract
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.ending import EndingReader, tail_tokens
from sglang_deepprune.group import Group, Sibling, State
from sglang_deepprune.handover import Handover
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.metrics import GROUPS, Meter, Reason, count_group
from sglang_deepprune.probing import ProbeDesk
from sglang_deepprune.questions import Questions
from sglang_deepprune.reading import READ_TOKENS, TraceReader, in_turn
from sglang_deepprune.record import choice_of, record_of
from sglang_deepprune.run import Run
from sglang_deepprune.truncation import warm_up
from sglang_deepprune.types import ABSENT, Close, Expire, FenceResult, GroupRecord, Probe
from sglang_deepprune.voting import Ballot

logger = logging.getLogger(__name__)

HOLD_LIMIT_S = 2.0  # the longest that a finished group's last output waits for the fence
MOST_MEMBERS = 4096  # of a client-side group; whoever comes later is a plain request
# Siblings of all client-side groups: one request may announce thousands, and name as many groups.
MOST_AWAITED = 65_536
MOST_CLOSED = 64  # client-side groups whose time is out, in one step

_GREEDY = (
    "deepprune: the siblings of a group at temperature 0 are one and the same trace; what stopping "
    "them spares is not counted as saved"
)
_PROMPT_TOKENS = 2048  # about a millisecond to decode, once a group
_PROMPT_CHARS = 16_384


class Coordinator:
    """All live groups of one scheduler process."""

    def __init__(
        self,
        config: DeepPruneConfig,
        decode: Callable[[Sequence[int]], str],
        *,
        read: Callable[[Sequence[int]], str] | None = None,
        mark_ids: Collection[int] = (),
        judge: JudgeWorker | ProbeDesk | None = None,
        fence: Fence | None = None,
        clock: Callable[[], float] = time.monotonic,
        meter: Meter | None = None,
    ):
        self.config = config
        self.decode = decode  # for answers: control tokens stay, they mark the thinking's end
        self.endings = EndingReader(decode, mark_ids)
        self.read = read or decode  # for judges: plain text, the same for every longer prefix
        self.judge = judge  # the leader's only
        self.fence = fence  # the leader's only
        self.clock = clock
        self.meter = meter or Meter()  # one that counts is the leader's only
        self.runs: dict[str, Run] = {}
        warm_up(config)
        self._epoch = 0
        self._num_renewals = 0
        self._num_awaited = 0  # see MOST_AWAITED
        self._next_read = ""  # the group at which the last step ran out of tokens to read
        self._told_greedy = False
        self._failed: list[Command] = []  # what these two could not even ask
        self.questions = Questions(fence, self._failed)
        self.handover = Handover(self.runs, judge, decode, clock, self.meter, self._failed)
        self._abandoned: deque[str] = deque(maxlen=1024)  # groups that late siblings must not renew

    @property
    def is_idle(self) -> bool:
        """No group lives: every hook returns at once."""
        return not self.runs

    @property
    def sizes(self) -> dict[str, int]:
        """How full the tables are; all zero when nothing is live."""
        return {"groups": len(self.runs), "questions": len(self.questions.asked)}

    def admit(
        self,
        group_id: str,
        index: int,
        size: int,
        settings: Mapping[str, Any],
        max_new_tokens: int,
        *,
        starts_in_reasoning: bool = False,
        is_greedy: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> Admission | None:
        """A sibling arrives. None: its group was abandoned, is over or full, or there are too many
        of them: it is a plain request.

        `starts_in_reasoning`: the prompt has opened the think block, so a trace without marks is
        all thinking. `is_greedy`: it samples at temperature 0. `prompt_ids`: read once a group, if
        a judge asks for its text.
        """
        run = self.runs.get(group_id)
        if run is None and group_id in self._abandoned:
            return None
        if run is not None and run.over_s is not None:
            return None  # its last output waits for the fence alone
        if run is None and index == ABSENT and self._num_awaited + max(1, size) > MOST_AWAITED:
            return None
        if run is None:
            run = self._open(group_id, index, size, settings, max_new_tokens)
            run.starts_in_reasoning = starts_in_reasoning
            run.group.is_greedy = is_greedy
            if is_greedy and not self._told_greedy:
                self._told_greedy = True
                logger.warning(_GREEDY)
            if self.judge is not None and run.group.config.is_judged:
                run.reader.prompt = self._prompt(prompt_ids)
        group = run.group
        if index == ABSENT:
            taken = [
                index
                for index, one in group.siblings.items()
                if one.state is not State.EXPECTED and not one.is_given_up
            ]
            if len(taken) >= MOST_MEMBERS:
                return None
            index = max(taken, default=-1) + 1
        run.touched_s = self.clock()
        sibling = group.siblings.setdefault(index, Sibling(index))
        if sibling.state.is_end:
            sibling.state, sibling.is_given_up = State.EXPECTED, False  # and here it is
        if sibling.state is State.EXPECTED:
            sibling.state = State.HELD if policy.is_full(group) else State.QUEUED
        if sibling.doom is not None or group.is_decided:
            sibling.doom = State.NOT_STARTED
            return Admission(index, end=State.NOT_STARTED)
        return Admission(index, is_held=sibling.state is State.HELD)

    def _prompt(self, prompt_ids: Sequence[int]) -> str:
        """What a judge reads of a prompt: its end, where options and the question stand."""
        try:
            return self.read(prompt_ids[-_PROMPT_TOKENS:])[-_PROMPT_CHARS:]
        except (OverflowError, TypeError, IndexError):
            return ""  # an image's ids are hashes, beyond any vocabulary

    def _open(
        self, group_id: str, index: int, size: int, settings: Mapping[str, Any], max_tokens: int
    ) -> Run:
        self._epoch += 1
        group = Group(group_id, size, self.config.override(settings), epoch=self._epoch)
        group.is_closed = size > 0
        reader = TraceReader(group, self.read)
        run = Run(group, reader, max_tokens, is_client_side=index == ABSENT)
        self._num_awaited += max(1, size) if run.is_client_side else 0
        self.runs[group_id] = run
        return run

    def observe(self, outputs: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """One decode step: {group: {sibling: its output ids}}. Every W steps, hand to the judge."""
        left = READ_TOKENS
        for group_id in in_turn(list(outputs), self._next_read):
            run, siblings = self.runs.get(group_id), outputs[group_id]
            if run is None:
                continue
            group = run.group
            group.steps += 1
            for index, output_ids in siblings.items():
                sibling = group.siblings[index]
                sibling.num_tokens = len(output_ids)
                if sibling.state is State.QUEUED:
                    sibling.state = State.RUNNING
            if not group.config.is_judged:
                continue
            if group.is_decided or group.is_released:
                run.reader.unread.clear()  # nobody will be asked about them
                continue
            is_window = group.steps % group.config.window == 0 or run.reader.is_behind
            if is_window or run.reader.unread:
                left = run.reader.advance(siblings if is_window else {}, left)
                if run.reader.has_more:
                    self._next_read = group_id
            if is_window:
                self.handover.look(run)

    def vote(self, group_id: str, ends: Sequence[End], step_ends: int = 0) -> list[Action]:
        """The siblings that end in this step, in the batch's order: their ballots, and what follows
        from all of them. The policy is asked once: it looks at every sibling of the group.

        `step_ends`: how many end in this step in all groups; they share what a step reads.
        """
        run = self.runs.get(group_id)
        if run is None:
            return []
        fresh = [end for end in ends if not run.group.siblings[end.index].has_voted]
        num_ends = max(step_ends, len(ends))
        for end in fresh:
            self._count(run, end, tail_tokens(num_ends, end.is_cut))
        return self._replan(run) if fresh else []

    def _count(self, run: Run, end: End, tail: int) -> None:
        """One ballot."""
        group = run.group
        sibling = group.siblings[end.index]
        sibling.doom = None
        sibling.num_tokens = len(end.output_ids)
        field = group.config.answer_field or None
        ending = self.endings.read(
            end.output_ids,
            starts_inside=run.starts_in_reasoning,
            is_whole=field is not None,
            tail=tail,
        )
        found = None
        if ending is not None:
            found = extract(
                ending.text,
                is_cut=end.is_cut,
                json_field=field,
                starts_in_reasoning=ending.is_inside,
            )
        sibling.answer = found.answer if found else None
        sibling.has_voted = True
        if group.config.is_judged:
            trace = run.reader.ended(end.index, end.output_ids, sibling.answer)
            if trace is not None:
                self.handover.ended(group.group_id, trace)
        self.questions.ask(group, group.tally.add(Ballot(sibling.answer, end.index)))

    def apply(self, command: Command) -> list[Action]:
        """A verdict of the leader, on every rank at the same step. Late ones are dropped."""
        run = self.runs.get(command.group_id)
        if run is None or run.group.epoch != command.epoch:
            return []
        if isinstance(command, Close):
            self._close(run)
        elif isinstance(command, Expire):
            run.group.tally.give_up()
        elif isinstance(command, FenceResult):
            run.group.tally.resolve(command.low, command.high, command.is_same)
            self.questions.drop_moot(run.group)
        elif isinstance(command, Probe):
            return self.handover.forks(run.group, command)
        else:
            self.handover.place(run, command)
        return self._replan(run)

    def poll(self) -> list[Command]:
        """Leader only: what judge, fence and clock have to say by now. Never blocks."""
        commands = self._failed.copy()
        self._failed.clear()
        commands += self.questions.poll()
        if self.judge is not None:
            commands += self.judge.poll()
        now, num_closed = self.clock(), 0
        for group_id, run in self.runs.items():
            epoch = run.group.epoch
            if run.over_s is not None and now - run.over_s > HOLD_LIMIT_S:
                run.over_s = now
                commands.append(Expire(group_id, epoch))
            is_late = now - run.touched_s > self.config.group_timeout_s
            if is_late and num_closed < MOST_CLOSED:
                is_awaited = run.is_awaited  # looks at every sibling
                run.touched_s = now if is_awaited else math.inf  # until `admit` touches it again
                if is_awaited:
                    commands.append(Close(group_id, epoch))
                    num_closed += 1
        return commands

    def tidy(self) -> None:
        """Leader, while no group lives: what is still under way for groups that have ended."""
        self.questions.tidy()
        self.handover.tidy()

    def retire(self, group_id: str, index: int, state: State, num_tokens: int) -> Retired | None:
        """A sibling has ended, exactly once. The last one brings the group's record."""
        run = self.runs.get(group_id)
        if run is None or run.group.siblings[index].state.is_end:
            return None
        group = run.group
        sibling = group.siblings[index]
        sibling.state, sibling.doom, sibling.num_tokens = state, None, num_tokens
        run.reader.drop(index)
        is_over = group.is_over and (group.is_closed or not run.is_client_side)
        if is_over and not group.tally.is_settled:
            run.over_s = self.clock()
            return Retired(choice_of(sibling), is_pending=True)
        choice, record = choice_of(sibling), None
        if is_over:
            record = self._conclude(run)
        elif run.is_client_side:
            record = record_of(run.group, run.max_new_tokens, is_settled=False)
        return Retired(choice, record)

    def settle(self, group_id: str) -> GroupRecord | None:
        """The record of a group whose last output was held, once its vote is counted."""
        run = self.runs.get(group_id)
        if run is None or not (run.group.is_over and run.group.is_closed):
            return None
        if not run.group.tally.is_settled:
            return None
        return self._conclude(run)

    def give_up(self, group_id: str) -> GroupRecord | None:
        """Nobody is there to wait for the fence: the group's record, as its vote stands now."""
        run = self.runs.get(group_id)
        if run is not None:
            run.group.tally.give_up()
        return self.settle(group_id)

    def lost(self, group_id: str) -> list[Action]:
        """Siblings were aborted: fewer may still vote, which can decide it."""
        run = self.runs.get(group_id)
        return self._replan(run) if run is not None else []

    def start_extra(self, group_id: str, epoch: int) -> Start | None:
        """Rows are free: the group's next held sibling may start beyond its claim."""
        run = self.runs.get(group_id)
        if run is None or run.group.epoch != epoch or run.group.is_decided:
            return None
        held = run.group.held
        if not held:
            return None
        held[0].state = State.QUEUED
        return Start(group_id, held[0].index)

    def is_asleep(self, group_id: str) -> bool:
        """Nothing of the group runs or is queued, and somebody is held: it must be replanned."""
        run = self.runs.get(group_id)
        if run is None or run.group.is_decided:
            return False  # whoever is held there is about to be answered
        return run.group.num_started == 0 and run.group.has_held

    def send_back(self, group_id: str, index: int, num_tokens: int) -> None:
        """An extra yields its row, or got none: it waits within its group again."""
        sibling = self.runs[group_id].group.siblings[index]
        sibling.state, sibling.num_tokens = State.HELD, num_tokens

    def prune(self, group_id: str, index: int) -> Stop:
        """KV is short: end a sibling that a judge found redundant."""
        group = self.runs[group_id].group
        sibling = group.siblings[index]
        sibling.doom, sibling.pruned_at = State.PRUNED, sibling.num_tokens or None
        group.reason = policy.POOL_FULL
        return Stop(group_id, index, State.PRUNED)

    def name_of(self, group_id: str, index: int) -> str:
        """What a group is called here. Members that name it after the weights have changed are none
        of those before."""
        is_named_by_client = index == ABSENT and self._num_renewals
        return f"{group_id}@{self._num_renewals}" if is_named_by_client else group_id

    def renew(self) -> list[Action]:
        """The weights are about to change, and no group crosses that: nothing is decided on traces
        of both. What lives runs on as plain sampling; verdicts on their way find another epoch."""
        self._num_renewals += 1
        actions: list[Action] = []
        for run in list(self.runs.values()):
            group = run.group
            if group.is_decided or run.over_s is not None:
                continue  # all of it is from before
            self._epoch += 1
            group.epoch, run.in_flight = self._epoch, frozenset()
            group.is_released, group.reason = True, policy.RENEWED
            group.tally.give_up()  # of what the fence has not answered yet
            if run.is_client_side:
                self._close(run)
            actions += self._replan(run)
        return actions

    def abandon(self, group_id: str = "") -> list[str]:
        """A fault of ours: the group, or every live one, runs on as plain sampling, and is ours no
        more."""
        gone = [group_id] if group_id else list(self.runs)
        self.meter.count(GROUPS, sum(one in self.runs for one in gone), Reason.ABANDONED)
        for one in gone:
            self.forget(one)
        self._abandoned.extend(gone)
        return gone

    def revive(self, group_id: str, index: int) -> None:
        """A doomed sibling ends by itself in the very step that would have stopped it."""
        sibling = self.runs[group_id].group.siblings[index]
        sibling.doom, sibling.pruned_at = None, None

    def forget(self, group_id: str) -> None:
        """The group is gone; whatever is still asked for it is asked no more."""
        run = self.runs.pop(group_id, None)
        if run is not None and run.is_client_side:
            self._num_awaited -= max(1, run.group.size)
        if self.judge is not None:
            self.judge.drop(group_id)
        self.questions.forget(group_id)

    def _close(self, run: Run) -> None:
        """Time is out: whoever has not come will not be waited for."""
        run.group.is_closed = True
        for sibling in run.group.siblings.values():
            sibling.is_given_up |= sibling.state is State.EXPECTED
            if sibling.state is State.EXPECTED and sibling.doom is not None:
                sibling.state = sibling.doom = State.NOT_STARTED  # nor would it have been
            elif sibling.state is State.EXPECTED:
                sibling.state = State.ABORTED
        if run.group.is_over and run.group.tally.is_settled:
            self._conclude(run)

    def _conclude(self, run: Run) -> GroupRecord:
        """The group has ended: its record, counted once, and the group is gone."""
        record = record_of(run.group, run.max_new_tokens, is_settled=True)
        count_group(self.meter, record, is_probed=self.handover.desk is not None)
        self.forget(run.group.group_id)
        return record

    def _replan(self, run: Run) -> list[Action]:
        """Ask the policy; doom whom it stops, queue whom it starts."""
        group = run.group
        plan = policy.plan(group, in_flight=run.in_flight)
        if plan.reason == policy.OPEN_ENDED:
            group.is_released = True
        if plan.decided:
            group.is_decided = True
        if plan.reason and (plan.stop or plan.decided or group.is_released):
            group.reason = plan.reason
        end = State.DECIDED if plan.decided else State.PRUNED
        actions: list[Action] = []
        for index in plan.stop:
            sibling = group.siblings[index]
            if not sibling.is_live:
                continue
            # A sibling that turns out to have no token is called `not_started` when it ends.
            sibling.doom = end
            sibling.pruned_at = sibling.num_tokens or None
            if sibling.state is not State.EXPECTED:
                actions.append(Stop(group.group_id, index, sibling.doom))
        for sibling in group.held[: plan.admit]:
            sibling.state = State.QUEUED
            actions.append(Start(group.group_id, sibling.index))
        return actions
