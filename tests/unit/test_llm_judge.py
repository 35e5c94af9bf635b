"""A causal LM as judge: its scores are the model's own, and training gives its label a meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from sglang_deepprune.cli import main
from sglang_deepprune.config import ConfigError
from sglang_deepprune.evaluation import auroc
from sglang_deepprune.judges import check_judge, is_remote_model, load_judge
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.lm_training import examples, focal_loss
from sglang_deepprune.types import Pair, Trace
from tests import lm_judge


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return lm_judge.make_base(tmp_path_factory.mktemp("base"))


def test_scores_are_the_models_own_probabilities_whatever_the_batch(base: Path):
    judge = LLMJudge(str(base))
    pairs, _ = lm_judge.pairs(num_questions=3)
    scores = judge.score(pairs)
    assert scores.dtype == np.float32 and scores.shape == (len(pairs),)
    for pair, score in zip(pairs[::7], scores[::7], strict=True):
        (prompt,) = judge.prompts.write([pair])
        with torch.inference_mode():
            logits = judge.model(input_ids=torch.tensor([[*prompt.prefix, *prompt.rest]])).logits
        same, different = logits[0, -1, list(judge.prompts.label_ids)].double()
        assert score == pytest.approx(float(torch.sigmoid(same - different)), abs=1e-5)
        assert judge.score([pair])[0] == pytest.approx(float(score), abs=1e-5)
        assert judge.score([Pair(pair.right, pair.left)])[0] == pytest.approx(
            float(score), abs=1e-5
        )


def test_a_trace_without_text_has_no_verdict(base: Path):
    judge = LLMJudge(str(base))
    blank, said = Trace(0, " \n", 1, "tokens"), Trace(1, "it is east", 3, "tokens")
    scores = judge.score([Pair(blank, said), Pair(said, Trace(2, "it is west", 3, "tokens"))])
    assert np.isnan(scores[0]) and 0 <= scores[1] <= 1
    assert judge.score([]).shape == (0,)


def test_a_model_that_caps_its_logits_is_read_right(tmp_path: Path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from tests.engine.tiny_model import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer(["Yes", "No", "it is"])
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = LLMJudge(str(tmp_path))
    pair = Pair(Trace(0, "it is", 2, "tokens"), Trace(1, "is it", 2, "tokens"))
    (prompt,) = judge.prompts.write([pair])
    with torch.inference_mode():
        logits = judge.model(input_ids=torch.tensor([[*prompt.prefix, *prompt.rest]])).logits
    same, different = logits[0, -1, list(judge.prompts.label_ids)]
    assert 0.001 < abs(float(same)) < 0.0499  # capped, yet not flat
    assert judge.score([pair])[0] == pytest.approx(float(torch.sigmoid(same - different)), abs=1e-5)


def test_training_gives_the_label_token_signal(base: Path):
    pairs, labels = lm_judge.pairs()
    truth = np.array(labels)
    before = auroc(truth, LLMJudge(str(base)).score(pairs))
    judge = load_judge(f"llm:{lm_judge.trained()}")
    after = auroc(truth, judge.score(pairs))
    assert before < 0.7 and after > 0.95
    saved = json.loads((lm_judge.trained() / "training.json").read_text())
    assert saved["is_focal"] and saved["gamma"] == 2.0


def test_the_command_trains_with_lora_and_goes_on_where_it_was_stopped(
    base: Path, tmp_path: Path, capsys
):
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(
        json.dumps({"question_id": one.question_id, "prompt": "Where?", "text": t.text,
                    "num_tokens": 8, "answer": t.answer}) + "\n"
        for one in lm_judge.recording(6, 6, 3) for t in one.traces
    ))  # fmt: skip
    arguments = [
        "train-judge", "--traces", str(traces), "--output", str(tmp_path / "out"), "--base",
        str(base), "--cut", "tokens:500", "--lora", "4", "--batch", "4", "--epochs", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "GiB" in capsys.readouterr().out
    judge = load_judge(f"llm:{tmp_path / 'out'}")
    assert judge.score(lm_judge.pairs(1)[0]).shape == (28,)
    assert not (tmp_path / "out" / "checkpoints").exists(), "a finished run is not resumed"
    assert main([*arguments, "--seed", "5"]) == 0
    assert ", 0 steps" not in capsys.readouterr().out
    assert main([*arguments, "--alpha", "2"]) == 2
    assert "--alpha" in capsys.readouterr().err


def test_focal_loss_is_that_of_torchvision():
    torch.manual_seed(0)
    logits, labels = torch.randn(64) * 3, (torch.rand(64) > 0.5).float()
    for gamma, alpha in ((2.0, 0.25), (0.0, 0.5), (1.5, 0.7)):
        wanted = sigmoid_focal_loss(logits, labels, alpha, gamma, reduction="mean")
        assert focal_loss(logits, labels, gamma, alpha) == pytest.approx(float(wanted), rel=1e-5)


def test_the_rarer_label_is_shown_more_often(base: Path):
    judge = LLMJudge(str(base))
    questions = lm_judge.recording(10, 6, 4)
    once = lm_judge.RECIPE.__class__(cut="tokens:500", oversample=1)
    twice = lm_judge.RECIPE.__class__(cut="tokens:500", oversample=2)
    counts = {}
    for name, recipe in (("once", once), ("twice", twice)):
        rows = examples(questions, judge.prompts, recipe)
        counts[name] = [sum(row["labels"] == label for row in rows) for label in (0.0, 1.0)]
    rare = counts["once"].index(min(counts["once"]))
    assert counts["twice"][rare] == 2 * counts["once"][rare]
    assert counts["twice"][1 - rare] == counts["once"][1 - rare]


def test_what_cannot_be_a_model_is_refused_before_anything_is_loaded(tmp_path: Path):
    (tmp_path / "x.bin").write_text("")
    refusals = {
        "llm": "needs a model",
        "llm:nowhere": "no model",
        f"llm:{tmp_path / 'x.bin'}": "neither a folder nor a GGUF",
        f"llm:{tmp_path}": r"no config\.json",
    }
    for spec, part in refusals.items():
        with pytest.raises(ConfigError, match=part):
            check_judge(spec)
    check_judge("llm:THU-KEG/DeepPrune-Judge-4B")  # the hub may have it
    assert is_remote_model("llm:THU-KEG/DeepPrune-Judge-4B")
