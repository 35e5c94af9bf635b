"""When a vote is decided: the rule on plain numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune import policy


@pytest.mark.parametrize(
    ("n", "a", "b", "chance", "stops"),
    [
        (16, 3, 0, 0.029, True),
        (16, 4, 1, 0.043, True),
        (16, 5, 2, 0.044, True),
        (32, 3, 0, 0.044, True),
        (32, 4, 1, 0.074, False),
        (32, 5, 1, 0.035, True),
        (64, 3, 0, 0.053, False),
        (64, 4, 0, 0.024, True),
        (64, 5, 1, 0.048, True),
        (64, 8, 4, 0.096, False),
    ],
)
def test_the_worked_values_of_the_rule_hold(
    n: int, a: int, b: int, chance: float, stops: bool
) -> None:
    k = a + b
    scaled = min(n - k, math.ceil((n - k) * (a + b + 1) / (k + 1)))
    assert policy.chance_of_overtake(a, b, scaled) == pytest.approx(chance, abs=0.0006)
    assert policy.decided(a, b, k, n - k, 0.05) is stops


@given(a=st.integers(0, 12), b=st.integers(0, 12), r=st.integers(0, 40))
def test_the_chance_equals_the_sum_over_polya_draws(a: int, b: int, r: int) -> None:
    ahead = {a: 1.0}  # votes of the leader -> probability, one draw at a time
    for drawn in range(r):
        after: dict[int, float] = {}
        for votes, p in ahead.items():
            share = (votes + 1) / (a + b + drawn + 2)
            after[votes + 1] = after.get(votes + 1, 0.0) + p * share
            after[votes] = after.get(votes, 0.0) + p * (1 - share)
        ahead = after
    expected = sum(p for votes, p in ahead.items() if a + b + r - votes > votes)
    assert policy.chance_of_overtake(a, b, r) == pytest.approx(expected, abs=1e-9)


def test_a_tie_at_the_end_is_not_ahead() -> None:
    assert policy.chance_of_overtake(1, 0, 1) == 0.0
    assert policy.chance_of_overtake(1, 0, 2) == pytest.approx(1 / 6)


def test_a_vote_that_a_tie_could_still_turn_counts_as_decided() -> None:
    """The numbers of docs/algorithm.md: three to one of eight, four to come."""
    assert policy.chance_of_overtake(3, 1, 4) == pytest.approx(0.04, abs=0.005)
    assert policy.decided(3, 1, 4, 4, 0.05)
    # Of four draws from the urn 4:2, one is the leader's and three are the runner-up's.
    tie = 4 * (4 * 2 * 3 * 4) / (6 * 7 * 8 * 9)
    assert tie == pytest.approx(0.13, abs=0.005)


def test_abstentions_count_as_ballots_and_not_as_votes() -> None:
    assert policy.decided(3, 0, 3, 61, 0.05) is False
    # Three of six abstained: half of the rest is expected to scatter, so fewer can overtake.
    assert policy.decided(3, 0, 6, 20, 0.05) is True


def test_two_votes_decide_nothing_unless_nobody_else_may_vote() -> None:
    assert policy.decided(2, 0, 2, 1, 0.05) is False
    assert policy.decided(2, 0, 2, 0, 0.05) is True


def test_nothing_is_decided_without_a_single_vote() -> None:
    assert policy.decided(0, 0, 9, 3, 0.5) is False
    assert policy.decided(0, 0, 9, 0, 0.5) is False


def test_min_votes_is_respected() -> None:
    assert policy.decided(4, 0, 4, 12, 0.05, min_votes=5) is False
