"""`eval-judge`: each figure against a value known otherwise, the vote study, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sglang_deepprune import card, evaluation, vote_study
from sglang_deepprune.cli import main
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.judges.permission import with_card
from sglang_deepprune.types import Trace
from tests.unit import recordings


def test_auroc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(200) < 0.4, np.round(rng.random(200), 1)
    assert evaluation.auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(evaluation.auroc(np.ones(3, bool), np.ones(3)))


def test_tnr_at_fnr():
    positives, negatives = np.arange(10) / 10 + 0.05, np.arange(10) / 10
    scores = np.concatenate([positives, negatives])
    labels = np.arange(20) < 10
    # Two of ten positives lie below .25; so do the negatives 0, .1, .2.
    assert evaluation.tnr_at_fnr(labels, scores) == pytest.approx(0.3)
    assert evaluation.tnr_at_fnr(labels, np.ones(20)) == 0.0


def test_calibrate_takes_the_smallest_tau_that_holds_from_there_on():
    scores = np.repeat([0.9, 0.7, 0.5], 100)
    labels = np.concatenate([np.ones(100), np.ones(60), np.zeros(40), np.zeros(100)]).astype(bool)
    assert evaluation.calibrate(labels, scores, 0.2) == pytest.approx(0.5)  # 40 of 200
    assert evaluation.calibrate(labels, scores, 0.1) == pytest.approx(0.7)  # none of 100
    assert evaluation.calibrate(~labels, scores, 0.1) is None
    assert evaluation.false_merge(labels, scores, 0.5) == pytest.approx(0.2)


def case(answers: str, tokens: list[int], scores: np.ndarray | None = None) -> vote_study.Case:
    size = len(answers)
    known = [None if a == "-" else a for a in answers]
    traces = tuple(Trace(i, f"text {i}", 10, "tokens") for i in range(size))
    same = np.array([[a == b for b in answers] for a in answers], dtype=np.float32)
    ids = vote_study.class_ids(known)
    return vote_study.Case(ids, 0, tuple(tokens), traces, same if scores is None else scores)


def test_the_votes_of_a_study_by_hand():
    one = case("AABBBBAB", [100] * 8)
    assert vote_study.everybody(one) == vote_study.Outcome(1, 800.0, True)
    assert vote_study.keep(one, 0.5) == [2, 3]  # K2 = 2 of the largest cluster
    paper = vote_study.clustered(one, 0.5, with_decided=False)
    assert paper == vote_study.Outcome(1, 2 * 100 + 6 * 10, False)
    nobody = case("AABB", [50] * 4, np.zeros((4, 4), np.float32))
    assert vote_study.keep(nobody, 0.5) == [0]  # all singletons: K3
    silent = case("AABB", [50] * 4, np.full((4, 4), np.nan, np.float32))
    assert vote_study.keep(silent, 0.5) == [0, 1, 2, 3]  # no verdict stops nobody


def test_the_decided_stop_of_a_study():
    one = case("AAAAAAAAAAAAAAAB", list(range(100, 260, 10)))
    found = vote_study.decided_alone(one, range(16))
    assert found == vote_study.Outcome(0, 100 + 110 + 14 * 120, True)  # 3:0 of 16 is decided
    split = case("AB-B", [10, 20, 30, 40])
    assert vote_study.decided_alone(split, range(4)) == vote_study.Outcome(1, 100.0, True)
    assert vote_study.everybody(case("BA", [1, 1])).winner == 0  # a tie: the lowest sibling


def test_equal_tokens_between_two_sizes():
    curve = np.array([[[0.5, 10.0], [0.0, 30.0]], [[1.0, 20.0], [0.5, 60.0]]])
    np.testing.assert_allclose(vote_study.equal_tokens(curve, 30.0), [0.75, 0.25])
    np.testing.assert_allclose(vote_study.equal_tokens(curve, 1.0), [0.5, 0.0])
    np.testing.assert_allclose(vote_study.equal_tokens(curve, 99.0), [1.0, 0.5])
    alike = vote_study.rival_curve([case("AAAA", [10, 10, 10, 10])], with_decided=False)
    np.testing.assert_allclose(alike[:, 0], [[1, 10], [1, 20], [1, 30], [1, 40]])


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    status = main(["eval-judge", *argv])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return recordings.write(tmp_path / "traces.jsonl", recordings.lettered(6, 6))


def test_a_perfect_judge_and_its_card(
    tmp_path: Path, file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluation, "MIN_QUESTIONS", 6)
    oracle = tmp_path / "oracle.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    known = [{"text_prefix": row["text"], "answer": row["answer"]} for row in rows]
    recordings.write(oracle, known)
    report, own = tmp_path / "report.json", tmp_path / "card.json"
    status, out, _ = run(
        capsys, "--judge", f"oracle:{oracle}", "--traces", str(file), "--cut", "share:0.75",
        "--json", str(report), "--card", str(own),
    )  # fmt: skip
    assert status == 0
    assert "may prune under balanced" in out
    found = json.loads(report.read_text())
    (row,) = found["rows"]
    assert row["judge"] == "oracle:oracle.jsonl"
    assert row["pooled_auroc"] == row["within_auroc"] == row["tnr_at_fnr_0_2"] == 1.0
    assert row["brier"] == row["false_merge"] == row["false_merge_unseen"] == 0.0
    assert row["same_cluster_decided"] == 1.0
    assert 0.5 < row["difficulty_auroc"] < 1.0
    assert set(found["may_prune"].values()) == {True}
    saved = card.load(own)
    assert saved.may_prune
    assert saved.taus == {"share:0.75": row["tau"]}
    assert (saved.data["questions"], saved.data["traces"]) == (6, 36)


def test_a_card_of_a_judge_fitted_in_folds_is_one_that_a_server_takes(
    file: Path, tmp_path: Path, capsys: Any
):
    own = tmp_path / "judge.card.json"
    argv = ["--judge", "belief", "--folds", "3", "--traces", str(file), "--cut", "share:0.75"]
    assert run(capsys, *argv, "--card", str(own))[0] == 0
    assert card.load(own).data["folds"] == 3
    assert card.load(own).weights == ""  # of no fold's in particular
    for judge in ("belief", "belief:judge.json"):
        with_card(DeepPruneConfig(enable=True, judge=judge, judge_card=str(own)))


def test_a_cut_without_a_tau_does_not_hide_one_that_allows():
    base = {"same_cluster_decided": 1.0, "same_decided_equal_tokens": 0.9}
    rows = [{**base, "cut": cut, "tau": tau, "gain_low": low}
            for cut, tau, low in (("words:25", None, 0.05), ("share:0.5", 0.7, 0.04))]  # fmt: skip
    may_prune, why = evaluation.judge_rule(rows, 16, 60)
    assert may_prune and "share:0.5" in why
    may_prune, why = evaluation.judge_rule(rows[:1], 16, 60)
    assert not may_prune and "false merges" in why
    assert evaluation.judge_rule(rows, 16, 59) == (
        False, "59 questions are too few to tell, 60 the least"
    )  # fmt: skip


def test_an_interval_is_wider_where_the_best_of_several_is_taken():
    values = np.random.default_rng(0).normal(size=50)
    one, eight = (evaluation._interval(values, 0, looks) for looks in (1, 8))
    assert eight[0] < one[0] < one[1] < eight[1]


def test_a_judge_without_knowledge_may_not_prune(file: Path, tmp_path: Path, capsys: Any):
    report = tmp_path / "report.json"
    argv = ["--judge", "similarity", "--traces", str(file), "--json", str(report)]
    status, out, _ = run(capsys, *argv, "--cut", "tokens:20", "--cut", "share:0.25")
    assert status == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["cut"] for row in rows] == ["tokens:20", "share:0.25"]
    assert all(row["within_low"] <= row["within_auroc"] <= row["within_high"] for row in rows)
    assert "may prune under balanced: no" in out


def test_belief_in_folds(file: Path, tmp_path: Path, capsys: Any):
    report = tmp_path / "report.json"
    argv = ["--judge", "belief", "--folds", "3", "--cut", "share:0.75", "--json", str(report)]
    assert run(capsys, *argv, "--traces", str(file))[0] == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert row["judge"] == "belief, 3 folds"
    assert row["within_auroc"] > 0.65


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--judge", "nobody"], "unknown judge"),
        (["--judge", "similarity", "--cut", "lines:3"], "no cut 'lines:3'"),
        (["--judge", "similarity", "--folds", "3"], "only --judge belief"),
        (["--judge", "belief", "--folds", "7"], "must be 2 to 6"),
        (["--judge", "similarity", "--false-merge", "2"], "between 0 and 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(file: Path, capsys: Any, argv: list[str], part: str):
    status, _, err = run(capsys, *argv, "--traces", str(file))
    assert status == 2
    assert part in err


def test_the_calibrate_command(file: Path, tmp_path: Path, capsys: Any):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    known = [{"text_prefix": row["text"], "answer": row["answer"]} for row in rows]
    oracle = recordings.write(tmp_path / "oracle.jsonl", known)
    argv = ["calibrate", "--traces", str(file), "--cut", "share:0.75", "--judge"]
    assert main([*argv, f"oracle:{oracle}"]) == 0
    assert "tau 0.3: " in capsys.readouterr().out
    assert main([*argv, "none"]) == 1
    assert "no tau keeps false merges" in capsys.readouterr().out
    assert main([*argv, "nobody"]) == 2


def test_a_judge_without_verdicts_is_no_table(file: Path, capsys: Any):
    status, _, err = run(capsys, "--judge", "none", "--traces", str(file), "--cut", "tokens:20")
    assert status == 1
    assert "nothing could be judged" in err


@pytest.mark.parametrize(
    ("change", "part"),
    [({"format": "x"}, "not of format"), ({"may_prune": "yes"}, "may_prune"),
     ({"taus": {"a": 2}}, "in .0, 1."), ({"more": 1}, "more")],
)  # fmt: skip
def test_a_card_that_cannot_be_believed(tmp_path: Path, change: dict[str, Any], part: str):
    path = tmp_path / "card.json"
    card.save(card.Card("j", {}, [], {"tokens:500": 0.5}, False, "r"), path)
    assert card.load(path).taus == {"tokens:500": 0.5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(card.CardError, match=part):
        card.load(path)


def test_several_judges_make_one_table(tmp_path: Path, file: Path, capsys: Any):
    report = tmp_path / "report.json"
    asked = ("--judge", "similarity", "trigrams", "--traces", str(file), "--cut", "share:0.75")
    status, out, _ = run(capsys, *asked, "--json", str(report))
    assert status == 0
    assert [row["judge"] for row in json.loads(report.read_text())["rows"]] == [
        "similarity", "trigrams",
    ]  # fmt: skip
    assert "similarity: may prune" in out and "trigrams: may prune" in out
    status, _, err = run(capsys, *asked, "--card", str(tmp_path / "card.json"))
    assert status == 2 and "a card and a plot are of one judge" in err
