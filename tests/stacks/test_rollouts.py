"""Rollouts in the form of verl's and TRL's calls: all samples whole, then fewer of them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from sglang_deepprune.local_server import CPU_FLAGS, has_gpu
from sglang_deepprune.reasoner import model_path
from tests.engine.server import Server, cpu_env
from tests.stacks.recipes import RECIPES, environ, run_json


def check_batch(groups: list[list[dict[str, Any]]], preset: str) -> None:
    """Three prompts of eight samples, a logprob a token; which of them a trainer may score."""
    assert [len(samples) for samples in groups] == [8, 8, 8]
    num_complete = []
    for samples in groups:
        for sample in samples:
            assert len(sample["logprobs"]) == len(sample["ids"])
            assert all(value <= 0 for value in sample["logprobs"])
            assert sample["ids"] or not sample["complete"]
        complete = [sample for sample in samples if sample["complete"]]
        assert len({tuple(sample["ids"]) for sample in complete}) > 1, "all samples are one"
        num_complete.append(len(complete))
    if preset == "collect":
        assert num_complete == [8, 8, 8]
    else:
        # No seeds here: one group may happen to need all of its samples, hardly all three.
        assert min(num_complete) >= 3 and sum(num_complete) < 24, "nothing was stopped"


def test_single_requests_over_http(server: Server, own_versions: Any):
    own_versions("rollouts over HTTP (form of verl 0.9.1 and TRL 1.16.0)", "httpx", "sglang")
    said = run_json([sys.executable, RECIPES / "rollouts_http.py"], env=environ(server.url))
    assert len(said) == 4
    for name, groups in said.items():
        check_batch(groups, name.split()[1])
    server.wait_idle()


@pytest.mark.timeout(400)
def test_single_calls_of_an_engine_in_process(own_versions: Any):
    own_versions("rollouts in process (form of verl 0.9.1)", "sglang")
    env = cpu_env({"MODEL": model_path(), "ENGINE_OPTIONS": json.dumps(engine_options())})
    said = run_json([sys.executable, RECIPES / "rollouts_engine.py"], env=env, limit_s=360)
    assert list(said) == ["collect", "balanced"]
    for preset, groups in said.items():
        check_batch(groups, preset)


def engine_options() -> dict[str, Any]:
    """Keywords of `sglang.Engine` for this machine."""
    options: dict[str, Any] = {"deepprune_fill": 0.0, "log_level": "error"}
    if has_gpu():
        return options
    flags = [*CPU_FLAGS, "--"]
    for flag, value in zip(flags, flags[1:], strict=False):
        if flag.startswith("--") and flag != "--":
            is_switch = value.startswith("--")
            options[flag[2:].replace("-", "_")] = True if is_switch else value
    options["mem_fraction_static"] = float(options["mem_fraction_static"])
    return {**options, "max_total_tokens": 20000}
