"""Comparisons that stop when the placement is clear: the full loop's placements, fewer asked."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.clustering import place
from sglang_deepprune.sequential import similarities
from sglang_deepprune.types import JudgeTask, Pair, Trace

SCORES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, math.nan]))
ROWS = st.lists(st.lists(SCORES, min_size=1, max_size=8), min_size=1, max_size=6)


def best(means: list[float], tau: float) -> int | None:
    """Where the paper puts a trace; the older of two."""
    found = [j for j, mean in enumerate(means) if not math.isnan(mean) and mean > tau]
    return min(found, key=lambda j: (-means[j], j)) if found else None


def full_means(rows: list[list[float]]) -> list[float]:
    kept = [[v for v in row if not math.isnan(v)] for row in rows]
    return [math.fsum(row) / len(row) if row else math.nan for row in kept]


def run(rows, tau: float, error: float, is_exclusive: bool = False) -> tuple[list[float], int]:
    facts = [[None] * len(row) for row in rows]
    means, asked = drive(similarities(facts, tau, error, is_exclusive=is_exclusive), rows)
    assert len(set(asked)) == len(asked)
    return means, len(asked)


def drive(steps, rows) -> tuple[list[float], list[tuple[int, int]]]:
    """The means, and what was asked for, in order."""
    asked = []
    try:
        asked.append(next(steps))
        while True:
            cluster, member = asked[-1]
            asked.append(steps.send(rows[cluster][member]))
    except StopIteration as end:
        return end.value, asked


@given(rows=ROWS, tau=st.floats(0.05, 0.95))
def test_without_error_the_placement_is_that_of_the_full_loop(rows, tau):
    means, _ = run(rows, tau, 0.0)
    wanted = full_means(rows)
    top = best(wanted, tau)
    got = best(means, tau)
    # Equal up to the rounding of two orders of summation.
    assert got == top or (
        abs((wanted[got] if got is not None else tau) - (wanted[top] if top is not None else tau))
        < 1e-9
    )


def test_a_sure_judge_is_asked_little():
    rows = [[0.98] * 10, [0.02] * 10, [0.03] * 10, [0.01] * 2]
    asked = {}
    for name, error, is_exclusive in (("exact", 0.0, False), ("interval", 0.01, False),
                                      ("exclusive", 0.01, True)):  # fmt: skip
        means, asked[name] = run(rows, 0.5, error, is_exclusive)
        assert best(means, 0.5) == 0
    assert asked["exclusive"] < asked["interval"] < asked["exact"] < 32
    assert asked["exclusive"] <= 5 and asked["interval"] <= 16


def test_a_cluster_that_is_better_than_the_first_good_one_is_found_unless_they_exclude():
    rows = [[0.7] * 10, [0.9] * 10]
    assert best(run(rows, 0.5, 0.01)[0], 0.5) == 1
    assert best(run(rows, 0.5, 0.0)[0], 0.5) == 1


def test_where_nothing_matches_every_cluster_was_heard():
    rows = [[0.02] * 10, [0.1] * 10, [0.05] * 3]
    means, asked = run(rows, 0.5, 0.01)
    assert best(means, 0.5) is None and not any(map(math.isnan, means))
    assert asked < 23 / 2


def two_valued(rng: np.random.Generator, rates: list[float], sizes: list[int]) -> list[list[float]]:
    return [
        np.where(rng.random(size) < rate, 0.95, 0.05).tolist()
        for rate, size in zip(rates, sizes, strict=True)
    ]


@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("highs", [3, 4, 6, 7])
def test_of_two_valued_scores_no_more_placements_differ_than_stated(error, highs):
    """The worst there are: one cluster whose members are nearly as often one as the other."""
    rng = np.random.default_rng(highs)
    row = [0.95] * highs + [0.05] * (10 - highs)
    drawn = [rng.permutation(row).tolist() for _ in range(1000)]
    wrong = [best(run([one], 0.5, error)[0], 0.5) != best(full_means([row]), 0.5) for one in drawn]
    assert np.mean(wrong) <= error


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_among_many_two_valued_clusters_no_more_placements_differ_than_stated(error):
    rng = np.random.default_rng(5)
    wrong = []
    for _ in range(500):
        rows = two_valued(rng, rng.random(8).tolist(), rng.integers(3, 11, 8).tolist())
        means, num = run(rows, 0.5, error)
        exact, num_exact = run(rows, 0.5, 0.0)
        assert num <= num_exact
        wrong.append(best(means, 0.5) != best(exact, 0.5))
    assert np.mean(wrong) <= error


def test_facts_are_not_asked_and_count():
    assert drive(similarities([[1.0, 1.0], [0.0]], 0.5, 0.01), []) == ([1.0, 0.0], [])


def test_the_largest_cluster_is_asked_first():
    rows = [[0.1] * 2, [0.9] * 10, [0.1] * 3]
    facts = [[None] * len(row) for row in rows]
    _, asked = drive(similarities(facts, 0.5, 0.05, is_exclusive=True), rows)
    assert asked[0][0] == 1


def task(n: int, compare: str, error: float = 0.0) -> JudgeTask:
    traces = tuple(Trace(i, f"t{i}", 10, "tokens") for i in range(n))
    return JudgeTask("g", 0, traces, (), (), 0.5, 32, 10, 0, compare, error)


def noisy(seed: int):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.12, (64, 64))

    def score(pairs: list[Pair]) -> np.ndarray:
        found = []
        for pair in pairs:
            i, j = sorted((pair.left.sibling, pair.right.sibling))
            found.append(np.clip((0.8 if i % 3 == j % 3 else 0.2) + noise[i, j], 0, 1))
        return np.array(found, dtype=np.float32)

    return score


@pytest.mark.parametrize(("compare", "error", "share"), [
    ("sequential", 0.0, 0.9), ("sequential", 0.01, 0.6), ("exclusive", 0.01, 0.45),
])  # fmt: skip
def test_a_window_is_placed_as_by_the_full_loop_with_fewer_pairs(compare, error, share):
    whole, num_full, tokens_full = place(task(48, "full"), noisy(1))
    short, num, tokens = place(task(48, compare, error), noisy(1))
    same = [a.cluster == b.cluster for a, b in zip(whole, short, strict=True)]
    assert np.mean(same) >= (1.0 if error == 0 else 0.97)
    assert num < num_full * share and tokens == num * 20 < tokens_full


def test_at_a_tau_of_one_nothing_merges_and_nothing_is_unknown():
    found, _, _ = place(replace(task(4, "sequential", 0.01), tau=1.0), noisy(2))
    assert [one.cluster for one in found] == [0, 1, 2, 3]
