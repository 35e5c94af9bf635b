"""lm-evaluation-harness: maj@k by the server, and by its own filters over grouped repeats."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sglang_deepprune.answers import compare
from tests.engine.server import Server
from tests.stacks.recipes import PROGRAMS, RECIPES, environ, run, run_json

QUESTIONS = [json.loads(line) for line in (RECIPES / "lm_eval_questions.jsonl").open()]
BOX = re.compile(r"boxed\{([^}]*)\}")


def evaluate(
    server: Server,
    command: list[str | Path],
    task: str,
    path: str,
    out: Path,
    *more: str,
    num_concurrent: int = 8,
) -> tuple[float, list[dict[str, Any]]]:
    """The score that lm-eval reports, and what it logged of each question."""
    options = {
        "model": "default", "base_url": f"{server.url}{path}", "tokenizer_backend": "None",
        "tokenized_requests": "False", "num_concurrent": str(num_concurrent),
    }  # fmt: skip
    said = ",".join(f"{name}={value}" for name, value in options.items())
    run(
        [*command, "--include_path", ".", "--tasks", task, "--model_args", said, *more,
         "--output_path", out, "--log_samples"],
        env=environ(server.url, HF_HUB_OFFLINE="1", HF_HOME=str(out / "cache")),
    )  # fmt: skip
    (results,) = out.glob("*/results_*.json")
    (samples,) = out.glob(f"*/samples_{task}_*.jsonl")
    score = json.loads(results.read_text())["results"][task]["exact_match,maj@8"]
    logged = [json.loads(line) for line in samples.open()]
    assert [one["doc"]["question"] for one in logged] == [one["question"] for one in QUESTIONS]
    return score, logged


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_the_server_votes_and_lm_eval_reads_one_text_a_question(
    server: Server, environment: Any, tmp_path: Path, model: str
):
    program = environment("lm-eval").folder / "bin" / "lm_eval"
    is_chat = "chat" in model
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    more = ("--apply_chat_template",) if is_chat else ()
    score, logged = evaluate(
        server, [program, "--model", model], "deepprune_vote", path, tmp_path, *more
    )
    right = finished = 0
    for sample in logged:
        ((text,),) = sample["resps"]
        # The same request again: lm-eval's seed is always the same, and so are the samples.
        prompt = sample["doc"]["question"]
        said: dict[str, Any] = {
            "model": "m", "n": 8, "max_tokens": 700, "temperature": 1.0, "seed": 1234,
            "custom_params": {"deepprune": {"return": "vote"}},
        }  # fmt: skip
        said |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {
            "prompt": prompt
        }  # fmt: skip
        group = server.post(path, said).json()["metadata"]["deepprune"]
        assert BOX.findall(text)[-1] == group["answer"]
        assert len(group["choices"]) == 8
        finished += sum(choice["state"] == "finished" for choice in group["choices"])
        right += compare(group["answer"], sample["doc"]["answer"]) is True
    assert score == right / len(QUESTIONS) and score > 0
    assert finished < 8 * len(QUESTIONS), "nothing was stopped"


@pytest.mark.parametrize("num_concurrent", [8, 1])
def test_stopped_repeats_are_no_wrong_answers(
    server: Server, environment: Any, tmp_path: Path, num_concurrent: int
):
    python = environment("lm-eval").python
    score, logged = evaluate(
        server,
        [python, "lm_eval_repeats.py", "--model", "deepprune-completions"],
        "deepprune_repeats",
        "/v1/completions",
        tmp_path,
        num_concurrent=num_concurrent,
    )
    stopped, naive, right = 0, 0.0, 0.0
    for sample in logged:
        (texts,) = sample["resps"]
        assert len(texts) == 8
        stopped += texts.count("")
        finished = Counter(BOX.findall(text)[-1] for text in texts if BOX.findall(text))
        most = finished.most_common(1)[0]
        (voted,) = sample["filtered_resps"]
        assert finished[voted] == most[1], "a majority of those that ran to their end"
        right += voted == sample["doc"]["answer"]
        naive += most[1] > 8 - sum(finished.values()) and voted == sample["doc"]["answer"]
    assert stopped > 0, "the repeats of a question were no group"
    assert score == right / len(QUESTIONS) > 0
    # What counting the stopped ones as an answer of their own would have reported.
    assert naive / len(QUESTIONS) < score


def test_without_return_vote_it_takes_choice_0_or_fails(server: Server, environment: Any):
    """Why the recipe says `return: vote`."""
    python = environment("lm-eval").python
    left = run_json([python, PROGRAMS / "lm_eval_all_choices.py"], env=environ(server.url))
    reply = server.post(
        "/v1/completions",
        {"model": "m", "prompt": QUESTIONS[0]["question"], "n": 8, "seed": 1234,
         "temperature": 1.0, "max_tokens": 700},
    ).json()  # fmt: skip
    # With lm-eval's seed choice 0 is the longest of the first four: stopped when those agree.
    assert reply["choices"][0]["finish_reason"] == "length"
    assert (
        left["sequential"] == [reply["choices"][0]["text"]] and "boxed" not in left["sequential"][0]
    )
    assert "longer" in left["concurrent"]
