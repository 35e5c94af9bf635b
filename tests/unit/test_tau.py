"""tau at run time: moved by checked merges, bounded, off by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune import policy, tau
from sglang_deepprune.group import Group
from tests.unit.test_policy import make_group, vote

PRUNES: dict[str, Any] = {"preset": "paper", "tau": 0.5, "tau_step": 0.1}


def group_of(clusters: Sequence[Sequence[str | None]], **settings: Any) -> Group:
    """A cluster lists the answers of its members; "-" has not voted yet."""
    places = iter(range(64))
    placed = [[(next(places), answer) for answer in own] for own in clusters]
    group = make_group(
        sum(map(len, placed)), [[i for i, _ in own] for own in placed], **(PRUNES | settings)
    )
    for index, answer in (one for own in placed for one in own):
        if answer != "-":
            vote(group, index, answer)
    return group


def test_a_merge_is_checked_once_the_cluster_s_first_voter_and_the_joiner_have_voted():
    group = group_of([["-", "1", "1", "2", "-"], ["3", None, "3"], ["4"], ["-"]])
    assert tau.checked(group) == tau.Checked(right=2, wrong=1)


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ([["-", "-"]], 0.5),
        ([["1", "2"]], 0.58),  # up by .1 * .8
        ([["1", "1", "1"]], 0.46),  # twice down by .1 * .2
        ([["1"], ["1"]], 0.5),  # two clusters are no merge
        ([["1", "2", "3", "4", "5"]], 0.7),  # no further than .2
        ([["1"] * 16], 0.3),
    ],
)
def test_wrong_merges_raise_tau_and_right_ones_lower_it(clusters, expected):
    assert tau.merge_tau(group_of(clusters)) == pytest.approx(expected)


def test_off_nothing_is_looked_at():
    group = group_of([["1", "2", "3"]], tau_step=0.0)
    assert tau.merge_tau(group) == 0.5 and not tau.is_distrusted(group)


@given(
    st.lists(st.lists(st.sampled_from(["1", "2", None, "-"]), min_size=1, max_size=8), max_size=6)
)
def test_tau_stays_a_probability_near_where_it_began(clusters):
    for start in (0.0, 0.1, 0.95, 1.0):
        moved = tau.merge_tau(group_of(clusters, tau=start, tau_step=1.0))
        assert 0 <= moved <= 1 and abs(moved - start) <= tau.REACH + 1e-9


def test_wrong_merges_take_the_judge_s_word_away_and_right_ones_give_it_back():
    # Clusters of K2 = 1: without the check the two late members would be stopped.
    clusters = [["1", "-"], ["2", "-"], ["5", "6"], ["7"]]
    trusted = group_of(clusters, k2=1)
    assert policy.plan(trusted).stop == (1, 3)
    doubtful = group_of([*clusters, ["8", "9"]], k2=1)
    assert tau.is_distrusted(doubtful) and not policy.plan(doubtful).stop
    assert policy.most_redundant(doubtful, {0: 5, 1: 5}) is None
    redeemed = group_of([*clusters, ["8", "9"], ["4", "4"]], k2=1)
    assert policy.plan(redeemed).stop == (1, 3)
