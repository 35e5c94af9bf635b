"""The official OpenAI SDKs, as docs/recipes/openai_sdk.* use them."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from tests.engine.server import Server
from tests.stacks.recipes import RECIPES, environ, run_json


def check_reply(said: dict[str, Any]) -> None:
    """Eight choices, of which some were stopped, and a record that says which."""
    assert said["answer"] == "135"
    states = said["states"]
    assert len(states) == 8 and Counter(states)["finished"] >= 3
    assert {"decided", "not_started"} & set(states), "nothing was saved"
    for state, reason, text in zip(states, said["finish_reasons"], said["texts"], strict=True):
        assert reason == ("stop" if state == "finished" else "length")
        assert ("\\boxed{" in text) >= (state == "finished")
        assert text == "" or state != "not_started"


def check(said: dict[str, Any]) -> None:
    """What both SDKs must show: all of the reply, all of the record, streaming and not."""
    check_reply(said)
    assert said["votes"][0]["votes"] >= 3 and said["completion_tokens"] > 0
    states, streamed = said["states"], said["streamed"]
    assert streamed["settled"] and streamed["answer"] == "135"
    for index, choice in enumerate(streamed["choices"]):
        # One seed, so the same sibling says the same, as far as it came.
        if choice["state"] == states[index] == "finished":
            assert said["streamed_texts"][index] == said["texts"][index]


def test_python_sdk_reads_choices_and_record(server: Server, environment: Any):
    python = environment("openai-python").python
    check(run_json([python, RECIPES / "openai_sdk.py"], env=environ(server.url)))


def test_the_python_sdk_that_sglang_brings_does_too(server: Server, own_versions: Any):
    own_versions("OpenAI SDK that SGLang brings", "openai", "httpx", "sglang")
    check(run_json([sys.executable, RECIPES / "openai_sdk.py"], env=environ(server.url)))


def test_node_sdk_reads_choices_and_record(server: Server, environment: Any):
    folder = environment("openai-node").folder
    # Node looks for packages beside the file that imports them.
    script = folder / "openai_sdk.mjs"
    script.write_text((RECIPES / "openai_sdk.mjs").read_text())
    check(run_json(["node", script], env=environ(server.url)))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stopped_choices_have_logprobs_and_token_ids_like_any_other(server: Server, path: str):
    """What trainers ask for beside the text; a choice that never started has none of either."""
    body: dict[str, Any] = {
        "model": "m", "n": 8, "seed": 5, "max_tokens": 700, "return_token_ids": True,
        "custom_params": {"deepprune": {"preset": "balanced"}},
    }  # fmt: skip
    question = "What is 19 + 32 + 37 + 47 ?"
    if "chat" in path:
        body |= {"messages": [{"role": "user", "content": question}], "logprobs": True}
    else:
        body |= {"prompt": question, "logprobs": 1}
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    reply = response.json()
    states = [choice["state"] for choice in reply["metadata"]["deepprune"]["choices"]]
    assert "not_started" in states
    is_chat = "chat" in path
    for choice, state in zip(reply["choices"], states, strict=True):
        ids = choice["response_token_ids" if is_chat else "token_ids"]
        rows = (choice["logprobs"] or {}).get("content" if is_chat else "token_logprobs") or []
        assert len(rows) == len(ids), state
        assert bool(rows) == (state != "not_started")
