"""Which GPU a judge gets, and where a server could not start beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges.gpu import BALANCE_CHECK, VISIBLE, visible_gpu
from sglang_deepprune.judging import child_env
from sglang_deepprune.patches import build, server_args

MIB = 80_000.0
ON_GPU = DeepPruneConfig(enable=True, judge="llm:a/judge", judge_device="cuda:1", judge_mem=12_000)


@pytest.mark.parametrize(
    ("shown", "device", "wanted"),
    [
        (None, "cuda", "0"),
        (None, "cuda:3", "3"),
        ("6,4", "cuda", "6"),
        ("6, 4", "cuda:1", "4"),
        ("GPU-aa,MIG-bb", "cuda:1", "MIG-bb"),
    ],
)
def test_a_judge_gets_the_gpu_that_the_server_calls_so(monkeypatch, shown, device, wanted):
    monkeypatch.delenv(VISIBLE, raising=False)
    if shown is not None:
        monkeypatch.setenv(VISIBLE, shown)
    assert visible_gpu(device) == wanted
    assert child_env("llm:x", device)[VISIBLE] == wanted
    assert child_env("llm:x", "cpu")[VISIBLE] == ""


@pytest.mark.parametrize(
    ("shown", "count"), [("", "0 GPUs"), ("-1", "0 GPUs"), ("5", "1 GPU"), ("5,-1,6", "1 GPU")]
)
def test_a_gpu_that_the_server_does_not_see_is_refused_early(monkeypatch, shown, count):
    monkeypatch.setenv(VISIBLE, shown)
    with pytest.raises(ConfigError, match=f"no 'cuda:1' here.*shows the server {count}$"):
        server_args._with_memory(ON_GPU, SimpleNamespace())


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings step beside a server on CUDA with these flags."""
    monkeypatch.setattr("sglang.srt.utils.get_device_memory_capacity", lambda device: MIB)
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.delenv(BALANCE_CHECK, raising=False)

    def run(config: DeepPruneConfig = ON_GPU, **flags: Any) -> DeepPruneConfig:
        return server_args._with_memory(config, SimpleNamespace(**{"device": "cuda", **flags}))

    return run


def test_a_scheduler_that_sees_one_gpu_starts_the_judge_on_the_right_one(step, monkeypatch):
    monkeypatch.setenv(VISIBLE, "6,4")
    config = step()
    monkeypatch.setenv(VISIBLE, "6")  # as SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS does
    assert build._worker(config)._child.env[VISIBLE] == "4"


def test_tensor_parallel_with_a_judge_on_one_of_its_gpus_is_refused(step, monkeypatch):
    for flags in ({"tp_size": 2}, {"tp_size": 2, "base_gpu_id": 1}, {"tp_size": 4, "nnodes": 2}):
        with pytest.raises(ConfigError, match=f"judge_device.*--tp-size.*{BALANCE_CHECK}=0"):
            step(**flags)
    step()
    step(tp_size=2, base_gpu_id=2)
    step(tp_size=2, gpu_id_step=2)
    step(tp_size=2, nnodes=2)
    step(tp_size=2, device="cpu")
    monkeypatch.setenv(BALANCE_CHECK, "0")
    step(tp_size=2)


def test_a_small_judge_does_not_unbalance_it(step):
    step(DeepPruneConfig(judge="llm:a/judge", judge_device="cuda:0", judge_mem=3000), tp_size=2)
    with pytest.raises(ConfigError, match="--tp-size"):  # nobody knows what it takes
        step(DeepPruneConfig(judge="encoder", judge_device="cuda:0"), tp_size=2)


def test_a_judge_a_data_parallel_rank_on_one_gpu_is_refused(step):
    with pytest.raises(ConfigError, match="judge_device.*--dp-size 2 each rank would start"):
        step(dp_size=2)
    step(DeepPruneConfig(judge="similarity"), dp_size=2, tp_size=2)
    step(DeepPruneConfig(judge="none", judge_device="cuda:0"), dp_size=2, tp_size=2)
