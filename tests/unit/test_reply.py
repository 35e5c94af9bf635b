"""Settings on their way in, choices and records on their way out; no server, no SGLang."""

from __future__ import annotations

import asyncio
import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.patches import output, wire
from sglang_deepprune.types import ChoiceRecord, GroupRecord

CONFIG = DeepPruneConfig(enable=True)


def test_silence_means_the_servers_default():
    assert wire.read_ask(CONFIG, None).is_wanted
    opt_in = DeepPruneConfig(enable=True, default="opt-in")
    assert not wire.read_ask(opt_in, {"mine": 1}).is_wanted
    assert wire.read_ask(opt_in, {"deepprune": True}).is_wanted
    assert not wire.read_ask(CONFIG, {"deepprune": False}).is_wanted
    assert not wire.read_ask(CONFIG, {"deepprune": {"enabled": False}}).is_wanted


@pytest.mark.parametrize(
    ("asked", "field"),
    [({"enabled": "yes"}, "enabled"), ({"group": 3}, "group"), ({"group": "x" * 300}, "group"),
     ({"group": "g", "size": -1}, "size"), ({"size": 4}, "size"), ("yes", "custom_params"),
     ({"group": "g", "size": 10**6}, "size")],
)  # fmt: skip
def test_a_bad_ask_names_its_field(asked: Any, field: str):
    with pytest.raises(ConfigError) as caught:
        wire.read_ask(CONFIG, {"deepprune": asked})
    assert caught.value.field == field


def test_a_tag_replaces_our_keys_and_leaves_the_callers_alone():
    tagged = wire.tag("g", 0, 2, {"k1": 3}, rid="r", token="t")
    sent = wire.with_tag({"mine": 1, "deepprune": {"k1": 3}, "__deepprune": "forged"}, tagged)
    assert sent == {"mine": 1, "__deepprune": tagged}
    assert wire.settings_of(tagged) == {"k1": 3}
    assert wire.with_tag({"deepprune": True}, None) is None
    assert wire.is_ours(sent, "t") and not wire.is_ours(sent, "other")
    assert not wire.is_ours({"__deepprune": "x"}, "t") and not wire.is_ours(None, "t")


def test_a_request_cannot_smuggle_a_group_through_its_settings():
    tagged = wire.tag("g", 0, 2, {"gid": "another", "token": "guess"}, rid="", token="t")
    assert tagged["gid"] == "g" and tagged["token"] == "t"


def choice(index: int, state: str = "finished", tokens: int = 5) -> dict[str, Any]:
    return ChoiceRecord(index, state, tokens, answer="4").to_json()


def group(states: list[str], winner: int | None = 0) -> dict[str, Any]:
    choices = tuple(ChoiceRecord(i, state, 5) for i, state in enumerate(states))
    return GroupRecord("g", True, "x", size=len(states), winner=winner, choices=choices,
                       generated_tokens=5 * len(states)).to_json()  # fmt: skip


def reply(index: int, record: dict[str, Any] | None = None, end: bool = True) -> dict[str, Any]:
    ours: dict[str, Any] = {"choice": choice(index)}
    if record:
        ours["group"] = record
    reason = {"type": "stop"} if end else None
    meta = {"completion_tokens": 5, "finish_reason": reason, "deepprune": ours if end else {}}
    return {"text": f"text {index}", "index": index, "meta_info": meta}


def ask(returns: str = "all", wanted: bool = True) -> wire.Ask:
    return wire.Ask(wanted, True, returns=returns)


STATES = ["pruned", "finished", "finished"]


@pytest.mark.parametrize(
    ("returns", "kept"), [("all", [0, 1, 2]), ("survivors", [1, 2]), ("vote", [2])]
)
def test_whole_replies_are_filtered_and_the_record_leads(returns: str, kept: list[int]):
    outputs = [reply(0), reply(1, group(STATES, winner=2)), reply(2)]
    shaped = output.Reply(3, [ask(returns)]).whole(outputs, SimpleNamespace())
    assert [one["text"] for one in shaped] == [f"text {index}" for index in kept]
    assert ["group" in one["meta_info"]["deepprune"] for one in shaped] == [True] + [False] * (
        len(kept) - 1
    )


def test_a_stream_that_returns_the_vote_says_nothing_before_the_end():
    shape, obj = output.Reply(3, [ask("vote")]), SimpleNamespace()
    sent: list[dict[str, Any]] = []
    for chunk in (reply(0, end=False), reply(2), reply(0), reply(1, group(STATES, winner=2))):
        sent += shape.piece(chunk, obj)
    assert [one["text"] for one in sent] == ["text 2"]
    assert sent[0]["meta_info"]["completion_tokens"] == 5  # its own, as in a whole reply
    assert getattr(obj, output.RECORDS)[0]["winner"] == 2


@pytest.mark.parametrize("wrap", [output.completion_stream, output.chat_stream])
def test_a_stream_whose_usage_is_added_up_counts_the_choices_that_were_dropped(wrap: Any):
    shape, obj = output.Reply(3, [ask("survivors")]), SimpleNamespace()
    wrap(lambda *_: None, None, obj, SimpleNamespace(), None)
    sent: list[dict[str, Any]] = []
    for chunk in (reply(2), reply(0), reply(1, group(STATES, winner=2))):
        sent += shape.piece(chunk, obj)
    assert [one["meta_info"]["completion_tokens"] for one in sent] == [10, 5]


def test_an_incremental_stream_joins_the_log_probabilities_of_what_it_held_back():
    shape, obj = output.Reply(1, [ask("vote")], is_incremental=True), SimpleNamespace()
    sent: list[dict[str, Any]] = []
    for place, is_end in enumerate((False, False, True)):
        chunk = reply(0, group(["finished"]) if is_end else None, end=is_end)
        chunk["meta_info"]["output_token_logprobs"] = [place]
        chunk["output_ids"] = [place + 7]
        sent += shape.piece(chunk, obj)
    (whole,) = sent
    assert whole["output_ids"] == [7, 8, 9] and whole["text"] == "text 0" * 3
    assert whole["meta_info"]["output_token_logprobs"] == [0, 1, 2]


def test_a_filtered_reply_echoes_each_choices_own_prompt():
    """As SGLang builds it, choice i belongs to prompt i // n; here each prompt has kept one."""
    prompts = ["first ", "second one "]

    def original(self: Any, request: Any, ret: Any, created: int) -> Any:
        texts = [prompts[place // request.n] + out["text"] for place, out in enumerate(ret)]
        choices = [SimpleNamespace(text=text) for text in texts]
        return SimpleNamespace(choices=choices, metadata=None, usage=None)

    outputs = [reply(index, group(["finished", "pruned"])) for index in (0, 2)]
    server = SimpleNamespace(_prepare_echo_prompts=lambda request: prompts)
    request = SimpleNamespace(n=2, echo=True)
    response = output.build_response(original, server, request, outputs, 0)
    assert [choice.text for choice in response.choices] == ["first text 0", "second one text 2"]


def test_usage_beside_a_filter_counts_each_prompt_once():
    """SGLang takes every n-th output for a prompt's first, which no longer holds."""
    details = SimpleNamespace(cached_tokens=90)
    usage = SimpleNamespace(
        prompt_tokens=100, completion_tokens=10, total_tokens=110, prompt_tokens_details=details
    )
    outputs = [reply(index, group(["finished", "pruned"])) for index in (0, 2)]
    for output_, cached in zip(outputs, (90, 80), strict=True):
        output_["meta_info"] |= {"prompt_tokens": 100, "cached_tokens": cached}
        output_["meta_info"]["deepprune"]["group"] |= {"settled": True, "generated_tokens": 10}
    response = SimpleNamespace(choices=[], metadata=None, usage=usage)
    output.build_response(
        lambda *_: response, None, SimpleNamespace(n=2, echo=False), outputs, 0
    )  # fmt: skip
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (200, 20, 220)
    assert details.cached_tokens == 170


def test_deltas_are_joined_in_order_once_the_vote_is_known():
    shape, obj = output.Reply(2, [ask("survivors")], is_incremental=True), SimpleNamespace()
    sent: list[dict[str, Any]] = []
    for place in range(200):
        for index in (0, 1):
            is_last = place == 199
            record = group(["finished", "pruned"]) if is_last and index else None
            chunk = {**reply(index, record, end=is_last), "output_ids": [index, place]}
            sent += shape.piece({**chunk, "text": f"{index}:{place} "}, obj)
    (one,) = sent
    assert one["text"] == "".join(f"0:{place} " for place in range(200))
    assert one["output_ids"] == [x for place in range(200) for x in (0, place)]
    assert not shape.buffers and not shape.pieces


CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {"city": "Oslo"}}\n</tool_call>'
)


@pytest.mark.parametrize("is_incremental", [False, True])
def test_a_stream_with_tools_replays_the_chunks_of_what_it_held_back(is_incremental: bool):
    """SGLang's parsers take one step a chunk: they would lose the arguments of a call in one."""
    shape = output.Reply(2, [ask("vote")], is_incremental=is_incremental)
    obj, parts = SimpleNamespace(), [CALLS[i : i + 4] for i in range(0, len(CALLS), 4)]
    setattr(obj, output.REPLAYS, True)
    setattr(obj, output.ADDS_UP, True)
    sent: list[dict[str, Any]] = []
    for place, part in enumerate(parts):
        for index in (0, 1):
            is_last = place == len(parts) - 1
            record = group(["finished"] * 2, winner=1) if is_last and index else None
            chunk = reply(index, record, end=is_last)
            chunk["text"] = part if is_incremental else "".join(parts[: place + 1])
            chunk["meta_info"]["completion_tokens"] = place + 1
            logprobs = [[place]] if is_incremental else [[i] for i in range(place + 1)]
            chunk["meta_info"]["output_token_logprobs"] = logprobs
            sent += shape.piece(chunk, obj)
    assert len(sent) == len(parts) and {one["index"] for one in sent} == {0}
    ends = [one["meta_info"]["finish_reason"] is not None for one in sent]
    assert ends == [False] * (len(parts) - 1) + [True]
    counts = [one["meta_info"]["completion_tokens"] for one in sent]
    assert counts == [*range(1, len(parts)), 2 * len(parts)]  # the end counts the dropped one too
    lengths = [len(one["meta_info"]["output_token_logprobs"]) for one in sent]
    assert lengths == [1 if is_incremental else place + 1 for place in range(len(parts))]
    openai = importlib.import_module("sglang.srt.entrypoints.openai.protocol")
    calls = importlib.import_module("sglang.srt.function_call.function_call_parser")
    tools = [openai.Tool(function=openai.Function(name=name)) for name in ("weather", "clock")]
    parser = calls.FunctionCallParser(tools, "qwen25")
    told: dict[int, str] = {}
    offset = 0
    for one in sent:
        delta = one["text"] if is_incremental else one["text"][offset:]
        offset = len(one["text"])
        for call in parser.parse_stream_chunk(delta)[1]:
            told[call.tool_index] = told.get(call.tool_index, "") + (call.name or "")
            told[call.tool_index] += call.parameters
    assert told == {0: 'weather{"city": "Rome"}', 1: 'clock{"city": "Oslo"}'}
    assert not shape.chunks


def test_a_vote_without_a_winner_returns_a_finished_choice():
    outputs = [reply(0), reply(1, group(STATES, winner=None)), reply(2)]
    shaped = output.Reply(3, [ask("vote")]).whole(outputs, SimpleNamespace())
    assert [one["text"] for one in shaped] == ["text 1"]


@pytest.mark.parametrize(("returns", "kept"), [("survivors", [0, 1, 2]), ("vote", [0])])
def test_where_nothing_finished_the_vote_is_still_one_choice(returns: str, kept: list[int]):
    outputs = [reply(0, group(["aborted"] * 3, winner=None)), reply(1), reply(2)]
    shaped = output.Reply(3, [ask(returns)]).whole(outputs, SimpleNamespace())
    assert [one["text"] for one in shaped] == [f"text {index}" for index in kept]
    assert "group" in shaped[0]["meta_info"]["deepprune"]


def test_a_request_that_opted_out_gets_all_its_choices_whatever_the_server_returns():
    plain = [{"text": f"{i}", "meta_info": {"completion_tokens": 5}} for i in range(3)]
    shaped = output.Reply(3, [ask("vote", wanted=False)]).whole(plain, SimpleNamespace())
    assert [one["text"] for one in shaped] == ["0", "1", "2"]


def test_a_group_without_a_record_says_why():
    lost = {"text": "", "meta_info": {"completion_tokens": 0, "finish_reason": {"type": "abort"}}}
    (first, _) = output.Reply(2, [ask()]).whole([lost, {**lost}], SimpleNamespace())
    record = first["meta_info"]["deepprune"]["group"]
    assert record["active"] is False and record["reason"] == "aborted before it was settled"


def test_a_group_that_was_given_up_is_not_called_aborted():
    """After a fault of ours siblings end by themselves, and nobody brings a record."""
    shaped = output.Reply(3, [ask()]).whole([reply(0), reply(1), reply(2)], SimpleNamespace())
    record = shaped[0]["meta_info"]["deepprune"]["group"]
    assert record["active"] is False and "error of the plugin's own" in record["reason"]
    assert [one["meta_info"]["deepprune"]["choice"]["state"] for one in shaped] == ["finished"] * 3


def test_unpack_takes_our_json_out_of_the_finish_reason():
    meta: dict[str, Any] = {}
    reason = {"type": "stop", "deepprune": json.dumps({"choice": {}, "group": {"winner": 1}})}
    obj = SimpleNamespace()
    output.unpack(meta, reason, obj)
    assert reason == {"type": "stop"} and meta["deepprune"]["group"] == {"winner": 1}
    assert getattr(obj, output.RECORDS) == [{"winner": 1}]


def test_the_record_comes_right_before_done():
    async def lines():
        yield 'data: {"id": "abc", "choices": [1]}\n\n'
        yield "data: [DONE]\n\n"

    async def read() -> list[str]:
        adapted = SimpleNamespace(**{output.RECORDS: [{"winner": 1}]})
        wrapped = output.completion_stream(
            lambda *_: lines(), None, adapted, SimpleNamespace(model="m"), None
        )
        return [line async for line in wrapped]

    first, record, done = asyncio.run(read())
    body = json.loads(record[6:])
    assert body["choices"] == [] and body["id"] == "abc"
    assert body["metadata"]["deepprune"] == {"winner": 1}
    assert done == "data: [DONE]\n\n" and first.startswith("data: {")
