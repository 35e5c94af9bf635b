"""Labelled pairs: all of a question in one split, none without a label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_deepprune import pairs
from sglang_deepprune.cli import main
from sglang_deepprune.traces import load
from tests.unit import recordings


def run(tmp_path: Path, rows: list[dict], *arguments: str) -> tuple[int, list[dict]]:
    traces = recordings.write(tmp_path / "traces.jsonl", rows)
    output = tmp_path / "pairs.jsonl"
    status = main(["pairs", "--traces", str(traces), "--output", str(output), *arguments])
    found = [json.loads(line) for line in output.read_text().splitlines()] if status == 0 else []
    return status, found


def test_all_pairs_of_a_question_are_there_once_and_in_one_split(tmp_path: Path):
    _, found = run(tmp_path, recordings.lettered(num_questions=10, n=6))
    assert len(found) == 10 * 15
    assert len({(row["question_id"], row["left"], row["right"]) for row in found}) == len(found)
    assert all(row["left"] < row["right"] for row in found)
    splits = {name: {r["split"] for r in found if r["question_id"] == name}
              for name in {row["question_id"] for row in found}}  # fmt: skip
    assert all(len(names) == 1 for names in splits.values())
    counts = {name: sum(names == {name} for names in splits.values()) for name in pairs.SPLITS}
    assert counts == {"train": 7, "dev": 1, "test": 2}


def test_the_label_is_our_equivalence_and_abstentions_have_none(tmp_path: Path):
    answers = ["1/2", "0.5", "2", None]
    rows = [
        {"question_id": "q", "prompt": "?", "text": "x", "num_tokens": 5, "answer": answer}
        for answer in answers
    ]
    status, found = run(tmp_path, rows, "--json", str(tmp_path / "out.json"))
    assert status == 0
    labels = {(row["left"], row["right"]): row["same"] for row in found}
    assert labels == {(0, 1): True, (0, 2): False, (1, 2): False}
    (balance,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert balance["same"] == 1 and balance["different"] == 2 and balance["unlabelled"] == 3
    assert balance["same_share"] == pytest.approx(1 / 3, abs=1e-3)


def test_texts_are_written_at_the_cut_that_was_asked_for(tmp_path: Path):
    rows = recordings.open_ended(num_questions=2, n=3)
    _, found = run(tmp_path, rows, "--cut", "share:0.5")
    by_id = {question.question_id: question for question in load(tmp_path / "traces.jsonl")}
    for row in found:
        whole = by_id[row["question_id"]].traces[row["left"]].text
        assert whole.startswith(row["left_text"]) and 0 < len(row["left_text"]) < len(whole)


def test_the_split_is_seeded():
    first, again, other = (pairs.split(40, (0.5, 0.25, 0.25), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [first.count(name) for name in pairs.SPLITS] == [20, 10, 10]


@pytest.mark.parametrize("arguments", [
    ("--shares", "0.5", "0.2", "0.2"), ("--shares", "1.2", "-0.2", "0"), ("--cut", "lines:3"),
])  # fmt: skip
def test_bad_arguments_get_one_sentence(tmp_path: Path, capsys, arguments):
    status, _ = run(tmp_path, recordings.lettered(num_questions=2, n=2), *arguments)
    assert status == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
