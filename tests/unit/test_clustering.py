"""Greedy clustering of traces. No judge: scores are looked up or made up."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.clustering import JudgeError, Score, place
from sglang_deepprune.types import ABSENT, Assignment, JudgeTask, Pair, Trace


class Judge:
    """P(same) is `same` for traces of one letter (their text's first), else `other`."""

    def __init__(self, same: float = 0.9, other: float = 0.1):
        self.same, self.other = same, other
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, pairs: Sequence[Pair]) -> npt.NDArray[np.floating]:
        self.calls.append([(pair.left.sibling, pair.right.sibling) for pair in pairs])
        same = [pair.left.text[0] == pair.right.text[0] for pair in pairs]
        return np.array([self.same if s else self.other for s in same], dtype=np.float32)


def traces(letters: str, start: int = 0) -> tuple[Trace, ...]:
    return tuple(Trace(start + i, f"{c}{start + i}", 10, "tokens") for i, c in enumerate(letters))


def make_task(new: Sequence[Trace], members: Sequence[Trace] = (), **changes: Any) -> JudgeTask:
    plain = JudgeTask(
        group_id="g",
        epoch=1,
        traces=tuple(new),
        members=tuple(members),
        clusters=(),
        tau=0.5,
        max_clusters=32,
        num_compared=10,
        seed=0,
    )
    return dataclasses.replace(plain, **changes)


def clusters_of(assignments: Sequence[Assignment]) -> list[int]:
    return [assignment.cluster for assignment in assignments]


def always(value: float) -> Score:
    return lambda pairs: np.full(len(pairs), value, dtype=np.float32)


def test_the_first_trace_opens_a_cluster_and_asks_nobody() -> None:
    judge = Judge()
    (one,), num_pairs, num_tokens = place(make_task(traces("a")), judge)
    assert (one.sibling, one.cluster) == (0, 0) and math.isnan(one.similarity)
    assert (judge.calls, num_pairs, num_tokens) == ([], 0, 0)


def test_traces_join_their_like_in_order() -> None:
    assignments, *_ = place(make_task(traces("abacba")), Judge())
    assert clusters_of(assignments) == [0, 1, 0, 2, 1, 0]
    assert assignments[2].similarity == pytest.approx(0.9)


def test_all_pairs_of_a_trace_are_scored_in_one_call() -> None:
    judge = Judge()
    _, num_pairs, num_tokens = place(make_task(traces("aab")), judge)
    assert judge.calls == [[(1, 0)], [(2, 0), (2, 1)]]
    assert (num_pairs, num_tokens) == (3, 60)


def test_clusters_of_earlier_windows_take_new_traces() -> None:
    old = traces("aab")
    task = make_task(traces("ba", start=3), old, clusters=((0, 1), (2,)))
    assert clusters_of(place(task, Judge())[0]) == [1, 0]


def test_a_similarity_of_exactly_tau_does_not_join() -> None:
    assert clusters_of(place(make_task(traces("aa")), always(0.5))[0]) == [0, 1]


def test_ties_go_to_the_older_cluster() -> None:
    task = make_task(traces("x", start=2), traces("ab"), clusters=((0,), (1,)))
    assert clusters_of(place(task, always(0.8))[0]) == [0]


def test_a_trace_that_matches_none_of_k_clusters_is_left_out() -> None:
    assignments, *_ = place(make_task(traces("abca"), max_clusters=2), Judge())
    assert clusters_of(assignments) == [0, 1, ABSENT, 0]
    assert assignments[2].similarity == pytest.approx(0.1)


def test_k1_members_are_drawn_without_replacement() -> None:
    old = traces("a" * 9)
    task = make_task(traces("a", start=9), old, clusters=(tuple(range(9)),), num_compared=4)
    judge = Judge()
    _, num_pairs, _ = place(task, judge)
    drawn = [member for _, member in judge.calls[0]]
    assert num_pairs == 4 and len(set(drawn)) == 4 and set(drawn) <= set(range(9))


def test_other_seeds_draw_other_members() -> None:
    def draw(seed: int) -> tuple[int, ...]:
        judge = Judge()
        old = traces("a" * 30)
        task = make_task(traces("a", 30), old, clusters=(tuple(range(30)),), seed=seed)
        place(task, judge)
        return tuple(member for _, member in judge.calls[0])

    assert len({draw(seed) for seed in range(5)}) == 5
    assert draw(3) == draw(3)


def test_the_draw_is_the_same_in_another_process() -> None:
    code = (
        "from sglang_deepprune.clustering import _draw\n"
        "from sglang_deepprune.types import JudgeTask, Trace\n"
        "task = JudgeTask('g', 1, (), (), (), .5, 32, 3, 7)\n"
        "known = {i: Trace(i, str(i), 1, 'end') for i in range(20)}\n"
        "print([t.sibling for t in _draw(task, 4, 0, range(20), known)])\n"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1 and runs != {""}


def test_nan_scores_are_left_out_of_the_mean() -> None:
    task = make_task(traces("x", start=2), traces("aa"), clusters=((0, 1),))
    (one,), *_ = place(task, lambda pairs: np.array([np.nan, 0.75]))
    assert (one.cluster, one.similarity) == (0, 0.75)


def test_a_trace_with_nothing_but_nan_gets_no_verdict() -> None:
    task = make_task(traces("x", start=2), traces("ab"), clusters=((0,), (1,)))
    (one,), num_pairs, _ = place(task, always(math.nan))
    assert one.cluster == ABSENT and math.isnan(one.similarity) and num_pairs == 2


def test_a_trace_without_a_verdict_is_evidence_for_no_cluster() -> None:
    scores = iter([np.array([np.nan]), np.array([0.9])])
    assignments, *_ = place(make_task(traces("aba")), lambda pairs: next(scores))
    assert clusters_of(assignments) == [0, ABSENT, 0]


def test_equal_texts_need_no_judge() -> None:
    same = [Trace(i, "so it is 5", 10, "tokens") for i in range(2)]
    judge = Judge()
    assignments, num_pairs, num_tokens = place(make_task(same), judge)
    assert assignments[1] == Assignment(1, 0, 1.0)
    assert (judge.calls, num_pairs, num_tokens) == ([], 0, 0)


def test_two_empty_texts_are_not_taken_for_equal_answers() -> None:
    empty = [Trace(i, "", 0, "end") for i in range(2)]
    asked = place(make_task(empty), always(0.2))
    assert clusters_of(asked[0]) == [0, 1] and asked[1] == 1


@pytest.mark.parametrize(
    ("verdict", "cluster", "similarity", "num_pairs"),
    [(True, 0, 1.0, 0), (False, 1, 0.0, 0), (None, 1, 0.25, 1)],
)
def test_known_answers_are_compared_and_only_open_questions_asked(
    monkeypatch: pytest.MonkeyPatch,
    verdict: bool | None,
    cluster: int,
    similarity: float,
    num_pairs: int,
) -> None:
    monkeypatch.setattr("sglang_deepprune.answers.compare", lambda a, b: verdict, raising=False)
    ended = [Trace(i, f"text {i}", 10, "end", answer=f"answer {i}") for i in range(2)]
    assignments, asked, _ = place(make_task(ended), always(0.25))
    assert assignments[1] == Assignment(1, cluster, similarity) and asked == num_pairs


def test_answers_outweigh_equal_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_deepprune.answers.compare", lambda a, b: a == b, raising=False)
    ended = [Trace(i, "the same start", 10, "tokens", answer=str(i)) for i in range(2)]
    assert clusters_of(place(make_task(ended), Judge())[0]) == [0, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.array([0.5, 0.5]), "returned the shape"),
        (np.array([[0.5]]), "returned the shape"),
        (np.array([]), "returned the shape"),
        (np.array([1]), "float array, got int64"),
        (np.array(["0.5"]), "float array"),
        (np.array([True]), "float array"),
        ([0.5], "float array, got list"),
        (None, "float array, got NoneType"),
        (np.array([1.01]), "probabilities, got 1.01"),
        (np.array([-0.2]), "probabilities, got -0.2"),
        (np.array([np.inf]), "probabilities, got inf"),
    ],
)
def test_what_is_no_list_of_probabilities_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        place(make_task(traces("ab")), lambda pairs: answer)


def test_rounding_beyond_one_is_forgiven() -> None:
    (_, one), *_ = place(make_task(traces("ab")), lambda pairs: np.array([1.0 + 5e-7]))
    assert one.similarity == 1.0


@given(letters=st.text("abcd", max_size=12), limit=st.integers(1, 5), compared=st.integers(1, 4))
def test_a_right_judge_finds_the_true_classes(letters: str, limit: int, compared: int) -> None:
    task = make_task(traces(letters), max_clusters=limit, num_compared=compared)
    assignments, num_pairs, num_tokens = place(task, Judge())
    order = list(dict.fromkeys(letters))[:limit]
    expected = [order.index(c) if c in order else ABSENT for c in letters]
    assert clusters_of(assignments) == expected
    assert num_tokens == 20 * num_pairs <= 20 * limit * compared * len(letters)


@given(letters=st.text("abc", min_size=2, max_size=10), split=st.integers(1, 9))
def test_windows_do_not_change_the_clusters(letters: str, split: int) -> None:
    new = traces(letters)
    whole, *_ = place(make_task(new), Judge())
    first, *_ = place(make_task(new[:split]), Judge())
    taken: dict[int, list[int]] = {}
    for one in first:
        taken.setdefault(one.cluster, []).append(one.sibling)
    clusters = tuple(tuple(taken[cluster]) for cluster in sorted(taken))
    second, *_ = place(make_task(new[split:], new[:split], clusters=clusters), Judge())
    assert clusters_of([*first, *second]) == clusters_of(whole)
