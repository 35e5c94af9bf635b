"""Formulas that only the fence can compare: who waits for it, how long, and what it is asked."""

from __future__ import annotations

import pytest

from sglang_deepprune.actions import End
from sglang_deepprune.group import State
from sglang_deepprune.types import ABSENT, Expire, FenceResult
from tests.unit.coordinators import TEXTS, coordinator, end, fill


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
