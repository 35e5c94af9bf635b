"""Groups in a real server on scripted tokens: what stops, when its KV is free, what comes back.

Runs in each configuration of conftest.CONFIGS, strict memory checks on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.engine import scenario
from tests.engine.server import Server, cpu_env

SCHEMA = json.loads(
    Path(__file__)
    .resolve()
    .parents[2]
    .joinpath("sglang_deepprune/schema/record.schema.json")
    .read_text()
)
PRUNE, DECIDE = "prune: what is 12 + 3 =", "decide: what is 4 + 3 ="
PAPER = {"preset": "paper", "k2": 2, **scenario.CUT}


def ask(server: Server, prompt: str, n: int, settings: Any, **params: Any) -> list[dict[str, Any]]:
    """n siblings over /generate; checks each record against the schema."""
    outputs = server.generate(
        prompt, n=n, temperature=1.0, custom_params={"deepprune": settings},
        **{"max_new_tokens": 400, **params},
    )  # fmt: skip
    for output in outputs:
        jsonschema.validate(output["meta_info"]["deepprune"], SCHEMA)
    return outputs


def states(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["meta_info"]["deepprune"]["choice"]["state"] for output in outputs]


def group_of(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return outputs[0]["meta_info"]["deepprune"]["group"]


def page_of(server: Server) -> int:
    """The page size that the server's name tells."""
    return int(re.findall(r"page(\d+)", server.name)[0])


def own_slots(server: Server, output: dict[str, Any]) -> int:
    """KV slots that this sibling shared with nobody when it was stopped, whole pages."""
    page = page_of(server)
    in_flight = 0 if "no-overlap" in server.name else 1
    meta = output["meta_info"]
    held = meta["prompt_tokens"] + meta["completion_tokens"] - 1 + in_flight
    return -(-held // page) * page - meta["prompt_tokens"] // page * page


def test_redundant_siblings_stop_and_their_kv_is_free_in_that_step(scripted: Server, tokenizer):
    before = len(scripted.log_lines("deepprune-verdict"))
    outputs = ask(scripted, PRUNE, 8, PAPER)
    group = group_of(outputs)
    assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
    assert group["clusters"] == [[0, 1, 3, 5, 6], [2, 4, 7]]
    assert (group["answer"], group["winner"]) == ("15", 0)
    assert group["votes"] == [{"answer": "15", "votes": 2}]
    for index in (0, 1):  # survivors emit their whole script, to the token
        assert outputs[index]["text"] == scenario.PROMPTS[PRUNE][index]
        assert outputs[index]["meta_info"]["finish_reason"]["type"] == "stop"
    for output in outputs[2:]:
        assert output["meta_info"]["finish_reason"]["type"] == "length"
        assert 16 <= output["meta_info"]["completion_tokens"] < 110
    steps = scripted.log_lines("deepprune-verdict")[before:]
    assert sum(step["doomed"] for step in steps) == 6
    freed = sum(step["after"]["available"] - step["before"]["available"] for step in steps)
    assert freed == sum(own_slots(scripted, output) for output in outputs[2:])
    assert all(step["after"]["evictable"] == step["before"]["evictable"] for step in steps)
    assert sum(step["after"]["rows"] - step["before"]["rows"] for step in steps) == 6
    scripted.wait_idle()


def test_a_decided_vote_stops_the_rest_in_the_deciding_step(scripted: Server):
    before = len(scripted.log_lines("deepprune-verdict"))
    outputs = ask(scripted, DECIDE, 8, {"preset": "latency", "window": 8})
    group = group_of(outputs)
    assert states(outputs) == ["finished"] * 3 + ["decided"] * 5
    assert group["reason"].startswith("decided: 3:0")
    assert group["answer"] == "7" and group["tie"] is False
    (step,) = scripted.log_lines("deepprune-verdict")[before:]
    deciding = outputs[2]["meta_info"]["completion_tokens"]
    assert {output["meta_info"]["completion_tokens"] for output in outputs[3:]} == {deciding}
    used = [step[when]["available"] + step[when]["evictable"] for when in ("before", "after")]
    # Nothing of the group is left in use: all that remains is the evictable prefix.
    assert step["after"]["protected"] == 0
    assert used[1] == 20000 // page_of(scripted) * page_of(scripted)
    assert group["saved_tokens_at_most"] == 5 * (400 - deciding)
    scripted.wait_idle()


def test_siblings_share_the_prompt_and_usage_counts_every_token(scripted: Server):
    response = scripted.post(
        "/v1/completions",
        {"model": "m", "prompt": PRUNE, "n": 8, "max_tokens": 400, "temperature": 1.0,
         "custom_params": {"deepprune": PAPER}},
    )  # fmt: skip
    body = response.json()
    group = body["metadata"]["deepprune"]
    jsonschema.validate({"choice": group["choices"][0], "group": group}, SCHEMA)
    assert [choice["index"] for choice in body["choices"]] == list(range(8))
    assert [c["finish_reason"] for c in body["choices"]] == ["stop"] * 2 + ["length"] * 6
    assert body["usage"]["completion_tokens"] == group["generated_tokens"]
    assert body["usage"]["completion_tokens"] == sum(c["tokens"] for c in group["choices"])
    outputs = ask(scripted, PRUNE, 8, PAPER)
    prompt = outputs[0]["meta_info"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens"] == prompt
    page = page_of(scripted)
    assert all(output["meta_info"]["cached_tokens"] >= prompt - page for output in outputs)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_stream_has_one_terminal_chunk_a_choice_and_the_record_last(scripted: Server, path: str):
    custom = {"deepprune": PAPER}
    said: dict[str, Any] = {"model": "m", "n": 8, "max_tokens": 400, "custom_params": custom}
    if path == "/generate":
        params = {"n": 8, "max_new_tokens": 400, "custom_params": custom}
        said = {"text": PRUNE, "sampling_params": params}
    elif path == "/v1/completions":
        said["prompt"] = PRUNE
    else:
        said["messages"] = [{"role": "user", "content": PRUNE}]
    ends: dict[int, str] = {}
    group: dict[str, Any] = {}
    for chunk in scripted.stream(path, said):
        assert not group, "the record comes last"
        if path == "/generate":
            ours = chunk["meta_info"].get("deepprune", {})
            group = ours.get("group", {})
            reason = (chunk["meta_info"]["finish_reason"] or {}).get("type")
            index = chunk["index"]
        elif not chunk["choices"]:
            group = chunk["metadata"]["deepprune"]
            continue
        else:
            index = chunk["choices"][0]["index"]
            reason = chunk["choices"][0]["finish_reason"]
        if reason:
            assert index not in ends
            ends[index] = reason
    assert ends == {0: "stop", 1: "stop", **dict.fromkeys(range(2, 8), "length")}
    assert group["answer"] == "15" and group["settled"] is True


def test_queued_siblings_of_a_decided_group_are_never_prefilled(scripted: Server):
    if "no-overlap" not in scripted.name:
        n, expected = 12, ["finished"] * 3 + ["decided"] * 9
    else:  # 8 rows: the rest waits in SGLang's queue
        n, expected = 12, ["finished"] * 3 + ["decided"] * 5
    outputs = ask(scripted, DECIDE, n, {"preset": "latency", "window": 8})
    assert states(outputs)[: len(expected)] == expected
    for output in outputs[len(expected) :]:
        choice = output["meta_info"]["deepprune"]["choice"]
        assert choice["state"] in ("not_started", "decided")
        if choice["state"] == "not_started":
            assert choice["tokens"] == 0 and output["text"] == ""
            assert output["meta_info"]["prompt_tokens"] > 0
    if "no-overlap" in scripted.name:
        assert "not_started" in states(outputs)
    scripted.wait_idle()


@pytest.mark.parametrize(("returns", "indices"), [("survivors", [0, 1]), ("vote", [0])])
def test_return_filters_choices_but_not_the_usage(scripted: Server, returns: str, indices):
    settings = {**PAPER, "return": returns}
    body = {"model": "m", "prompt": PRUNE, "n": 8, "max_tokens": 400, "temperature": 1.0,
            "custom_params": {"deepprune": settings}}  # fmt: skip
    reply = scripted.post("/v1/completions", body).json()
    group = reply["metadata"]["deepprune"]
    assert [choice["text"] for choice in reply["choices"]] == [
        scenario.PROMPTS[PRUNE][index] for index in indices
    ]
    assert reply["usage"]["completion_tokens"] == group["generated_tokens"]
    texts: dict[int, str] = {}
    usage: dict[str, Any] | None = None
    body |= {"stream_options": {"include_usage": True}}
    for chunk in scripted.stream("/v1/completions", body):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {index: scenario.PROMPTS[PRUNE][index] for index in indices}
    assert usage is not None and usage["completion_tokens"] > sum(
        group["choices"][index]["tokens"] for index in indices
    )


def test_a_native_streams_numbers_are_those_of_each_choice(scripted: Server):
    """Where choices are dropped, too: a native reply has no usage that would count them."""
    params = {"n": 8, "max_new_tokens": 400, "temperature": 1.0,
              "custom_params": {"deepprune": {**PAPER, "return": "survivors"}}}  # fmt: skip
    ends: dict[int, dict[str, Any]] = {}
    length: Counter[int] = Counter()
    for chunk in scripted.stream("/generate", {"text": PRUNE, "sampling_params": params}):
        length[chunk["index"]] = len(chunk["output_ids"])
        ends[chunk["index"]] = chunk["meta_info"]
    record = ends[0]["deepprune"]["group"]
    for index in (0, 1):
        assert ends[index]["completion_tokens"] == length[index]
        assert ends[index]["completion_tokens"] == record["choices"][index]["tokens"]


def test_a_request_can_opt_out_and_then_nothing_is_stopped(scripted: Server, tokenizer):
    outputs = scripted.generate(DECIDE, n=4, max_new_tokens=400, custom_params={"deepprune": False})
    # Without a tag siblings are told apart by arrival: each plays some whole script.
    assert {output["text"] for output in outputs} <= set(scenario.PROMPTS[DECIDE])
    group = outputs[0]["meta_info"]["deepprune"]["group"]
    assert group["active"] is False and "request" in group["reason"]


def test_every_prompt_of_a_list_is_a_group_of_its_own(scripted: Server):
    reply = scripted.post(
        "/v1/completions",
        {"model": "m", "prompt": [PRUNE, DECIDE], "n": 8, "max_tokens": 400,
         "custom_params": {"deepprune": {"preset": "latency"}}},
    ).json()  # fmt: skip
    groups = reply["metadata"]["deepprune"]["groups"]
    assert [group["answer"] for group in groups] == ["15", "7"]
    assert [group["size"] for group in groups] == [8, 8]
    assert len(reply["choices"]) == 16


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k1": 0}, "k1"), ({"judge": "oracle:/etc/passwd"}, "judge"), ({"nonsense": 1}, "nonsense"),
     ({"tau": "high"}, "tau"), ({"group": "g"}, "group"), ([1], "custom_params")],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_bad_setting_is_a_400_that_names_it(scripted: Server, path: str, settings, named: str):
    custom = {"deepprune": settings}
    if path == "/generate":
        params = {"n": 2, "custom_params": custom}
        body: dict[str, Any] = {"text": PRUNE, "sampling_params": params}
    elif path == "/v1/completions":
        body = {"model": "m", "prompt": PRUNE, "n": 2, "custom_params": custom}
    else:
        messages = [{"role": "user", "content": PRUNE}]
        body = {"model": "m", "messages": messages, "n": 2, "custom_params": custom}
    response = scripted.post(path, body)
    assert response.status_code == 400 and f"deepprune.{named}" in response.text
    assert scripted.is_alive


def test_single_requests_join_a_group_by_name(scripted: Server):
    replies: dict[int, dict[str, Any]] = {}
    settings = {"group": "unguessable-1", "size": 8, "preset": "latency", "window": 8}

    def one(number: int) -> None:
        replies[number] = scripted.generate(
            "client: what is 5 + 2 =", max_new_tokens=400, temperature=1.0,
            custom_params={"deepprune": settings},
        )  # fmt: skip

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [reply["meta_info"]["deepprune"] for reply in replies.values()]
    for record in records:
        jsonschema.validate(record, SCHEMA)
    assert sorted(record["choice"]["index"] for record in records) == list(range(8))
    settled = [record["group"] for record in records if record["group"]["settled"]]
    assert len(settled) == 1 and settled[0]["answer"] == "7"
    ended = sorted(record["choice"]["state"] for record in records)
    assert ended.count("finished") >= 3 and "decided" in ended
    scripted.wait_idle()


def test_equal_answers_that_only_sympy_can_tell_are_one_vote(scripted: Server):
    outputs = ask(scripted, "fence: expand", 3, {"preset": "latency"})
    votes = [vote["votes"] for vote in group_of(outputs)["votes"]]
    assert votes == [2, 1]
    assert states(outputs) == ["finished"] * 3


def sglang_deepprune(*words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """The command, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "sglang_deepprune.cli", *words],
        input=said, env=cpu_env(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "stream"])
def test_explain_reads_what_a_client_got(scripted: Server, path: str):
    custom = {"deepprune": PAPER}
    if path == "/generate":
        params = {"n": 8, "max_new_tokens": 400, "temperature": 1.0, "custom_params": custom}
        body: dict[str, Any] = {"text": PRUNE, "sampling_params": params}
    else:
        body = {
            "model": "m",
            "n": 8,
            "max_tokens": 400,
            "temperature": 1.0,
            "custom_params": custom,
        }
        if path == "/v1/completions":
            body["prompt"] = PRUNE
        else:
            body["messages"] = [{"role": "user", "content": PRUNE}]
    if path == "stream":
        reply = scripted.post("/v1/chat/completions", {**body, "stream": True}).text
        assert reply.count("data: ") > 8
    else:
        reply = scripted.post(path, body).text
    done = sglang_deepprune("explain", "-", said=reply)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("'15', as sibling 0 wrote it, wins with 2 of 2 votes.")
    assert "2 ran to the end and 6 were stopped as redundant" in done.stdout
    # Whoever is cut a window later may be stopped before it is in one.
    assert re.search(r"2 clusters of (5 and 3|5 and 2|4 and 3)\b", done.stdout)
    assert "Mind:" not in done.stdout


def test_explain_says_why_a_reply_has_no_record(scripted: Server):
    done = sglang_deepprune("explain", "-", said=json.dumps(scripted.generate("x", n=1)))
    assert done.returncode == 1 and "this reply has no record" in done.stderr
    outputs = scripted.generate(DECIDE, n=2, max_new_tokens=4, custom_params={"deepprune": False})
    done = sglang_deepprune("explain", "-", said=json.dumps(outputs))
    assert done.returncode == 0 and "no group: switched off by request" in done.stdout


def test_doctor_finds_a_live_server_well_and_tells_its_settings(scripted: Server):
    done = sglang_deepprune("doctor", "--json", "--url", scripted.url)
    body = json.loads(done.stdout)
    findings = {one["check"]: (one["state"], one["sentence"]) for one in body["findings"]}
    assert done.returncode == 0 and body["faults"] == 0, findings
    assert findings["plugin"][0] == findings["judge"][0] == findings["request"][0] == "ok"
    assert body["server"]["settings"]["deepprune_window"] == 8
    assert "window=8" in findings["settings"][1]
    (rank,) = body["server"]["ranks"]
    assert (rank["judge_state"], rank["faults"]) == ("ready", [])
    assert body["server"]["record"]["size"] == 2
    info = scripted.get("/server_info")
    assert "_deepprune" not in info["internal_states"][0]
    assert "token" not in info["internal_states"][0]["deepprune"]


def test_our_tables_are_empty_when_nothing_is_live(scripted: Server):
    scripted.wait_idle()
    last = scripted.log_lines("deepprune-tables")[-1]
    assert set(last.values()) == {0}, last


def test_a_client_cannot_forge_a_tag(scripted: Server):
    """Our wire key in a client's custom_params is taken out, or ignored for want of the token."""
    forged = {"gid": "x", "index": 0, "size": 2, "rid": "", "token": "guess"}
    output = scripted.generate("hello", max_new_tokens=4, custom_params={"__deepprune": forged})
    assert "deepprune" not in output["meta_info"]
    outputs = scripted.generate(
        PRUNE, n=2, max_new_tokens=400, custom_params={"__deepprune": "x", "mine": 1}
    )
    assert states(outputs) == ["finished"] * 2
    assert "live groups run on" not in scripted.log
