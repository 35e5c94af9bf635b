"""After 200 mixed requests the counters at /metrics are the sums over what clients were told."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from sglang_deepprune import metrics
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.counters import Scrape, scrape, wait_for
from tests.engine.server import Server
from tests.engine.test_groups import PAPER, PRUNE, ask, own_slots, states
from tests.engine.test_parallel import CORES

NUM_REQUESTS = 200
CLIENTS = 12
# Heads of a record's reason, and what a dashboard calls them: written out, not taken from the code.
HEADS = {
    "all siblings finished": "finished", "aborted": "aborted", "decided": "decided",
    "pruned": "pruned", "redundant": "pruned", "open-ended": "open_ended", "gave up": "gave_up",
}  # fmt: skip
page1 = pytest.mark.parametrize("scripted", ["page1-overlap"], indirect=True)


Record = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What all clients together read in their replies: a record, or None where there is none."""

    replies: tuple[Record | None, ...]

    @property
    def records(self) -> list[Record]:
        """Of groups that have ended: a client-side group has one, with its last member."""
        return [one for one in self.replies if one and one["active"] and one["settled"]]

    def sum(self, name: str) -> float:
        return sum(record[name] for record in self.records)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(HEADS[record["reason"].partition(":")[0]] for record in self.records)

    @property
    def states(self) -> Counter[str]:
        return Counter(c["state"] for record in self.records for c in record["choices"])

    def stopped(self, state: str) -> list[int]:
        """Tokens of each sibling that was stopped while it ran."""
        return [c["tokens"] for record in self.records for c in record["choices"]
                if c["state"] == state]  # fmt: skip


def native(server: Server, body: Record) -> Record | None:
    """POST /generate; the record's tokens are those of the choices that came back."""
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    outputs = reply.json() if isinstance(reply.json(), list) else [reply.json()]
    ours = outputs[0]["meta_info"].get("deepprune")
    if not ours:
        return None
    record = dict(ours["group"])
    if record["active"] and 1 < record["size"] == len(outputs):
        spent = sum(output["meta_info"]["completion_tokens"] for output in outputs)
        assert spent == record["generated_tokens"]
    return record


def native_stream(server: Server, body: Record, abort_at: int = 0) -> Record | None:
    """The same as a stream; `abort_at`: aborted by its rid after so many chunks."""
    record = None
    for place, chunk in enumerate(server.stream("/generate", body), start=1):
        if place == abort_at:
            assert server.post("/abort_request", {"rid": body["rid"]}).status_code == 200
        record = (chunk["meta_info"].get("deepprune") or {}).get("group", record)
    return record


def openai_like(server: Server, path: str, body: Record) -> Record | None:
    """A reply of the OpenAI routes, whole or streamed; usage counts every token of the record."""
    if body["stream"]:
        found = [chunk.get("metadata") for chunk in server.stream(path, body)]
        return next((one["deepprune"] for one in found if one), None)
    reply = server.post(path, body)
    assert reply.status_code == 200, reply.text
    record = (reply.json().get("metadata") or {}).get("deepprune")
    if record is not None and record["active"]:
        assert reply.json()["usage"]["completion_tokens"] == record["generated_tokens"]
    return record


def mixed_requests(rng: random.Random, name: str) -> list[tuple[Any, ...]]:
    """NUM_REQUESTS calls: (function, its arguments after the server)."""
    prompts = [prompt for prompt in scenario.PROMPTS if prompt.startswith("mixed")]
    calls: list[tuple[Any, ...]] = []
    # A client-side group is never cut in two: the last one may bring a few more.
    while len(calls) < NUM_REQUESTS:
        prompt, number = rng.choice(prompts), len(calls)
        preset = rng.choice(["balanced", "paper", "latency", "collect"])
        settings: Any = {"preset": preset, "k2": rng.choice([1, 2, 4]), **scenario.CUT}
        size, limit = rng.choice([1, 2, 3, 4, 6, 8, 12, 16]), rng.choice([24, 60, 100])
        kind = rng.choice(
            ["whole"] * 4 + ["stream", "abort", "completion", "chat", "off", "client"]
        )
        if kind == "client":
            size = min(6, size + 1)
            settings |= {"group": f"{name} {number}", "size": size}
            params = {"max_new_tokens": limit, "custom_params": {"deepprune": settings}}
            calls += [(native, {"text": prompt, "sampling_params": params})] * size
            continue
        if kind == "off":
            settings = False
        elif kind == "whole":
            settings["return"] = rng.choice(["all", "all", "vote", "survivors"])
        custom = {"deepprune": settings}
        if kind in ("completion", "chat"):
            body = {"model": "m", "n": size, "max_tokens": limit, "temperature": 1.0,
                    "custom_params": custom, "stream": rng.random() < 0.5}  # fmt: skip
            if kind == "chat":
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
            calls.append((openai_like, path, body))
            continue
        if kind == "abort":
            size = max(2, size)
        params = {"n": size, "max_new_tokens": limit, "temperature": 1.0, "custom_params": custom}
        body = {"text": prompt, "rid": f"{name} {number}", "sampling_params": params}
        if kind in ("whole", "off"):
            calls.append((native, body))
        elif kind == "stream":
            calls.append((native_stream, body))
        else:
            calls.append((native_stream, body, rng.choice([1, 3, 9])))
    return calls


def run(server: Server, seed: int) -> tuple[Told, Scrape, float]:
    """Serve them all; what clients were told, what was counted meanwhile, most groups seen live."""
    before = scrape(server)
    most_live = 0.0
    calls = mixed_requests(random.Random(seed), f"mixed {seed}")
    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(function, server, *rest) for function, *rest in calls]
        while wait(sent, timeout=0.5).not_done:
            most_live = max(most_live, scrape(server).total(metrics.LIVE_GROUPS))
        told = Told(tuple(one.result() for one in sent))
    server.wait_idle()
    gauges = (metrics.LIVE_GROUPS, metrics.HELD_SIBLINGS)
    after = wait_for(server, lambda now: not any(now.total(gauge) for gauge in gauges))
    return told, after.since(before), most_live


def check(told: Told, counted: Scrape, most_live: float) -> None:
    """Every counter against the replies."""
    assert counted.of(metrics.GROUPS) == told.reasons
    assert {"finished", "decided", "pruned", "open_ended"} <= set(told.reasons), told.reasons
    assert counted.of(metrics.SIBLINGS) == told.states
    assert {"finished", "pruned", "decided", "not_started", "aborted"} <= set(told.states)
    for metric, name in (
        (metrics.GENERATED_TOKENS, "generated_tokens"),
        (metrics.SAVED_TOKENS, "saved_tokens_at_most"), (metrics.JUDGE_WINDOWS, "windows"),
        (metrics.JUDGE_PAIRS, "judge_calls"), (metrics.JUDGE_TOKENS, "judge_tokens"),
    ):  # fmt: skip
        assert counted.total(metric) == told.sum(name) > 0, name
    assert counted.total(metrics.JUDGE_SECONDS) == pytest.approx(told.sum("judge_ms") / 1000)
    # A verdict on a group that is gone by then has nobody to act on.
    assert 0 < counted.total(metrics.VERDICT_LATENCY) <= told.sum("windows")
    # At page size 1 a running sibling owns what it has generated, and under overlap the slot of
    # the token that is in flight, less the one whose KV is never written.
    for state, slots in counted.of(metrics.FREED_SLOTS).items():
        tokens = told.stopped(state)
        assert sum(tokens) - len(tokens) <= slots <= sum(tokens), state
    assert set(counted.of(metrics.FREED_SLOTS)) == {"pruned", "decided"}
    quiet = (
        metrics.EXTRAS_STARTED, metrics.EXTRAS_YIELDED, metrics.HOOK_ERRORS,
        metrics.PROBE_TOKENS, metrics.RETRACTIONS, metrics.RETRACTIONS_AVOIDED,
    )  # fmt: skip
    assert {metric.name: counted.total(metric) for metric in quiet if counted.total(metric)} == {}
    kinds = {one and (one["active"], one["settled"]) for one in told.replies}
    assert kinds == {None, (False, True), (True, False), (True, True)} and most_live >= 1
    # Nothing in a label that SGLang has not put there, and the closed sets.
    assert counted.labels.keys() == counted.stock.keys()
    known = {one.value for metric in metrics.ALL if metric.values for one in metric.values}
    assert {own for _, own in counted.sums} <= known | {""}


@page1
def test_two_hundred_mixed_requests_count_as_their_replies_say(scripted: Server):
    told, counted, most_live = run(scripted, seed=1)
    check(told, counted, most_live)
    assert wait_for(scripted, lambda now: now.total(metrics.JUDGE_UP) == 1)


@page1
def test_slots_that_a_verdict_frees_are_counted_to_the_slot(scripted: Server):
    before = scrape(scripted)
    outputs = ask(scripted, PRUNE, 8, PAPER)
    assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
    freed = scrape(scripted).since(before).of(metrics.FREED_SLOTS)
    assert freed == {"pruned": sum(own_slots(scripted, output) for output in outputs[2:])}


@page1
def test_a_client_that_leaves_is_counted_too(scripted: Server):
    before = scrape(scripted)
    params = {"n": 6, "max_new_tokens": 400, "custom_params": {"deepprune": {"preset": "collect"}}}
    stream = scripted.stream("/generate", {"text": "D3: count", "sampling_params": params})
    for _ in range(8):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    scripted.wait_idle()
    counted = wait_for(scripted, lambda now: not now.total(metrics.LIVE_GROUPS)).since(before)
    assert counted.of(metrics.GROUPS) == {"aborted": 1}
    assert counted.of(metrics.SIBLINGS) == {"aborted": 6}


@page1
def test_a_judge_that_raises_or_dies_shows_in_its_failures(scripted: Server):
    before = wait_for(scripted, lambda now: now.total(metrics.JUDGE_UP) == 1)
    settings = {"preset": "paper", "k2": 1, **scenario.CUT}
    ask(scripted, "fault: RAISE", 4, settings)
    ask(scripted, "fault: DIE", 4, settings)
    after = wait_for(
        scripted,
        lambda now: (
            now.since(before).total(metrics.JUDGE_RESTARTS) >= 1
            and now.total(metrics.JUDGE_UP) == 1
        ),
    ).since(before)
    failures = after.of(metrics.JUDGE_FAILURES)
    assert set(failures) == {"task", "end"} and min(failures.values()) >= 1
    assert after.total(metrics.VERDICT_LATENCY) == 0 and after.of(metrics.GROUPS) == {"finished": 2}


@pytest.mark.parametrize("scripted", ["page16-no-overlap"], indirect=True)
def test_without_sglangs_flag_there_are_no_metrics(scripted: Server):
    ask(scripted, PRUNE, 8, PAPER)
    reply = requests.get(f"{scripted.url}/metrics", timeout=30)
    assert reply.status_code == 404 or "deepprune" not in reply.text


@pytest.mark.modes
@pytest.mark.parametrize(
    "flags",
    [("--dp", "2"), ("--tp", "2", "--enable-metrics-for-all-schedulers"),
     ("--tokenizer-worker-num", "2")],
    ids=["dp2", "tp2", "two tokenizers"],
)  # fmt: skip
def test_ranks_and_tokenizer_processes_count_once(tiny: Any, scripts_env: Any, flags: Any):
    env = {**scripts_env, **(CORES if flags[0] in ("--dp", "--tp") else {})}
    with Server(tiny, *COMMON, *MARKER, "--enable-metrics", *flags, env=env) as server:
        told, counted, most_live = run(server, seed=2)
        check(told, counted, most_live)
        if flags[0] == "--dp":
            assert set(counted.by_rank) == {"0", "1"} and min(counted.by_rank.values()) > 0
        assert counted.labels["tp_rank"] == {"0"}
