"""Who is grouped, who is left alone and who is refused, before SGLang fans a request out."""

from __future__ import annotations

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.patches import output, seams, server_args, tokenizer_manager
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


def test_a_name_joins_no_other_session_processor_or_parameters_of_the_callers():
    def group_of(own: dict[str, Any], **more: Any) -> str:
        custom = {"deepprune": {"group": "k", "size": 2}, **own}
        one = SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=custom), rid="r", input_ids=[1, 2],
            mm_inputs=None, input_embeds=None, **more,
        )  # fmt: skip
        tokenizer_manager.send_batch_request(lambda self, sent: sent, manager(), [one])
        return str(one.sampling_params.custom_params["__deepprune"]["gid"])

    session = importlib.import_module("sglang.srt.managers.io_struct").SessionParams
    plain = group_of({})
    others = [
        group_of({}, session_params=session(id="a")),
        group_of({}, session_params=session(id="b")),
        group_of({}, session_id="a"), group_of({}, custom_logit_processor="x"),
        group_of({"budget": 8}), group_of({"budget": 9}),
    ]  # fmt: skip
    assert len({plain, *others}) == len(others) + 1
    assert group_of({}) == plain and group_of({"budget": 8}) == others[-2]
    assert group_of({}, session_params=session(id="a")) == others[0]


def test_a_batch_of_prompts_as_token_ids_is_tagged_as_single_requests_are():
    def single(custom: Any) -> Any:
        params = SimpleNamespace(custom_params=custom)
        return SimpleNamespace(
            sampling_params=params, rid="r", input_ids=[1, 2], mm_inputs=None, input_embeds=None,
        )  # fmt: skip

    def send(*customs: Any) -> list[Any]:
        objs = [single(custom) for custom in customs]
        tokenizer_manager.send_batch_request(lambda self, sent: sent, manager(), objs)
        return [one.sampling_params.custom_params for one in objs]

    group = {"deepprune": {"group": "k", "size": 2}}
    first, second, plain = send(group, group, None)
    assert first["__deepprune"]["gid"] == second["__deepprune"]["gid"] and plain is None
    with pytest.raises(ConfigError, match="deepprune.preset"):
        send({"deepprune": {"group": "k", "preset": "best"}})


def test_a_batch_that_names_groups_has_their_latest_records_on_it():
    """SGLang gives each prompt of a batch a request object of its own."""

    def chunk(group: str, tokens: int, settled: bool) -> dict[str, Any]:
        record = {"group_id": group, "generated_tokens": tokens, "settled": settled}
        return {"meta_info": {"deepprune": {"group": record}}}

    io_struct = importlib.import_module("sglang.srt.managers.io_struct")

    async def original(self: Any, obj: Any, request: Any) -> Any:
        one: dict[str, Any]
        for one in (
            chunk("a", 9, True),
            chunk("a", 5, False),
            {"meta_info": {}},
            chunk("b", 1, False),
        ):
            yield one

    async def read(custom: Any) -> Any:
        params = [{"custom_params": custom}] * 3
        obj = io_struct.GenerateReqInput(text=["x"] * 3, sampling_params=params)
        obj.parallel_sample_num = 1
        hook = tokenizer_manager.handle_batch_request
        assert len([one async for one in hook(original, manager(), obj, None)]) == 4
        return getattr(obj, output.RECORDS, None)

    found = asyncio.run(read({"deepprune": {"group": "k"}}))
    assert [(one["group_id"], one["settled"]) for one in found] == [("a", True), ("b", False)]
    assert asyncio.run(read({"theirs": 1})) is None


@pytest.mark.parametrize("is_async", [False, True], ids=["before 0.5.20", "since"])
def test_a_group_that_is_aborted_before_its_siblings_are_sent_is_aborted(is_async: bool):
    """SGLang prefills the prompt first, which takes its turn in the queue."""
    sent: list[str] = []
    aborted: list[str] = []

    def plain(self: Any, one: Any) -> None:
        sent.append(one.rid)

    async def since(self: Any, one: Any) -> None:
        sent.append(one.rid)

    def abort(rid: str) -> Any:
        hooked = tokenizer_manager.abort_request
        return hooked(lambda self, rid, abort_all: aborted.append(rid), self, rid)

    self = manager()
    self.abort_request, self.rid_to_state = abort, {}

    async def serve() -> None:
        fan = tokenizer_manager._fan_of(self, request({"n": 2}))
        assert fan is not None
        fan.stems = ["job"]
        tokenizer_manager._BY_STEM["job"] = fan
        tokenizer_manager._FAN.set(fan)
        for rid in ("warm-up", "s0", "s1"):
            one = SimpleNamespace(
                sampling_params=SimpleNamespace(custom_params=None), rid=rid, routed_dp_rank=None
            )
            result = tokenizer_manager.send_one_request(since if is_async else plain, self, one)
            if is_async:
                await result
            if rid == "warm-up":
                abort("job")

    try:
        asyncio.run(serve())
    finally:
        tokenizer_manager._BY_STEM.clear()
    assert sent == ["warm-up", "s0", "s1"] and aborted == ["s0", "s1"]


def watched(monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[bool, int]:
    """A stream of the vote whose client leaves at the third look: (it was aborted, looks)."""
    monkeypatch.setattr(tokenizer_manager, "_LOOK_S", 0.0)
    aborted: list[str] = []
    self = manager()
    self.rid_to_state, self.abort_request = {"s0": None}, aborted.append
    looks: list[int] = []

    async def is_disconnected() -> bool:
        looks.append(1)
        return len(looks) > 2

    async def original(self: Any, obj: Any, request: Any) -> Any:
        for place in range(10):
            yield {"index": 0, "text": "x" * place, "meta_info": {"finish_reason": None}}

    async def read() -> list[Any]:
        asked = request({"n": 2, "custom_params": {"deepprune": {"return": "vote"}}}, **more)
        fan = tokenizer_manager._fan_of(self, asked)
        assert fan is not None
        fan.rids = [(0, "s0")]
        client = SimpleNamespace(is_disconnected=is_disconnected)
        return [one async for one in tokenizer_manager._serve(
            original, self, asked, client, (), fan)]  # fmt: skip

    try:
        asyncio.run(read())
    except ValueError as error:
        assert "client has left" in str(error)
        assert aborted == ["s0"]
        return True, len(looks)
    return False, len(looks)


def test_a_client_that_leaves_while_its_choices_are_held_back_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
):
    """The OpenAI endpoints begin to answer with the first chunk, and here that is the last."""
    assert watched(monkeypatch) == (True, 3)
    assert watched(monkeypatch, background=False) == (True, 3)


def test_a_background_request_runs_on_without_its_client(monkeypatch: pytest.MonkeyPatch):
    """SGLang's own looks at the client leave such a request out."""
    assert watched(monkeypatch, background=True) == (False, 0)


@pytest.mark.parametrize("flag", ["smg_grpc_mode", "grpc_mode"])
def test_a_front_end_that_fans_out_by_itself_is_refused(flag: str):
    with pytest.raises(seams.SeamError, match="--smg-grpc-mode: its servicer fans n>1 out itself"):
        server_args.refuse_unproven_modes(SimpleNamespace(**{flag: True}))
