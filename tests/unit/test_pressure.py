"""A full KV pool without a server: who goes, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.patches.scheduler import Engine
from tests.unit.test_engine_side import engine, request


class Batch:
    """As much of SGLang's running batch as giving way meets: it fits once it has `fits` rows."""

    def __init__(self, ours: Engine, reqs: Sequence[Any], fits: int):
        self.reqs, self.fits = list(reqs), fits
        self.batch_is_full = True
        self.spec_algorithm = SimpleNamespace(is_none=lambda: True)
        for req in self.reqs:
            req.output_ids = req.output_ids or [1, 2]
            req.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
        ours.scheduler.enable_priority_scheduling = False
        ours.scheduler.token_to_kv_pool_allocator = SimpleNamespace(
            available_size=lambda: 0, page_size=1
        )
        ours.scheduler.new_token_ratio_tracker = SimpleNamespace(
            current=0.1, estimate_new_token_ratio_after_retract=lambda reqs: len(reqs) / 10
        )

    def check_decode_mem(self) -> bool:
        return len(self.reqs) <= self.fits

    def release_req(self, place: int, remaining: int) -> None:
        pass

    def filter_batch(self, keep_indices: Sequence[int]) -> None:
        self.reqs = [self.reqs[place] for place in keep_indices]


def siblings(ours: Engine, size: int) -> list[Any]:
    found = [request(ours, f"s{index}", "g", index, size) for index in range(size)]
    for one in found:
        ours.arrivals.arrive(one)
    return found


def test_a_sibling_that_gave_way_queues_again_and_not_for_the_very_next_pass():
    ours = engine(preset="latency")
    first, second = siblings(ours, 2)
    batch = Batch(ours, [first, second, request(ours, "stranger")], fits=2)
    ours.pressure.relieve(batch)
    assert [req.rid for req in batch.reqs] == ["s0", "stranger"] and "s1" in ours.room.held
    assert ours.has_lost and not ours.scheduler.waiting_queue
    assert ours.scheduler.new_token_ratio_tracker.current == 0.2, "as for the 2 that run on"
    waiting = request(ours, "has come meanwhile")
    ours.room.stamp(waiting)
    ours.scheduler.waiting_queue.append(waiting)
    ours.replan_lost()
    assert ours.scheduler.waiting_queue == [waiting, second] and not ours.room.held
    assert not ours.pressure.shed, "the group's next claim takes its own place"


def test_a_group_above_its_claim_waits_for_a_vote_or_free_rows():
    ours = engine(preset="balanced", base=1, widen=0.0)
    first, second = siblings(ours, 2)
    ours.coordinator.start_extra("g", ours.coordinator.runs["g"].group.epoch)
    batch = Batch(ours, [first, second, request(ours, "stranger")], fits=2)
    ours.room.take(second)
    ours.rows.extras[second.rid] = "g"
    ours.pressure.relieve(batch)
    ours.replan_lost()
    assert list(ours.room.held) == ["s1"] and not ours.scheduler.waiting_queue


@pytest.mark.parametrize(
    ("name", "value"),
    [("presence_penalty", 1.5), ("frequency_penalty", -0.5), ("repetition_penalty", 1.05),
     ("min_new_tokens", 8), ("input_embeds", [[0.0]])],
)  # fmt: skip
def test_an_extra_that_would_not_go_on_the_same_keeps_its_row(name: str, value: Any):
    ours = engine(preset="balanced", base=1, widen=0.0)
    extras = siblings(ours, 3)[1:]
    for one in extras:
        ours.coordinator.start_extra("g", ours.coordinator.runs["g"].group.epoch)
        ours.room.take(one)
        ours.rows.extras[one.rid] = "g"
    batch = Batch(ours, extras, fits=2)
    setattr(extras[1] if name == "input_embeds" else extras[1].sampling_params, name, value)
    assert ours.rows.yield_rows(batch, 2) == 1
    assert batch.reqs == [extras[1]] and list(ours.room.held) == [extras[0].rid]


def test_a_strangers_row_is_not_taken_for_the_siblings_whose_rid_it_bears():
    ours = engine(preset="latency")
    first, second = siblings(ours, 2)  # the second waits in SGLang's queue
    stranger = request(ours, "s1")
    batch = Batch(ours, [first, stranger, request(ours, "other")], fits=2)
    ours.pressure.relieve(batch)
    assert len(batch.reqs) == 3 and not ours.room.held, "SGLang retracts whom it likes"
    ours.rows.extras["s1"] = "g"
    assert ours.rows.yield_rows(batch, 1) == 0 and ours.live["s1"].req is second


def test_the_kv_of_a_stranger_is_not_weighed_for_the_doomed_of_its_rid(
    monkeypatch: pytest.MonkeyPatch,
):
    ours = engine(preset="latency")
    first, _ = siblings(ours, 2)
    stranger = request(ours, "s0")
    weighed: list[Any] = []
    monkeypatch.setattr(ours.dooms, "weigh", weighed.append)
    ours.dooms.slots["s0"] = 0
    for one in first, stranger:
        one.skip_radix_cache_insert = True
    ours.dooms.weigh_doomed(SimpleNamespace(reqs=[stranger, first]))
    assert len(weighed) == 1 and weighed[0] is first
