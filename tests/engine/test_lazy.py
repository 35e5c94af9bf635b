"""Lazy groups in a real server: who starts, who never does, and who may still reach the held ones.

Scripted tokens, strict memory checks on, in each configuration of conftest.CONFIGS.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
import requests

from tests.engine import scenario
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, ask, group_of, page_of, states
from tests.engine.versions import before

DISAGREE = "lazy: what is 6 + 6 ="
LONG = "D3: count"
BALANCED = {"preset": "balanced", "widen": 0.0}


def test_a_decided_vote_leaves_most_siblings_unstarted(scripted: Server):
    outputs = ask(scripted, DECIDE, 12, BALANCED)
    found = Counter(states(outputs))
    assert found["finished"] == 3 and set(found) <= {"finished", "decided", "not_started"}
    if "no-overlap" in scripted.name:  # nothing is filled there: base 4, and one more a vote
        assert found == {"finished": 3, "decided": 3, "not_started": 6}
    assert group_of(outputs)["answer"] == "7"
    for output in outputs:
        meta = output["meta_info"]
        if meta["deepprune"]["choice"]["state"] == "not_started":
            assert output["text"] == "" and meta["completion_tokens"] == 0
            assert meta["finish_reason"]["type"] == "length"
            assert meta["prompt_tokens"] == outputs[0]["meta_info"]["prompt_tokens"]
    scripted.wait_idle()
    assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())


def test_a_question_without_agreement_runs_all_its_siblings(scripted: Server):
    outputs = ask(scripted, DISAGREE, 12, BALANCED)
    assert states(outputs) == ["finished"] * 12
    for index, output in enumerate(outputs):  # in order, and each on its own script
        assert output["text"] == scenario.PROMPTS[DISAGREE][index]
        page = page_of(scripted)
        prompt = output["meta_info"]["prompt_tokens"]
        assert output["meta_info"]["cached_tokens"] >= prompt - page
    assert len(group_of(outputs)["votes"]) == 12
    scripted.wait_idle()


def test_a_stream_ends_unstarted_choices_with_one_terminal_chunk(scripted: Server):
    said = {"model": "m", "prompt": DECIDE, "n": 12, "max_tokens": 400,
            "custom_params": {"deepprune": BALANCED}}  # fmt: skip
    ends: Counter[int] = Counter()
    record: dict[str, Any] = {}
    for chunk in scripted.stream("/v1/completions", said):
        for choice in chunk["choices"]:
            ends[choice["index"]] += choice["finish_reason"] is not None
        record = chunk.get("metadata") or record
    assert ends == Counter(range(12))
    assert record["deepprune"]["answer"] == "7"


def in_background(server: Server, body: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    """The request's reply, in a list once it is there."""
    replies: list[Any] = []

    def send() -> None:
        try:
            replies.append(server.post("/generate", body, timeout_s=60))
        except requests.RequestException as error:
            replies.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    return thread, replies


def start_long(server: Server, rid: str, n: int = 12) -> tuple[threading.Thread, list[Any]]:
    """A group that runs for a while with most of its siblings held."""
    slow = {**BALANCED, "base": 2, "eps": 0.0}  # two at a time to the end: seconds
    params = {"n": n, "max_new_tokens": 400, "custom_params": {"deepprune": slow}}
    started = in_background(server, {"text": LONG, "rid": rid, "sampling_params": params})
    # Before 0.5.19 the load is told with a delay; the group runs for a second or more.
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline and server_load(server)["num_running_reqs"] < 2:
        time.sleep(0.02)
    return started


def server_load(server: Server) -> dict[str, Any]:
    return dict(requests.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0])


def test_held_siblings_count_as_load_and_as_work(scripted: Server):
    thread, replies = start_long(scripted, "loaded")
    load = server_load(scripted)
    assert load["num_running_reqs"] + load["num_waiting_reqs"] >= 8
    flush = requests.post(f"{scripted.url}/flush_cache", timeout=30)
    assert flush.status_code != 200
    thread.join()
    assert replies[0].status_code == 200
    scripted.wait_idle()


def test_aborts_by_rid_and_of_all_reach_held_siblings(scripted: Server):
    for rid, body in (("one", {"rid": "one"}), ("all", {"abort_all": True})):
        thread, replies = start_long(scripted, rid)
        scripted.post("/abort_request", body)
        thread.join(timeout=30)
        assert not thread.is_alive(), "the client hangs"
        assert replies and replies[0].status_code == 200
        ends = Counter(one["meta_info"]["finish_reason"]["type"] for one in replies[0].json())
        assert set(ends) <= {"abort", "stop"} and ends["abort"] >= 6, ends
        scripted.wait_idle()
        assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())


def test_an_abort_by_prefix_ends_members_of_a_named_group_and_no_stranger(scripted: Server):
    """SGLang aborts whatever rid begins with what is said: `p` is `p1` and `p2` too, held ones
    among them, and not `q`."""
    params = {"max_new_tokens": 400, "temperature": 1.0}
    group = {**BALANCED, "base": 2, "eps": 0.0, "group": "by-prefix", "size": 3}
    member = {"text": LONG, "sampling_params": {**params, "custom_params": {"deepprune": group}}}
    other = {"text": "a bystander", "sampling_params": {**params, "ignore_eos": True}}
    sent = {"q": in_background(scripted, {**other, "rid": "q"})}
    sent |= {rid: in_background(scripted, {**member, "rid": rid}) for rid in ("p", "p1", "p2")}
    held_s = time.monotonic() + 5
    while num_held(scripted) < 1:
        assert time.monotonic() < held_s, "the third member never came"
    scripted.post("/abort_request", {"rid": "p"})
    metas = {}
    for rid, (thread, replies) in sent.items():
        thread.join(timeout=60)
        assert not thread.is_alive(), f"the client of {rid} hangs"
        metas[rid] = replies[0].json()["meta_info"]
    stranger = metas.pop("q")
    assert stranger["finish_reason"]["type"] == "length" and "deepprune" not in stranger
    assert stranger["completion_tokens"] == 400
    assert {meta["finish_reason"]["type"] for meta in metas.values()} == {"abort"}
    records = [meta["deepprune"] for meta in metas.values()]
    assert {record["choice"]["state"] for record in records} == {"aborted"}
    assert sorted(record["choice"]["index"] for record in records) == [0, 1, 2]
    assert sum(record["choice"]["tokens"] == 0 for record in records) == 1  # the held one
    (last,) = [record["group"] for record in records if record["group"]["settled"]]
    assert last["size"] == 3 and last["votes"] == [] and last["answer"] is None
    assert [choice["state"] for choice in last["choices"]] == ["aborted"] * 3
    assert last["generated_tokens"] == sum(meta["completion_tokens"] for meta in metas.values())
    scripted.wait_idle()
    assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())


def num_held(server: Server) -> int:
    """Siblings that wait within their groups, of which some member runs."""
    load = server_load(server)
    return int(load["num_waiting_reqs"]) if load["num_running_reqs"] >= 3 else 0


def test_held_siblings_that_are_aborted_bring_their_records(scripted: Server):
    slow = {**BALANCED, "base": 2, "eps": 0.0}
    params = {"n": 12, "max_new_tokens": 400, "custom_params": {"deepprune": slow}}
    said = {"text": LONG, "rid": "streamed", "sampling_params": params}
    ends: dict[int, dict[str, Any]] = {}
    group: dict[str, Any] = {}
    for place, chunk in enumerate(scripted.stream("/generate", said)):
        if place == 4:
            scripted.post("/abort_request", {"rid": "streamed"})
        if chunk["meta_info"]["finish_reason"] is not None:
            ends[chunk["index"]] = chunk["meta_info"]
            group = chunk["meta_info"]["deepprune"].pop("group", group)
    assert sorted(ends) == list(range(12))
    for index, meta in ends.items():
        assert meta["deepprune"]["choice"]["index"] == index
        assert meta["deepprune"]["choice"]["state"] == "aborted"
        assert meta["finish_reason"]["type"] == "abort" and meta["finish_reason"]["message"]
    assert group["active"] and group["settled"] and len(group["choices"]) == 12
    assert {choice["state"] for choice in group["choices"]} == {"aborted"}
    scripted.wait_idle()


def test_a_client_that_leaves_takes_its_held_siblings_along(scripted: Server):
    params = {"n": 12, "max_new_tokens": 400, "custom_params": {"deepprune": BALANCED}}
    stream = scripted.stream("/generate", {"text": LONG, "sampling_params": params})
    for _ in range(20):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    scripted.wait_idle()
    assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())


def test_a_stranger_is_served_while_a_group_holds_its_siblings(scripted: Server):
    thread, replies = start_long(scripted, "beside")
    start = time.monotonic()
    output = scripted.generate("a stranger", n=1, max_new_tokens=8, temperature=0.0)
    waited = time.monotonic() - start
    assert thread.is_alive() and output["meta_info"]["completion_tokens"] == 8
    thread.join()
    assert waited < 5 and replies[0].status_code == 200
    scripted.wait_idle()


def whole(thread: Any, replies: list[Any]) -> list[dict[str, Any]]:
    """The outputs of LONG's siblings: each has run to its end."""
    thread.join(timeout=60)
    assert not thread.is_alive(), "the client hangs"
    outputs: list[dict[str, Any]] = replies[0].json()
    assert states(outputs) == ["finished"] * 12
    assert [one["text"] for one in outputs] == scenario.PROMPTS[LONG]
    return outputs


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_and_a_flush_leave_held_siblings_to_go_on(scripted: Server, mode: str):
    """What an RL trainer does between two steps: the tree is flushed under our prompt lock."""
    thread, replies = start_long(scripted, f"paused-{mode}")
    assert scripted.post("/pause_generation", {"mode": mode}).status_code == 200
    # SGLang flushes for nobody while requests run, and before 0.5.21 while any wait; the rest must
    # hold all the same.
    flushed = 400 if mode == "in_place" or before("0.5.21") else 200
    assert requests.post(f"{scripted.url}/flush_cache", timeout=30).status_code == flushed
    assert scripted.post("/continue_generation", {}).status_code == 200
    whole(thread, replies)
    scripted.wait_idle()
    assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())


def test_a_pause_that_aborts_takes_held_siblings_along(scripted: Server):
    thread, replies = start_long(scripted, "aborted")
    assert scripted.post("/pause_generation", {"mode": "abort"}).status_code == 200
    thread.join(timeout=60)
    assert not thread.is_alive(), "the client hangs"
    found = Counter(states(replies[0].json()))
    assert found["aborted"] >= 8 and set(found) <= {"aborted", "finished"}
    scripted.wait_idle()  # flushed while it is paused
    assert all(count == 0 for count in scripted.log_lines("deepprune-tables")[-1].values())
    assert scripted.post("/continue_generation", {}).status_code == 200
    assert group_of(ask(scripted, DECIDE, 12, BALANCED))["answer"] == "7"
