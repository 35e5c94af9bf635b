"""The demo's pure parts: the rival's expectation, the live view's state, the table's rows."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from sglang_deepprune.demo import Mode, Outcome, modes, row_of
from sglang_deepprune.demo_view import Cell, Row, View
from sglang_deepprune.equal_tokens import Sampled, cons_accuracy, cons_at_tokens, majority
from sglang_deepprune.reasoner import Question

ANSWERS = ("7", "7", "8", None, "7", "9")
QUESTION = Sampled(ANSWERS, (10, 20, 30, 40, 50, 60), "7")


def test_a_majority_counts_equal_answers_and_no_abstentions():
    assert majority(["8", "7", "7.0", None]) == "7"
    assert majority([None, None]) is None
    assert majority(["8", "7"]) == "8"  # a tie: the first


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cons_at_k_is_the_mean_over_all_subsets(k: int):
    subsets = list(combinations(ANSWERS, k))
    # Every order is as likely: a tie is right in as many cases as its classes are first.
    exact = 0.0
    for subset in subsets:
        counts = {a: subset.count(a) for a in subset if a is not None}
        best = [a for a, count in counts.items() if count == max(counts.values())]
        exact += ("7" in best) / len(best) if best else 0.0
    assert cons_accuracy(QUESTION, k, draws=4000) == pytest.approx(exact / len(subsets), abs=0.03)


def test_equal_tokens_interpolate_between_whole_k():
    low, high = (cons_accuracy(QUESTION, k) for k in (2, 3))
    rival = cons_at_tokens([QUESTION], 35 * 2.5)
    assert rival.k == pytest.approx(2.5)
    assert rival.accuracy == pytest.approx((low + high) / 2)
    assert cons_at_tokens([QUESTION], 1e9).k == 6 and cons_at_tokens([QUESTION], 1).k == 1


def chunk(index: int, tokens: int, **meta: object) -> dict[str, object]:
    return {"index": index, "meta_info": {"completion_tokens": tokens, **meta}}


def test_the_view_follows_a_stream():
    row = Row("2 + 2", "4", [Cell(), Cell()])
    row.take(chunk(0, 5, finish_reason=None))
    assert (row.cells[0].state, row.cells[0].tokens) == ("running", 5)
    ended = {"choice": {"state": "finished", "answer": "4"}}
    row.take(chunk(0, 9, finish_reason={"type": "stop"}, deepprune=ended))
    pruned = {"choice": {"state": "pruned", "answer": None}, "group": {"answer": "4"}}
    row.take(chunk(1, 7, finish_reason={"type": "length"}, deepprune=pruned))
    assert [cell.state for cell in row.cells] == ["finished", "pruned"]
    assert row.group == {"answer": "4"}
    view = View("test", total=1)
    view.open(0, row)
    assert view.__rich__() is not None
    view.close(0)
    assert (view.done, view.rows) == (1, {})


def outcome(answer: str | None, tokens: int) -> Outcome:
    choices: list[dict[str, Any]] = [
        {"answer": "4", "tokens": tokens, "state": "finished"},
        {"answer": None, "tokens": 3, "state": "pruned"},
    ]
    group = {"answer": answer, "generated_tokens": tokens + 3, "judge_calls": 2, "judge_tokens": 9}
    return Outcome(Question("2 + 2", "4", "easy"), group, choices)


def test_a_row_counts_states_and_compares_winners_with_plain():
    plain = [outcome("4", 20), outcome("5", 20)]
    row = row_of(Mode("m", {}), [outcome("4.0", 10), outcome(None, 10)], 1.5, plain)
    assert (row["vote_right"], row["same_winner"], row["single_right"]) == (0.5, 0.5, 1.0)
    assert (row["finished"], row["pruned"], row["tokens"], row["judge_calls"]) == (2, 2, 13, 4)


def test_plain_is_the_first_mode_and_stops_nothing():
    assert modes(["paper"])[0].settings == {"preset": "collect"}
    assert all("paper: 25" in mode.cut for mode in modes(["paper", "paper-scaled"])[1:])
