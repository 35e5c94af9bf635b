"""What goes to the judge and what its verdicts do, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_deepprune.actions import Admission, Start, Stop
from sglang_deepprune.group import State
from sglang_deepprune.types import JudgeResult
from tests.unit.coordinators import admit_lazy, coordinator, decode, end, fill, step, verdict


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
    failed = JudgeResult("g", c.runs["g"].group.epoch, error="no verdict", window=1)
    assert c.apply(failed) == []
    for length in range(5, 9):
        step(c, [0, 1, 2], length)
    assert [trace.sibling for trace in c.judge.tasks[-1].traces] == [2]  # type: ignore[union-attr]


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


def test_a_failure_that_comes_again_while_the_next_window_is_out_leaves_that_alone():
    c = coordinator(preset="paper", cut="tokens", k2=4)
    fill(c, 4)
    for length in range(1, 5):
        step(c, [0, 1], length)
    failed = JudgeResult("g", c.runs["g"].group.epoch, error="no verdict", window=1)
    c.apply(failed)
    for length in range(5, 9):
        step(c, [0, 1, 2, 3], length)
    c.apply(failed)
    assert c.runs["g"].in_flight == {2, 3}
    c.apply(verdict(c, (2, 0), (3, 1)))
    assert c.runs["g"].group.clusters == [[2], [3]]


def test_one_step_cuts_a_few_traces_and_the_next_ones_go_on():
    c = coordinator(preset="paper", cut="tokens")
    fill(c, 20)
    for length in range(1, 8):
        step(c, list(range(20)), length)
    assert len(c.runs["g"].reader.traces) == 20
    assert len(c.judge.tasks[0].traces) == 8  # type: ignore[union-attr]


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
