"""Rows beyond the claims: filled where they are (nearly) free, given back when anybody else waits.

`wanted` decides on the leader alone, because it rests on its clock (`StepModel`); the `Fill`
commands ride the request broadcast, so all ranks act on them in the same scheduler pass. An extra
enters SGLang's queue only while that is empty, inside `_get_new_batch_prefill_raw`, and what is not
admitted there goes back: it never stands in front of anybody. Running extras yield their rows as
SGLang's own priority preemption takes them (`schedule_policy.py::PrefillAdder.preempt_to_schedule`:
`release_req`, then `filter_batch`); the tokens that they have are kept.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sglang_deepprune import policy
from sglang_deepprune.actions import Start
from sglang_deepprune.group import Group
from sglang_deepprune.metrics import EXTRAS_STARTED, EXTRAS_YIELDED, RETRACTIONS, Who
from sglang_deepprune.stepmodel import StepModel
from sglang_deepprune.types import Fill

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine

_BATCH = 8  # extras start an eighth of the rows at a time: a prefill pass stops all decoding
_EVERY = 4  # decode steps between two looks at free rows


class Rows:
    """Extras of one scheduler: which siblings they are, when they start and when they yield."""

    def __init__(self, engine: Engine, growth: float):
        self.engine = engine
        self.scheduler = engine.scheduler
        self.coordinator = engine.coordinator
        self.growth = growth  # the setting `fill`
        self.model = StepModel()
        self.extras: dict[str, str] = {}  # rid -> its group, oldest first
        self.fills: list[Fill] = []  # of this scheduler pass
        self.num_yielded = 0
        self._injected: list[Any] = []
        self._was_full = False
        self._last_decode = 0.0  # clock of the newest decode result; 0: something else came between
        self._steps = 0

    # -- the leader's clock ------------------------------------------------------------------

    def decoded(self, rows: int) -> None:
        """A decode result is done: the time since the last one is a step of the steady state."""
        if not self.growth:
            return
        now = time.perf_counter()
        if self._last_decode:
            self.model.add(rows, now - self._last_decode)
        self._last_decode = now
        self._steps += 1

    def interrupted(self) -> None:
        """A prefill pass: the time to the next decode result is no step."""
        self._last_decode = 0.0

    def take(self, fill: Fill) -> None:
        """A fill has come back in the broadcast. Not before: SGLang may drop what it pulls in a
        pass in which it receives nothing (`--scheduler-recv-interval`)."""
        self._steps = 0
        self.fills.append(fill)

    def wanted(self) -> list[Fill]:
        """How many siblings of which group start now beyond their claims."""
        scheduler = self.scheduler
        if not self.growth or not self.engine.room.held or self._steps < _EVERY:
            return []
        if scheduler.waiting_queue or scheduler.chunked_req is not None:
            return []
        if scheduler.grammar_manager.has_waiting_grammars():
            return []  # they enter the queue inside the very pass that would admit the extras
        groups = [run.group for run in self.coordinator.runs.values()]
        order = chain.from_iterable(map(policy.fill_order, self._by_priority(groups)))
        fills: dict[str, Fill] = {}
        for _, group in zip(range(self._num_free(groups)), order, strict=False):
            known = fills.get(group.group_id)
            count = known.count + 1 if known else 1
            fills[group.group_id] = Fill(group.group_id, group.epoch, count)
        return list(fills.values())

    def _by_priority(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """Groups with held siblings, those that SGLang would serve first in front; all together
        where it knows no priorities."""
        if not self.scheduler.enable_priority_scheduling:
            return [groups]
        levels: dict[int, list[Group]] = {}
        for group in groups:
            held = group.held[0].index if group.has_held else -1
            req = self.engine.req_of(group.group_id, held)
            if req is not None:
                levels.setdefault(self._urgency(req), []).append(group)
        return [levels[urgency] for urgency in sorted(levels, reverse=True)]

    def _urgency(self, req: Any) -> int:
        """Higher is served first."""
        if not self.scheduler.enable_priority_scheduling:
            return 0
        sign = -1 if self.scheduler.schedule_low_priority_values_first else 1
        return sign * int(req.priority)

    def _num_free(self, groups: Sequence[Group]) -> int:
        batch, last = self.scheduler.running_batch, self.scheduler.last_batch
        if batch.batch_is_full:
            return 0
        running = [req for req in batch.reqs if not req.finished()]
        if last is not None and last is not batch and last.forward_mode.is_extend():
            running += [req for req in last.reqs if not req.finished()]
        rows = len(running)
        claimed = rows - sum(policy.num_extras(group) for group in groups)
        claimed -= len(self.engine.probes.running)
        limit = self.model.rows_within(max(1, claimed), self.growth)
        free = self.scheduler.get_num_allocatable_reqs(rows)
        if limit is not None:
            free = min(free, limit - rows)
        if free <= 0 or free < min(len(self.engine.room.held), (rows + free) // _BATCH):
            return 0
        return int(min(free, self._num_that_fit(groups, running)))

    def _num_that_fit(self, groups: Sequence[Group], running: Sequence[Any]) -> int:
        """Extras whose expected tokens fit into the pool beside what the running ones will need."""
        known = [group.mean_length for group in groups if group.num_voted]
        expected = max(1.0, sum(known) / len(known)) if known else 0.0
        if not expected:
            return len(self.engine.room.held)  # SGLang's own estimate decides
        needed = sum(max(0.0, expected - len(req.output_ids)) for req in running)
        return max(0, int((self.free_tokens() - needed) / expected))

    def free_tokens(self) -> int:
        """KV slots that are free or can be evicted; hybrid caches tell one number a kind."""
        evictable = self.scheduler.tree_cache.evictable_size()
        evictable = min(evictable) if isinstance(evictable, tuple) else evictable
        return int(self.scheduler.token_to_kv_pool_allocator.available_size() + evictable)

    # -- inside the prefill pass, on every rank ----------------------------------------------

    def before_prefill(self, batch: Any) -> None:
        """Extras make room for whoever waits; with nobody waiting, more of them may start."""
        fills, self.fills = self.fills, []
        self.promote()
        waiting = self.scheduler.waiting_queue
        if waiting:
            probes = self.engine.probes
            if (self.extras or probes.running) and self._is_blocked(batch):
                count = len(waiting) - (probes.guard(probes.give_way, batch, len(waiting)) or 0)
                if count > 0:
                    self.yield_rows(batch, count)
            return
        self._was_full = batch.batch_is_full
        if self.scheduler.grammar_manager.has_waiting_grammars():
            return
        for fill in fills:
            for _ in range(fill.count):
                start = self.coordinator.start_extra(fill.group_id, fill.epoch)
                if start is None or not self._inject(start):
                    break

    def _inject(self, start: Start) -> bool:
        req = self.engine.req_of(start.group_id, start.index)
        if req is None or not self.engine.room.take(req):
            return False
        self.scheduler.waiting_queue.append(req)
        self.extras[req.rid] = start.group_id
        self._injected.append(req)
        return True

    def after_prefill(self, batch: Any) -> None:
        """What SGLang did not admit waits within its group again."""
        if not self._injected:
            return
        injected, self._injected = self._injected, []
        queue = self.scheduler.waiting_queue
        waiting = {id(req) for req in queue}
        # One that is ours no more (a fault in between) stays in SGLang's queue.
        refused = [req for req in injected if id(req) in waiting and self.engine.live_of(req)]
        ours = {id(req) for req in refused}
        self.scheduler.waiting_queue = [req for req in queue if id(req) not in ours]
        self.engine.meter.count(EXTRAS_STARTED, sum(id(req) not in waiting for req in injected))
        for req in refused:
            self.send_back(req)
        if refused and not self.scheduler.waiting_queue:
            # SGLang's note that the batch is full would keep out requests that ask for less.
            batch.batch_is_full = self._was_full

    def yield_rows(self, batch: Any, count: int) -> int:
        """Take up to `count` rows from running extras, of the least priority and then the youngest
        first; how many there were."""
        running = {
            req.rid: place
            for place, req in enumerate(batch.reqs)
            if self._is_extra(req) and can_be_released(req) and goes_on_the_same(req)
        }
        youngest = [running[rid] for rid in reversed(self.extras) if rid in running]
        places = sorted(youngest, key=lambda place: self._urgency(batch.reqs[place]))[:count]
        self.release(batch, places)
        return len(places)

    def release(self, batch: Any, places: Sequence[int]) -> list[Any]:
        """Take these rows of the running batch; their requests wait within their groups again."""
        reqs = self.take_off(batch, places)
        num_extras = sum(map(self._is_extra, reqs))
        self.engine.meter.count(EXTRAS_YIELDED, num_extras)
        self.engine.meter.count(RETRACTIONS, len(reqs), Who.DEEPPRUNE)
        for req in reqs:
            self.send_back(req)
            req.time_stats.set_wait_queue_entry_time()  # as for any retracted request
        self.num_yielded += len(reqs)
        return reqs

    def take_off(self, batch: Any, places: Sequence[int]) -> list[Any]:
        """Take these rows of the running batch; whose they were owns neither row nor KV now."""
        if not places:
            return []
        reqs = [batch.reqs[place] for place in places]
        # Before 0.5.19 it wants the server's arguments too.
        is_old = "server_args" in inspect.signature(batch.release_req).parameters
        more = (self.scheduler.server_args,) if is_old else ()
        for count, place in enumerate(places, start=1):
            batch.release_req(place, len(batch.reqs) - count, *more)
        taken = set(places)
        batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i not in taken])
        batch.batch_is_full = False
        return reqs

    def send_back(self, req: Any) -> None:
        """It owns neither row nor KV: to its group, until it is claimed or rows are free."""
        self.extras.pop(req.rid, None)
        live = self.engine.live[req.rid]
        self.coordinator.send_back(live.group_id, live.index, len(req.output_ids))
        self.engine.room.hold(req)
        self.engine.wake(live.group_id)

    def promote(self) -> None:
        """An extra whose group has come to claim it is one no more: the oldest first."""
        for group_id in dict.fromkeys(self.extras.values()):
            run = self.coordinator.runs.get(group_id)
            own = [rid for rid, known in self.extras.items() if known == group_id]
            keep = policy.num_extras(run.group) if run is not None else 0
            for rid in own[: max(0, len(own) - keep)]:
                del self.extras[rid]

    def _is_extra(self, req: Any) -> bool:
        return req.rid in self.extras and self.engine.live_of(req) is not None

    def _is_blocked(self, batch: Any) -> bool:
        if any(req.finished() for req in batch.reqs):
            return False  # before 0.5.21 they are still in: a row is free as of the next pass
        free = self.scheduler.get_num_allocatable_reqs(len(batch.reqs))
        return bool(batch.batch_is_full or free <= 0)


def goes_on_the_same(req: Any) -> bool:
    """After its row was taken it goes on as if it had kept it. Not with embeddings, for which
    `Req.reset_for_retract` drops the tokens; nor with penalties and least lengths, which
    `sampling/penaltylib` counts from the latest prefill on. An extra of these keeps its row, as it
    would under plain n>1."""
    params = req.sampling_params
    has_penalty = params.frequency_penalty or params.presence_penalty
    has_penalty = has_penalty or params.repetition_penalty != 1 or params.min_new_tokens > 0
    return not has_penalty and req.input_embeds is None


def can_be_released(req: Any) -> bool:
    """Runs, has a token, and nothing has been decided about its end."""
    return bool(not req.finished() and req.to_finish is None and req.output_ids)
