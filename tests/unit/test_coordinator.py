"""The coordinator without an engine: who belongs to a group, who votes, and what that decides."""

from __future__ import annotations

import pytest

from sglang_deepprune.actions import Admission, End, Start
from sglang_deepprune.group import State
from sglang_deepprune.run import Run
from sglang_deepprune.types import ABSENT, Close
from tests.unit.coordinators import admit_lazy, coordinator, end, fill, step, verdict


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


def test_siblings_that_come_after_the_decision_need_not_start():
    c = coordinator(preset="latency")
    for index in range(4):
        c.admit("g", index, 8, {}, 100)
    for index in range(3):
        end(c, index, 1)
    assert c.admit("g", 5, 8, {}, 100) == Admission(5, end=State.NOT_STARTED)


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


def test_a_group_that_is_complete_is_looked_at_once_for_whom_it_awaits(
    monkeypatch: pytest.MonkeyPatch,
):
    """A poll is a scheduler pass: to look at every sibling in each would grow with all groups."""
    c = coordinator(preset="collect", group_timeout_s=10.0)
    for index in (0, 1):
        c.admit("g", index, 3, {}, 100)
    looks: list[bool] = []

    def look(run: Run) -> bool:
        looks.append(any(s.state is State.EXPECTED for s in run.group.siblings.values()))
        return looks[-1]

    monkeypatch.setattr(Run, "is_awaited", property(look))
    assert c.poll() == [] and not looks
    c.clock.now = 11.0  # type: ignore[attr-defined]
    (command,) = c.poll()
    c.apply(command)
    c.admit("g", 2, 3, {}, 100)
    c.clock.now = 22.0  # type: ignore[attr-defined]
    for _ in range(5):
        assert c.poll() == []
    assert looks == [True, False]


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
