"""SGLang's router over two workers: n>1, streams, cancels, and groups kept on one of them.

Worker A runs preset `balanced`, worker B `latency`: a record whose request names no preset says who
served it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_deepprune.local_server import free_port
from sglang_deepprune.reasoner import model_path
from tests.engine.server import Server
from tests.stacks.recipes import FLAGS, RECIPES, environ, run_json

START_LIMIT_S = 180
QUESTION = "What is 19 + 32 + 37 + 47 ?"
LONG = "What is 36 + 55 + 54 + 19 + 18 + 32 * 30 + 95 + 80 + 35 + 3 * 2 - 55 + 13 + 55 + 23 + 41 ?"


@dataclass(frozen=True, slots=True)
class Router:
    url: str
    policy: str

    def post(self, path: str, body: dict[str, Any], **headers: str) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, headers=headers, timeout=240)


@pytest.fixture(scope="module")
def workers(server: Server) -> Iterator[list[Server]]:
    """The session's server and a second one."""
    with Server(
        model_path(), *FLAGS, "--deepprune-preset", "latency", max_total_tokens=40000
    ) as second:
        yield [server, second]


@pytest.fixture(scope="module", params=["manual", "consistent_hashing"])
def router(
    request: pytest.FixtureRequest,
    environment: Any,
    workers: list[Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Router]:
    """`manual` from its command line, the hash policy by the recipe's program."""
    python = environment("router").python
    port, metrics = free_port(), free_port()
    urls = [worker.url for worker in workers]
    if request.param == "manual":
        command = [python, "-m", "sglang_router.launch_router", "--policy", "manual",
                   "--host", "127.0.0.1", "--port", port, "--prometheus-port", metrics,
                   "--worker-urls", *urls]  # fmt: skip
    else:
        command = [python, RECIPES / "router_consistent_hashing.py"]
    env = environ(PORT=str(port), METRICS_PORT=str(metrics), WORKERS=" ".join(urls))
    log = tmp_path_factory.mktemp("router") / "router.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(part) for part in command], env=env, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_workers(url, process, log)
        yield Router(url, request.param)
    finally:
        process.kill()
        process.wait()


def wait_for_workers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            known = requests.get(f"{url}/workers", timeout=5).json()["workers"]
            if sum(worker["is_healthy"] for worker in known) == 2:
                return
        except (requests.RequestException, ValueError):
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": QUESTION, "n": 8, "seed": 5, "max_tokens": 700, **more}


def test_completions_pass_choices_settings_and_record(router: Router):
    asked = completion(custom_params={"deepprune": {"preset": "economy", "return": "vote"}})
    reply = router.post("/v1/completions", asked).json()
    group = reply["metadata"]["deepprune"]
    assert group["preset"] == "economy" and group["answer"] == "135" and group["size"] == 8
    assert len(reply["choices"]) == 1 and "135" in reply["choices"][0]["text"]
    assert 400 <= router.post("/v1/completions", completion(prompt=[1, 2, 3])).status_code < 500


def test_chat_and_generate_lose_the_settings_and_keep_the_record(router: Router):
    """The router sends on the fields that it knows. The server's own flags hold."""
    settings = {"deepprune": {"preset": "economy", "return": "vote"}}
    chat = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], "n": 8, "seed": 5,
            "max_tokens": 700, "custom_params": settings}  # fmt: skip
    reply = router.post("/v1/chat/completions", chat).json()
    group = reply["metadata"]["deepprune"]
    assert group["preset"] in ("balanced", "latency") and group["answer"] == "135"
    assert len(reply["choices"]) == 8
    refused = router.post("/v1/chat/completions", {**chat, "n": 16})
    assert refused.status_code == 400 and "10" in refused.text, "n is at most 10 in a router's chat"

    params = {"n": 8, "max_new_tokens": 700, "temperature": 1.0, "custom_params": settings}
    outputs = router.post("/generate", {"text": QUESTION, "sampling_params": params}).json()
    assert len(outputs) == 8
    assert outputs[0]["meta_info"]["deepprune"]["group"]["preset"] in ("balanced", "latency")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_ends_with_the_record(router: Router, path: str):
    asked = completion(stream=True)
    if "chat" in path:
        asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
    response = requests.post(f"{router.url}{path}", json=asked, stream=True, timeout=240)
    lines = [line for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]" and b'"deepprune"' in lines[-2]
    assert b'"answer": "135"' in lines[-2]


def running(workers: list[Server]) -> int:
    """Requests that the workers have now, held siblings included."""
    loads = [worker.get("/v1/loads")["loads"] for worker in workers]
    return sum(
        int(load["num_running_reqs"]) + int(load["num_waiting_reqs"])
        for one in loads
        for load in one
    )


def test_a_client_that_leaves_stops_the_group_behind_the_router(
    router: Router, workers: list[Server]
):
    asked = completion(
        prompt=LONG, n=16, max_tokens=900, ignore_eos=True, stream=True,
        custom_params={"deepprune": {"preset": "collect"}},
    )  # fmt: skip
    response = requests.post(f"{router.url}/v1/completions", json=asked, stream=True, timeout=240)
    lines = response.iter_lines()
    tokens = 0
    while tokens < 32:
        tokens += next(lines).startswith(b"data: {")
    assert running(workers) >= 8
    response.close()
    start = time.monotonic()
    while running(workers) and time.monotonic() - start < 30:
        time.sleep(0.05)
    # 900 steps of 16 rows take several seconds on any CPU.
    assert running(workers) == 0 and time.monotonic() - start < 3
    for worker in workers:
        worker.wait_idle()


def test_a_group_of_single_requests_stays_on_one_worker(router: Router, workers: list[Server]):
    served = set()
    for _ in range(4):  # six keys a run; all on one worker happens once in 32 runs
        said = run_json([sys.executable, RECIPES / "router_groups.py"], env=environ(router.url))
        for settled, records in said:
            assert settled["size"] == 8 and settled["votes"]
            assert len({record["group_id"] for record in records}) == 1
            (preset,) = {record["preset"] for record in records}
            served.add(preset)
        if len(served) == 2:
            break
    assert served == {"balanced", "latency"}, "all keys went to one worker"
    for worker in workers:
        worker.wait_idle()


def test_the_hash_policy_takes_an_api_key_for_a_routing_key(router: Router):
    if router.policy != "consistent_hashing":
        pytest.skip("a rule of that policy alone")
    for key in ("one", "two", "three", "four", "five", "six"):
        served = set()
        for _ in range(3):
            asked = completion(max_tokens=4)
            reply = router.post("/v1/completions", asked, Authorization=f"Bearer {key}").json()
            served.add(reply["metadata"]["deepprune"]["preset"])
        assert len(served) == 1, "chance would have split one of six keys"
