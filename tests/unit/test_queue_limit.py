"""`--max-queued-requests` at an arrival: who counts, and whom a higher priority may evict."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.patches import hooks
from sglang_deepprune.patches.scheduler import Engine
from tests.unit.test_engine_side import engine, request

LIMIT, ROWS = 64, 256


class Queue:
    """As much of SGLang's scheduler as an arrival meets: `_abort_on_queued_limit`, and rows."""

    def __init__(self, ours: Engine, limit: int = LIMIT, rows: int = ROWS):
        self.ours = ours
        self.scheduler = ours.scheduler
        self.scheduler.max_queued_requests = limit
        self.scheduler.running_batch = SimpleNamespace(reqs=[])
        self.scheduler.get_num_allocatable_reqs = lambda running: rows - running
        self.refused: list[str] = []

    def arrive(self, req: Any, priority: int = 0) -> None:
        req.priority = priority
        hooks.add_request_to_queue(self._add, self.scheduler, req)

    def _add(self, scheduler: Any, req: Any, is_retracted: bool) -> None:
        limit, queue = scheduler.max_queued_requests, scheduler.waiting_queue
        if limit is not None and len(queue) + 1 > limit:
            least = min(queue, key=lambda one: one.priority)
            out = least if least.priority < req.priority else req
            self.refused.append(out.rid)
            if out is req:
                return
            queue.remove(least)
        queue.append(req)

    def group(self, name: str, size: int, priority: int = 0) -> None:
        for index in range(size):
            self.arrive(request(self.ours, f"{name}{index}", name, index, size), priority)

    def prefill(self) -> None:
        """Whoever is in SGLang's queue gets a row."""
        self.scheduler.running_batch.reqs += self.scheduler.waiting_queue
        self.scheduler.waiting_queue = []


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    ours = engine()
    monkeypatch.setattr(hooks, "_engine", ours)
    yield Queue(ours)
    assert not ours.faults


def test_siblings_held_by_design_refuse_no_other_group_while_rows_are_free(queue: Queue):
    for name in "abc":
        queue.group(name, LIMIT)
        queue.prefill()
    assert not queue.refused
    assert len(queue.ours.room.held) == 3 * (LIMIT - 4)
    queue.arrive(request(queue.ours, "stranger"))
    assert not queue.refused


def test_a_group_beyond_free_rows_and_limit_is_refused(queue: Queue):
    queue.group("a", ROWS + 2 * LIMIT)
    assert queue.refused


def test_without_a_free_row_the_held_count_for_everybody(queue: Queue):
    queue.scheduler.get_num_allocatable_reqs = lambda running: 4 - running
    queue.group("a", LIMIT)
    queue.prefill()
    for index in range(5):
        queue.arrive(request(queue.ours, f"stranger{index}"))
    assert queue.refused == ["stranger4"]  # beside the 60 that are held


def test_a_higher_priority_evicts_no_held_sibling_while_rows_are_free(queue: Queue):
    queue.group("a", LIMIT)
    queue.prefill()
    queue.group("urgent", LIMIT, priority=1)
    queue.arrive(request(queue.ours, "stranger"), priority=2)
    assert not queue.refused
    queue.scheduler.get_num_allocatable_reqs = lambda running: 0
    queue.arrive(request(queue.ours, "late"), priority=2)
    assert queue.refused == ["a4"]  # as SGLang evicts whoever waits for a row
