"""Replay's pure parts: cons@k, accounting, what is kept, scripts. No server, no model loading."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.replay import policies_of
from benchmarks.replay_curve import Curves, Sampled, expected_accuracy, gain_interval, winner
from benchmarks.replay_data import (
    Played,
    Question,
    Recorded,
    load_questions,
    spread,
    write_oracle,
)
from benchmarks.replay_report import policy_row, question_row
from benchmarks.replay_results import Outcome, Policy, Results, Usage
from benchmarks.replay_run import read_reply
from sglang_deepprune.answers import extract
from sglang_deepprune.judges.oracle import OracleJudge
from sglang_deepprune.types import Pair, Trace

ANSWERS = ("A", "B", None, "A", "C", "B", "B")


def brute_force(answers, gold, k):
    """Every subset, every tied answer with equal chance."""
    hits = []
    for subset in combinations(answers, k):
        votes = [answer for answer in subset if answer is not None]
        most = max((votes.count(answer) for answer in votes), default=0)
        tied = {answer for answer in votes if votes.count(answer) == most}
        hits.append((gold in tied) / len(tied) if tied else 0.0)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("gold", ["A", "B", "C", "D"])
@pytest.mark.parametrize("k", range(1, len(ANSWERS) + 1))
def test_expected_accuracy_is_the_mean_over_all_subsets(gold, k):
    assert expected_accuracy(ANSWERS, gold, k) == pytest.approx(brute_force(ANSWERS, gold, k))


def test_abstentions_alone_are_wrong():
    assert expected_accuracy((None, None), "A", 2) == 0.0


def test_more_traces_than_were_recorded_are_refused():
    with pytest.raises(ValueError, match="1 to 2"):
        expected_accuracy(("A", "B"), "A", 3)


def curves():
    wide = Sampled(("A", "A", "B", "A"), (10, 20, 30, 40), "A")
    narrow = Sampled(("B", "A"), (5, 15), "B")
    return Curves.of([wide, narrow])


def test_a_question_with_fewer_traces_gives_all_it_has():
    points = curves().points
    assert [point.k for point in points] == [1, 2, 3, 4]
    assert [point.tokens for point in points] == pytest.approx([35, 70, 95, 120])
    assert points[0].accuracy == pytest.approx((0.75 + 0.5) / 2)
    assert points[3].accuracy == pytest.approx((1.0 + 0.5) / 2)  # 1:1 in the narrow one


def test_between_two_k_tokens_and_accuracy_are_interpolated():
    low, high = curves().points[:2]
    middle = curves().at_tokens((low.tokens + high.tokens) / 2)
    assert middle.k == pytest.approx(1.5)
    assert middle.accuracy == pytest.approx((low.accuracy + high.accuracy) / 2)


def test_beyond_the_curve_its_ends_hold():
    assert curves().at_tokens(1).k == 1
    assert curves().at_tokens(10**6).k == 4


def test_a_policy_that_is_the_curve_gains_nothing():
    sampled = [Sampled(("A",) * 4, (10,) * 4, gold) for gold in "AB"]
    low, high = gain_interval(Curves.of(sampled), [40, 40], [True, False], draws=200)
    assert (low, high) == (0.0, 0.0)


def test_the_interval_of_a_better_policy_is_above_zero():
    sampled = [Sampled(("A", "B", "C", "D"), (10,) * 4, "A")] * 8
    low, high = gain_interval(Curves.of(sampled), [20] * 8, [True] * 8, draws=200)
    assert low == high == pytest.approx(0.75)


def test_ties_of_the_whole_vote_go_to_the_lowest_sibling():
    assert winner((None, "B", "A", "A", "B")) == ("B", True)
    assert winner((None, None)) == (None, False)


def played(answers=("A", "B", None), lengths=(3, 5, 4), gold="A"):
    traces = tuple(Recorded("thought", answer) for answer in answers)
    return Played(Question("q", "prompt", gold, traces), tuple(range(7)), lengths)


def reply(tokens, states, record, text="</think>\n\nThe answer is (A).", cached=6):
    """What the server sends: the group's record rides on the first choice."""
    choices = []
    for index, (count, state) in enumerate(zip(tokens, states, strict=True)):
        body = {"choice": {"state": state}, **({"group": record} if index == 0 else {})}
        meta = {"completion_tokens": count, "prompt_tokens": 7, "deepprune": body,
                "cached_tokens": cached if count else 0}  # fmt: skip
        choices.append({"text": text, "meta_info": meta})
    return choices


RECORD = {
    "active": True, "reason": "pruned", "answer": "A", "tie": False,
    "votes": [{"answer": "A", "votes": 1}],
    "judge_tokens": 90, "judge_calls": 3, "judge_ms": 1.5,
}  # fmt: skip


def test_tokens_of_stopped_siblings_count_and_unstarted_ones_computed_no_prefix():
    choices = reply((3, 2, 0), ("finished", "pruned", "not_started"), RECORD)
    outcome = read_reply(Policy("paper", "similarity", 0), played(), choices, 1.0)
    assert outcome.decode_tokens == 5
    assert outcome.longest == 3
    assert outcome.prefix_tokens == 7 + 1 + 1  # the warm-up's prompt, one token a started sibling
    assert (outcome.pruned, outcome.not_started, outcome.decided) == (1, 1, 0)
    assert (outcome.judge_tokens, outcome.judge_calls) == (90, 3)
    assert outcome.is_right


def test_plain_votes_over_what_it_said():
    switched_off = {**RECORD, "active": False, "answer": None, "votes": []}
    choices = reply((3, 5, 4), ("finished",) * 3, switched_off)
    for choice, answer in zip(choices, "AB", strict=False):
        choice["text"] = f"</think>\n\nThe answer is ({answer})."
    choices[2]["text"] = "</think>\n\nI could not reach an answer."
    outcome = read_reply(Policy("plain"), played(), choices, 1.0)
    assert (outcome.winner, outcome.tie, outcome.votes) == ("A", True, {"A": 1, "B": 1})


def test_plain_that_says_something_else_is_refused():
    choices = reply((3, 5, 9), ("finished",) * 3, {**RECORD, "active": False})
    with pytest.raises(RuntimeError, match="not what was recorded"):
        read_reply(Policy("plain"), played(), choices, 1.0)


def test_a_policy_without_a_group_is_refused():
    choices = reply((3,), ("finished",), {**RECORD, "active": False, "reason": "switched off"})
    with pytest.raises(RuntimeError, match="switched off"):
        read_reply(Policy("latency"), played(), choices, 1.0)


def outcome_of(**changes):
    choices = reply((3, 2, 0), ("finished", "pruned", "not_started"), RECORD)
    outcome = read_reply(Policy("paper", "similarity", 0), played(), choices, 1.0)
    fields = {name: getattr(outcome, name) for name in Outcome.__slots__}
    usage = Usage(wall_s=2.0, cpu_s=1.0, steps=9, kv_sum=30, kv_samples=3, kv_peak=20)
    return Outcome(**{**fields, "usage": usage, **changes})


def test_a_cut_off_run_goes_on_after_its_last_whole_line(tmp_path):
    results = Results(tmp_path)
    results.add(outcome_of())
    with results.path.open("a") as out:
        out.write('{"policy": "paper", "jud')
    again = Results(tmp_path)
    policy = Policy("paper", "similarity", 0)
    assert again.of(policy, [played()]) == [outcome_of()]
    assert again.missing(policy, [played()]) == []
    assert again.missing(Policy("paper", "similarity", 20), [played()]) == [played()]


def test_what_comes_after_a_cut_off_line_is_read(tmp_path):
    results = Results(tmp_path)
    results.path.write_text('{"policy": "pa')
    again = Results(tmp_path)
    again.add(outcome_of())
    assert len(Results(tmp_path).outcomes) == 1


def test_rows_are_sums_over_questions():
    sampled = Sampled(("A", "B", None), (3, 5, 4), "A")
    outcomes = [outcome_of(), outcome_of(is_right=False, winner="B")]
    row = policy_row(
        Policy("paper", "similarity", 0), outcomes, [played()] * 2, Curves.of([sampled] * 2)
    )
    assert row["decode_tokens"] == 10
    assert row["judge_tokens"] == 180
    assert (row["wall_s"], row["cpu_s"], row["steps"]) == (4.0, 2.0, 18)
    assert (row["kv_peak"], row["kv_mean"]) == (20, 10)
    assert (row["accuracy"], row["same_winner"]) == (0.5, 0.5)
    assert row["cons_k"] == pytest.approx(10 / 8)  # a trace of both questions takes 8
    assert row["cons_k_with_judge"] == 3
    assert row["gain"] == pytest.approx(0.5 - row["cons_k_accuracy"])
    assert json.dumps(row)


def test_a_question_row_is_flat_and_names_plains_winner():
    curve = Curves.of([Sampled(("A", "B", None), (3, 5, 4), "A")])
    row = question_row(outcome_of(), played(), curve)
    assert row["plain_winner"] == "A"
    assert row["k2"] == "n/4"
    assert row["cons_k"] == pytest.approx(1.25)


@pytest.mark.parametrize("answer", [*"ABCDEFGHIJ", None])
def test_a_script_says_its_recorded_answer(answer):
    found = extract(Recorded("So it must be (B). The answer is B.", answer).script)
    assert (found.answer if found else None) == answer


def recording(path: Path) -> Path:
    rows = [
        {"question_id": name, "question": "Which? A) x", "options": [f"{name} one", "two"],
         "gold": "B", "seed": take // 2, "trace": f"{name} {take} " + "so " * 900, "answer": answer}
        for take, answer in enumerate(("A", "B", None)) for name in ("q1", "q2")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_traces_that_share_a_seed_stay_apart_and_prompts_show_the_options(tmp_path):
    questions = load_questions(recording(tmp_path / "traces.jsonl"))
    assert [question.question_id for question in questions] == ["q1", "q2"]
    assert [trace.answer for trace in questions[0].traces] == ["A", "B", None]
    assert questions[0].prompt != questions[1].prompt
    assert "A. q1 one\nB. two" in questions[0].prompt


def test_spread_takes_from_all_parts():
    questions = [Question(str(i), "", "A", ()) for i in range(10)]
    assert [one.question_id for one in spread(questions, 4)] == ["0", "2", "5", "7"]
    assert spread(questions, 0) == spread(questions, 99) == questions


def test_the_oracle_file_is_what_the_judge_reads(tmp_path):
    questions = load_questions(recording(tmp_path / "traces.jsonl"))
    write_oracle(tmp_path / "oracle.jsonl", questions)
    judge = OracleJudge(str(tmp_path / "oracle.jsonl"))
    first, other, silent = (
        Trace(i, trace.text[:1500], 500, "words") for i, trace in enumerate(questions[0].traces[:3])
    )
    twin = Trace(3, questions[1].traces[0].text[:1500], 500, "words")
    pairs = [Pair(first, other), Pair(first, twin), Pair(first, silent)]
    assert judge.score(pairs[1:]).tolist() == [1.0, 0.0]


def test_paper_takes_each_judge_with_each_k2_and_the_rest_one_server():
    found = policies_of(["plain", "latency", "paper"], ["oracle", "similarity"], [20, 0])
    assert [(one.name, one.judge, one.k2) for one in found] == [
        ("plain", "none", None),
        ("latency", "none", None),
        ("paper", "similarity", 20),
        ("paper", "similarity", 0),
        ("paper", "oracle", 20),
        ("paper", "oracle", 0),
    ]
    assert found[0].settings is False
    assert found[3].settings == {"preset": "paper", "k2": 0}
