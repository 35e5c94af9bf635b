"""Groups that start some of their siblings and hold the others, without an engine."""

from __future__ import annotations

import pytest

from sglang_deepprune.actions import Start, Stop
from sglang_deepprune.group import Sibling, State
from tests.unit.coordinators import admit_lazy, coordinator, end


def test_a_lazy_group_starts_its_base_and_each_undecided_vote_claims_one_more():
    c = coordinator(widen=0.0)
    assert admit_lazy(c, 16) == [False] * 4 + [True] * 12
    assert end(c, 0, 1) == [Start("g", 4)]
    assert end(c, 2, 2) == [Start("g", 5)]
    assert c.runs["g"].group.num_started == 4


def test_who_arrives_at_a_full_group_does_not_have_all_the_others_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    """A group of thousands arrives in one pass: to count it for each would stop the loop."""
    c, looks = coordinator(widen=0.0), []
    is_started = Sibling.is_started

    def look(sibling: Sibling) -> bool:
        looks.append(sibling.index)
        return bool(is_started.fget(sibling))  # type: ignore[attr-defined]

    monkeypatch.setattr(Sibling, "is_started", property(look))
    assert admit_lazy(c, 300) == [False] * 4 + [True] * 296
    assert len(looks) <= 2 * 4 * 300
    looks.clear()
    assert admit_lazy(c, 300, "eager", admission="eager") == [False] * 300 and not looks


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


def test_a_group_with_nothing_started_is_asleep():
    c = coordinator(widen=0.0)
    admit_lazy(c, 8)
    assert not c.is_asleep("g") and not c.is_asleep("unknown")
    for index in range(4):
        c.send_back("g", index, 5)
    assert c.is_asleep("g")
    assert len(c.lost("g")) == 4 and not c.is_asleep("g")
