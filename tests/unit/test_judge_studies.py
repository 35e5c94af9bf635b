"""The studies of judging: every way gives the same placements, and counts what it read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import comparisons, judge
from tests import lm_judge


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text("".join(
        json.dumps({"question_id": one.question_id, "prompt": "Where?", "text": f"{t.text} {i}",
                    "num_tokens": 8, "answer": t.answer}) + "\n"
        for one in lm_judge.recording(2, 8, 5) for i, t in enumerate(one.traces)
    ))  # fmt: skip
    return path


def run(module, monkeypatch, *arguments: str) -> list[dict]:
    output = Path(arguments[-1])
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments[:-1], "--json", str(output)])
    module.main()
    return json.loads(output.read_text())["rows"]


def test_the_ways_agree_and_sharing_reads_less(traces: Path, tmp_path: Path, monkeypatch):
    base = lm_judge.make_base(tmp_path / "base", prompt="{problem} {first} | {second}")
    rows = run(
        judge, monkeypatch, "--traces", str(traces), "--judge", str(base), "--n", "8", "--cut",
        "tokens:500", "--tau", "0.9", "--ways", "naive", "sorted", "packed",
        str(tmp_path / "out.json"),
    )  # fmt: skip
    found = {(row["way"], row["comparisons"]): row for row in rows}
    full = [found[way, "full"] for way in ("naive", "sorted", "packed")]
    assert len({row["pairs"] for row in full}) == 1
    assert all(row["same_assignments"] == 1 for row in full)
    assert found["packed", "full"]["tokens"] < found["sorted", "full"]["tokens"]
    assert found["packed", "full"]["bound"] > 1 and found["sorted", "full"]["bound"] == 1
    assert found["packed", "sequential"]["pairs"] <= found["packed", "full"]["pairs"]
    assert [row["error"] for row in rows[:4]] == [0, 0, 0.05, 0.05]


def test_the_naive_way_reads_where_the_model_is():
    class Model:
        device = torch.device("meta")

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            assert input_ids.device == attention_mask.device == self.device
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 9))

    asked: Any = SimpleNamespace(model=Model(), prompts=SimpleNamespace(label_ids=(1, 2)))
    way = judge.Naive(asked)
    assert way._batch([torch.tensor([3, 4, 5]), torch.tensor([6])]) == [0.5, 0.5]


def test_comparisons_are_counted_against_the_full_loop(traces: Path, tmp_path: Path, monkeypatch):
    rows = run(
        comparisons, monkeypatch, "--traces", str(traces), "--judge", "trigrams", "--cut",
        "tokens:500", "--tau", "0.5", str(tmp_path / "out.json"),
    )  # fmt: skip
    full, exact = rows[0], rows[1]
    assert (full["comparisons"], full["same_assignments"], full["tokens_ratio"]) == ("full", 1, 1)
    assert exact["comparisons"] == "sequential" and exact["error"] == 0
    assert exact["same_assignments"] == exact["same_decisions"] == 1
    assert 0 < exact["calls_a_trace"] <= full["calls_a_trace"]


def test_a_judge_whose_scores_depend_on_their_company_is_not_asked_one_by_one(traces: Path):
    with pytest.raises(SystemExit, match="asked in full"):
        next(comparisons.trace_cases(str(traces), "similarity", "tokens:500", 0.5, 1))
