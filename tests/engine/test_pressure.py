"""A full KV pool: who gives way, and in which order. Case D6's preference, by construction."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from sglang_deepprune import metrics
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.counters import scrape
from tests.engine.server import Server
from tests.engine.test_groups import ask, group_of, states
from tests.engine.test_lazy import LONG, in_background, server_load
from tests.engine.versions import paged

PAGES = {"page1": ("--page-size", "1"), "page16": ("--page-size", "16")}
ROOM = 1200  # KV slots: about three of the 330-token traces


@pytest.fixture(
    scope="module", params=["page1", pytest.param("page16", marks=[paged, pytest.mark.modes])]
)
def tight(request: pytest.FixtureRequest, tiny: Any, scripts_env: Any) -> Iterator[Server]:
    # SGLang admits more than fits, as it does when its guess of the lengths is too low.
    flags = (*COMMON, *MARKER, *PAGES[request.param], "--schedule-conservativeness", "0.1",
             "--enable-metrics")  # fmt: skip
    env = {**scripts_env, "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    with Server(tiny, *flags, env=env, max_total_tokens=ROOM) as server:
        server.name = request.param
        yield server


def counts(server: Server) -> dict[str, int]:
    return dict(server.log_lines("deepprune-counts")[-1])


def test_redundant_siblings_are_pruned_before_anybody_is_retracted(tight: Server):
    settings = {"preset": "paper", "k2": 20, **scenario.CUT}
    outputs = ask(tight, LONG, 8, settings)
    group = group_of(outputs)
    assert group["reason"] == "pruned: the KV pool was full"
    found = Counter(states(outputs))
    assert found["pruned"] >= 1 and found["finished"] >= 2, found
    assert group["answer"] == "1"
    assert counts(tight)["relieved"] >= found["pruned"]
    # Of a pool of ROOM slots each gives back what it has, and never more than its tokens' pages.
    freed = scrape(tight).of(metrics.FREED_SLOTS)
    tokens = sum(c["tokens"] for c in group["choices"] if c["state"] == "pruned")
    assert set(freed) == {"pruned"} and 0 < freed["pruned"] <= tokens + 32 * found["pruned"]
    tight.wait_idle()
    assert set(tight.log_lines("deepprune-tables")[-1].values()) == {0}


def test_a_group_over_its_share_gives_way_to_a_stranger(tight: Server):
    before, retracted = counts(tight)["relieved"], tight.log.count("Retract requests")
    params = {"n": 8, "max_new_tokens": 400, "custom_params": {"deepprune": {"preset": "collect"}}}
    thread, replies = in_background(tight, {"text": LONG, "sampling_params": params})
    while thread.is_alive() and server_load(tight)["num_running_reqs"] < 8:
        time.sleep(0.01)
    assert thread.is_alive(), "the group never ran all at once"
    # It comes last and has least when the pool is full: the one that SGLang would retract.
    stranger = tight.generate("a stranger", max_new_tokens=300, ignore_eos=True, temperature=0.0)
    assert stranger["meta_info"]["completion_tokens"] == 300
    assert tight.log.count("Retract requests") == retracted  # nobody had to be so far
    thread.join()
    # Whoever gave way queues for room again, and not for a step or two at a time.
    assert before < counts(tight)["relieved"] < before + 50
    outputs = replies[0].json()
    assert states(outputs) == ["finished"] * 8
    for index, output in enumerate(outputs):  # sent back and started again, to the same text
        assert output["text"] == scenario.PROMPTS[LONG][index]
    tight.wait_idle()


def mixed_request(rng: random.Random) -> dict[str, Any]:
    prompt = rng.choice(
        [p for p in scenario.PROMPTS if not p.startswith(("fault", "D4", "client"))]
    )
    preset = rng.choice(["balanced", "faithful", "economy", "latency", "paper", "collect"])
    params = {
        "n": rng.choice([1, 2, 4, 8, 16, 48]), "max_new_tokens": rng.choice([8, 60, 400]),
        "temperature": 1.0, "custom_params": {"deepprune": {"preset": preset, **scenario.CUT}},
    }  # fmt: skip
    return {"text": prompt, "rid": f"mixed-{rng.random()}", "sampling_params": params}


def check_reply(response: Any, size: int) -> None:
    """Every choice has a state, and a finish reason; a stranger to deepprune has neither group."""
    assert response.status_code == 200, response.text[:300]
    body = response.json()
    outputs = body if isinstance(body, list) else [body]
    assert len(outputs) == size
    for output in outputs:
        assert output["meta_info"]["finish_reason"] is not None
        if size > 1:
            assert output["meta_info"]["deepprune"]["choice"]["state"]


def storm(server: Server, num_requests: int, seed: int) -> None:
    """Requests of every kind at once; some clients leave, some abort. Before that, a group that
    fills the pool by itself: whomever it gave up would be its own, so SGLang retracts."""
    alone = ask(server, LONG, 8, {"preset": "collect"})
    assert [output["text"] for output in alone] == scenario.PROMPTS[LONG][:8]
    rng, failures = random.Random(seed), []
    bodies = [mixed_request(rng) for _ in range(num_requests)]
    fates = [rng.random() for _ in bodies]
    gate = threading.Semaphore(12)

    def send(body: dict[str, Any], fate: float) -> None:
        with gate:
            try:
                if fate < 0.15:  # leaves
                    stream = server.stream("/generate", body)
                    for _ in range(5):
                        next(stream, None)
                    stream.close()  # type: ignore[attr-defined]
                elif fate < 0.3:  # aborts itself
                    thread, replies = in_background(server, body)
                    threading.Event().wait(fate)
                    server.post("/abort_request", {"rid": body["rid"]})
                    thread.join(120)
                    assert not thread.is_alive(), "a client hangs"
                    check_reply(replies[0], body["sampling_params"]["n"])
                else:
                    reply = server.post("/generate", body, timeout_s=240)
                    check_reply(reply, body["sampling_params"]["n"])
            except (AssertionError, requests.RequestException) as error:
                failures.append(f"{body['sampling_params']} {fate:.2f}: {error}")

    threads = [threading.Thread(target=send, args=pair) for pair in zip(bodies, fates, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures[:5])
    server.wait_idle()
    assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
    assert "live groups run on as plain sampling" not in server.log
    logged, counted = counts(server), scrape(server)
    assert counted.total(metrics.RETRACTIONS_AVOIDED) == logged["relieved"] > 0
    assert counted.of(metrics.RETRACTIONS)["deepprune"] == logged["yielded"] > 0
    # Who is doomed or an extra is retracted too, and never queues again: the log's count leaves
    # them out. SGLang's own has strangers as well.
    assert 0 < logged["retracted"] <= counted.of(metrics.RETRACTIONS)["sglang"]
    all_retracted = map(int, re.findall(r"Retract requests.*?#retracted_reqs: (\d+)", server.log))
    assert counted.of(metrics.RETRACTIONS)["sglang"] <= sum(all_retracted)
    assert not counted.total(metrics.HOOK_ERRORS)


def test_mixed_requests_on_a_pool_for_three_siblings(tight: Server):
    storm(tight, 40, seed=1)


@pytest.mark.slow
def test_a_thousand_mixed_requests_on_a_pool_for_three_siblings(tight: Server):
    storm(tight, 1000, seed=2)
