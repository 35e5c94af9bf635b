"""Modes of a server that need one of their own: each goes through the same groups.

What is right does not depend on the mode, so most of it is what test_groups.py asks of the shared
servers, on scripted tokens and with strict memory checks.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scripted import plugin_env, write_scripts
from tests.engine import fault_plugin, scenario, test_groups, test_lazy
from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, PAPER, PRUNE, ask, group_of, states
from tests.engine.test_lazy import DISAGREE, LONG, in_background, server_load
from tests.engine.test_order import Client
from tests.engine.test_queue import body_of

pytestmark = pytest.mark.modes

Check = Callable[[Server, Any], None]
URGENT = 100  # beyond SGLang's preemption threshold


def tables(server: Server) -> None:
    """All of ours is empty within a moment, and no fault of ours was logged."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = server.log_lines("deepprune-tables")
        if lines and set(lines[-1].values()) == {0}:
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"our tables are not empty: {lines[-1]}")
    assert "live groups run on" not in server.log and server.is_alive


def exact_texts(server: Server, _: Any) -> None:
    """Who stops and what everybody said, to the token; nothing about the pool."""
    outputs = ask(server, PRUNE, 8, PAPER)
    assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
    assert [output["text"] for output in outputs[:2]] == scenario.PROMPTS[PRUNE][:2]
    for output, script in zip(outputs[2:], scenario.PROMPTS[PRUNE][2:], strict=True):
        assert script.startswith(output["text"])
    decided = ask(server, DECIDE, 12, {"preset": "latency", "window": 8})
    assert states(decided)[:3] == ["finished"] * 3
    assert set(states(decided)[3:]) <= {"decided", "not_started"}
    fenced = ask(server, "fence: expand", 3, {"preset": "latency"})
    assert [vote["votes"] for vote in group_of(fenced)["votes"]] == [2, 1]
    lazy = ask(server, DISAGREE, 12, test_lazy.BALANCED)
    assert [output["text"] for output in lazy] == scenario.PROMPTS[DISAGREE]


def streams(server: Server, _: Any) -> None:
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        test_groups.test_a_stream_has_one_terminal_chunk_a_choice_and_the_record_last(server, path)


def freed_slots(server: Server, tokenizer: Any) -> None:
    """Each stopped sibling's own pages, in the verdict's step."""
    test_groups.test_redundant_siblings_stop_and_their_kv_is_free_in_that_step(server, tokenizer)
    test_groups.test_a_decided_vote_stops_the_rest_in_the_deciding_step(server)
    test_groups.test_siblings_share_the_prompt_and_usage_counts_every_token(server)
    test_lazy.test_a_question_without_agreement_runs_all_its_siblings(server)


def aborted(server: Server, _: Any) -> None:
    """By the rid that the client knows, also where another tokenizer process knows the siblings."""
    for rid in ("first", "second", "third"):
        params = {"n": 12, "max_new_tokens": 400,
                  "custom_params": {"deepprune": {"preset": "collect"}}}  # fmt: skip
        thread, replies = in_background(
            server, {"text": LONG, "rid": rid, "sampling_params": params}
        )
        time.sleep(0.4)
        server.post("/abort_request", {"rid": rid})
        thread.join(timeout=60)
        assert not thread.is_alive() and replies[0].status_code == 200
        types = Counter(out["meta_info"]["finish_reason"]["type"] for out in replies[0].json())
        assert types["abort"] >= 4 and set(types) <= {"abort", "stop"}


def bad_setting(server: Server, _: Any) -> None:
    params = {"n": 2, "custom_params": {"deepprune": {"k1": 0}}}
    reply = server.post("/generate", {"text": PRUNE, "sampling_params": params})
    assert reply.status_code == 400 and "deepprune.k1" in reply.text


def embeddings(server: Server, tokenizer: Any) -> None:
    """Prompts as embeddings: groups of their own; no client may join such a group by name."""
    rows = len(tokenizer.encode(PRUNE))
    embeds = [[0.01 * ((row + column) % 7) for column in range(64)] for row in range(rows)]
    params: dict[str, Any] = {"n": 4, "max_new_tokens": 12, "temperature": 1.0,
                              "custom_params": {"deepprune": {"preset": "balanced"}}}  # fmt: skip
    reply = server.post("/generate", {"input_embeds": embeds, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    outputs = reply.json()
    assert states(outputs) == ["finished"] * 4
    assert {out["meta_info"]["prompt_tokens"] for out in outputs} == {rows}
    params = {"max_new_tokens": 4, "custom_params": {"deepprune": {"group": "g", "size": 2}}}
    reply = server.post("/generate", {"input_embeds": embeds, "sampling_params": params})
    assert reply.status_code == 400 and "not for prompts with images" in reply.text


def half_a_group(server: Server, _: Any) -> None:
    """What a router does to a client-side group: the other half went to another server."""
    settings = {"group": "unguessable-half", "size": 8, "preset": "latency", "window": 8}
    params = {"max_new_tokens": 400, "temperature": 1.0, "custom_params": {"deepprune": settings}}
    sent = [in_background(server, {"text": DECIDE, "sampling_params": params}) for _ in range(4)]
    records = []
    for thread, replies in sent:
        thread.join(timeout=60)
        records.append(replies[0].json()["meta_info"]["deepprune"])
    # Nobody waits for the others, and the record says how many there should be.
    assert {record["group"]["size"] for record in records} == {8}
    assert sorted(record["choice"]["index"] for record in records) == [0, 1, 2, 3]
    assert any(record["group"]["settled"] is False for record in records)
    time.sleep(2.5)  # the group is closed by then
    ask(server, "D2: what is 2 + 2 =", 3, {"preset": "collect"})


def held_back_streams(server: Server, _: Any) -> None:
    """Chunks are deltas here, and a choice that `return: vote` held back is whole again."""
    settings = {"deepprune": {**PAPER, "return": "vote"}}
    said = {"model": "m", "prompt": PRUNE, "n": 8, "max_tokens": 400, "logprobs": 1,
            "custom_params": settings}  # fmt: skip
    text, num_logprobs, record = "", 0, None
    for chunk in server.stream("/v1/completions", said):
        record = (chunk.get("metadata") or {}).get("deepprune", record)
        for choice in chunk["choices"]:
            assert choice["index"] == 0
            text += choice["text"]
            num_logprobs += len((choice["logprobs"] or {}).get("tokens") or ())
    assert text == scenario.PROMPTS[PRUNE][0]
    assert record is not None and num_logprobs == record["choices"][0]["tokens"]
    test_groups.test_return_filters_choices_but_not_the_usage(server, "survivors", [0, 1])


MODES: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[Check, ...]]] = {
    "page64-overlap": (("--page-size", "64"), {}, (freed_slots, exact_texts, streams)),
    "page1-chunked": (
        ("--chunked-prefill-size", "16"), {}, (freed_slots, exact_texts, streams),
    ),
    "page1-no-radix": (
        ("--disable-radix-cache", "--deepprune-group-timeout-s", "2"), {},
        (exact_texts, embeddings, half_a_group),
    ),
    "page1-incremental": (
        ("--incremental-streaming-output", "--stream-interval", "4"), {},
        (exact_texts, streams, held_back_streams),
    ),
    "page1-workers": (
        ("--tokenizer-worker-num", "2", "--detokenizer-worker-num", "2"),
        {"SGLANG_USE_PICKLE_IPC": "0"}, (exact_texts, exact_texts, streams, aborted, bad_setting),
    ),
    "page1-workers-pickled": (
        ("--tokenizer-worker-num", "2", "--detokenizer-worker-num", "2"),
        {"SGLANG_USE_PICKLE_IPC": "1"}, (exact_texts, aborted),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODES))
def test_groups_are_the_same_in_every_mode_of_the_server(
    tiny: Any, tokenizer: Any, scripts_env: Any, name: str
):
    flags, env, checks = MODES[name]
    with Server(tiny, *COMMON, *MARKER, *flags, env={**scripts_env, **env}) as server:
        server.name = name
        for check in checks:
            check(server, tokenizer)
        tables(server)


def test_rows_that_decode_within_a_prefill_pass_are_siblings_too(tiny: Any, scripts_env: Any):
    """`--enable-mixed-chunk`: others' prompts come in pieces, beside the group's decode rows."""
    flags = ("--enable-mixed-chunk", "--chunked-prefill-size", "16")
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        stop, served = threading.Event(), list[Any]()

        def strangers() -> None:
            while not stop.is_set():
                text = f"{len(served)} " + " ".join(scenario.WORDS * 12)
                served.append(server.generate(text, max_new_tokens=2, temperature=0.0))

        thread = threading.Thread(target=strangers)
        thread.start()
        try:
            for _ in range(3):
                outputs = ask(server, PRUNE, 8, PAPER)
                found = Counter(states(outputs))
                assert set(found) == {"finished", "pruned"} and found["finished"] >= 2
                assert group_of(outputs)["answer"] == "15"
                decided = ask(server, DECIDE, 12, {"preset": "latency", "window": 8})
                assert Counter(states(decided))["finished"] == 3
                lazy = ask(server, DISAGREE, 12, test_lazy.BALANCED)
                assert [one["text"] for one in lazy] == scenario.PROMPTS[DISAGREE]
                long = ask(server, scenario.ORDER, 6, {"preset": "collect"})
                assert [one["text"] for one in long] == scenario.PROMPTS[scenario.ORDER]
                for reply, prompt in ((outputs, PRUNE), (decided, DECIDE)):
                    for output, script in zip(reply, scenario.PROMPTS[prompt], strict=False):
                        assert script.startswith(output["text"])
        finally:
            stop.set()
            thread.join()
        assert served and re.search(r"Prefill batch.*#running-req: [1-9]", server.log)
        server.wait_idle()
        tables(server)


def pool_of(server: Server) -> dict[str, Any]:
    """The server's inner state, by fault_plugin.py."""
    return dict(server.get("/server_info")["internal_states"][0][fault_plugin.KEY])


def at_baseline(server: Server, before: dict[str, Any]) -> None:
    """All slots and rows are back. Without a flush, which would make a leak good."""
    tables(server)
    deadline = time.monotonic() + 10  # under overlap a row outlives its client by a step
    names = ("free", "evictable", "protected", "rows")
    while (now := pool_of(server)) and any(now[name] != before[name] for name in names):
        assert time.monotonic() < deadline, f"{now} after, {before} before"
        time.sleep(0.1)


@pytest.mark.parametrize("more", [(), ("--enable-mixed-chunk",)], ids=["chunked", "mixed"])
def test_a_sibling_in_the_middle_of_its_prompt_is_decided_and_aborted(
    tiny: Any, tokenizer: Any, tmp_path: Path, more: tuple[str, ...]
):
    """The warm-up leaves the prompt in the tree, so that siblings have one chunk at most: without
    a tree each reads it whole, 16 tokens a pass. Three rows end at once, the next three begin, and
    then the fence finds that the three answers are one."""
    prompt = " ".join(["chunks:", *scenario.WORDS * 40, "="])
    answers = ["(x+1)^2", "x^2+2x+1", "x^2+2x+1"]
    texts = [f"<A> so \\boxed{{{answer}}}" for answer in answers]
    texts += [scenario.trace("B", 200, "8", turn) for turn in range(9)]
    length = len(tokenizer.encode(prompt))
    assert length > 20 * 16
    tokens = scenario.token_lists(tokenizer, texts)
    write_scripts(tmp_path / "scripts.json", {tuple(tokenizer.encode(prompt)): tokens})
    faults = fault_plugin.plugin_env(tmp_path / "faults")["PYTHONPATH"]
    env = plugin_env(tmp_path / "scripts.json", tmp_path / "scripted")
    env |= {"PYTHONPATH": f"{env['PYTHONPATH']}:{faults}"}
    flags = ("--disable-radix-cache", "--chunked-prefill-size", "16", "--max-running-requests", "3")
    with Server(tiny, *COMMON, *MARKER, *flags, *more, env=env) as server:
        server.generate("a stranger", max_new_tokens=2)
        before = pool_of(server)
        for _ in range(3):
            outputs = ask(server, prompt, 12, {"preset": "latency", "window": 8})
            assert states(outputs)[:3] == ["finished"] * 3
            assert set(states(outputs)[3:]) <= {"decided", "not_started"}
            assert group_of(outputs)["reason"].startswith("decided: 3:0")
            at_baseline(server, before)
        assert pool_of(server)["chunked"]["doomed"] >= 1, "nobody was decided in mid-prompt"
        for count, way in enumerate(({"rid": "chunked"}, {"abort_all": True}), 1):
            settings = {"deepprune": {"preset": "collect"}}
            params = {"n": 12, "max_new_tokens": 400, "custom_params": settings}
            thread, replies = in_background(
                server, {"text": prompt, "rid": "chunked", "sampling_params": params}
            )
            while not pool_of(server)["is_chunking"]:
                assert thread.is_alive()
            server.post("/abort_request", way)
            thread.join(timeout=60)
            assert not thread.is_alive() and replies[0].status_code == 200
            ends = Counter(out["meta_info"]["finish_reason"]["type"] for out in replies[0].json())
            assert ends == {"abort": 12}
            assert pool_of(server)["chunked"]["aborted"] >= count
            at_baseline(server, before)


def test_a_group_beyond_the_queue_limit_is_a_503_and_leaves_nothing(tiny: Any, scripts_env: Any):
    """SGLang's own rule for n>1, also where most siblings are held and in no queue."""
    flags = ("--max-queued-requests", "64", "--max-running-requests", "1")
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        for _ in range(2):
            reply = server.post("/generate", body_of(512), timeout_s=120)
            assert reply.status_code == 503, reply.text[:300]
            server.wait_idle()
            tables(server)
        fitting = server.post("/generate", body_of(60), timeout_s=240)
        assert fitting.status_code == 200 and len(fitting.json()) == 60
        tables(server)


def test_a_sibling_that_was_preempted_is_pruned_while_it_waits(tiny: Any, scripts_env: Any):
    """The judge takes 0.3 s; in between an urgent request takes the row of one of the two."""
    flags = ("--enable-priority-scheduling", "--max-running-requests", "2")
    settings = {"preset": "paper", "k2": 1, "window": 8, "cut": "tokens", "cut_tokens": 8}
    params = {"n": 2, "max_new_tokens": 512, "custom_params": {"deepprune": settings}}
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        seen = Counter[bool]()
        for _ in range(8):
            siblings = Client(
                server, {"text": "D4: slow", "sampling_params": params, "priority": 0}
            )
            deadline = time.monotonic() + 10
            while server_load(server)["num_running_reqs"] < 2 and time.monotonic() < deadline:
                time.sleep(0.005)
            body = {"text": "urgent", "priority": URGENT,
                    "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}  # fmt: skip
            urgent = Client(server, body).join()
            siblings.join()
            assert urgent.last[0]["meta_info"]["completion_tokens"] == 400
            for index, chunk in siblings.last.items():
                assert scenario.PROMPTS["D4: slow"][index].startswith(chunk["text"])
            ends = {c["index"]: c["state"] for c in siblings.group["choices"]}
            assert sorted(ends.values()) in (["finished", "pruned"], ["finished", "finished"])
            for index, state in ends.items():
                preempted = siblings.last[index]["meta_info"]["num_retractions"] > 0
                seen[state == "pruned" and preempted] += 1
            server.wait_idle()
            tables(server)
        assert seen[True], "no preempted sibling was pruned in eight rounds"
