"""n=16 on the embedded reasoner: real sampling, the default judge, nothing scripted."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_deepprune.answers import compare, extract
from sglang_deepprune.reasoner import questions
from tests.engine.server import Server
from tests.engine.test_groups import group_of, states

N = 16
CUT = {"window": 8, "cut": "words", "cut_words": 4, "cut_max_tokens": 60}
QUESTIONS = questions(seed=11, count=4)


def sample(server: Server, prompt: str, settings: dict[str, Any], **more: Any) -> list[Any]:
    return server.generate(
        prompt, n=N, max_new_tokens=700, temperature=1.0, sampling_seed=3,
        custom_params={"deepprune": settings}, **more,
    )  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.difficulty)
def test_redundant_siblings_are_pruned_and_the_survivors_are_untouched(reasoner: Server, question):
    whole = sample(reasoner, question.prompt, {"preset": "collect"})
    assert states(whole) == ["finished"] * N
    before = len(reasoner.log_lines("deepprune-verdict"))
    outputs = sample(reasoner, question.prompt, {"preset": "paper", "k2": 0, "tau": 0.4, **CUT})
    ended = states(outputs)
    group = group_of(outputs)
    assert "pruned" in ended, group
    freed = 0
    for step in reasoner.log_lines("deepprune-verdict")[before:]:
        freed += step["after"]["available"] - step["before"]["available"]
    for all_of_it, output, state in zip(whole, outputs, ended, strict=True):
        if state == "finished":
            assert output["text"] == all_of_it["text"]
        else:
            assert all_of_it["text"].startswith(output["text"])
            # Private slots: what it generated, less what was never cached, plus one in flight.
            assert output["meta_info"]["completion_tokens"] > 0
    pruned = [o for o, state in zip(outputs, ended, strict=True) if state == "pruned"]
    # Every private slot of a pruned sibling (its tokens, under overlap) came back in its step;
    # survivors that finished in the same step free theirs into the tree, not into the pool.
    assert freed >= sum(output["meta_info"]["completion_tokens"] for output in pruned) - 2 * N
    prompt = outputs[0]["meta_info"]["prompt_tokens"]
    assert all(output["meta_info"]["cached_tokens"] >= prompt - 1 for output in outputs)
    reasoner.wait_idle()


@pytest.mark.parametrize("question", QUESTIONS[:2], ids=lambda question: question.difficulty)
def test_the_vote_is_the_majority_of_the_texts(reasoner: Server, question):
    outputs = sample(reasoner, question.prompt, {"preset": "collect"})
    found = [extract(output["text"]) for output in outputs]
    classes: list[list[str]] = []
    for one in found:
        if one is None:
            continue
        for known in classes:
            if compare(known[0], one.answer):
                known.append(one.answer)
                break
        else:
            classes.append([one.answer])
    group = group_of(outputs)
    assert sorted((len(c) for c in classes), reverse=True) == [v["votes"] for v in group["votes"]]
    most = max(len(known) for known in classes)
    assert any(len(c) == most and compare(c[0], group["answer"]) for c in classes)
    assert group["abstentions"] == sum(one is None for one in found)


def test_a_decided_vote_saves_tokens_and_keeps_the_winner(reasoner: Server):
    question = questions(seed=21, count=1, difficulty="easy")[0]
    whole = sample(reasoner, question.prompt, {"preset": "collect"})
    decided = sample(reasoner, question.prompt, {"preset": "latency"})
    assert group_of(decided)["reason"].startswith("decided")
    assert compare(group_of(whole)["answer"], group_of(decided)["answer"])
    assert group_of(decided)["generated_tokens"] < group_of(whole)["generated_tokens"]


def test_chat_and_stream_of_the_reasoner_vote_too(reasoner: Server):
    question = questions(seed=31, count=1, difficulty="easy")[0]
    body = {"model": "m", "messages": [{"role": "user", "content": question.prompt}], "n": N,
            "max_tokens": 700, "temperature": 1.0, "seed": 5,
            "custom_params": {"deepprune": {"preset": "latency"}}}  # fmt: skip
    reply = reasoner.post("/v1/chat/completions", body).json()
    group = reply["metadata"]["deepprune"]
    assert group["size"] == N and group["answer"] is not None
    last = list(reasoner.stream("/v1/chat/completions", body))[-1]
    assert last["metadata"]["deepprune"]["answer"] == group["answer"]
    reasoner.wait_idle()
