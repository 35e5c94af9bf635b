"""Two tensor-parallel and two data-parallel ranks: one decision a step, one rank a group (D11)."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from sglang_deepprune.local_server import free_port
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, PAPER, PRUNE, ask, group_of, states
from tests.engine.test_lazy import LONG, in_background
from tests.engine.versions import before

# SGLang's CPU engine asks for one core a rank.
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
# Before 0.5.19 one entry a tensor-parallel rank; data-parallel ones share it.
DP_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0-1"} if before("0.5.19") else CORES


def rank_of(outputs: list[dict[str, Any]]) -> int:
    """The data-parallel rank that served all of them."""
    (rank,) = {output["meta_info"]["dp_rank"] for output in outputs}
    return int(rank)


def check_each_group_has_one_rank(server: Server) -> None:
    """Prompts that no rank has seen: whoever finds one in the cache is where its warm-up was."""
    ranks = []
    for word in ("one", "two", "three", "four", "five", "six"):
        outputs = ask(server, f"{word} group: what is its rank?", 8, {"preset": "collect"},
                      max_new_tokens=6)  # fmt: skip
        ranks.append(rank_of(outputs))
        for output in outputs:
            meta = output["meta_info"]
            assert meta["prompt_tokens"] > 8  # what the prompts share is far less than one of them
            assert meta["cached_tokens"] >= meta["prompt_tokens"] - 1  # pages of one token
        group = group_of(outputs)
        assert group["size"] == len(group["choices"]) == 8
    assert sorted(ranks) == [0, 0, 0, 1, 1, 1], "groups that come one by one take turns"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tp", "2"), ("--dp", "2")], ids=["tp2", "dp2"])
def test_a_group_is_whole_on_two_ranks(tiny, scripts_env, flags: tuple[str, str]):
    cores = DP_CORES if flags[0] == "--dp" else CORES
    with Server(tiny, *COMMON, *MARKER, *flags, env={**scripts_env, **cores}) as server:
        for _ in range(3):
            outputs = ask(server, PRUNE, 8, PAPER)
            assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
            assert outputs[0]["text"] == scenario.PROMPTS[PRUNE][0]
            decided = ask(server, DECIDE, 12, {"preset": "latency"})
            assert states(decided) == ["finished"] * 3 + ["decided"] * 9
            fenced = ask(server, "fence: expand", 3, {"preset": "latency"})
            assert [vote["votes"] for vote in group_of(fenced)["votes"]] == [2, 1]
        fat = {
            "text": LONG,
            "sampling_params": {
                "n": 12,
                "max_new_tokens": 400,
                "custom_params": {"deepprune": {"preset": "balanced"}},
            },
        }
        if flags[0] == "--dp":
            check_each_group_has_one_rank(server)
        both = [in_background(server, fat) for _ in range(2)]
        if flags[0] == "--dp":
            deadline = time.monotonic() + 10  # they run for seconds, and may begin late
            while not all(load["num_running_reqs"] for load in server.get("/v1/loads")["loads"]):
                assert time.monotonic() < deadline, "a rank has no group, the other has both"
                time.sleep(0.1)
        for thread, replies in both:
            thread.join()
            assert set(states(replies[0].json())) <= {"finished", "decided", "not_started"}
        if flags[0] == "--dp":  # the second fat group went where the first was not
            assert {rank_of(replies[0].json()) for _, replies in both} == {0, 1}
        server.wait_idle()
        lines = server.log_lines("deepprune-verdict")
        if flags[0] == "--tp":
            # Both ranks log every verdict step: the same siblings, the same slots freed.
            freed = [step["after"]["available"] - step["before"]["available"] for step in lines]
            assert len(lines) % 2 == 0 and sorted(freed)[::2] == sorted(freed)[1::2]
        assert set(server.log_lines("deepprune-tables")[-1].values()) == {0}


@pytest.mark.modes
def test_a_group_is_one_on_two_nodes(tiny, scripts_env):
    """Each node reads its own command line, and draws its own token: the first one's holds."""
    shared = ("--tp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    flags = (*COMMON, *MARKER, *shared, "--node-rank")
    env = {**scripts_env, **CORES}
    with contextlib.ExitStack() as stack:
        other = Server(tiny, *flags, "1", env=env)  # has no API of its own to wait for
        stack.callback(other.stop)
        server = stack.enter_context(Server(tiny, *flags, "0", env=env))
        outputs = ask(server, PRUNE, 8, PAPER)
        assert states(outputs) == ["finished", "finished", *["pruned"] * 6]
        lazy = ask(server, DECIDE, 12, {"preset": "balanced"})
        assert group_of(lazy)["reason"].startswith("decided") and "not_started" in states(lazy)
        server.wait_idle()
        steps = [len(node.log_lines("deepprune-verdict")) for node in (server, other)]
        assert steps[0] == steps[1] > 0, "both ranks stop the same siblings"
