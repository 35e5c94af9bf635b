"""What steers the tokens of siblings: logit processors, thinking budgets, grammars, tool calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from tests.engine.logit_processors import OneToken, thinking_budget
from tests.engine.server import Server
from tests.engine.test_groups import group_of, states
from tests.engine.test_shapes import body_of, generate, needs_page1, settled


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_custom_logit_processor_sees_its_own_keys_for_each_sibling(
    scripted: Server, tokenizer: Any, preset: str
):
    needs_page1(scripted)
    token, surprise = (tokenizer.encode(text)[0] for text in ("thus", "wait"))
    custom = {"token": token, "surprise": surprise, "deepprune": {"preset": preset}}
    body = body_of("/generate", "one token only", 6, custom)
    body["sampling_params"]["max_new_tokens"] = 12
    outputs = generate(scripted, {**body, "custom_logit_processor": OneToken.to_str()})
    assert [output["output_ids"] for output in outputs] == [[token] * 12] * 6
    assert group_of(outputs)["size"] == 6
    settled(scripted)


def test_a_thinking_budget_by_logit_processor_holds_for_each_sibling(
    scripted: Server, tokenizer: Any
):
    needs_page1(scripted)
    start, end, newline = (tokenizer.encode(text)[0] for text in ("thus", "wait", "\n"))
    custom = {"thinking_budget": 5, "deepprune": {"preset": "latency"}}
    body = body_of("/generate", "think\nthus", 6, custom)
    body["sampling_params"].update(max_new_tokens=16, logit_bias={str(start): -100.0})
    outputs = generate(
        scripted, {**body, "custom_logit_processor": thinking_budget(start, end, newline)}
    )
    for output in outputs:
        # Five tokens, a newline, the closing mark; under overlap the rule sees a step less.
        ids = output["output_ids"]
        assert end in ids[:10], ids
        assert newline in ids[: ids.index(end)] or ids.index(end) < 5
    assert group_of(outputs)["size"] == 6


def test_a_regex_is_kept_by_every_sibling_and_their_answers_are_votes(scripted: Server):
    params = {"regex": "the answer is \\\\boxed\\{(15|9)\\}", "max_new_tokens": 60}
    for preset in ("balanced", "latency", "paper"):
        outputs = scripted.generate(
            "pick one", n=8, temperature=1.0, custom_params={"deepprune": {"preset": preset}},
            **params,
        )  # fmt: skip
        group = group_of(outputs)
        whole = [
            o for o, state in zip(outputs, states(outputs), strict=True) if state == "finished"
        ]
        assert len(whole) >= 3
        for output in whole:
            assert re.fullmatch("the answer is \\\\boxed\\{(15|9)\\}", output["text"])
        said = Counter(re.findall("\\d+", output["text"])[0] for output in whole)
        assert {vote["answer"]: vote["votes"] for vote in group["votes"]} == said
    settled(scripted)


def test_a_json_schema_votes_by_its_answer_field(scripted: Server):
    needs_page1(scripted)
    schema = {
        "type": "object",
        "properties": {"note": {"enum": [1, 2]}, "result": {"enum": [3, 4]}},
        "required": ["note", "result"],
        "additionalProperties": False,
    }
    settings = {"preset": "latency", "answer_field": "result", "eps": 0.0}
    outputs = scripted.generate(
        "say it in JSON", n=6, temperature=1.0, max_new_tokens=100,
        json_schema=json.dumps(schema), custom_params={"deepprune": settings},
    )  # fmt: skip
    assert states(outputs) == ["finished"] * 6
    said = Counter(str(json.loads(output["text"])["result"]) for output in outputs)
    votes = {vote["answer"]: vote["votes"] for vote in group_of(outputs)["votes"]}
    assert votes == said


def tool_body(n: int, settings: dict[str, Any]) -> dict[str, Any]:
    kinds = {"type": "object", "properties": {"a": {"enum": [3, 4]}}, "required": ["a"]}
    # Without `strict` SGLang's grammar takes any JSON for the arguments, and this model says any.
    parameters = {**kinds, "additionalProperties": False}
    function = {"name": "add", "parameters": parameters, "strict": True}
    return body_of(
        "/v1/chat/completions", "call it", n, {"deepprune": settings},
        tools=[{"type": "function", "function": function}], parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "add"}},
        seed=5,  # what it babbles behind a call may, once in many runs, read like an answer
    )  # fmt: skip


def test_tool_calls_hold_no_answer_and_all_come_back(scripted: Server):
    needs_page1(scripted)
    reply = scripted.post("/v1/chat/completions", tool_body(6, {"preset": "balanced"}))
    assert reply.status_code == 200, reply.text
    reply = reply.json()
    for choice in reply["choices"]:
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"])["a"] in (3, 4)
        # Behind its call this model may babble on to its last token.
        assert choice["finish_reason"] in ("tool_calls", "length")
    group = reply["metadata"]["deepprune"]
    assert group["answer"] is None and group["reason"].startswith("open-ended")
    assert {choice["state"] for choice in group["choices"]} == {"finished"}


def test_a_streamed_tool_call_that_was_held_back_comes_with_its_arguments(scripted: Server):
    needs_page1(scripted)
    told: dict[int, list[str]] = {}
    for chunk in scripted.stream("/v1/chat/completions", tool_body(4, {"return": "vote"})):
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                function = call["function"]
                said = [function.get("name") or "", function.get("arguments") or ""]
                told.setdefault(choice["index"], []).append("".join(said))
    (pieces,) = told.values()
    whole = "".join(pieces)
    assert whole.startswith("add") and json.loads(whole.removeprefix("add"))["a"] in (3, 4)
