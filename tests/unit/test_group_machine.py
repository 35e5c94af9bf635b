"""The coordinator under any order of events: a state machine in the engine's place.

`Ranks` is what SGLang and `patches/` are to the coordinator: it knows where each sibling lies, does
what it is told to, and ends siblings. A leader and a follower get the same events in lockstep; the
follower has neither judge nor fence nor the same clock, and must decide the same. Judge and fence
answer late, with errors, with NaN, twice, or for an epoch that is gone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sglang_deepprune import metrics, policy
from sglang_deepprune.actions import Action, Command, End, Retired, Start, Stop
from sglang_deepprune.clustering import place
from sglang_deepprune.config import PRESETS, DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import Group, State
from sglang_deepprune.types import ABSENT, GroupRecord, JudgeResult, JudgeTask
from tests.unit.coordinators import Clock, FakeFence, FakeJudge, decode
from tests.unit.test_metrics import Tally

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "sglang_deepprune/schema/record.schema.json").read_text())
GROUP_SCHEMA = {**SCHEMA, "$ref": "#/$defs/group"}
for key in ("type", "properties", "required", "additionalProperties"):
    del GROUP_SCHEMA[key]
LIMIT = 40  # max_new_tokens of every sibling
TIMEOUT_S = 60.0
HELD, QUEUED, RUNNING = "held", "queued", "running"
ANSWERS = (1, 1, 1, 2, 7, 8, 9)  # ids that coordinators.TEXTS knows; 7 abstains, 8 is 9


@dataclass
class Member:
    """One sibling inside the engine."""

    place: str
    tokens: int = 0
    doom: State | None = None
    is_retracted: bool = False  # has run, and lies in SGLang's queue again; only the engine knows


@dataclass
class Known:
    """A group as its clients know it."""

    size: int
    epoch: int
    is_client_side: bool
    unsent: list[int] = field(default_factory=list)
    num_lost: int = 0  # never sent, as their client left, or sent when the group was over
    members: dict[int, Member] = field(default_factory=dict)  # those that have not ended
    ended: dict[int, State] = field(default_factory=dict)
    is_renewed: bool = False  # the weights have changed under it
    is_proven: bool = False  # a judge has said something about two of them
    unjudged: set[int] = field(default_factory=set)  # the judge was asked, and did not know


class Ranks(RuleBasedStateMachine):
    @initialize(
        window=st.sampled_from([1, 4]), base=st.integers(1, 4), widen=st.sampled_from([0.0, 0.5]),
        judge=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def start(self, window: int, base: int, judge: bool, widen: float) -> None:
        config = DeepPruneConfig(
            window=window, base=base, widen=widen, cut_tokens=4, cut="tokens",
            judge="similarity" if judge else "none", group_timeout_s=TIMEOUT_S,
            # As if a card had let the judge prune, so that lazy groups have verdicts too.
            card_taus=(("tokens:4", 0.5),),
        )  # fmt: skip
        self.clock = Clock()
        self.judge, self.fence, self.tally = FakeJudge(), FakeFence(), Tally()
        self.told: list[GroupRecord] = []  # settled records, as clients see them
        self.num_silent = 0  # groups that ended when nobody was left to be told
        self.leader = Coordinator(
            config, decode, judge=self.judge, fence=self.fence,  # type: ignore[arg-type]
            clock=self.clock, meter=self.tally,
        )  # fmt: skip
        self.follower = Coordinator(config, decode, clock=lambda: 1e9)
        self.groups: dict[str, Known] = {}
        self.pending: dict[str, tuple[int, Retired]] = {}
        self.lost: set[str] = set()
        self.tasks: list[JudgeTask] = []  # handed to the judge, unanswered
        self.asked: list[int] = []  # tickets of the fence, unanswered
        self.wire: list[Command] = []
        self.sent: list[Command] = []  # broadcast before; may come again
        self.settings: dict[str, dict[str, Any]] = {}
        self.num_opened = 0
        self.abandoned: set[str] = set()  # groups that have met a fault of ours

    # -- both ranks --------------------------------------------------------------------------

    def both(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """One event on both ranks: the same answer, and the same groups after it."""
        told = getattr(self.leader, name)(*args, **kwargs)
        assert told == getattr(self.follower, name)(*args, **kwargs), "the ranks disagree"
        return told

    def group(self, gid: str) -> Group:
        return self.leader.runs[gid].group

    def act(self, actions: Sequence[Action]) -> None:
        """What `Engine._act` does."""
        ended: list[tuple[str, int, State]] = []
        for action in actions:
            gid, group = action.group_id, self.group(action.group_id)
            member = self.groups[gid].members[action.index]
            if isinstance(action, Start):
                assert member.place == HELD and not group.is_decided, "started after the decision"
                member.place = QUEUED
                continue
            assert isinstance(action, Stop) and not group.siblings[action.index].has_voted
            assert not self.groups[gid].is_renewed, "stopped on traces of two weight versions"
            if action.state is State.PRUNED:
                assert self.groups[gid].is_proven, "pruned without a verdict"
                assert action.index not in self.groups[gid].unjudged, "the judge did not know"
            if member.place == RUNNING:
                member.doom = action.state
            else:
                ended.append((gid, action.index, action.state))
        for gid, index, state in ended:
            self.retire(gid, index, state)

    def retire(self, gid: str, index: int, state: State) -> None:
        """A sibling leaves through one of the two doors."""
        known = self.groups[gid]
        tokens, group = known.members.pop(index).tokens, self.group(gid)
        if tokens == 0 and state in (State.PRUNED, State.DECIDED):
            state = State.NOT_STARTED
        known.ended[index] = state
        retired = self.both("retire", gid, index, state, tokens)
        assert retired is not None, "ended, and the coordinator does not know it"
        assert self.both("retire", gid, index, State.ABORTED, 99) is None, "ended twice"
        assert (retired.choice.index, retired.choice.state) == (index, state.value)
        assert retired.choice.tokens == tokens
        if retired.is_pending:
            assert gid not in self.pending
            self.pending[gid] = (index, retired)
        elif retired.group is not None and retired.group.settled:
            assert group.tally.is_settled, "the fence was not waited for"
            self.settled(gid, retired.group)
        if state in (State.ABORTED, State.FAILED):
            self.lost.add(gid)
        if self.both("is_asleep", gid):
            self.lost.add(gid)

    def settled(self, gid: str, record: GroupRecord) -> None:
        """The record of a group that has ended: once, by the schema, and its counts add up."""
        known = self.groups.pop(gid)
        self.told.append(record)
        jsonschema.validate(record.to_json(), GROUP_SCHEMA)
        assert not known.members and gid not in self.leader.runs
        states = {choice.index: choice.state for choice in record.choices}
        assert {i: states[i] for i in known.ended} == {i: s.value for i, s in known.ended.items()}
        never_sent = set(states) - set(known.ended)
        assert {states[index] for index in never_sent} <= {"aborted", "not_started"}
        assert record.size == len(states) >= known.size
        assert known.is_client_side or record.size == known.size
        assert record.generated_tokens == sum(choice.tokens for choice in record.choices)
        finished = [choice for choice in record.choices if choice.state == "finished"]
        assert sum(votes for _, votes in record.votes) + record.abstentions == len(finished)
        assert record.abstentions == sum(choice.answer is None for choice in finished)
        if record.votes:
            assert record.votes[0][1] == max(votes for _, votes in record.votes)
            assert record.winner in {choice.index for choice in finished}
        assert (record.winner is None) == (record.answer is None) == (not record.votes)
        placed = [index for cluster in record.clusters for index in cluster]
        assert len(placed) == len(set(placed)) and set(placed) <= set(states)
        stopped = [c for c in record.choices if c.state in ("pruned", "decided", "not_started")]
        assert record.saved_tokens_at_most == sum(LIMIT - choice.tokens for choice in stopped)

    def replan_lost(self) -> None:
        lost, self.lost = sorted(self.lost), set()
        for gid in lost:
            self.act(self.both("lost", gid))

    # -- clients -----------------------------------------------------------------------------

    @precondition(lambda self: len(self.groups) < 3)
    @rule(
        size=st.sampled_from([1, 2, 3, 5, 8, 12]), preset=st.sampled_from([*PRESETS, "paper"]),
        kind=st.sampled_from(["n", "n", "n", "sized", "open"]), k2=st.integers(1, 3),
        name=st.sampled_from(["a", "b"]), arrives=st.integers(0, 12),
    )  # fmt: skip
    def open(self, size: int, preset: str, kind: str, k2: int, name: str, arrives: int) -> None:
        # A group that is gone may be followed by one of its name: then only the epoch differs.
        is_free = name not in self.leader.runs and name not in self.abandoned
        gid = name if is_free else f"{name}{self.num_opened}"
        self.num_opened += 1
        asked = {"preset": preset, "k2": k2}
        self.groups[gid] = Known(size if kind != "open" else 0, 0, kind != "n", list(range(size)))
        if kind == "sized":
            self.groups[gid].unsent += [size, size + 1]  # more members than it was said to have
        self.settings[gid] = asked
        for _ in range(max(1, arrives)):
            if gid in self.groups and self.groups[gid].unsent:
                self.admit(gid, 0)

    def admit(self, gid: str, which: int) -> None:
        known = self.groups[gid]
        index = known.unsent.pop(which % len(known.unsent))
        was_decided = gid in self.leader.runs and self.group(gid).is_decided
        assert self.both("name_of", gid, index) == gid
        admission = self.both(
            "admit", gid, ABSENT if known.is_client_side else index, known.size,
            self.settings[gid], LIMIT,
        )  # fmt: skip
        if admission is None:
            assert gid in self.pending, "a sibling of a group that lives is a plain request"
            known.num_lost += 1
            return
        assert known.is_client_side or admission.index == index
        assert admission.index not in known.members
        index, known.epoch = admission.index, self.group(gid).epoch
        assert index not in known.ended, "an index that has ended came back"
        known.members[index] = Member(HELD if admission.is_held else QUEUED)
        assert not was_decided or admission.end is State.NOT_STARTED
        if admission.end is not None:
            self.retire(gid, index, admission.end)

    @precondition(lambda self: any(known.unsent for known in self.groups.values()))
    @rule(data=st.data(), count=st.integers(1, 4))
    def arrive(self, data: Any, count: int) -> None:
        for _ in range(count):
            open_ones = [gid for gid in self.groups if self.groups[gid].unsent]
            if open_ones:
                self.admit(data.draw(st.sampled_from(open_ones)), data.draw(st.integers(0, 11)))

    def has(self, *places: str) -> bool:
        known = self.groups.values()
        return any(one.place in places for group in known for one in group.members.values())

    def some(self, data: Any, count: int, *places: str) -> list[tuple[str, int]]:
        """A few siblings that lie in one of these places."""
        found = [
            (gid, index)
            for gid, known in self.groups.items()
            for index, member in known.members.items()
            if member.place in places
        ]
        if not found:
            return []
        return data.draw(st.lists(st.sampled_from(found), min_size=1, max_size=count, unique=True))

    @precondition(lambda self: self.has(HELD, QUEUED, RUNNING))
    @rule(data=st.data(), state=st.sampled_from([State.ABORTED, State.FAILED]))
    def abort(self, data: Any, state: State) -> None:
        for gid, index in self.some(data, 2, HELD, QUEUED, RUNNING):
            if gid in self.groups and index in self.groups[gid].members:
                self.retire(gid, index, state)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        """A client is gone: all that it has sent is aborted."""
        gid = data.draw(st.sampled_from(sorted(self.groups)))
        self.groups[gid].num_lost += len(self.groups[gid].unsent)
        self.groups[gid].unsent.clear()
        for index in list(self.groups[gid].members):
            if gid in self.groups:
                self.retire(gid, index, State.ABORTED)

    # -- the engine --------------------------------------------------------------------------

    @precondition(lambda self: self.has(QUEUED, RUNNING))
    @rule(tokens=st.integers(1, 9), is_full=st.sampled_from([False, False, True]))
    def step(self, tokens: int, is_full: bool) -> None:
        """Decode steps; doomed siblings end in the first one. While rows are full, whoever waits in
        SGLang's queue goes on waiting there; with nobody on a row there is room."""
        self.replan_lost()
        for gid, known in list(self.groups.items()):
            for index, member in list(known.members.items()):
                if member.doom is not None:
                    self.retire(gid, index, member.doom)
        going = (RUNNING,) if is_full and self.has(RUNNING) else (QUEUED, RUNNING)
        for _ in range(tokens):
            outputs: dict[str, dict[int, list[int]]] = {}
            for gid, known in self.groups.items():
                for index, member in known.members.items():
                    if member.place in going and member.tokens < LIMIT - 1:
                        member.place, member.tokens = RUNNING, member.tokens + 1
                        member.is_retracted = False
                        outputs.setdefault(gid, {})[index] = [0] * member.tokens
            self.both("observe", outputs)
        self.tasks += self.judge.tasks
        self.judge.tasks = []

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        """A few siblings end in one step: all vote, then all leave. Doomed ones among them too."""
        self.replan_lost()
        ending = self.some(data, 4, RUNNING)
        ends: dict[str, list[End]] = {}
        for gid, index in ending:
            member = self.groups[gid].members[index]
            member.tokens += 1
            if member.doom is not None:
                member.doom = None
                self.both("revive", gid, index)
            last = data.draw(st.sampled_from(ANSWERS))
            ids = [0] * (member.tokens - 1) + [last]
            ends.setdefault(gid, []).append(End(index, ids, False))
        for gid, some in ends.items():
            self.act(self.both("vote", gid, some))
            assert self.both("vote", gid, some) == [], "voted twice"
        for gid, index in ending:
            self.retire(gid, index, State.FINISHED)
        self.asked = list(range(len(self.fence.asked)))

    @precondition(lambda self: self.has(HELD))
    @rule(data=st.data(), is_old=st.booleans())
    def fill(self, data: Any, is_old: bool) -> None:
        """Rows are free, and an extra may start; never for a command of another epoch."""
        for gid, known in self.groups.items():
            if gid not in self.leader.runs or data.draw(st.booleans()):
                continue
            start = self.both("start_extra", gid, known.epoch - is_old)
            if start is not None:
                assert not is_old and not self.group(gid).is_decided
                member = known.members[start.index]
                assert member.place == HELD
                member.place = QUEUED

    @precondition(lambda self: self.has(RUNNING))
    @rule(data=st.data(), goes_on=st.booleans())
    def retract(self, data: Any, goes_on: bool) -> None:
        """KV is short, and SGLang takes rows: its own queue has these siblings again, with all that
        they have said. The coordinator is not told. Who is doomed does not start again."""
        for gid, index in self.some(data, 4, RUNNING):
            member = self.groups[gid].members[index]
            member.place, member.is_retracted = QUEUED, True
            if member.doom is not None:
                self.retire(gid, index, member.doom)
        if goes_on and self.has(RUNNING):
            self.step(2, True)  # as it is for the others, which is why they were retracted

    @precondition(lambda self: self.has(QUEUED, RUNNING))
    @rule(data=st.data())
    def yield_rows(self, data: Any) -> None:
        for gid, index in self.some(data, 3, QUEUED, RUNNING):
            member = self.groups[gid].members[index]
            if member.doom is None and not member.is_retracted:
                member.place = HELD
                self.both("send_back", gid, index, member.tokens)
                if self.both("is_asleep", gid):
                    self.lost.add(gid)

    @precondition(lambda self: any(run.group.clusters for run in self.leader.runs.values()))
    @rule()
    def relieve(self) -> None:
        """KV is short: a redundant sibling is taken off its row and pruned."""
        for gid, known in self.groups.items():
            rows = {i: m.tokens for i, m in known.members.items()
                    if m.place == RUNNING and m.doom is None}  # fmt: skip
            redundant = policy.most_redundant(self.group(gid), rows) if rows else None
            if redundant is not None:
                known.members[redundant].place = HELD
                self.both("send_back", gid, redundant, rows[redundant])
                self.act([self.both("prune", gid, redundant)])
                return

    @precondition(lambda self: self.groups)
    @rule(is_now=st.sampled_from([False, False, False, False, True]))
    def renew(self, is_now: bool) -> None:
        """The weights change; members that a client sends later are of another group."""
        if not is_now:
            return
        actions = self.both("renew")
        for gid, known in list(self.groups.items()):
            group = self.group(gid) if gid in self.leader.runs else None
            if group is not None and not group.is_decided and gid not in self.pending:
                known.epoch, known.is_renewed = group.epoch, True
            if known.is_client_side:
                known.unsent.clear()
            if not known.members and gid not in self.leader.runs:
                del self.groups[gid]
                self.num_silent += 1
        self.act(actions)

    @precondition(lambda self: len(self.groups.keys() & self.leader.runs.keys()) > 1)
    @rule(data=st.data(), is_now=st.sampled_from([False, False, False, False, True]))
    def abandon(self, data: Any, is_now: bool) -> None:
        """A fault of ours at this group: it is plain sampling, and so are those that come late."""
        gid = data.draw(st.sampled_from(sorted(self.groups.keys() & self.leader.runs.keys())))
        if not is_now:
            return
        assert self.both("abandon", gid) == [gid]
        known = self.groups.pop(gid)
        self.pending.pop(gid, None)
        self.lost.discard(gid)
        self.abandoned.add(gid)
        for index in known.unsent[:1]:
            asked = self.settings[gid]
            assert self.both("admit", gid, index, known.size, asked, LIMIT) is None
        assert gid not in self.leader.runs

    # -- judge, fence, clock -----------------------------------------------------------------

    @precondition(lambda self: self.tasks)
    @rule(
        data=st.data(), kind=st.sampled_from(["score", "score", "nan", "some nan", "raise"]),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def judge_answers(self, data: Any, kind: str, seed: int) -> None:
        """Any task's verdict, in any order, for a group that may be gone by now."""
        task = self.tasks.pop(data.draw(st.integers(0, len(self.tasks) - 1)))
        rng = random.Random(seed)

        def score(pairs: Sequence[Any]) -> Any:
            share = {"nan": 1.0, "some nan": 0.4}.get(kind, 0.0)
            drawn = [(rng.random() < share, rng.random() < 0.6) for _ in pairs]
            values = [math.nan if is_nan else float(is_same) for is_nan, is_same in drawn]
            return np.array(values, dtype=np.float32)

        if kind == "raise":
            result = JudgeResult(task.group_id, task.epoch, error="told to", window=task.window)
        else:
            placed, pairs, tokens = place(task, score)
            result = JudgeResult(
                task.group_id, task.epoch, placed, pairs, tokens, 1.0, window=task.window
            )
        self.judge.results.append(result)

    @precondition(lambda self: self.leader.config.judge != "none" and self.has(QUEUED, RUNNING))
    @rule(data=st.data(), kind=st.sampled_from(["score", "some nan"]), seed=st.integers(0, 99))
    def decode_and_judge(self, data: Any, kind: str, seed: int) -> None:
        """The ordinary course: traces reach the cut, and a prompt judge has its say."""
        self.step(5, False)
        while self.tasks:
            self.judge_answers(data, kind, seed)
        self.broadcast(data, False, False)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), is_same=st.sampled_from([True, False, None]))
    def fence_answers(self, data: Any, is_same: bool | None) -> None:
        ticket = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        self.fence.answers.append((ticket, is_same))

    @precondition(lambda self: self.groups)
    @rule(seconds=st.sampled_from([0.5, 3.0, TIMEOUT_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.groups or self.judge.results or self.wire)
    @rule(data=st.data(), again=st.booleans(), is_late=st.booleans())
    def broadcast(self, data: Any, again: bool, is_late: bool) -> None:
        """The leader's commands reach all ranks; one of before may come a second time."""
        self.wire += self.leader.poll()
        if is_late:
            return
        commands, self.wire = self.wire, []
        self.sent = (self.sent + commands)[-20:]
        if again and self.sent:
            commands = [*commands, data.draw(st.sampled_from(self.sent[-3:]))]
        for command in commands:
            self.apply(command)
        self.replan_lost()

    def apply(self, command: Command) -> None:
        gid = command.group_id
        run = self.leader.runs.get(gid)
        is_live = run is not None and run.group.epoch == command.epoch
        before = _picture(run.group) if run is not None else None
        if isinstance(command, JudgeResult) and is_live:
            for one in command.assignments:
                self.groups[gid].is_proven |= one.similarity == one.similarity
                if one.cluster == ABSENT and one.similarity != one.similarity:
                    self.groups[gid].unjudged.add(one.sibling)
        actions = self.both("apply", command)
        if not is_live:
            assert actions == [], "a verdict of another epoch acts"
            assert run is None or _picture(run.group) == before, "a verdict of another epoch counts"
        self.act(actions)
        if gid in self.leader.runs or run is None:
            record = self.both("settle", gid)
            if gid in self.pending and record is not None:
                del self.pending[gid]
                self.settled(gid, record)
            elif record is not None:
                self.groups.pop(gid)  # the same, and the fence was late
                self.num_silent += 1
        elif gid in self.groups and not self.groups[gid].members:
            self.groups.pop(gid)  # closed by time, with nobody left to tell
            self.num_silent += 1

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def the_ranks_know_the_same(self) -> None:
        if not hasattr(self, "leader"):
            return
        assert self.leader.runs.keys() == self.follower.runs.keys()
        for gid, run in self.leader.runs.items():
            assert _picture(run.group) == _picture(self.follower.runs[gid].group)

    @invariant()
    def every_sibling_is_in_one_place(self) -> None:
        """Expected, held, queued or running here and there alike; the rest has ended. Whom SGLang
        has retracted the coordinator takes to be running. None is lost, and none comes on top."""
        for gid, known in getattr(self, "groups", {}).items():
            if gid not in self.leader.runs:
                continue
            found = {
                State.EXPECTED: None, State.HELD: HELD, State.QUEUED: QUEUED,
                State.RUNNING: RUNNING,
            }  # fmt: skip
            siblings = self.group(gid).siblings
            for index, sibling in siblings.items():
                member = known.members.get(index)
                if sibling.state.is_end:
                    assert member is None and known.ended.get(index, sibling.state) is sibling.state
                elif found[sibling.state] is None:
                    assert member is None and index not in known.ended
                else:
                    assert member is not None
                    is_back = member.is_retracted and member.place == QUEUED and member.tokens > 0
                    place = RUNNING if is_back else member.place
                    assert place == found[sibling.state], "the engine has it elsewhere"
            assert set(known.members) | set(known.ended) <= set(siblings)
            assert not known.members.keys() & known.ended.keys()
            placed = [index for cluster in self.group(gid).clusters for index in cluster]
            assert len(placed) == len(set(placed)), "a verdict counts twice"
            assert len(siblings) >= known.size
            if not known.is_client_side:
                waiting = len(known.unsent) + known.num_lost
                assert len(known.members) + waiting + len(known.ended) == known.size
                assert len(siblings) == known.size, "a sibling that nobody has asked for"

    @invariant()
    def no_group_is_asleep(self) -> None:
        """Something of it lives, is about to end, is awaited, or its last output is held."""
        for gid, run in self.leader.runs.items() if hasattr(self, "leader") else ():
            group, known = run.group, self.groups[gid]
            assert known.members or run.is_awaited or gid in self.pending or (
                not group.tally.is_settled
            ), "nothing of it is left, and it is still there"  # fmt: skip
            if gid not in self.lost and known.members and not group.is_decided:
                awake = [m for m in known.members.values() if m.place != HELD]
                assert awake, "all that is left of it waits for nobody"

    @invariant()
    def nothing_is_kept_of_groups_that_are_gone(self) -> None:
        for question in self.leader.questions.asked.values() if hasattr(self, "leader") else ():
            assert question.group_id in self.leader.runs

    def teardown(self) -> None:
        """Let everything run to its end: then nobody is left, and nothing."""
        if not hasattr(self, "leader"):
            return
        for known in self.groups.values():
            known.unsent.clear()
        for passes in range(200):
            if not self.groups:
                break
            self.replan_lost()
            for gid, known in list(self.groups.items()):
                for index, member in list(known.members.items()):
                    if gid not in self.groups or index not in known.members:
                        continue
                    if member.place == HELD:
                        continue
                    member.place, member.tokens = RUNNING, member.tokens + 1
                    if member.doom is not None:
                        self.retire(gid, index, member.doom)
                        continue
                    ids = [0] * member.tokens + [1]
                    self.act(self.both("vote", gid, [End(index, ids, False)]))
                    self.retire(gid, index, State.FINISHED)
            self.clock.now += TIMEOUT_S + 1
            if passes > 100:  # a group whose last output waits must not need the fence for its end
                assert not self.pending
                self.fence.answers += [(ticket, None) for ticket in range(len(self.fence.asked))]
            commands, self.wire = [*self.wire, *self.leader.poll()], []
            for command in commands:
                self.apply(command)
        assert not self.groups and self.leader.is_idle and self.follower.is_idle
        assert set(self.leader.sizes.values()) == {0}
        self.check_counts()

    def check_counts(self) -> None:
        """Each group was counted once, under a known reason; the sums are those of the records."""
        groups = self.tally.of(metrics.GROUPS)
        assert metrics.Reason.OTHER.value not in groups
        assert groups.pop("abandoned", 0) == len(self.abandoned)
        assert sum(groups.values()) == len(self.told) + self.num_silent
        if self.num_silent:
            return  # what nobody was told is counted all the same
        states = Counter(choice.state for record in self.told for choice in record.choices)
        assert self.tally.of(metrics.SIBLINGS) == states
        for metric, name in (
            (metrics.GENERATED_TOKENS, "generated_tokens"),
            (metrics.SAVED_TOKENS, "saved_tokens_at_most"),
            (metrics.JUDGE_WINDOWS, "windows"), (metrics.JUDGE_PAIRS, "judge_calls"),
            (metrics.JUDGE_TOKENS, "judge_tokens"),
        ):  # fmt: skip
            assert self.tally.sums[metric.name, ""] == sum(getattr(r, name) for r in self.told)


def _picture(group: Group) -> Any:
    """All of a group's state that can be compared."""
    return (
        [dataclasses.astuple(sibling) for sibling in group.siblings.values()],
        [list(cluster) for cluster in group.clusters],
        [(count.answer, count.siblings) for count in group.tally.counts()],
        group.tally.is_settled, group.epoch, group.is_decided, group.is_released,
        group.is_closed, group.reason, group.windows, group.judge_calls, group.steps,
    )  # fmt: skip


TestRanks = Ranks.TestCase
TestRanks.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
