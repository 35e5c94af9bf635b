"""Shapes of requests: whatever else a client asks for, its group works, or its request is refused.

On the shared servers; scripted tokens wherever they may stand (a grammar, a logit processor and
min_new_tokens need tokens that are really sampled).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import Any

import pytest
import requests

from sglang_deepprune.reasoner import questions
from tests.engine import scenario
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, PAPER, PRUNE, ask, group_of, states

LATENCY = {"preset": "latency", "window": 8}
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")


def body_of(path: str, prompt: Any, n: int, custom: Any = None, **more: Any) -> dict[str, Any]:
    """The same request for each endpoint."""
    if path == "/generate":
        params = {"n": n, "max_new_tokens": 400, "temperature": 1.0, "custom_params": custom}
        return {"text": prompt, "sampling_params": params, **more}
    body = {"model": "m", "n": n, "max_tokens": 400, "temperature": 1.0, "custom_params": custom}
    if path == "/v1/completions":
        return {**body, "prompt": prompt, **more}
    return {**body, "messages": [{"role": "user", "content": prompt}], **more}


def generate(server: Server, body: dict[str, Any]) -> Any:
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def metadata(reply: dict[str, Any]) -> dict[str, Any]:
    return reply.get("metadata") or {}


def needs_page1(server: Server) -> None:
    if "page1-" not in server.name:
        pytest.skip("the other configuration has the server's flags for it")


def settled(server: Server) -> None:
    server.wait_idle()
    assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
    assert "live groups run on" not in server.log


# -- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_one_sample_is_no_group(scripted: Server, path: str):
    for custom in (None, {"deepprune": {"preset": "paper"}}):
        reply = scripted.post(path, body_of(path, PRUNE, 1, custom)).json()
        if path == "/generate":
            assert "deepprune" not in reply["meta_info"]
        else:
            assert "deepprune" not in metadata(reply) and len(reply["choices"]) == 1


@pytest.mark.modes
def test_five_hundred_siblings_of_a_decided_question_are_never_started(scripted: Server):
    outputs = ask(scripted, DECIDE, 512, {"preset": "balanced", "widen": 0.0})
    found = Counter(states(outputs))
    # Three in four of the scripts say 8: among so many that may still vote that takes a few more.
    assert 3 <= found["finished"] <= 64 and found["not_started"] >= 400
    group = group_of(outputs)
    assert (group["size"], group["answer"]) == (512, "8") and group["reason"].startswith("decided")
    settled(scripted)


@pytest.mark.parametrize("path", PATHS)
def test_more_siblings_than_any_group_has_are_a_400_at_once(scripted: Server, path: str):
    start = time.monotonic()
    reply = scripted.post(path, body_of(path, PRUNE, 2_147_483_647))
    assert reply.status_code == 400
    assert "deepprune.n: at most 4096 siblings a group, got 2147483647" in reply.text
    # SGLang itself would copy the prompt two billion times before anybody looks at n.
    assert time.monotonic() - start < 5 and scripted.is_alive


def test_a_hundred_and_thirty_prompts_are_as_many_groups(scripted: Server):
    needs_page1(scripted)
    kinds = ["D12: four ways", "D12: none", "D2: what is 2 + 2 ="]
    prompts = [kinds[place % 3] for place in range(130)]
    body = body_of("/v1/completions", prompts, 4, {"deepprune": {"preset": "latency"}})
    reply = scripted.post("/v1/completions", body).json()
    groups = reply["metadata"]["deepprune"]["groups"]
    assert len(groups) == 130 and len(reply["choices"]) == 520
    assert len({group["group_id"] for group in groups}) == 130
    right = {kinds[0]: "5", kinds[1]: None, kinds[2]: "4"}
    for prompt, group in zip(prompts, groups, strict=True):
        assert (group["size"], group["answer"]) == (4, right[prompt])
    assert reply["usage"]["completion_tokens"] == sum(g["generated_tokens"] for g in groups)
    settled(scripted)


def test_prompts_as_token_ids_are_groups_as_texts_are(scripted: Server, tokenizer: Any):
    body = body_of("/generate", None, 8, {"deepprune": PAPER})
    del body["text"]
    outputs = generate(scripted, {**body, "input_ids": tokenizer.encode(PRUNE)})
    assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
    assert outputs[0]["text"] == scenario.PROMPTS[PRUNE][0]
    prompts = [tokenizer.encode(prompt) for prompt in (PRUNE, "D2: what is 2 + 2 =")]
    both = generate(scripted, {**body, "input_ids": prompts})
    groups = [one["meta_info"]["deepprune"]["group"] for one in (both[0], both[8])]
    assert [group["answer"] for group in groups] == ["15", "4"]


def test_a_batch_of_prompts_as_token_ids_may_name_one_group(scripted: Server, tokenizer: Any):
    """SGLang sends such a batch whole, by another function than single requests."""
    ours = {"group": "batch of ids", "size": 6, "preset": "latency"}
    ids = [tokenizer.encode("D12: four ways")] * 6
    body = body_of("/generate", None, 1, {"deepprune": ours})
    del body["text"]
    outputs = generate(scripted, {**body, "input_ids": ids})
    assert len({one["meta_info"]["deepprune"]["group"]["group_id"] for one in outputs}) == 1
    record = max((group_of([one]) for one in outputs), key=lambda group: len(group["choices"]))
    assert (record["size"], record["answer"]) == (6, "5")
    ours["preset"] = "best"
    refused = scripted.post("/generate", {**body, "input_ids": ids})
    assert refused.status_code == 400 and "deepprune.preset" in refused.text
    settled(scripted)


def test_a_streamed_list_of_prompts_that_names_one_group_ends_with_its_record(scripted: Server):
    ours = {"group": "a list", "size": 6, "preset": "latency"}
    body = body_of("/v1/completions", ["D12: four ways"] * 6, 1, {"deepprune": ours})
    *_, last = scripted.stream("/v1/completions", body)
    record = metadata(last)["deepprune"]
    assert (record["size"], record["answer"], record["settled"]) == (6, "5", True)
    settled(scripted)


# -- what comes back beside the text -------------------------------------------------------------


def test_log_probabilities_are_those_of_each_choices_own_tokens(scripted: Server):
    """Of siblings that never started, none: SGLang has no such requests itself."""
    custom = {"deepprune": {"preset": "balanced", "widen": 0.0}}
    more = {"return_logprob": True, "top_logprobs_num": 20}
    outputs = generate(scripted, body_of("/generate", DECIDE, 12, custom, **more))
    assert {"finished", "not_started"} <= set(states(outputs))
    chunks: dict[int, dict[str, Any]] = {}
    for chunk in scripted.stream("/generate", body_of("/generate", DECIDE, 12, custom, **more)):
        chunks[chunk["index"]] = chunk
    for output in [*outputs, *chunks.values()]:
        meta = output["meta_info"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
        assert len(meta["output_top_logprobs"]) == meta["completion_tokens"]
        assert all(len(top) == 20 for top in meta["output_top_logprobs"])
    assert sorted(chunks) == list(range(12))
    settled(scripted)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS[1:])
def test_log_probabilities_over_the_openai_endpoints(scripted: Server, path: str, is_stream: bool):
    custom = {"deepprune": {"preset": "balanced", "widen": 0.0}}
    is_chat = path == "/v1/chat/completions"
    more = {"logprobs": True, "top_logprobs": 20} if is_chat else {"logprobs": 5}
    body = body_of(path, DECIDE, 12, custom, **more)
    chunks = list(scripted.stream(path, body)) if is_stream else []
    chunks = chunks or [scripted.post(path, body).json()]
    record = next(m["deepprune"] for m in map(metadata, chunks) if "deepprune" in m)
    counted: Counter[int] = Counter()
    for chunk in chunks:
        for choice in chunk["choices"]:
            said = choice.get("logprobs") or {}
            entries = said.get("content" if is_chat else "tokens") or ()
            counted[choice["index"]] += len(entries)
            if is_chat:
                assert all(len(entry["top_logprobs"]) == 20 for entry in entries)
    assert record["answer"] == "7" and "not_started" in {c["state"] for c in record["choices"]}
    for choice in record["choices"]:
        found, tokens = counted[choice["index"]], choice["tokens"]
        # A chat's stream has no chunk, and so no log-probability, for a token without text.
        assert found == tokens or (is_chat and is_stream and 0 < found < tokens)


def test_hidden_states_are_one_a_token_and_none_for_whom_never_started(scripted: Server):
    needs_page1(scripted)
    custom = {"deepprune": {"preset": "balanced", "widen": 0.0, "base": 3}}
    body = body_of("/generate", DECIDE, 8, custom, return_hidden_states=True)
    outputs = generate(scripted, body)
    assert {"finished", "not_started"} <= set(states(outputs))
    for output in outputs:
        meta = output["meta_info"]
        assert len(meta.get("hidden_states") or ()) == meta["completion_tokens"]
    settled(scripted)


def test_echo_begins_each_choice_with_its_own_prompt_also_when_choices_are_left_out(
    scripted: Server,
):
    for returns, places in (("all", [0] * 8 + [1] * 8), ("vote", [0, 1])):
        custom = {"deepprune": {**LATENCY, "return": returns}}
        prompts = [PRUNE, DECIDE]
        body = body_of("/v1/completions", prompts, 8, custom, echo=True)
        choices = scripted.post("/v1/completions", body).json()["choices"]
        assert len(choices) == len(places)
        for place, choice in zip(places, choices, strict=True):
            prompt = prompts[place]
            assert choice["text"].startswith(prompt), choice["text"][:60]
            script = choice["text"].removeprefix(prompt)
            assert any(one.startswith(script) for one in scenario.PROMPTS[prompt])


def test_echo_with_log_probabilities_covers_the_prompt(scripted: Server):
    """What lm-eval's local-completions sends; nothing of it for whom never started."""
    custom = {"deepprune": {"preset": "balanced", "widen": 0.0}}
    body = body_of("/v1/completions", DECIDE, 10, custom, echo=True, logprobs=1)
    reply = scripted.post("/v1/completions", body)
    assert reply.status_code == 200, reply.text[:300]
    record = reply.json()["metadata"]["deepprune"]
    for choice, ours in zip(reply.json()["choices"], record["choices"], strict=True):
        assert choice["text"].startswith(DECIDE)
        count = len(choice["logprobs"]["tokens"])
        assert count > ours["tokens"] if ours["tokens"] else count == 0
    settled(scripted)


def test_a_prompt_that_is_echoed_or_holds_a_box_casts_no_vote(scripted: Server):
    prompt = "box: my answer is \\boxed{42}, put yours into \\boxed{}"
    body = body_of("/v1/completions", prompt, 4, {"deepprune": LATENCY}, echo=True)
    reply = scripted.post("/v1/completions", body).json()
    group = reply["metadata"]["deepprune"]
    assert "42" in reply["choices"][0]["text"]
    assert (group["answer"], group["votes"], group["abstentions"]) == (None, [], 4)


def test_routed_experts_may_be_asked_for(scripted: Server):
    """The model has none: SGLang leaves the field out, for stopped choices as for whole ones."""
    body = body_of("/generate", DECIDE, 6, {"deepprune": LATENCY}, return_routed_experts=True)
    assert states(generate(scripted, body)) == ["finished"] * 3 + ["decided"] * 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_before_the_vote_takes_its_group_along(scripted: Server, path: str):
    """Choices are held back until the vote: until then the endpoint has not begun to answer."""
    settings = {"preset": "latency", "return": "vote"}
    body = body_of(path, "a stranger", 3, {"deepprune": settings}, ignore_eos=True, stream=True)
    body["max_tokens"] = 4000
    with contextlib.suppress(requests.exceptions.ReadTimeout):
        requests.post(f"{scripted.url}{path}", json=body, timeout=1.5, stream=True)
    scripted.wait_idle(limit_s=6.0)
    settled(scripted)


# -- lengths and temperature ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "forced", [{"ignore_eos": True}, {"min_new_tokens": 60}], ids=["ignore_eos", "min=max"]
)
def test_forced_lengths_are_a_benchmark_and_not_pruned_unless_asked(scripted: Server, forced: Any):
    params = {"n": 4, "max_new_tokens": 60, "temperature": 1.0, **forced}
    for output in scripted.generate(DECIDE, **params):
        assert "deepprune" not in output["meta_info"]
        assert output["meta_info"]["completion_tokens"] == 60 or "min_new_tokens" in forced
    asked = scripted.generate(DECIDE, **params, custom_params={"deepprune": LATENCY})
    assert group_of(asked)["active"] is True


def test_min_new_tokens_holds_for_whoever_finishes(reasoner: Server):
    question = questions(seed=5, count=1)[0]
    outputs = reasoner.generate(
        question.prompt, n=8, min_new_tokens=300, max_new_tokens=500, temperature=1.0,
        custom_params={"deepprune": {"preset": "balanced"}},
    )  # fmt: skip
    lengths = [output["meta_info"]["completion_tokens"] for output in outputs]
    ended = states(outputs)
    assert ended.count("finished") >= 1
    assert all(n >= 300 for n, state in zip(lengths, ended, strict=True) if state == "finished")


@pytest.mark.parametrize("most", [7, 8, 9, 15, 16, 17, 18, 24, 25])
def test_siblings_that_all_end_by_length_at_the_window(scripted: Server, most: int):
    """The window is 8 steps and the cut 16 tokens: they end before, in and after the judge's
    step."""
    settings = {**PAPER, "k2": 1}
    outputs = ask(scripted, PRUNE, 8, settings, max_new_tokens=most)
    lengths = [output["meta_info"]["completion_tokens"] for output in outputs]
    if most <= 17:  # nobody is judged before it has ended
        assert states(outputs) == ["finished"] * 8 and lengths == [most] * 8
    assert set(states(outputs)) <= {"finished", "pruned"} and max(lengths) == most
    assert {o["meta_info"]["finish_reason"]["type"] for o in outputs} == {"length"}
    group = group_of(outputs)
    assert group["settled"] is True and group["votes"] == []
    settled(scripted)


def test_at_temperature_zero_nothing_counts_as_saved_and_that_is_said_once(scripted: Server):
    for _ in range(2):
        outputs = scripted.generate(
            DECIDE, n=8, max_new_tokens=400, temperature=0.0, custom_params={"deepprune": LATENCY}
        )
        assert states(outputs) == ["finished"] * 3 + ["decided"] * 5
        assert group_of(outputs)["saved_tokens_at_most"] == 0
    assert scripted.log.count("at temperature 0 are one and the same trace") == 1


# -- sessions ------------------------------------------------------------------------------------


def test_a_session_is_left_alone_unless_it_asks(scripted: Server):
    session = scripted.post("/open_session", {"capacity_of_str_len": 4096}).json()
    plain = body_of("/generate", DECIDE, 6, session_params={"id": session})
    outputs = generate(scripted, plain)
    assert all("deepprune" not in output["meta_info"] for output in outputs)
    assert {output["text"] for output in outputs} <= set(scenario.PROMPTS[DECIDE])
    asked = body_of("/generate", DECIDE, 6, {"deepprune": LATENCY}, session_params={"id": session})
    outputs = generate(scripted, asked)
    assert states(outputs) == ["finished"] * 3 + ["decided"] * 3
    # The conversation goes on from a whole choice, and from one that was cut short.
    for output in (outputs[0], outputs[5]):
        meta = output["meta_info"]
        more = {"session_params": {"id": session, "rid": meta["id"]}}
        body = body_of("/generate", " and more", 1, **more)
        body["sampling_params"]["max_new_tokens"] = 4
        follower = generate(scripted, body)["meta_info"]
        assert follower["prompt_tokens"] >= meta["prompt_tokens"] + meta["completion_tokens"]
    assert scripted.post("/close_session", {"session_id": session}).status_code == 200
    settled(scripted)


# -- prompts without one right answer ------------------------------------------------------------


@pytest.mark.parametrize(
    "preset",
    ["balanced",
     *(pytest.param(one, marks=pytest.mark.modes) for one in ("latency", "faithful", "economy"))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["poem", "code", "proof"])
def test_poems_programs_and_proofs_hold_no_answer_and_all_run_to_their_end(
    scripted: Server, kind: str, preset: str
):
    (prompt,) = [prompt for prompt in scenario.PROMPTS if prompt.startswith(kind + ":")]
    outputs = ask(scripted, prompt, 6, {"preset": preset})
    assert [output["text"] for output in outputs] == scenario.PROMPTS[prompt]
    group = group_of(outputs)
    assert group["answer"] is None and group["reason"].startswith("open-ended")


def test_where_all_solutions_are_wanted_collect_stops_nobody(scripted: Server):
    prompt = "all: show all pairs of numbers whose sum is 5"
    outputs = ask(scripted, prompt, 6, {"preset": "collect"})
    assert [output["text"] for output in outputs] == scenario.PROMPTS[prompt]
    votes = {vote["answer"]: vote["votes"] for vote in group_of(outputs)["votes"]}
    assert votes == {"(1, 4)": 3, "(2, 3)": 2, "(0, 5)": 1}
    off = scripted.generate(
        prompt, n=6, max_new_tokens=400, temperature=1.0, custom_params={"deepprune": False}
    )
    assert {output["text"] for output in off} == set(scenario.PROMPTS[prompt])


@pytest.mark.parametrize("prompt", ["open: what is 2 * 2 = <think>\n", "marks: kimi",
                                    "marks: channels", "marks: none"])  # fmt: skip
def test_thinking_opened_by_the_template_or_marked_otherwise_or_not_at_all(
    scripted: Server, prompt: str
):
    outputs = ask(scripted, prompt, 4, {"preset": "collect"})
    assert group_of(outputs)["votes"] == [{"answer": "4", "votes": 4}]
    if prompt.startswith("open"):  # cut inside the thinking: what is boxed there is no vote
        outputs = ask(scripted, prompt, 4, {"preset": "collect"}, max_new_tokens=24)
        assert "\\boxed{9}" in outputs[0]["text"]
        assert group_of(outputs)["abstentions"] == 4


def test_a_word_of_the_callers_under_our_key_is_a_400(scripted: Server):
    body = body_of("/generate", PRUNE, 2, {"deepprune": "my own"})
    reply = scripted.post("/generate", body)
    assert reply.status_code == 400 and "deepprune.custom_params" in reply.text
