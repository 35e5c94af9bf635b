"""The coordinator without an engine: outputs are lists of ids, the judge answers when told to."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sglang_deepprune.actions import Action, Admission, End, Start, Stop
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.types import (
    ABSENT,
    Assignment,
    Close,
    Expire,
    FenceResult,
    JudgeResult,
    JudgeTask,
)

TEXTS = {1: "so \\boxed{1}", 2: "so \\boxed{2}", 7: "nothing", 8: "\\boxed{(x+1)^2}",
         9: "\\boxed{x^2+2x+1}"}  # fmt: skip


class FakeJudge:
    def __init__(self) -> None:
        self.tasks: list[JudgeTask] = []
        self.results: list[JudgeResult] = []

    def submit(self, task: JudgeTask) -> None:
        self.tasks.append(task)

    def poll(self) -> list[JudgeResult]:
        done, self.results = self.results, []
        return done

    def drop(self, group_id: str) -> None:
        self.results = [one for one in self.results if one.group_id != group_id]


class FakeFence:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: list[tuple[int, bool | None]] = []

    def ask(self, a: str, b: str) -> int:
        self.asked.append((a, b))
        return len(self.asked) - 1

    def drop(self, tickets: Any) -> None:
        self.dropped = list(tickets)

    def poll(self) -> list[tuple[int, bool | None]]:
        done, self.answers = self.answers, []
        return done


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def decode(ids: Any) -> str:
    """The last id chooses the text; every other one is a word."""
    return " ".join(["word"] * (len(ids) - 1) + [TEXTS.get(ids[-1], "word")] if ids else [])


def coordinator(**settings: Any) -> Coordinator:
    config = DeepPruneConfig(**{"window": 4, "cut_tokens": 4, **settings})
    return Coordinator(config, decode, judge=FakeJudge(), fence=FakeFence(), clock=Clock())  # type: ignore[arg-type]


def fill(c: Coordinator, size: int, gid: str = "g", **settings: Any) -> None:
    for index in range(size):
        assert c.admit(gid, index, size, settings, 100) == Admission(index)


def step(c: Coordinator, live: list[int], length: int, gid: str = "g") -> None:
    c.observe({gid: {index: [0] * length for index in live}})


def end(c: Coordinator, index: int, last: int, gid: str = "g") -> list[Action]:
    stops = c.vote(gid, [End(index, [0, 0, last], False)])
    c.retire(gid, index, State.FINISHED, 3)
    return stops


def test_three_equal_votes_of_eight_decide_and_stop_the_rest():
    c = coordinator(preset="latency")
    fill(c, 8)
    assert end(c, 0, 1) == [] and end(c, 1, 1) == []
    stops = end(c, 2, 1)
    assert [stop.index for stop in stops] == [3, 4, 5, 6, 7]
    for index in range(3, 8):
        retired = c.retire("g", index, State.DECIDED, 10)
    assert retired is not None and retired.group is not None
    assert retired.group.answer == "1" and retired.group.votes == (("1", 3),)
    assert retired.group.saved_tokens_at_most == 5 * 90
    assert c.is_idle


def test_a_stopped_sibling_says_how_far_it_was_where_no_judge_is_asked_too():
    c = coordinator(preset="latency")
    fill(c, 8)
    for length in range(1, 6):
        step(c, list(range(7)), length)
    for index in range(3):
        end(c, index, 1)
    siblings = c.runs["g"].group.siblings
    assert (siblings[3].pruned_at, siblings[7].pruned_at) == (5, None)


def test_greedy_siblings_save_nothing_and_that_is_said_once(caplog: pytest.LogCaptureFixture):
    c = coordinator(preset="latency")
    for group_id in ("g", "h"):
        for index in range(8):
            c.admit(group_id, index, 8, {}, 100, is_greedy=True)
        for index in range(3):
            end(c, index, 1, group_id)
        for index in range(3, 8):
            retired = c.retire(group_id, index, State.DECIDED, 10)
        assert retired is not None and retired.group is not None
        assert retired.group.answer == "1" and retired.group.saved_tokens_at_most == 0
    assert caplog.text.count("at temperature 0 are one and the same trace") == 1


def test_a_sibling_votes_and_retires_once():
    c = coordinator(preset="collect")
    fill(c, 2)
    end(c, 0, 1)
    assert c.vote("g", [End(0, [0, 0, 2], False)]) == []
    assert c.retire("g", 0, State.ABORTED, 9) is None
    assert c.runs["g"].group.num_voted == 1


def test_a_window_hands_over_what_was_cut_and_nothing_twice():
    c = coordinator(preset="paper", cut="tokens")
    fill(c, 3)
    for length in range(1, 9):
        step(c, [0, 1, 2], length)
    (task,) = c.judge.tasks  # type: ignore[union-attr]
    assert [trace.sibling for trace in task.traces] == [0, 1, 2]
    assert {trace.num_tokens for trace in task.traces} == {4}


def test_a_judge_may_read_the_prompt():
    c = coordinator(preset="paper", cut="tokens")
    for index in range(2):
        c.admit("g", index, 2, {}, 100, prompt_ids=[0, 0, 1])
    for length in range(1, 9):
        step(c, [0, 1], length)
    (task,) = c.judge.tasks  # type: ignore[union-attr]
    assert {trace.prompt for trace in task.traces} == {decode([0, 0, 1])}


def test_a_prompt_that_cannot_be_read_is_empty():
    c = coordinator(preset="paper", cut="tokens")

    def unreadable(ids: Any) -> str:
        raise OverflowError("an image's id")

    c.read = unreadable
    assert c.admit("g", 0, 2, {}, 100, prompt_ids=[1 << 60]) == Admission(0)
    assert c.runs["g"].reader.prompt == ""


def verdict(c: Coordinator, *places: tuple[int, int], gid: str = "g", epoch: int | None = None):
    epoch = c.runs[gid].group.epoch if epoch is None else epoch
    placed = tuple(Assignment(s, k, math.nan if k == ABSENT else 0.9) for s, k in places)
    return JudgeResult(gid, epoch, placed, 3, 30, 1.5)


def test_a_verdict_prunes_and_names_the_cluster_in_the_record():
    c = coordinator(preset="paper", cut="tokens", k2=1)
    fill(c, 3)
    for length in range(1, 7):  # the cut is at 4, and the judge takes its time
        step(c, [0, 1, 2], length)
    stops = c.apply(verdict(c, (0, 0), (1, 0), (2, 1)))
    assert stops == [Stop("g", 1, State.PRUNED), Stop("g", 2, State.PRUNED)]
    choice = c.retire("g", 1, State.PRUNED, 6).choice  # type: ignore[union-attr]
    assert (choice.cluster, choice.state, choice.pruned_at) == (0, "pruned", 6)
    assert choice.similarity == pytest.approx(0.9)


def test_a_verdict_of_another_epoch_or_of_a_gone_group_is_dropped():
    c = coordinator(preset="paper", cut="tokens", k2=1)
    fill(c, 2)
    for length in range(1, 5):
        step(c, [0, 1], length)
    late = verdict(c, (0, 0), (1, 0))
    assert c.apply(verdict(c, (0, 0), (1, 0), epoch=99)) == []
    c.retire("g", 0, State.ABORTED, 4)
    c.retire("g", 1, State.ABORTED, 4)
    assert c.is_idle and c.apply(late) == []
    fill(c, 2)  # the same id again: a new epoch
    assert c.apply(late) == []


def test_a_failed_verdict_prunes_nothing_and_the_next_window_goes_on():
    c = coordinator(preset="paper", cut="tokens", k2=1)
    fill(c, 3)
    for length in range(1, 5):
        step(c, [0, 1], length)
    failed = JudgeResult("g", c.runs["g"].group.epoch, error="no verdict")
    assert c.apply(failed) == []
    for length in range(5, 9):
        step(c, [0, 1, 2], length)
    assert [trace.sibling for trace in c.judge.tasks[-1].traces] == [2]  # type: ignore[union-attr]


def test_siblings_that_come_after_the_decision_need_not_start():
    c = coordinator(preset="latency")
    for index in range(4):
        c.admit("g", index, 8, {}, 100)
    for index in range(3):
        end(c, index, 1)
    assert c.admit("g", 5, 8, {}, 100) == Admission(5, end=State.NOT_STARTED)


def test_the_last_output_waits_for_the_fence_and_equal_answers_become_one_vote():
    c = coordinator(preset="collect")
    fill(c, 2)
    end(c, 0, 8)
    c.vote("g", [End(1, [0, 0, 9], False)])
    retired = c.retire("g", 1, State.FINISHED, 3)
    assert retired is not None and retired.is_pending and retired.group is None
    assert c.settle("g") is None
    c.fence.answers = [(0, True)]  # type: ignore[union-attr]
    (command,) = c.poll()
    assert isinstance(command, FenceResult) and command.is_same is True
    c.apply(command)
    record = c.settle("g")
    assert record is not None and [votes for _, votes in record.votes] == [2]
    assert c.is_idle


@pytest.mark.parametrize("size", [2, 0])
def test_a_client_side_groups_last_output_waits_for_the_fence_too(size: int):
    c = coordinator(preset="collect", group_timeout_s=10.0)
    for _ in range(2):
        c.admit("g", ABSENT, size, {}, 100)
    if not size:
        c.clock.now = 11.0  # type: ignore[attr-defined]
        for command in c.poll():
            c.apply(command)
    end(c, 0, 8)
    c.vote("g", [End(1, [0, 0, 9], False)])
    retired = c.retire("g", 1, State.FINISHED, 3)
    assert retired is not None and retired.is_pending and retired.group is None
    c.fence.answers = [(0, True)]  # type: ignore[union-attr]
    for command in c.poll():
        c.apply(command)
    record = c.settle("g")
    assert record is not None and record.settled and record.votes == (("(x+1)^2", 2),)
    assert c.is_idle


def test_three_finishers_without_an_answer_release_the_group():
    c = coordinator(preset="latency")
    fill(c, 8)
    for index in range(3):
        assert end(c, index, 7) == []
    assert c.runs["g"].group.is_released
    for index in range(3, 8):
        assert end(c, index, 1) == []
    assert c.is_idle


def test_a_client_side_group_closes_by_time_and_then_decides():
    c = coordinator(preset="latency", group_timeout_s=10.0)
    for expected in range(4):
        assert c.admit("g", ABSENT, 0, {}, 100) == Admission(expected)
    for index in range(3):
        assert end(c, index, 1) == []  # others may still come: nothing is decided
    assert c.poll() == []
    c.clock.now = 11.0  # type: ignore[attr-defined]
    (command,) = c.poll()
    assert isinstance(command, Close)
    assert [stop.index for stop in c.apply(command)] == [3]


def test_siblings_that_nobody_sends_are_not_waited_for_for_ever():
    c = coordinator(preset="collect", group_timeout_s=10.0)
    c.admit("g", 0, 3, {}, 100)
    end(c, 0, 1)
    assert not c.is_idle
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    assert c.is_idle


def test_a_sibling_that_comes_after_its_group_gave_it_up_is_one_of_it_all_the_same():
    c = coordinator(preset="collect", group_timeout_s=10.0)
    c.admit("g", 0, 2, {}, 100)
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    assert c.admit("g", 1, 2, {}, 100) == Admission(1)
    end(c, 0, 1)
    c.vote("g", [End(1, [0, 0, 1], False)])
    retired = c.retire("g", 1, State.FINISHED, 3)
    assert retired is not None and retired.choice.state == "finished"
    assert retired.group is not None and retired.group.votes == (("1", 2),)
    assert c.is_idle


def test_a_member_that_comes_after_the_time_out_takes_the_place_that_was_given_up():
    c = coordinator(preset="collect", group_timeout_s=10.0)
    for expected in range(2):
        assert c.admit("g", ABSENT, 3, {}, 100) == Admission(expected)
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    assert c.admit("g", ABSENT, 3, {}, 100) == Admission(2)
    for index in range(3):
        c.vote("g", [End(index, [0, 0, 1], False)])
        retired = c.retire("g", index, State.FINISHED, 3)
    assert retired is not None and retired.group is not None
    assert retired.group.size == 3 and retired.group.votes == (("1", 3),)


def test_a_stopped_sibling_that_nobody_sends_was_never_started():
    c = coordinator(preset="latency", group_timeout_s=10.0)
    for index in range(4):
        c.admit("g", index, 5, {}, 100)
    for index in range(3):
        end(c, index, 1)  # decided; the fifth has not come yet
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    retired = c.retire("g", 3, State.DECIDED, 10)
    assert retired is not None and retired.group is not None
    assert [choice.state for choice in retired.group.choices[3:]] == ["decided", "not_started"]
    assert retired.group.saved_tokens_at_most == 90 + 100


def test_a_sibling_that_comes_while_only_the_fence_is_waited_for_is_a_plain_request():
    c = coordinator(preset="collect", group_timeout_s=10.0)
    for index in range(2):
        c.admit("g", index, 3, {}, 100)
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    end(c, 0, 8)
    c.vote("g", [End(1, [0, 0, 9], False)])
    assert c.retire("g", 1, State.FINISHED, 3).is_pending  # type: ignore[union-attr]
    assert c.admit("g", 2, 3, {}, 100) is None
    c.fence.answers = [(0, True)]  # type: ignore[union-attr]
    for command in c.poll():
        c.apply(command)
    assert c.settle("g") is not None and c.is_idle


def test_an_abandoned_group_is_not_opened_again_by_late_siblings():
    c = coordinator()
    c.admit("g", 0, 3, {}, 100)
    c.abandon()
    assert c.is_idle and c.admit("g", 1, 3, {}, 100) is None
    assert c.admit("h", 0, 3, {}, 100) == Admission(0)


def test_a_fault_abandons_the_group_at_hand_or_all():
    c = coordinator()
    for gid in ("g", "h", "i"):
        c.admit(gid, 0, 3, {}, 100)
    assert c.abandon("h") == ["h"] and sorted(c.runs) == ["g", "i"]
    assert c.abandon("gone before") == ["gone before"] and sorted(c.runs) == ["g", "i"]
    assert c.abandon() == ["g", "i"] and c.is_idle


def test_aborts_leave_fewer_voters_and_can_decide():
    c = coordinator(preset="latency")
    fill(c, 16)
    for index, answer in enumerate([1, 2, 1, 1]):
        end(c, index, answer)
    assert not c.runs["g"].group.is_decided
    for aborted in range(4, 15):
        c.retire("g", aborted, State.ABORTED, 2)
        if stops := c.lost("g"):
            break
    assert [stop.index for stop in stops] == list(range(aborted + 1, 16))
    assert c.runs["g"].group.is_decided


def test_a_group_of_many_formulas_asks_few_questions_and_waits_only_so_long():
    c = coordinator(preset="collect")
    fill(c, 40)
    for index in range(40):
        TEXTS[100 + index] = f"\\boxed{{(x+{index + 2})^2 + y^{index + 3}}}"
        c.vote("g", [End(index, [0, 0, 100 + index], False)])
        retired = c.retire("g", index, State.FINISHED, 3)
    assert len(c.fence.asked) <= 16  # type: ignore[union-attr]
    assert retired is not None and retired.is_pending
    c.clock.now = 3.0  # type: ignore[attr-defined]
    commands = c.poll()
    assert any(isinstance(command, Expire) for command in commands)
    for command in commands:
        c.apply(command)
    assert c.settle("g") is not None and c.is_idle


def test_a_command_that_comes_twice_counts_once():
    c = coordinator(preset="paper", cut="tokens", k2=2)
    fill(c, 3)
    for length in range(1, 5):
        step(c, [0, 1, 2], length)
    once = verdict(c, (0, 0), (1, 0), (2, 0))
    c.apply(once)
    c.apply(once)
    assert c.runs["g"].group.clusters == [[0, 1, 2]] and c.runs["g"].group.judge_calls == 3


def test_a_command_that_comes_again_while_the_next_window_is_out_counts_once():
    c = coordinator(preset="paper", cut="tokens", k2=4)
    fill(c, 4)
    for length in range(1, 5):
        step(c, [0, 1], length)
    first = verdict(c, (0, 0), (1, 0))
    c.apply(first)
    for length in range(5, 9):
        step(c, [0, 1, 2, 3], length)
    c.apply(first)
    assert c.runs["g"].group.clusters == [[0, 1]] and c.runs["g"].in_flight == {2, 3}
    c.apply(verdict(c, (2, 0), (3, 1)))
    assert c.runs["g"].group.clusters == [[0, 1, 2], [3]]


def test_a_fence_that_cannot_be_asked_answers_by_the_broadcast():
    c = coordinator(preset="collect")

    def broken(a: str, b: str) -> int:
        raise OSError("no more processes")

    c.fence.ask = broken  # type: ignore[union-attr,method-assign]
    fill(c, 2)
    end(c, 0, 8)
    c.vote("g", [End(1, [0, 0, 9], False)])
    assert c.retire("g", 1, State.FINISHED, 3).is_pending  # type: ignore[union-attr]
    (command,) = c.poll()
    assert isinstance(command, FenceResult) and command.is_same is None
    c.apply(command)
    assert c.settle("g") is not None


def test_one_step_cuts_a_few_traces_and_the_next_ones_go_on():
    c = coordinator(preset="paper", cut="tokens")
    fill(c, 20)
    for length in range(1, 8):
        step(c, list(range(20)), length)
    assert len(c.runs["g"].reader.traces) == 20
    assert len(c.judge.tasks[0].traces) == 8  # type: ignore[union-attr]


def test_the_fence_is_polled_when_the_group_that_asked_is_gone():
    c = coordinator(preset="collect")
    fill(c, 3)
    end(c, 0, 8)
    end(c, 1, 9)
    c.abandon("g")
    assert c.fence.dropped == [0] and c.is_idle  # type: ignore[union-attr]
    c.fence.answers = [(0, None)]  # type: ignore[union-attr]
    c.questions.tidy()
    assert not c.fence.answers  # type: ignore[union-attr]
    fill(c, 2, "h")
    c.fence.answers = [(0, None)]  # type: ignore[union-attr]
    assert c.poll() == [] and not c.fence.answers  # type: ignore[union-attr]


def test_a_question_that_a_merge_has_answered_is_taken_back():
    c = coordinator(preset="collect")
    TEXTS[50] = "\\boxed{1+2x+x^2}"
    fill(c, 4)
    for index, last in enumerate((8, 9, 50)):
        end(c, index, last)
    assert len(c.fence.asked) == 3  # type: ignore[union-attr]
    c.fence.answers = [(0, True), (1, True)]  # type: ignore[union-attr]
    for command in c.poll():
        c.apply(command)
    assert c.fence.dropped == [2] and c.sizes["questions"] == 0  # type: ignore[union-attr]
    assert c.runs["g"].group.tally.is_settled


def admit_lazy(c: Coordinator, size: int, gid: str = "g", **settings: Any) -> list[bool]:
    """Which of the siblings are held."""
    admissions = [c.admit(gid, index, size, settings, 100) for index in range(size)]
    return [admission is not None and admission.is_held for admission in admissions]


def test_a_lazy_group_starts_its_base_and_each_undecided_vote_claims_one_more():
    c = coordinator(widen=0.0)
    assert admit_lazy(c, 16) == [False] * 4 + [True] * 12
    assert end(c, 0, 1) == [Start("g", 4)]
    assert end(c, 2, 2) == [Start("g", 5)]
    assert c.runs["g"].group.num_started == 4


def test_a_decided_lazy_group_ends_its_held_siblings_as_never_started():
    c = coordinator(widen=0.0)
    admit_lazy(c, 16)
    end(c, 0, 1), end(c, 1, 1)
    stops = end(c, 2, 1)
    assert {(stop.index, type(stop)) for stop in stops} == {(i, Stop) for i in range(3, 16)}
    for index in range(3, 16):
        retired = c.retire("g", index, State.NOT_STARTED, 0)
    assert retired is not None and retired.group is not None
    assert retired.group.votes == (("1", 3),)
    assert {choice.state for choice in retired.group.choices[6:]} == {"not_started"}


def test_a_group_of_which_nothing_lives_wakes():
    c = coordinator(widen=0.0)
    admit_lazy(c, 8)
    for index in range(4):
        c.retire("g", index, State.ABORTED, 0)
    assert c.lost("g") == [Start("g", index) for index in range(4, 8)]


def test_an_open_ended_lazy_group_is_released_to_its_end():
    c = coordinator(widen=0.0)
    admit_lazy(c, 8)
    started = [*end(c, 0, 7), *end(c, 1, 7)]
    assert started == [Start("g", 4), Start("g", 5)]
    assert end(c, 2, 7) == [Start("g", 6), Start("g", 7)]


def test_an_extra_that_yields_waits_for_a_claim_in_front_of_the_others():
    c = coordinator(widen=0.0)
    admit_lazy(c, 8)
    assert c.start_extra("g", c.runs["g"].group.epoch) == Start("g", 4)
    assert c.start_extra("g", c.runs["g"].group.epoch + 1) is None
    assert c.start_extra("g", c.runs["g"].group.epoch) == Start("g", 5)
    c.send_back("g", 5, 17)
    assert end(c, 0, 1) == []  # an extra takes the claim's place
    assert end(c, 1, 2) == [Start("g", 5)]


def test_a_verdict_that_stops_all_that_runs_starts_others():
    c = coordinator(preset="paper", admission="lazy", base=2, k2=1, widen=0.0, cut="tokens")
    assert admit_lazy(c, 8) == [False] * 2 + [True] * 6
    end(c, 0, 1)  # 2 starts
    c.runs["g"].in_flight = frozenset({0})
    c.apply(verdict(c, (0, 0)))
    end(c, 1, 2)  # 3 starts
    c.runs["g"].in_flight = frozenset({1, 2, 3})
    actions = c.apply(verdict(c, (1, 1), (2, 0), (3, 0)))
    assert [a.index for a in actions if isinstance(a, Stop)] == [2, 3]
    assert [a.index for a in actions if isinstance(a, Start)] == [4, 5]


def test_a_group_with_nothing_started_is_asleep():
    c = coordinator(widen=0.0)
    admit_lazy(c, 8)
    assert not c.is_asleep("g") and not c.is_asleep("unknown")
    for index in range(4):
        c.send_back("g", index, 5)
    assert c.is_asleep("g")
    assert len(c.lost("g")) == 4 and not c.is_asleep("g")


def test_no_group_crosses_a_change_of_the_weights():
    c = coordinator(preset="paper", admission="lazy", base=2, k2=1, widen=0.0, cut="tokens")
    admit_lazy(c, 6)
    for length in range(1, 5):
        step(c, [0, 1], length)
    late = verdict(c, (0, 0), (1, 0))
    assert c.renew() == [Start("g", index) for index in range(2, 6)]  # plain sampling has all run
    assert c.apply(late) == [] and c.runs["g"].group.clusters == []
    for index in range(6):  # three equal votes decide nothing any more
        assert end(c, index, 1) == []
    assert c.is_idle


def test_a_group_that_was_decided_before_the_weights_change_keeps_its_vote():
    c = coordinator(preset="latency")
    fill(c, 8)
    for index in range(3):
        end(c, index, 1)
    assert c.renew() == []
    assert c.admit("g", 7, 8, {}, 100) == Admission(7, end=State.NOT_STARTED)
    for index in range(3, 8):
        retired = c.retire("g", index, State.DECIDED, 10)
    assert retired is not None and retired.group is not None
    assert retired.group.reason.startswith("decided: 3:0")


def test_the_name_of_a_client_side_group_starts_anew_with_the_weights():
    c = coordinator(preset="latency")
    before = c.name_of("g", ABSENT)
    for _ in range(2):
        c.admit(before, ABSENT, 4, {}, 100)
    end(c, 0, 1, before)
    c.renew()
    after = c.name_of("g", ABSENT)
    assert after != before and c.name_of("g", 0) == "g"
    c.admit(after, ABSENT, 4, {}, 100)
    c.vote(before, [End(1, [0, 0, 1], False)])
    retired = c.retire(before, 1, State.FINISHED, 3)
    assert retired is not None and retired.group is not None  # the others are not waited for
    assert retired.group.settled and retired.group.votes == (("1", 2),)
    assert list(c.runs) == [after] and c.runs[after].group.num_voted == 0


def test_an_answer_that_the_fence_has_not_compared_counts_apart_once_the_weights_change():
    c = coordinator(preset="collect")
    fill(c, 3)
    end(c, 0, 8)
    end(c, 1, 9)
    c.renew()
    c.vote("g", [End(2, [0, 0, 9], False)])
    retired = c.retire("g", 2, State.FINISHED, 3)
    assert retired is not None and retired.group is not None
    assert [votes for _, votes in retired.group.votes] == [2, 1]


@pytest.mark.parametrize(
    ("ends", "reason"),
    [([State.ABORTED] * 3, "aborted: 3 of 3 siblings"),
     ([State.FINISHED, State.FAILED, State.FINISHED], "aborted: 1 of 3 siblings"),
     ([State.FINISHED] * 3, "all siblings finished")],
)  # fmt: skip
def test_a_group_that_lost_siblings_does_not_say_that_all_finished(ends: list[State], reason: str):
    c = coordinator(preset="collect")
    fill(c, 3)
    *_, last = [c.retire("g", index, state, 4) for index, state in enumerate(ends)]
    assert last is not None and last.group is not None and last.group.reason == reason
