"""Who is grouped, who is left alone and who is refused, before SGLang fans a request out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.patches import seams, server_args, tokenizer_manager
from sglang_deepprune.patches.server_args import ATTRIBUTE, Carrier


def manager(ranks: int = 0, **server: Any) -> Any:
    config = Carrier(DeepPruneConfig(enable=True))
    args = SimpleNamespace(**{ATTRIBUTE: config, "dp_size": 1, **server})
    extra = {"elastic_worker_count": ranks} if ranks else {}
    return SimpleNamespace(server_args=args, **extra)


def request(params: dict[str, Any], **more: Any) -> Any:
    return SimpleNamespace(
        parallel_sample_num=params.get("n", 1), batch_size=1, sampling_params=params,
        rid=["r_0", "r_1"], **more,
    )  # fmt: skip


def is_grouped(params: dict[str, Any], server: Any = None, **more: Any) -> bool:
    fan = tokenizer_manager._fan_of(server or manager(), request({"n": 2, **params}, **more))
    return fan is not None and fan.asks[0].is_wanted


ASKED = {"custom_params": {"deepprune": {"preset": "latency"}}}


@pytest.mark.parametrize(
    ("params", "more"),
    [({"ignore_eos": True}, {}), ({"min_new_tokens": 60, "max_new_tokens": 60}, {}),
     ({"min_new_tokens": 61, "max_new_tokens": 60}, {}), ({}, {"session_params": {"id": "s"}})],
)  # fmt: skip
def test_forced_lengths_and_sessions_are_grouped_only_when_they_ask(params: Any, more: Any):
    assert not is_grouped(params, **more)
    assert is_grouped({**params, **ASKED}, **more)


@pytest.mark.parametrize(
    "params",
    [{}, {"min_new_tokens": 10, "max_new_tokens": 60}, {"min_new_tokens": 60},
     {"min_new_tokens": 0, "max_new_tokens": 0}, {"ignore_eos": False}],
)  # fmt: skip
def test_everybody_else_is_grouped(params: Any):
    assert is_grouped(params)


def test_a_session_of_the_radix_tree_counts_where_the_server_has_them():
    assert is_grouped({}, session_id="only a name")
    pinned = manager(enable_session_radix_cache=True)
    assert not is_grouped({}, pinned, session_id="pinned")
    assert is_grouped(ASKED, pinned, session_id="pinned")
    assert is_grouped({}, pinned, session_id=None)


@pytest.mark.parametrize(
    ("ranks", "dp_size", "found"),
    [(0, 1, 1), (0, 4, 4), (2, 1, 2), (4, 4, 4)],
    ids=["one", "old: dp", "attention-DP", "dp"],
)
def test_a_group_goes_to_one_of_all_ranks_that_have_a_queue(ranks: int, dp_size: int, found: int):
    """`--attn-dp-size 2` leaves `dp_size` at 1, and has two ranks."""
    assert tokenizer_manager._num_ranks(manager(ranks, dp_size=dp_size)) == found


def ask_for(n: Any, custom: Any = None, *, is_listed: bool = False, **more: Any) -> list[str]:
    params = {"n": n, "custom_params": custom, **more}
    obj = SimpleNamespace(sampling_params=[params] if is_listed else params)

    async def original(self: Any, obj: Any, request: Any = None) -> Any:
        yield "answered"

    async def read() -> list[str]:
        return [one async for one in tokenizer_manager.generate_request(original, manager(), obj)]

    return asyncio.run(read())


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("n", [4097, 2_147_483_647])
def test_more_siblings_than_a_group_may_have_are_refused_before_anything_is_copied(
    n: int, is_listed: bool
):
    with pytest.raises(ConfigError, match=f"deepprune.n: at most 4096 siblings a group, got {n}"):
        ask_for(n, is_listed=is_listed)


@pytest.mark.parametrize("n", [1, 4096, "many", None, True])
def test_all_other_numbers_are_sglangs_to_answer(n: Any):
    assert ask_for(n) == ["answered"]


def test_beams_and_who_has_opted_out_are_left_alone_whatever_their_number():
    assert ask_for(5000, beam_width=4) == ["answered"]
    assert ask_for(5000, {"deepprune": False}) == ["answered"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"device": "cpu"}, []), ({"device": "cuda"}, ["a GPU"]),
     ({"enable_lora": True}, ["--enable-lora"]), ({"lora_paths": ["a=b"]}, ["--enable-lora"]),
     ({"speculative_algorithm": "EAGLE", "enable_deterministic_inference": True},
      ["--speculative-algorithm", "--enable-deterministic-inference"]),
     ({"rl_on_policy_target": "fsdp"}, ["--enable-deterministic-inference"]),
     ({"attn_dp_size": 2}, ["--attn-dp-size"]), ({"enable_dp_attention": True}, ["--attn-dp-size"]),
     ({"attn_dp_size": None}, [])],
)  # fmt: skip
def test_modes_that_nobody_has_run_are_named(flags: dict[str, Any], named: list[str]):
    args = SimpleNamespace(**{"device": "cpu", **flags})
    assert server_args.untested_modes(args) == named


def test_dp_attention_is_refused_where_verdicts_reach_one_rank_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    args = SimpleNamespace(enable_dp_attention=True)
    server_args.refuse_unproven_modes(args)
    monkeypatch.setattr(seams, "sglang_version", lambda: Version("0.5.19"))
    with pytest.raises(seams.SeamError, match="--enable-dp-attention before SGLang 0.5.20"):
        server_args.refuse_unproven_modes(args)
