"""What SGLang's queue does to its requests and held siblings: its limit reaches them, its time-out
those that are claimed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server
from tests.engine.test_groups import states
from tests.engine.test_lazy import LONG, in_background, server_load

ONE_AT_A_TIME = {"preset": "balanced", "base": 1, "widen": 0.0}


def body_of(n: int) -> dict[str, Any]:
    params = {"n": n, "max_new_tokens": 400, "custom_params": {"deepprune": ONE_AT_A_TIME}}
    return {"text": LONG, "sampling_params": params}


def test_held_siblings_count_for_the_queue_limit_at_arrival_and_never_later(tiny, scripts_env):
    flags = ("--max-queued-requests", "6", "--max-running-requests", "1", "--deepprune-fill", "0")
    with Server(tiny, *COMMON, *MARKER, *flags, env=scripts_env) as server:
        assert server.post("/generate", body_of(12)).status_code == 503
        server.wait_idle()
        thread, replies = in_background(server, body_of(5))
        while server_load(server)["num_running_reqs"] < 1:
            time.sleep(0.02)
        strangers = [
            in_background(server, {"text": "a stranger", "sampling_params": {"max_new_tokens": 4}})
            for _ in range(4)
        ]
        for one, _ in [(thread, replies), *strangers]:
            one.join(timeout=60)
            assert not one.is_alive()
        codes = sorted(answers[0].status_code for _, answers in strangers)
        assert codes == [200, 200, 503, 503]  # four are held, so two more may wait
        assert replies[0].status_code == 200
        assert states(replies[0].json())[:3] == ["finished"] * 3
        server.wait_idle()


@pytest.mark.modes
def test_held_siblings_do_not_time_out_and_claimed_ones_do(tiny, scripts_env):
    env = {**scripts_env, "SGLANG_REQ_WAITING_TIMEOUT": "1"}
    flags = ("--deepprune-fill", "0", "--max-running-requests", "1")
    with Server(tiny, *COMMON, *MARKER, *flags, env=env) as server:
        body = body_of(4)
        body["sampling_params"]["custom_params"]["deepprune"]["eps"] = 0.0
        start = time.monotonic()
        reply = server.post("/generate", body, timeout_s=120)
        assert time.monotonic() - start > 2, (
            "the last one must be held for longer than the time-out"
        )
        assert reply.status_code == 200 and states(reply.json()) == ["finished"] * 4
        server.wait_idle()
        # With a claim on two rows where there is one, the second waits for room.
        body = body_of(2)
        body["sampling_params"].update(max_new_tokens=1500, ignore_eos=True)
        body["sampling_params"]["custom_params"]["deepprune"] = {"preset": "latency"}
        reply = server.post("/generate", body, timeout_s=60)
        assert reply.status_code == 503 and "timeout" in reply.text
        server.wait_idle()
        assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}
        assert server.generate("a stranger", max_new_tokens=4)["meta_info"]
