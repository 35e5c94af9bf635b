"""The scheduler side without a server: whose request is whose, and how far a fault of ours goes."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.patches import build, hooks, scheduler, wire
from sglang_deepprune.patches.arrivals import Arrival
from sglang_deepprune.patches.scheduler import Engine
from sglang_deepprune.patches.server_args import ATTRIBUTE, Carrier
from sglang_deepprune.types import Fill
from tests.unit.coordinators import FakeFence

schedule_batch = importlib.import_module("sglang.srt.managers.schedule_batch")
VOCABULARY = 1 << 20
OFF_PUT = "x^2 - y^2", "(x - y)(x + y)"  # equal for the fence alone


def decode(ids: Sequence[int]) -> str:
    if any(one >= VOCABULARY for one in ids):
        raise OverflowError("out of range integral type conversion attempted")
    return " ".join(f"\\boxed{{{OFF_PUT[one % 2]}}}" if one >= 100 else "so" for one in ids)


def engine(**settings: Any) -> Engine:
    config = DeepPruneConfig(enable=True, **settings)
    args = SimpleNamespace(**{ATTRIBUTE: Carrier(config)}, enable_deterministic_inference=False)
    scheduler = SimpleNamespace(
        server_args=args, waiting_queue=[], max_queued_requests=None, tree_cache=SimpleNamespace(),
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        output_streamer=SimpleNamespace(stream_output=lambda *_: None),
    )  # fmt: skip
    return Engine(scheduler, config, Coordinator(config, decode, fence=FakeFence()))  # type: ignore[arg-type]


def request(ours: Engine, rid: str, group: str = "", index: int = 0, size: int = 4) -> Any:
    tag = wire.tag(group, index, size, {}, rid="stem", token=ours.token)
    params = SimpleNamespace(
        custom_params={wire.TAG: tag} if group else None, max_new_tokens=100, top_k=50,
        sampling_seed=None, ignore_eos=False, stop_token_ids=(), frequency_penalty=0.0,
        presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0,
    )  # fmt: skip
    return SimpleNamespace(
        rid=rid, sampling_params=params, origin_input_ids=[1, 2], output_ids=[], is_retracted=False,
        to_finish=None, finished_reason=None, finished=lambda: False, finished_output=False,
        skip_radix_cache_insert=False, eos_token_ids={9}, tokenizer=None, return_logprob=False,
        input_embeds=None,
    )  # fmt: skip


def step(ours: Engine, reqs: Sequence[Any], tokens: Sequence[int]) -> None:
    batch = SimpleNamespace(reqs=reqs, spec_algorithm=SimpleNamespace(is_none=lambda: True))
    ours.before_result(batch, SimpleNamespace(next_token_ids=list(tokens), copy_done=None))


def test_a_prompt_that_ends_in_an_image_is_a_group_and_harms_no_other():
    ours = engine()
    ours.guard(ours.arrivals.arrive, request(ours, "a0", "a"))
    image = request(ours, "b0", "b")
    image.origin_input_ids = [1, 1 << 61, 2]  # SGLang's pad ids are hashes
    assert ours.guard(ours.arrivals.arrive, image) is Arrival.STARTS
    assert sorted(ours.coordinator.runs) == ["a", "b"] and not ours.faults


def test_a_fault_before_a_group_is_known_is_that_groups_alone(monkeypatch: pytest.MonkeyPatch):
    ours = engine()
    ours.guard(ours.arrivals.arrive, request(ours, "a0", "a"))
    monkeypatch.setattr(ours.arrivals, "_opens_thinking", lambda ids: 1 / 0)
    ours.guard(ours.arrivals.arrive, request(ours, "b0", "b"))
    assert list(ours.coordinator.runs) == ["a"] and ours.faults
    monkeypatch.undo()
    assert ours.guard(ours.arrivals.arrive, request(ours, "b1", "b", 1)) is Arrival.STARTS
    assert list(ours.coordinator.runs) == ["a"], "plain sampling, all of it"


def test_another_request_of_the_same_rid_is_no_sibling():
    """Each tokenizer worker knows its own rids alone, so a rid may come twice."""
    ours = engine()
    sibling, stranger = request(ours, "x", "g"), request(ours, "x")
    assert ours.arrivals.arrive(sibling) is Arrival.STARTS
    again = request(ours, "x", "g", 1)
    assert ours.arrivals.arrive(again) is Arrival.STARTS and len(ours.live) == 1
    step(ours, [stranger], [9])
    assert ours.coordinator.runs["g"].group.tally.num_votes == 0
    ours.after_result(SimpleNamespace(reqs=[stranger]))
    assert not ours.coordinator.runs["g"].group.steps
    stranger.finished = lambda: True
    ours.close([stranger], None)
    assert ours.live["x"].req is sibling and stranger.finished_reason is None
    step(ours, [sibling], [9])
    assert ours.coordinator.runs["g"].group.num_voted == 1


def test_a_group_whose_last_sibling_is_aborted_in_the_queue_keeps_its_record():
    """No output is left that could wait for the fence: the vote counts as it stands."""
    ours = engine(preset="collect")
    siblings = [request(ours, f"s{index}", "g", index, 3) for index in range(3)]
    for one in siblings:
        ours.arrivals.arrive(one)
    for one, answer in zip(siblings, (100, 101), strict=False):
        one.output_ids = [answer]
        step(ours, [one], [9])
        live = ours.live[one.rid]
        ours.coordinator.retire("g", live.index, State.FINISHED, 1)
        ours._drop(live)
    assert not ours.coordinator.runs["g"].group.tally.is_settled
    output = SimpleNamespace(rid="s2", finished_reason=None, abort_message="")
    ours.aborted(output)
    assert '"votes"' in output.finished_reason[wire.KEY] and not ours.coordinator.runs
    ours.replan_lost()
    assert not ours.pending


def test_who_is_stopped_and_ends_in_one_mixed_pass_is_spared_and_votes():
    """Rows that decode within a prefill pass; what only prefills has no end to see."""
    ours = engine(preset="latency")
    first, second, third = [request(ours, f"s{i}", "g", i, 3) for i in range(3)]
    for one in (first, second, third):
        ours.arrivals.arrive(one)
        one.output_ids = [100]
    ours._act([ours.coordinator.prune("g", 0)])
    assert first.to_finish is not None
    batch = SimpleNamespace(
        reqs=[third, first, second], decoding_reqs=[first, second],
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
    )  # fmt: skip
    ours.before_mixed_result(batch, SimpleNamespace(next_token_ids=[9, 9, 5], copy_done=None))
    voted = {i: one.has_voted for i, one in ours.coordinator.runs["g"].group.siblings.items()}
    assert first.to_finish is None and voted == {0: True, 1: False, 2: False}


def test_an_aborted_extra_that_loses_its_row_is_answered_and_not_held():
    ours = engine(preset="balanced", base=1, widen=0.0)
    first, second = [request(ours, f"s{i}", "g", i, 2) for i in range(2)]
    for one in (first, second):
        ours.arrivals.arrive(one)
    ours.coordinator.start_extra("g", ours.coordinator.runs["g"].group.epoch)
    ours.room.take(second)
    ours.rows.extras[second.rid] = "g"
    second.is_retracted, second.to_finish = True, schedule_batch.FINISH_ABORT()
    assert ours.arrivals.arrive(second) is Arrival.RETURNS
    assert not ours.rows.extras and not ours.room.held


def test_the_refusal_of_a_stranger_ends_no_sibling_of_its_rid(monkeypatch: pytest.MonkeyPatch):
    """Two tokenizer workers may give one rid; SGLang says whom it refuses."""
    ours = engine(preset="collect")
    monkeypatch.setattr(hooks, "_engine", ours)
    first, second = (request(ours, f"s{index}", "g", index, 2) for index in range(2))
    kind = vars(scheduler)["Req"]  # SGLang's
    own = kind.__new__(kind)
    vars(own).update(vars(second))
    for one in first, own:
        ours.arrivals.arrive(one)
    ours.room.hold(own)
    stranger = kind.__new__(kind)
    stranger.rid = own.rid
    reason = {"type": "abort", "status_code": 503}
    output = vars(scheduler)["AbortReq"](rid=own.rid, finished_reason=reason)
    sent: list[Any] = []
    hooks.send_output(lambda self, *args: sent.append(args), None, output, stranger)
    assert ours.room.held == {own.rid: own} and ours.live[own.rid].req is own
    assert sent == [(output, stranger)] and set(output.finished_reason) == {"type", "status_code"}
    assert not ours.room.take(stranger) and ours.room.held == {own.rid: own}
    hooks.send_output(lambda self, *args: None, None, output, own)
    assert own.rid not in ours.live and not ours.room.held and not ours.faults


def test_an_idle_server_holds_the_fence_to_its_limit(monkeypatch: pytest.MonkeyPatch):
    ours = engine()
    ours.gauges = SimpleNamespace(tick=lambda: None)  # type: ignore[assignment]
    monkeypatch.setattr(hooks, "_engine", ours)
    fence = ours.coordinator.fence
    fence.answers = [(0, None)]  # type: ignore[union-attr]
    assert hooks.poll_commands([], None) is None
    assert not fence.answers and not ours.faults  # type: ignore[union-attr]


def test_an_idle_server_polls_a_judge_that_is_not_done_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
):
    ours = engine()
    ours.gauges = SimpleNamespace(tick=lambda: None)  # type: ignore[assignment]
    monkeypatch.setattr(hooks, "_engine", ours)
    polled: list[str] = []
    judge = SimpleNamespace(is_idle=False, poll=lambda: polled.append("polled"))
    ours.coordinator.handover.judge = judge  # type: ignore[assignment]
    assert hooks.poll_commands([], None) is None and polled == ["polled"]
    judge.is_idle = True
    assert hooks.poll_commands([], None) is None and polled == ["polled"] and not ours.faults


def test_a_server_with_an_output_that_waits_for_the_fence_does_not_sleep(
    monkeypatch: pytest.MonkeyPatch,
):
    ours = engine()
    monkeypatch.setattr(hooks, "_engine", ours)
    ask = lambda *by, **how: hooks.is_fully_idle(lambda *_, **__: True, ours.scheduler, *by, **how)  # noqa: E731
    assert ask()
    ours.pending["g"] = (request(ours, "s"), None)  # type: ignore[assignment]
    assert not ask()
    assert ask(ignore_waiting=True) and ask(False, True), "a paused server may flush"


@pytest.mark.parametrize(
    "wanted", [
        "ReleaseMemoryOccupationReqInput", "FlushCacheReqInput", "UpdateWeightFromDiskReqInput",
    ],
)  # fmt: skip
def test_no_output_waits_for_the_fence_when_the_server_is_to_be_idle(
    wanted: str, monkeypatch: pytest.MonkeyPatch
):
    """SGLang asserts that it is, or fails, and a trainer asks as soon as its client has left."""
    ours = engine(preset="collect")
    monkeypatch.setattr(hooks, "_engine", ours)
    siblings = [request(ours, f"s{index}", "g", index, 2) for index in range(2)]
    for one, answer in zip(siblings, (100, 101), strict=True):
        ours.arrivals.arrive(one)
        one.output_ids = [answer]
        step(ours, [one], [9])
        one.finished_len, one.finished = None, lambda: True
        one.finished_reason = SimpleNamespace(to_json=dict)
        ours.close([one], None)
    assert list(ours.pending) == ["g"]
    sent: list[Any] = []
    ours.scheduler.output_streamer.stream_output = lambda reqs, _: sent.extend(reqs)
    seen = lambda self, reqs: sent and not ours.pending and reqs  # noqa: E731
    kinds = {one.__name__: one for one in hooks._WANTS_IDLE}
    asked = [kinds[wanted](**{"model_path": "m"} if "Disk" in wanted else {})]
    assert hooks.process_input_requests(seen, ours.scheduler, asked) == asked
    assert sent == siblings[1:] and not ours.coordinator.runs and not ours.faults


def test_free_rows_are_asked_for_until_the_fill_comes_back(monkeypatch: pytest.MonkeyPatch):
    """SGLang drops what it pulls in a pass in which it receives nothing."""
    ours = engine()
    ours.room.held["h"] = object()
    scheduler = ours.scheduler
    scheduler.chunked_req, scheduler.enable_priority_scheduling = None, False
    scheduler.grammar_manager.has_waiting_grammars = lambda: False
    monkeypatch.setattr(ours.rows, "_num_free", lambda groups: 1)
    for index in range(8):
        ours.arrivals.arrive(request(ours, f"s{index}", "g", index, 8))
    ours.rows._steps = 4
    (fill,) = ours.rows.wanted()
    assert ours.rows.wanted() == [fill]
    ours.apply([fill])
    assert ours.rows.wanted() == [] and ours.rows.fills == [Fill("g", fill.epoch, 1)]


def test_ranks_of_several_nodes_agree_on_token_and_settings(monkeypatch: pytest.MonkeyPatch):
    """Each node draws a token of its own, and may have another card beside its judge."""
    first, here = DeepPruneConfig(enable=True, window=64), DeepPruneConfig(enable=True)
    args = SimpleNamespace(**{ATTRIBUTE: Carrier(here, "theirs")}, nnodes=1)
    scheduler = SimpleNamespace(server_args=args)
    assert build.agreed(scheduler, here) is here
    args.nnodes = 2
    said = (dataclasses.asdict(first), "ours")
    world = SimpleNamespace(broadcast_object=lambda own: said)
    monkeypatch.setattr("sglang.srt.distributed.parallel_state.get_world_group", lambda: world)
    assert build.agreed(scheduler, here) == first
    assert getattr(args, ATTRIBUTE).token == "ours"
