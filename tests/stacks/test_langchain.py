"""LangChain: what ChatOpenAI makes of n choices, and how to get the voted answer all the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.server import Server
from tests.stacks.recipes import PROGRAMS, RECIPES, environ, run_json


def test_the_recipe_gets_the_winner_and_the_record(server: Server, environment: Any):
    python = environment("langchain").python
    said = run_json([python, RECIPES / "langchain_chat.py"], env=environ(server.url))
    assert said["answer"] == "135"
    for name in ("message", "streamed", "recorded"):
        assert said[name].count("\\boxed{135}") == 1
    assert len(said["states"]) == 8 and said["states"].count("finished") >= 3


@pytest.fixture(scope="module")
def seed(server: Server) -> int:
    """A seed with which choice 0 is among the stopped ones."""
    body: dict[str, Any] = {
        "model": "m", "n": 8, "max_tokens": 700,
        "messages": [{"role": "user", "content": "What is 19 + 32 + 37 + 47 ?"}],
        "custom_params": {"deepprune": {"preset": "balanced"}},
    }  # fmt: skip
    for one in range(60):
        reply = server.post("/v1/chat/completions", {**body, "seed": one}).json()
        if reply["metadata"]["deepprune"]["choices"][0]["state"] == "decided":
            return one
    raise AssertionError("choice 0 always runs to its end")


def test_plain_chat_takes_the_first_choice_even_if_it_was_stopped(
    server: Server, environment: Any, seed: int
):
    python = environment("langchain").python
    left = run_json(
        [python, PROGRAMS / "langchain_losses.py"], env=environ(server.url, SEED=str(seed))
    )
    assert left["finish_reason"] == "length" and "\\boxed{" not in left["invoked"]
    assert left["has_record"] is False
    # `generate` has all the choices and their finish reasons, so a vote of one's own is possible;
    assert len(left["generated"]) == 8 and left["reasons"].count("stop") >= 3
    # a stream has neither indices nor the choices apart: eight texts run into one.
    assert left["streamed"].count("\\boxed{") >= 3
