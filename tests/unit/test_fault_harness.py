"""The fault harness can fail: every check of it says so of a made-up reply that is wrong."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from sglang_deepprune.local_server import ServerError
from sglang_deepprune.policy import RENEWED
from tests.engine import fault_checks as checks
from tests.engine import faults
from tests.engine.fault_clients import Reference, Seen
from tests.engine.fault_plan import (
    BYSTANDERS,
    FAULTS,
    OTHER_STRANGERS,
    PROMPTS,
    STRANGERS,
    Ask,
    Fault,
    Round,
    round_of,
    setup_of,
)

GROUP = Ask(0, "group", "waits", "faults: agree", 2, 60)
WHOLE = PROMPTS["faults: agree"]
MEMBER = Ask(1, "members", "waits", "faults: agree", 3, 60, {"group": "g", "size": 3})


def choice(state: str, reason: str, text: str, **more: Any) -> dict:
    said = {"index": 0, "state": state, "tokens": 1, "answer": None, "cluster": None,
            "similarity": None, "pruned_at": None}  # fmt: skip
    meta = {"deepprune": {"choice": said}, "finish_reason": {"type": reason},
            "completion_tokens": 1}  # fmt: skip
    return {"text": text, "meta_info": meta | more}


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (choice("finished", "stop", "whole"), ""),
        (choice("pruned", "length", "wh"), ""),
        (choice("pruned", "abort", "wh"), "its finish reason is abort"),
        (choice("finished", "stop", "wh"), "only 2 of 5"),
        (choice("decided", "length", "another"), "another text"),
        (choice("aborted", "abort", "wh"), "nobody has aborted it"),
        ({"text": "", "meta_info": {}}, "record"),
    ],
)
def test_a_wrong_choice_is_seen(output: dict, what: str):
    wrong = checks.of_choice(output, ["whole"])
    assert wrong == [] if not what else what in wrong[0]


def test_who_may_be_aborted_may_say_so():
    assert checks.of_choice(choice("aborted", "abort", "wh"), ["whole"], may_abort=True) == []


def ended(*states: str) -> list[dict]:
    return [
        choice(state, "", "")["meta_info"]["deepprune"]["choice"] | {"index": index}
        for index, state in enumerate(states)
    ]


def record(*states: str, **more: Any) -> dict:
    """A settled record whose choices have no answer and one token each."""
    stopped = sum(state in checks.STOPPED for state in states)
    return {
        "active": True, "settled": True, "size": len(states), "choices": ended(*states),
        "votes": [], "abstentions": states.count("finished"), "generated_tokens": len(states),
        "saved_tokens_at_most": 59 * stopped, "clusters": [], "group_id": "g",
        "reason": "all siblings finished",
    } | more  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"abstentions": 0}, {"generated_tokens": 3}, {"clusters": [[0], [0]]}, {"size": 3},
     {"settled": False}, {"saved_tokens_at_most": 1}],
)  # fmt: skip
def test_a_record_whose_counts_do_not_add_up_is_seen(change: dict):
    assert checks.of_record(GROUP, record("finished", "finished")) == []
    assert checks.of_record(GROUP, record("finished", "finished", **change))


@pytest.mark.parametrize("state", checks.LOST)
def test_a_sibling_that_nobody_has_aborted_is_seen_in_the_record(state: str):
    said = record("finished", state)
    assert checks.of_record(GROUP, said, may_abort=True) == []
    assert "nobody has aborted" in checks.of_record(GROUP, said)[0]
    gone = {"active": False, "reason": "aborted before it was settled", "choices": []}
    assert checks.of_record(GROUP, gone, may_abort=True) == []
    assert checks.of_record(GROUP, gone) and checks.of_record(GROUP, gone | {"reason": "else"})


@pytest.mark.parametrize("mark", ["RAISE", "SHAPE", "NAN", "HANG", "DIE"])
def test_nobody_is_pruned_without_a_verdict(mark: str):
    ask = Ask(0, "group", "waits", f"faults: {mark}", 2, 60)
    said = record("finished", "pruned")
    assert "no verdict" in checks.of_record(ask, said)[0]
    assert checks.of_record(GROUP, said) == []


def test_without_a_verdict_answers_are_still_known_to_be_equal():
    def one(index: int, state: str, answer: str | None) -> dict:
        return {"index": index, "state": state, "answer": answer, "cluster": None,
                "similarity": None, "pruned_at": None}  # fmt: skip

    ended = [one(0, "finished", "3"), one(1, "finished", "3")]
    said = {"choices": [*ended, one(2, "pruned", None)], "clusters": [[0, 1]]}
    assert checks.of_unjudged(said) == []
    assert checks.of_unjudged(said | {"clusters": [[0, 1, 2]]})
    assert checks.of_unjudged(said | {"clusters": [[0], [1]]})
    assert checks.of_unjudged(said | {"choices": [*ended[:1], one(1, "finished", "4")]})


def member(state: str, reason: str, group: dict | None, text: str = "") -> dict:
    said = choice(state, reason, text or WHOLE[0])
    if group is not None:
        said["meta_info"]["deepprune"]["group"] = group
    return said


def test_what_a_member_may_say():
    running = record("finished", settled=False, choices=[])
    assert checks.of_member(MEMBER, member("finished", "stop", running)) == []
    assert checks.of_member(MEMBER, member("finished", "stop", record("finished"))) == []
    for wrong in (
        member("finished", "stop", None), member("pruned", "stop", running),
        member("finished", "stop", running, "another"), member("aborted", "abort", running),
        member("finished", "stop", record("finished", abstentions=0)),
        {"text": "", "meta_info": {"finish_reason": {"type": "abort"}}},
        {"text": "", "meta_info": {"finish_reason": {"type": "stop"}}},
    ):  # fmt: skip
        assert checks.of_member(MEMBER, wrong)
    assert checks.of_member(MEMBER, member("aborted", "abort", running), may_abort=True) == []


def test_one_name_under_two_prompts_is_two_groups():
    other = Ask(2, "members", "waits", "faults: split", 3, 60, {"group": "g", "size": 3})
    assert checks.of_names([(MEMBER, {"a", "b"}), (MEMBER, {"a"}), (other, {"c"})]) == []
    assert checks.of_names([(MEMBER, {"a"}), (other, {"a"})])


def test_a_bystander_and_a_stranger_are_aborted_by_nobody():
    name = next(iter(BYSTANDERS))
    ask = Ask(0, "bystander", "waits", name, 1, 200)
    end = {"meta_info": {"finish_reason": {"type": "abort"}}, "output_ids": [1]}
    front = {**end, "text": BYSTANDERS[name][0][:4]}
    assert checks.of_bystander(ask, front, may_abort=True) == []
    assert "nobody has asked" in checks.of_bystander(ask, front)[0]
    assert checks.of_bystander(ask, {**front, "text": "another"}, may_abort=True)
    assert checks.of_stranger(front, [1, 2], 2, may_abort=True) == []
    assert "nobody has asked" in checks.of_stranger(front, [1, 2], 2)[0]
    assert checks.of_stranger(front, [2, 2], 2, may_abort=True)


def spanned(state: str, *spans: tuple[str, int]) -> dict:
    """A choice of so many tokens of each version of the weights."""
    ends = list(itertools.accumulate(number for _, number in spans))
    said = [
        {"version": version, "start": end - number, "end": end}
        for (version, number), end in zip(spans, ends, strict=True)
    ]
    return choice(state, "length", "", weight_versions=said)


OLD, NEW = "v1.5", "v2.5"


@pytest.mark.parametrize(
    ("outputs", "reason", "is_wrong"),
    [
        ([spanned("finished", (OLD, 9)), spanned("pruned", (OLD, 9))], "pruned: x", False),
        ([spanned("finished", (OLD, 9)), spanned("finished", (OLD, 3), (NEW, 9))], RENEWED, False),
        ([spanned("finished", (OLD, 9)), spanned("finished", (OLD, 3), (NEW, 9))], "x", True),
        # One that was held until then, by a version of the server's own name.
        ([spanned("finished", ("default", 9)), spanned("finished", (NEW, 9))], "x", True),
        ([spanned("finished", (OLD, 9)), spanned("decided", (OLD, 3), (NEW, 9))], "x", True),
        # An old verdict upon a group that has been let go.
        ([spanned("finished", (NEW, 9)), spanned("pruned", (OLD, 3), (NEW, 9))], RENEWED, True),
        # Decided before; it ends with the step that was under way.
        ([spanned("finished", (OLD, 9)), spanned("decided", (OLD, 3), (NEW, 1))], "x", False),
        ([spanned("finished", (OLD, 9)), spanned("aborted", (OLD, 3), (NEW, 9))], "x", False),
        ([choice("not_started", "length", "")], "x", False),
    ],
)
def test_a_group_that_crosses_new_weights_is_seen(outputs: list[dict], reason: str, is_wrong: bool):
    assert bool(checks.of_versions(outputs, reason)) is is_wrong


def test_groups_on_new_weights_alone_are_of_one_version():
    assert checks.of_versions([spanned("decided", (NEW, 9))], "decided: 3:0") == []


def told(ask: Ask, *records: dict, num_lost: int = 0) -> Seen:
    return Seen(ask, records=list(records), num_lost=num_lost)


def of_counters(groups: dict, siblings: dict, *seen: Seen) -> list[str]:
    return checks.of_counters(groups, siblings, seen)


def test_counters_are_what_clients_were_told():
    two = told(GROUP, record("finished", "pruned", reason="redundant: x"))
    one = told(GROUP, record("finished", "finished"))
    groups = {"finished": 1.0, "pruned": 1.0}
    assert of_counters(groups, {"finished": 3.0, "pruned": 1.0}, one, two) == []
    assert of_counters(groups, {"finished": 4.0, "pruned": 1.0}, one, two)
    assert of_counters(groups, {"finished": 2.0, "pruned": 1.0}, one, two)
    assert of_counters({"finished": 2.0}, {"finished": 3.0, "pruned": 1.0}, one, two)
    assert of_counters({**groups, "other": 1.0}, {"finished": 3.0, "pruned": 1.0}, one, two)
    assert of_counters({}, {}) == [] and of_counters({"finished": 1.0}, {})


def test_counters_know_whom_nobody_tells():
    left = told(Ask(0, "group", "leaves", "faults: agree", 4, 60))
    assert of_counters({"aborted": 1.0}, {"finished": 1.0, "aborted": 3.0}, left) == []
    assert of_counters({"aborted": 1.0}, {"finished": 1.0, "aborted": 4.0}, left)
    assert of_counters({"aborted": 2.0}, {"aborted": 4.0}, left)
    lost = told(GROUP, num_lost=1)
    assert of_counters({"aborted": 1.0}, {"aborted": 2.0}, lost) == []
    assert of_counters({}, {}, lost) == []
    assert of_counters({"aborted": 1.0}, {"finished": 2.0}, lost)


def of_members(*places: int, size: int = 3) -> Seen:
    ask = Ask(1, "members", "waits", "faults: agree", 3, 60, {"group": "g", "size": size})
    return Seen(ask, states=Counter(finished=3), places=Counter(("g", place) for place in places))


def test_counters_know_members():
    three = of_members(0, 1, 2)
    assert of_counters({"finished": 1.0}, {"finished": 3.0}, three) == []
    assert of_counters({"finished": 1.0}, {"finished": 4.0}, three)
    assert of_counters({"finished": 1.0}, {"finished": 2.0}, three)
    assert of_counters({}, {"finished": 3.0}, three)
    assert of_counters({"finished": 2.0}, {"finished": 3.0}, three)
    assert of_counters({"finished": 1.0}, {"finished": 3.0, "aborted": 1.0}, three)


def test_counters_know_whom_members_waited_for_in_vain():
    # One came too late, to a group of its own.
    late = of_members(0, 1, 0)
    groups = {"finished": 1.0, "aborted": 1.0}
    assert of_counters(groups, {"finished": 3.0, "aborted": 2.0, "not_started": 1.0}, late) == []
    assert of_counters(groups, {"finished": 3.0, "aborted": 2.0}, late)
    assert of_counters(groups, {"finished": 3.0, "aborted": 4.0}, late)
    assert of_counters({"finished": 1.0}, {"finished": 3.0, "aborted": 3.0}, late)
    four, any_ = of_members(0, 1, 2, size=4), of_members(0, 1, 2, size=0)
    assert of_counters({"aborted": 1.0}, {"finished": 3.0, "aborted": 1.0}, four) == []
    assert of_counters({"finished": 1.0}, {"finished": 3.0}, any_) == []
    # Two users who share a name and all else share a group.
    pair = of_members(0, 2, 4), of_members(1, 3, 5)
    assert of_counters({"finished": 1.0}, {"finished": 6.0}, *pair) == []
    assert of_counters({"finished": 2.0}, {"finished": 6.0}, *pair)


def test_tasks_of_the_judge_and_questions_of_the_fence_are_left_behind_by_nobody():
    quiet = {"tables": {"groups": 0, "queue": 0}}
    assert faults.busy_of(quiet) == {}
    assert faults.busy_of({**quiet, "judge_tasks": 0, "fence_open": 0}) == {}
    assert faults.busy_of({**quiet, "judge_tasks": 1}) == {"judge_tasks": 1}
    assert faults.busy_of({**quiet, "fence_open": 2}) == {"fence_open": 2}
    assert faults.busy_of({"tables": {"groups": 1}}) == {"groups": 1}


def alone(unsure: set[str]) -> Callable[[str], Reference]:
    return lambda prompt: Reference(prompt, [1, 2, 3], 0 if prompt in unsure else 3)


def test_strangers_of_whom_nothing_is_sure_are_replaced():
    found = faults.references(alone(set(STRANGERS[:2])))
    assert set(found) == set(STRANGERS)
    assert [one.prompt for one in found.values()] == [*OTHER_STRANGERS[:2], *STRANGERS[2:]]
    assert faults.references(alone({*OTHER_STRANGERS, *STRANGERS[2:]}))
    with pytest.raises(ValueError, match="only 1 strangers"):
        faults.references(alone({*OTHER_STRANGERS, *STRANGERS[1:]}))


def test_a_round_counts_groups_and_not_whoever_stands_by():
    for seed in range(20):
        plan = round_of(seed, 60)
        kinds = Counter(ask.kind for ask in plan.asks)
        assert kinds["group"] + kinds["members"] == plan.num_groups == 60 < len(plan.asks)
        assert plan.is_exact is not any(ask.fate == "leaves" for ask in plan.asks) or not seed % 2
        row = faults.row_of(plan, setup_of(seed), (), ())
        assert row["requests"] == 60 and row["bystanders"] == len(plan.asks) - 60


def test_two_users_name_their_client_side_groups_alike():
    same = other = 0
    for seed in range(40):
        by_name: dict[str, list[Ask]] = {}
        for ask in round_of(seed, 60).asks:
            if ask.kind == "members":
                by_name.setdefault(ask.settings["group"], []).append(ask)
        for first, *rest in by_name.values():
            assert len({ask.rid for ask in (first, *rest)}) == 1 + len(rest)
            same += any(ask.prompt == first.prompt for ask in rest)
            other += any(ask.prompt != first.prompt for ask in rest)
    assert same > 10 and other > 10


def plan_of(*kinds: str) -> Round:
    return Round(12, (GROUP,), tuple(Fault(0.0, kind) for kind in kinds))


def test_what_was_not_delivered_is_in_the_row():
    plan = plan_of("kill judge", "flush", "flush", "stop judge")
    row = faults.row_of(plan, setup_of(12), (), (), ["flush", "flush", "stop judge"])
    assert row["undelivered"] == "kill judge"
    assert faults.delivered_in([row]) == {"flush", "stop judge"}
    again = faults.row_of(plan_of("kill judge"), setup_of(12), (), (), ["kill judge"])
    assert faults.delivered_in([row, again]) == {"flush", "stop judge", "kill judge"}
    assert faults.delivered_in([faults.row_of(plan_of(), setup_of(12), (), ())]) == set()


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_signal_without_a_judge_is_not_delivered(monkeypatch: pytest.MonkeyPatch, is_ready: bool):
    def kill(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    clock = itertools.count()
    monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=clock.__next__, sleep=print))
    state = {"is_judge_ready": is_ready, "judge_pid": 1}
    harness: Any = SimpleNamespace(state=lambda: state)
    chaos = faults.Chaos(harness, [Fault(0.0, "kill judge")])
    chaos.run()
    assert chaos.delivered == chaos.wrong == []
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    chaos.run()
    assert chaos.delivered == ["kill judge"] * is_ready


def test_ten_thousand_without_one_kind_of_fault_fail(monkeypatch: pytest.MonkeyPatch):
    rows = [faults.row_of(plan_of(*FAULTS[1:]), setup_of(12), (), (), FAULTS[1:])]
    monkeypatch.setattr(faults, "rounds", lambda seeds, sizes: (rows, []))
    assert faults.play(10_000, 1)[1] == [f"never came about: {FAULTS[0]}"]
    assert faults.play(300, 1)[1] == []


class FakeHarness:
    """A server that dies in its first round."""

    starts: list[int]
    fault: Exception | None

    def __init__(self, model: Any, folder: Any, setup: Any, flags: Any):
        self.setup = setup
        self.seen = [Seen(GROUP)]
        self.wrong: list[str] = []
        self.server = SimpleNamespace(is_alive=True, log="its last words")
        self.starts.append(1)

    def __enter__(self) -> FakeHarness:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def play(self, plan: Round) -> dict:
        if len(self.starts) == 1 and self.fault is not None:
            raise self.fault
        return faults.row_of(plan, self.setup, (), ())


@pytest.mark.parametrize(
    "fault", [requests.ConnectionError("gone"), KeyError("internal_states"), ValueError("no JSON")]
)
def test_a_server_that_dies_is_a_failure_of_its_round_and_no_end(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
):
    monkeypatch.setattr(faults, "Harness", FakeHarness)
    monkeypatch.setattr(faults, "prepare", lambda folder: folder)
    monkeypatch.setattr(FakeHarness, "starts", [], raising=False)
    monkeypatch.setattr(FakeHarness, "fault", fault, raising=False)
    rows, (failure,) = faults.rounds([7, 8, 9], [3, 3, 3])
    assert [row["round"] for row in rows] == [7, 8, 9]
    assert rows[0]["wrong_states"] >= 1 and rows[0]["hung_clients"] == 1
    assert [row["wrong_states"] for row in rows[1:]] == [0, 0]
    assert "--replay 7 --round 3" in failure and "its last words" in failure
    assert str(fault) in failure and len(FakeHarness.starts) == 2


def test_a_server_that_does_not_start_is_one_too(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: FakeHarness) -> FakeHarness:
        if len(self.starts) == 1:
            raise ServerError("the server ended at start")
        return self

    monkeypatch.setattr(faults, "Harness", FakeHarness)
    monkeypatch.setattr(faults, "prepare", lambda folder: folder)
    monkeypatch.setattr(FakeHarness, "starts", [], raising=False)
    monkeypatch.setattr(FakeHarness, "fault", None, raising=False)
    monkeypatch.setattr(FakeHarness, "__enter__", refuse)
    rows, (failure,) = faults.rounds([7, 8], [3, 3])
    assert [row["wrong_states"] for row in rows] == [1, 0] and "ended at start" in failure
