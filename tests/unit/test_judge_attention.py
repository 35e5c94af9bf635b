"""FlashInfer as a judge's attention: chosen, checked, and the same scores."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges.attention import ENV, check_attention, choose_attention
from sglang_deepprune.judges.flashinfer_attention import FlashInferAttention
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judging import child_env
from sglang_deepprune.kernels.prefix_attention import prefix_attention, prefix_attention_reference
from sglang_deepprune.kernels.prefix_tree import pack
from tests import fake_flashinfer, lm_judge
from tests.unit.test_packed import forest


def test_the_judges_process_is_told_and_chooses(monkeypatch: pytest.MonkeyPatch):
    assert choose_attention(torch.device("cpu")) is prefix_attention
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    monkeypatch.setenv(ENV, child_env("llm:x", attention="flashinfer")[ENV])
    assert isinstance(choose_attention(torch.device("cpu")), FlashInferAttention)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"judge": "similarity", "judge_device": "cuda"}, "flashinfer is for llm:PATH on a GPU"),
        ({"judge": "llm:/models/judge"}, "flashinfer is for llm:PATH on a GPU"),
        ({"judge": "llm:/models/judge", "judge_device": "cuda:1"}, "flashinfer is not installed"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(settings, sentence, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr("sglang_deepprune.judges.attention.is_flashinfer_installed", lambda: False)
    check_attention(DeepPruneConfig(**settings))
    with pytest.raises(ConfigError, match=sentence):
        check_attention(DeepPruneConfig(**settings, judge_attention="flashinfer"))


@pytest.mark.parametrize("is_cached", [False, True])
def test_it_attends_as_the_reference_does(is_cached: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    attend = FlashInferAttention("cpu")
    for lengths in (([5, 3], [2, 1, 4], [0, 0, 1]), ([7], [1], [0]), ([0, 4], [3, 2], [0, 1])):
        tree = pack(*lengths)
        q = torch.randn(tree.total_tokens, 4, 16)
        k, v = torch.randn(2, tree.total_tokens, 2, 16)
        q = q[tree.num_prefix_tokens :] if is_cached else q
        wanted = prefix_attention_reference(q, k, v, tree)
        torch.testing.assert_close(attend(q, k, v, tree), wanted, atol=1e-5, rtol=1e-5)


def check_a_whole_judge(folder: str, monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    usual = LLMJudge(folder)
    monkeypatch.setenv(ENV, "flashinfer")
    judge = LLMJudge(folder)
    assert judge.packed is not None and isinstance(judge.packed._attend, FlashInferAttention)
    prompts = forest(5, [[30, 12], [7], [44, 3, 9]], 100)
    for _ in range(2):  # the second time with kept prefixes
        found = judge.score_prompts(prompts)
        assert found == pytest.approx(usual.score_prompts(prompts), abs=tolerance)


def test_a_whole_judge_gives_the_same_scores(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    check_a_whole_judge(str(lm_judge.make_base(tmp_path)), monkeypatch, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
def test_flashinfer_itself_gives_the_same_scores(tmp_path, monkeypatch):
    folder = lm_judge.make_base(tmp_path, head_dim=64)
    check_a_whole_judge(str(folder), monkeypatch, 1e-2)
