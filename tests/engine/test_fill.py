"""Free rows: on flat steps all are filled, and given back as soon as anybody else waits.

Also what a fault in our own code does to a group that holds siblings: nothing that a client sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_plugin
from sglang_deepprune import metrics
from tests import faulty_policy
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.counters import scrape
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, ask, states
from tests.engine.test_lazy import DISAGREE, LONG, in_background, server_load

ROWS = 8
NARROW = {"preset": "balanced", "base": 2, "widen": 0.0, "eps": 0.0}


def joined(*envs: dict[str, str]) -> dict[str, str]:
    """Several plugins in one environment."""
    paths = [env["PYTHONPATH"] for env in envs]
    merged: dict[str, str] = {}
    for env in envs:
        merged |= env
    return {**merged, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def flat(tiny: Path, scripts_env: Any, tmp_path_factory: Any) -> Iterator[Server]:
    """Every pass takes 15 ms, however many rows: a GPU below saturation."""
    bench = bench_plugin.plugin_env(
        tmp_path_factory.mktemp("bench"), flat_ms=15.0, is_deepprune_on=True
    )
    flags = (*COMMON, *MARKER, "--max-running-requests", str(ROWS), "--deepprune-fill", "0.25",
             "--enable-metrics")  # fmt: skip
    with Server(tiny, *flags, env=joined(scripts_env, bench)) as server:
        yield server


def test_flat_steps_fill_every_row_and_a_stranger_gets_one_at_once(flat: Server):
    ask(flat, DISAGREE, 12, NARROW)  # rows of several numbers: the server learns that they are free
    params = {"n": 16, "max_new_tokens": 400, "custom_params": {"deepprune": NARROW}}
    thread, replies = in_background(flat, {"text": LONG, "sampling_params": params})
    deadline = time.monotonic() + 30
    while server_load(flat)["num_running_reqs"] < ROWS:
        assert time.monotonic() < deadline, "the rows are not filled"
        time.sleep(0.05)
    before = flat.log_lines("deepprune-counts")[-1]["yielded"]
    start = time.monotonic()
    stranger = flat.generate("a stranger", max_new_tokens=8, ignore_eos=True, temperature=0.0)
    assert stranger["meta_info"]["completion_tokens"] == 8
    assert time.monotonic() - start < 2.0  # the first sibling ends after five seconds
    thread.join()
    outputs = replies[0].json()
    assert states(outputs) == ["finished"] * 16
    for index, output in enumerate(outputs):  # who gave its row back goes on with the same text
        assert output["text"] == scenario.PROMPTS[LONG][index % 12]
    yielded = flat.log_lines("deepprune-counts")[-1]["yielded"]
    assert yielded > before
    flat.wait_idle()
    counted = scrape(flat)
    assert counted.total(metrics.EXTRAS_STARTED) >= counted.total(metrics.EXTRAS_YIELDED)
    assert counted.total(metrics.EXTRAS_YIELDED) == yielded
    assert set(flat.log_lines("deepprune-tables")[-1].values()) == {0}


def test_two_groups_share_the_free_rows(flat: Server):
    params = {"n": 12, "max_new_tokens": 400, "custom_params": {"deepprune": NARROW}}
    both = [in_background(flat, {"text": LONG, "sampling_params": params}) for _ in range(2)]
    for thread, replies in both:
        thread.join()
        assert states(replies[0].json()) == ["finished"] * 12
    flat.wait_idle()


def test_a_fault_of_ours_is_logged_once_and_every_sibling_runs_to_its_end(
    tiny: Path, scripts_env: Any, tmp_path: Path
):
    info = tmp_path / "deepprune_faulty-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepprune-faulty\nVersion: 0.0.1\n"
    )
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nfaulty = faulty_policy:register\n"
    )
    env = joined(scripts_env, {"PYTHONPATH": str(tmp_path)})
    with Server(tiny, *COMMON, *MARKER, "--enable-metrics", env=env) as server:
        for _ in range(2):
            outputs = server.generate(
                DECIDE, n=12, temperature=1.0, max_new_tokens=400,
                custom_params={"deepprune": {"preset": "balanced"}},
            )  # fmt: skip
            assert [one["text"] for one in outputs] == scenario.PROMPTS[DECIDE]
            group = outputs[0]["meta_info"]["deepprune"]["group"]
            assert group["active"] is False
        assert server.log.count("live groups run on as plain sampling") == 1
        assert "KeyError at" in server.log and "faulty_policy.py" in server.log
        assert faulty_policy.CANARY not in server.log
        server.wait_idle()
        counted = scrape(server)
        assert counted.of(metrics.GROUPS) == {"abandoned": 2}
        assert counted.total(metrics.HOOK_ERRORS) == 2 and not counted.of(metrics.SIBLINGS)
