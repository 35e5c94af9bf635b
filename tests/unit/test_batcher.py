"""Many groups in one call of the judge: the placements of one group at a time, and no neighbour's
fault."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sglang_deepprune.batcher import Batcher, expected_tokens
from sglang_deepprune.clustering import JudgeError, place
from sglang_deepprune.types import JudgeTask, Pair, Trace


def task(name: str, count: int = 6, compare: str = "full", text: str = "") -> JudgeTask:
    traces = tuple(Trace(i, f"{name} {text} {i}", 10, "tokens") for i in range(count))
    return JudgeTask(name, 0, traces, (), (), 0.5, 32, 10, 0, compare, 0.0)


class Judge:
    """Same answer: same parity of the sibling. Remembers its calls."""

    name = "parity"
    mixes_groups = True

    def __init__(self, pause_s: float = 0.0, pair_s: float = 0.0) -> None:
        self.calls: list[list[str]] = []
        self.ended: list[str] = []
        self.pause_s = pause_s
        self.pair_s = pair_s

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        self.calls.append([pair.group_id for pair in pairs])
        time.sleep(self.pause_s + self.pair_s * len(pairs))
        if any("boom" in pair.left.text for pair in pairs):
            raise RuntimeError("of one group")
        same = [pair.left.sibling % 2 == pair.right.sibling % 2 for pair in pairs]
        return np.array(same, dtype=np.float32)

    def forget(self, group_ids: Sequence[str]) -> None:
        self.ended += group_ids


def warm(judge: Judge, budget_s: float = 100.0) -> Batcher:
    """One that knows how fast the judge is."""
    batcher = Batcher(judge, budget_s)
    batcher([task("before")])
    judge.calls.clear()
    return batcher


@pytest.mark.parametrize("compare", ["full", "sequential", "exclusive"])
def test_groups_side_by_side_are_placed_as_one_by_one(compare: str):
    judge = Judge()
    tasks = [task(f"g{i}", 3 + i, compare) for i in range(5)]
    results = warm(judge)(tasks)
    assert [result.group_id for result in results] == [one.group_id for one in tasks]
    for one, result in zip(tasks, results, strict=True):
        assert (result.assignments, result.num_pairs, result.num_tokens) == place(
            one, Judge().score
        )
    assert set(judge.calls[0]) == {one.group_id for one in tasks}
    alone = Judge()
    for one in tasks:
        place(one, alone.score)
    assert len(judge.calls) == max(len(calls_of(one)) for one in tasks) < len(alone.calls)


def calls_of(one: JudgeTask) -> list[list[str]]:
    judge = Judge()
    place(one, judge.score)
    return judge.calls


def test_the_first_batch_goes_one_by_one_as_nobody_knows_how_fast_the_judge_is():
    judge = Judge()
    Batcher(judge, 100.0)([task("a"), task("b")])
    assert all(len(set(call)) == 1 for call in judge.calls)


def test_a_judge_that_does_not_say_so_gets_one_group_a_call():
    judge = Judge()
    judge.mixes_groups = False
    warm(judge)([task("a"), task("b"), task("c")])
    assert all(len(set(call)) == 1 for call in judge.calls)


@pytest.mark.parametrize("compare", ["sequential", "exclusive"])
def test_scores_that_depend_on_their_company_are_asked_as_the_full_loop_does(compare: str):
    judge = Judge()
    judge.mixes_groups = False
    (result,) = warm(judge)([task("a", compare=compare)])
    assert judge.calls == calls_of(task("a"))
    assert result.num_pairs == place(task("a"), Judge().score)[1]


def test_a_group_that_makes_the_judge_raise_spoils_its_own_result_alone():
    results = warm(Judge())([task("a"), task("b", text="boom"), task("c")])
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].error is not None and "RuntimeError" in results[1].error
    assert [one.cluster for one in results[2].assignments] == [0, 1, 0, 1, 0, 1]


def test_what_a_failed_call_held_is_let_go_before_its_groups_are_tried_one_by_one():
    class Greedy(Judge):
        held: weakref.ref[np.ndarray] | None = None

        def score(self, pairs: Sequence[Pair]) -> np.ndarray:
            big = np.zeros(9)
            if len({pair.group_id for pair in pairs}) > 1:
                self.held = weakref.ref(big)
                raise MemoryError("of a device")
            assert self.held is None or self.held() is None, "the failed pass still lives"
            return super().score(pairs)

    judge = Greedy()
    results = warm(judge)([task("a"), task("b"), task("c")])
    assert judge.held is not None
    assert [result.error for result in results] == [None] * 3


def test_a_group_that_would_not_end_in_time_waits_for_the_next_batch():
    batcher = Batcher(Judge(pair_s=0.01), budget_s=0.7)
    short, long = task("short", 4), task("long", 14)  # 6 pairs, and 91
    assert [one.group_id for one in batcher([short, long])] == ["short"]
    (result,) = batcher([long])
    assert result.group_id == "long" and result.error is None


def test_more_groups_than_the_time_allows_are_left_for_a_later_batch():
    judge = Judge(pause_s=0.02)
    batcher = warm(judge, budget_s=0.4)  # a task takes seven calls
    tasks = [task(f"g{i}", 8) for i in range(30)]
    results = batcher(tasks)
    assert 1 <= len(results) < len(tasks)
    assert all(result.error is None for result in results)


def test_a_task_that_asks_for_more_than_its_time_has_no_verdict_and_the_judge_lives_on():
    batcher = warm(Judge(pause_s=0.02), budget_s=0.25)
    long, short = batcher([task("long", 400)]), batcher([task("short", 3)])
    assert long[0].error is not None and "more comparisons" in long[0].error
    assert long[0].elapsed_ms < 1000 and long[0].assignments == ()
    assert short[0].error is None


def test_a_call_that_would_not_end_in_time_is_not_begun():
    """The process ends at its deadline, here .5 s; a few such windows ended everybody's judge."""
    batcher = Batcher(Judge(pause_s=0.14), budget_s=0.25)
    start = time.monotonic()
    (slow,) = batcher([task("slow", 12)])
    assert slow.error is not None and "more comparisons" in slow.error
    assert time.monotonic() - start < 0.5


def test_a_round_of_many_pairs_is_cut_into_calls():
    judge = Judge()
    warm(judge)._scored(pairs_of(150))
    assert [len(call) for call in judge.calls] == [64, 64, 22]


def pairs_of(count: int) -> list[Pair]:
    traces = [Trace(i, str(i), 1, "end") for i in range(count + 1)]
    return [Pair(left, right) for left, right in zip(traces, traces[1:], strict=False)]


def test_a_slow_judge_gets_no_more_pairs_a_call_than_it_can_score_in_time():
    """One that reads 100 pairs a second began 64 of them with a quarter second left."""
    judge = Judge(pair_s=0.01)
    batcher = Batcher(judge, budget_s=0.25)
    batcher._stop_s = time.monotonic() + 0.25
    start = time.monotonic()
    with pytest.raises(JudgeError, match="more comparisons"):
        batcher._scored(pairs_of(300))
    assert time.monotonic() - start < 0.27
    assert len(judge.calls[0]) == 1 and 5 < max(map(len, judge.calls)) < 15
    judge.calls.clear()
    batcher([task("next", 40)])
    assert max(map(len, judge.calls)) < 30, "what it knows outlives a batch"


def test_one_slow_call_does_not_end_a_judge():
    judge = Judge(pause_s=0.5)
    batcher = Batcher(judge, budget_s=0.2)
    batcher([task("compiles", 2)])
    judge.pause_s = 0.0
    results = [batcher([task("later", 3)])[0] for _ in range(3)]
    assert results[-1].error is None


def test_scores_that_depend_on_their_company_are_asked_in_the_same_calls_each_time():
    judge = Judge()
    judge.mixes_groups = False
    batcher = Batcher(judge)
    found = batcher._scored(pairs_of(150))
    assert [len(call) for call in judge.calls] == [1, 64, 64, 22] and len(found) == 150
    judge.calls.clear()
    assert batcher._scored(pairs_of(150)) == found
    assert [len(call) for call in judge.calls] == [64, 64, 22]


@pytest.mark.parametrize("mixes", [True, False])
def test_a_slow_judge_is_not_asked_too_much_by_a_process_that_does_not_know_it(mixes: bool):
    """64 pairs were the first call of each process, and its last: so the judge was off for good."""
    judge = Judge(pair_s=0.02)
    judge.mixes_groups = mixes
    batcher = Batcher(judge, budget_s=0.25)
    start = time.monotonic()
    batcher._stop_s = start + 0.45
    with pytest.raises(JudgeError, match="more comparisons"):
        batcher._scored(pairs_of(150))
    assert time.monotonic() - start < 0.5, "its deadline"


def test_the_judge_knows_when_it_must_be_done():
    judge = Judge()
    judge.until = 0.0  # type: ignore[attr-defined]
    Batcher(judge, budget_s=5.0)([task("a")])
    assert 8.5 < judge.until - time.monotonic() <= 9.0  # type: ignore[attr-defined]


def test_side_by_side_are_no_more_than_the_judge_can_read_in_the_time_left():
    batcher = Batcher(Judge(), budget_s=10.0)
    one = task("a", 20)
    batcher._rate = expected_tokens(one) * 3 / 10.0
    assert len(batcher._chunk([replace(one, group_id=str(i)) for i in range(9)], 10.0)) == 3


def test_the_judge_is_told_which_groups_have_ended():
    judge = Judge()
    assert Batcher(judge)([], ["a", "b"]) == []
    assert judge.ended == ["a", "b"]
