"""The vote: classes, ties, abstentions, and independence of the order of proofs. Pure Python."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.voting import MAX_QUESTIONS, Ballot, Standing, Tally


def undecided(a: str, b: str) -> bool | None:
    """Equal strings are the same; formulas (with a plus) need the slow path; the rest differs."""
    return True if a == b else None if "+" in a and "+" in b else False


def tally(*answers: str | None) -> Tally:
    counted = Tally(undecided)
    for sibling, answer in enumerate(answers):
        counted.add(Ballot(answer, sibling))
    return counted


def test_most_votes_win() -> None:
    counted = tally("3", "5", "5", None, "5", "3")
    assert counted.counts() == [Standing("5", 3.0, (1, 2, 4)), Standing("3", 2.0, (0, 5))]
    assert counted.leader == Standing("5", 3.0, (1, 2, 4))
    assert counted.runner_up == Standing("3", 2.0, (0, 5))
    assert (counted.num_votes, counted.num_abstentions) == (6, 1)
    assert counted.is_settled and counted.ties == []


def test_real_comparison_joins_spellings() -> None:
    counted = Tally()
    for sibling, answer in enumerate(["0.75", "\\frac{3}{4}", "3/4", "0.7"]):
        assert counted.add(Ballot(answer, sibling)) == []
    assert counted.leader == Standing("0.75", 3.0, (0, 1, 2))


def test_abstentions_never_form_a_majority() -> None:
    counted = tally(None, None, None)
    assert counted.leader is None and counted.runner_up is None and counted.counts() == []
    assert (counted.num_votes, counted.num_abstentions) == (3, 3)
    assert counted.is_settled


def test_tie_goes_to_the_class_with_the_earliest_sibling_not_the_first_to_arrive() -> None:
    counted = Tally(undecided)
    for sibling, answer in [(3, "9"), (2, "4"), (1, "9"), (0, "4")]:
        counted.add(Ballot(answer, sibling))
    assert [standing.answer for standing in counted.counts()] == ["4", "9"]
    assert [standing.answer for standing in counted.ties] == ["4", "9"]


def test_weights_count_instead_of_heads() -> None:
    counted = Tally(undecided)
    counted.add(Ballot("1", 0, weight=0.4))
    counted.add(Ballot("1", 1, weight=0.4))
    counted.add(Ballot("2", 2, weight=0.9))
    assert counted.leader == Standing("2", 0.9, (2,))


def test_second_ballot_of_a_sibling_is_refused() -> None:
    counted = tally("1")
    with pytest.raises(ValueError, match="sibling 0"):
        counted.add(Ballot("2", 0))


def test_open_question_counts_apart_until_it_is_proven() -> None:
    counted = tally("a+b", "b+a", "7")
    (question,) = counted.open_questions
    assert (question.low, question.high) == (0, 1)
    assert (question.left, question.right) == ("a+b", "b+a")
    assert not counted.is_settled and len(counted.counts()) == 3
    counted.resolve(0, 1, True)
    assert counted.is_settled
    assert counted.leader == Standing("a+b", 2.0, (0, 1))


@pytest.mark.parametrize("verdict", [False, None])
def test_pair_not_shown_equal_stays_apart(verdict: bool | None) -> None:
    counted = tally("a+b", "b+a")
    counted.resolve(0, 1, verdict)
    assert counted.is_settled and len(counted.counts()) == 2


def test_question_between_merged_classes_is_no_longer_open() -> None:
    counted = tally("a+b", "b+a", "b+a+0")
    counted.resolve(0, 1, True)
    counted.resolve(0, 2, True)
    assert counted.is_settled
    counted.resolve(1, 2, False)
    assert len(counted.counts()) == 1


def test_unknown_answers_to_questions_are_ignored() -> None:
    counted = tally("a+b", "b+a")
    counted.resolve(4, 9, True)
    counted.resolve(0, 1, False)
    counted.resolve(0, 1, True)
    assert len(counted.counts()) == 2


def test_hostile_group_asks_a_bounded_number_of_questions() -> None:
    counted = tally(*(f"x+{index}" for index in range(200)))
    assert len(counted.open_questions) <= 200 * MAX_QUESTIONS


def test_the_last_questions_are_about_the_largest_classes() -> None:
    counted = tally(*(f"x+{index}" for index in range(6)))  # 15 questions are open
    for sibling in range(6, 9):
        counted.add(Ballot("x+4", sibling))
    (question,) = counted.add(Ballot("x+9", 9))
    assert question.left == "x+4"


def test_questions_that_a_merge_has_made_moot_leave_room_for_others() -> None:
    counted = tally(*(f"x+{index}" for index in range(7)))  # all 16 questions are open
    for high in range(1, 6):
        counted.resolve(0, high, True)
    assert len(counted.open_questions) == 1
    assert len(counted.add(Ballot("x+9", 9))) == 7


@given(st.permutations(list(itertools.combinations(range(5), 2))), st.sets(st.integers(0, 9)))
def test_order_of_proofs_does_not_matter(order: list[tuple[int, int]], proven: set[int]) -> None:
    pairs = list(itertools.combinations(range(5), 2))
    wanted, counted = (tally(*(f"x+{index}" for index in range(5))) for _ in range(2))
    for pair in pairs:
        wanted.resolve(*pair, pairs.index(pair) in proven)
    for pair in order:
        counted.resolve(*pair, pairs.index(pair) in proven)
    assert counted.counts() == wanted.counts()
    assert counted.votes() == [len(standing.siblings) for standing in counted.counts()]


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(2, 4))
def test_proof_may_come_before_or_after_later_ballots(proven: list[bool], early: int) -> None:
    answers = [f"x+{index}" for index in range(4)] + ["x+1", "x+0"]
    pairs = list(itertools.combinations(range(4), 2))
    verdicts = dict(zip(pairs, proven, strict=True))
    late, counted = tally(*answers), tally(*answers[:early])
    for question in counted.open_questions:
        counted.resolve(question.low, question.high, verdicts[question.low, question.high])
    for sibling in range(early, len(answers)):
        counted.add(Ballot(answers[sibling], sibling))
    for each in (late, counted):
        for pair, verdict in verdicts.items():
            each.resolve(*pair, verdict)
    assert counted.counts() == late.counts()
    assert counted.is_settled and late.is_settled
