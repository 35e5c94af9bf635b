"""The belief judge: its candidates, its training, its scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_deepprune import card, training
from sglang_deepprune.config import ConfigError
from sglang_deepprune.evaluation import auroc
from sglang_deepprune.judges import belief, check_judge, load_judge
from sglang_deepprune.judges.candidates import NUM_FEATURES, options_of, result_candidates
from sglang_deepprune.traces import load, truncate
from sglang_deepprune.types import Pair, Trace
from tests.unit import recordings


def test_options_are_the_last_list_of_the_prompt():
    prompt = "Given\nA. no\nB. no\n\nWhich?\n(A) x\n(B) y z\n(C) w\nD, nothing"
    assert options_of(prompt) == {"A": "x", "B": "y z", "C": "w"}
    assert options_of("A. only one") == {}
    assert options_of("B. first\nC. second") == {}


def test_results_are_what_a_trace_states():
    found = result_candidates(
        "start 7 and 12. 7 + 12 = 19. wait, 1,000.50 is it: so x = -3 \\boxed{4}"
    )
    assert found.names == ("19", "-3", "4")  # 7 and 12 are given, not stated
    assert found.features.shape == (3, NUM_FEATURES)
    assert result_candidates("").features.shape == (0, NUM_FEATURES)
    many = result_candidates(" ".join(f"x = {i}." for i in range(40)))
    assert many.names == tuple(str(i) for i in range(28, 40))


@pytest.fixture(scope="module", params=["options", "results"])
def trained(request: Any, tmp_path_factory: Any) -> tuple[str, str, list[dict[str, Any]]]:
    """(kind, path of the weights, unseen rows)."""
    make: Callable[..., list[dict[str, Any]]]
    make = recordings.lettered if request.param == "options" else recordings.open_ended
    folder = tmp_path_factory.mktemp("belief")
    file = recordings.write(folder / "train.jsonl", make(10, 8, seed=1))
    path = folder / "weights.json"
    assert training.main(["--traces", str(file), "--output", str(path)]) == 0
    return request.param, str(path), make(8, 8, seed=2)


def test_it_learns_and_the_order_of_pairs_does_not_matter(trained: Any, tmp_path: Path):
    _, path, rows = trained
    judge = load_judge(f"belief:{path}")
    labels, scores = [], []
    for question in load(recordings.write(tmp_path / "test.jsonl", rows)):
        short = [truncate(trace, "share:0.75", i) for i, trace in enumerate(question.traces)]
        pairs = [(i, j) for i in range(len(short)) for j in range(i)]
        got = judge.score([Pair(short[i], short[j]) for i, j in pairs])
        assert got.dtype == np.float32
        assert ((got >= 0) & (got <= 1)).all()
        turned = judge.score([Pair(short[j], short[i]) for i, j in pairs])
        np.testing.assert_allclose(got, turned, rtol=1e-6)
        alone = judge.score([Pair(short[pairs[0][0]], short[pairs[0][1]])])
        assert alone[0] == got[0]
        answers = [trace.answer for trace in question.traces]
        labels += [answers[i] == answers[j] for i, j in pairs]
        scores += got.tolist()
    assert auroc(np.array(labels), np.array(scores)) > 0.8
    assert abs(np.mean(scores) - np.mean(labels)) < 0.15  # calibrated, roughly


def test_no_verdict_on_what_it_was_not_trained_for(trained: Any):
    kind, path, _ = trained
    judge = load_judge(f"belief:{path}")
    prompt = "no list" if kind == "options" else "A. x\nB. y"
    strange = Trace(0, "so x = 5", 4, "tokens", prompt=prompt)
    empty = Trace(1, " ", 1, "tokens", prompt=prompt)
    assert np.isnan(judge.score([Pair(strange, strange), Pair(empty, strange)])).all()
    assert judge.score([]).shape == (0,)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", json.dumps({"format": belief.FORMAT}),
     json.dumps({"format": belief.FORMAT, "options": {"candidate": [1], "other": [], "pair": []}}),
     json.dumps({"format": belief.FORMAT, "options": {"weights": 5}})],
)  # fmt: skip
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: str):
    path = tmp_path / "judge.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="judge.json"):
        load_judge(f"belief:{path}")


def test_its_path_must_exist(tmp_path: Path):
    with pytest.raises(ConfigError, match="no file"):
        check_judge(f"belief:{tmp_path / 'missing.json'}")


def test_what_ships_knows_the_reasoners_answers_and_has_a_card():
    judge = belief.BeliefJudge()
    text = (
        "<think> hmm let us see go from the left . start with 10 . so 10 + 17 = 27 . "
        "thus 27 + 21 = 48 . wait maybe check 27 + 21 = 48 so right . "
        "hence 48 + 21 = {} . so the total is {} . "
        "</think> thus the answer is \\boxed{{{}}}"
    )
    left, right, other = (
        Trace(i, text.format(n, n, n), 20, "tokens", prompt="What is 10 + 17 + 21 + 21 ?")
        for i, n in enumerate((69, 69, 79))
    )
    same, different = judge.score([Pair(left, right), Pair(left, other)])
    assert same > 0.6 > 0.4 > different
    own = card.load(belief.EMBEDDED.with_suffix(".card.json"))
    assert own.may_prune is False  # a judge that ships must earn it


def test_training_says_what_is_missing(tmp_path: Path, capsys: Any):
    rows = [{**row, "answer": "A"} for row in recordings.lettered(4, 4)]
    file = recordings.write(tmp_path / "same.jsonl", rows)
    assert training.main(["--traces", str(file), "--output", str(tmp_path / "out.json")]) == 2
    assert "same label" in capsys.readouterr().err
    silent = recordings.write(tmp_path / "none.jsonl", [{**row, "answer": None} for row in rows])
    assert training.main(["--traces", str(silent), "--output", str(tmp_path / "out.json")]) == 2
    assert "no trace in the recording has an answer" in capsys.readouterr().err


def test_beliefs_sum_to_one_and_other_is_a_candidate():
    weights = belief.Weights([0.0] * (2 * NUM_FEATURES), [0.0, 0.0], [0.0] * 6)
    found = belief.belief(result_candidates("x = 3, y = 4"), 0.0, weights, has_other=True)
    assert found == pytest.approx({"3": 1 / 3, "4": 1 / 3, belief.OTHER: 1 / 3})
    features = belief.pair_features(found, found, (1.0, 2.0))
    assert features[1:] == pytest.approx([2 / 9, 1 / 9, 1 / 9, 3.0])
