"""When the KV pool is full, somebody dispensable goes before SGLang retracts anybody.

SGLang retracts whoever has generated least (`ScheduleBatch.retract_decode`), a stranger as soon as
a sibling. Before it comes to that, in this order: probes end; extras give their rows back; of a
group over its fair share of the rows, a sibling that a judge found redundant is pruned, else the
youngest one goes back to its group, which claims it again behind whoever waits. Never anybody of a
group within its share, never the last one of a group. All ranks see the same rows and act alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_deepprune import policy
from sglang_deepprune.metrics import RETRACTIONS_AVOIDED
from sglang_deepprune.patches.fork import ProbeReq
from sglang_deepprune.patches.rows import can_be_released

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine


class Pressure:
    """Looks at the pool before each decode step, while groups live."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.num_relieved = 0  # rows freed so that SGLang need not retract
        self.shed: set[str] = set()  # groups that lost a row so, until they are replanned

    def relieve(self, batch: Any) -> None:
        """Before `Scheduler.update_running_batch` checks the pool for the next decode step."""
        allocator = self.engine.scheduler.token_to_kv_pool_allocator
        # A page a row is the most that a step can ask for; more is free nearly always.
        if allocator.available_size() >= len(batch.reqs) * allocator.page_size:
            return
        if not batch.spec_algorithm.is_none():
            return
        finishing = getattr(self.engine.scheduler, "_reqs_finishing_inflight", None)  # 0.5.23
        if finishing is not None and finishing(batch):
            return  # SGLang waits for their KV rather than retract
        self.engine.rows.promote()
        while len(batch.reqs) > 1 and not batch.check_decode_mem():
            if self._yield_one(batch) or self._shed(batch):
                self.num_relieved += 1
                self.engine.meter.count(RETRACTIONS_AVOIDED)
            elif self.engine.prefixes.locks:
                self.engine.prefixes.let_go_all()
            else:
                return

    def _yield_one(self, batch: Any) -> int:
        """A probe's row, else an extra's."""
        probes = self.engine.probes
        taken = probes.guard(probes.give_way, batch, 1)
        return taken or self.engine.rows.yield_rows(batch, 1)

    def _shed(self, batch: Any) -> bool:
        """Take one row from the group that is furthest over its share."""
        rows: dict[str, dict[int, int]] = {}  # group -> sibling index -> row
        num_strangers = 0
        for place, req in enumerate(batch.reqs):
            live = self.engine.live_of(req)
            if isinstance(req, ProbeReq):
                continue
            if live is None:
                num_strangers += 1
            elif can_be_released(req):
                rows.setdefault(live.group_id, {})[live.index] = place
        if not rows:
            return False
        fattest = max(rows, key=lambda group_id: len(rows[group_id]))
        own = rows[fattest]
        group = self.engine.coordinator.runs[fattest].group
        lengths = {index: len(batch.reqs[place].output_ids) for index, place in own.items()}
        redundant = policy.most_redundant(group, lengths)
        is_alone = num_strangers == 0 and len(rows) == 1
        share = len(batch.reqs) / (len(rows) + num_strangers)
        if len(own) < 2 or (len(own) <= share and not is_alone):
            return False
        if redundant is None and is_alone:
            return False  # whomever SGLang retracts, it is one of these
        index = min(lengths, key=lambda i: (lengths[i], -i)) if redundant is None else redundant
        if redundant is not None:
            self.engine.dooms.weigh(batch.reqs[own[index]])
        self.engine.rows.release(batch, [own[index]])
        if redundant is not None:
            self.engine.prune(fattest, index)
        else:
            self._claim_again(fattest, batch)
        return True

    def _claim_again(self, group_id: str, batch: Any) -> None:
        """A group that has fallen below its claim queues for its room again. SGLang's estimate of
        what running requests will still need is raised as after a retraction of its own: else it
        would admit the sibling in the next pass, and we shed it in the one after."""
        tracker = self.engine.scheduler.new_token_ratio_tracker
        estimate = tracker.estimate_new_token_ratio_after_retract(batch.reqs)
        tracker.current = max(tracker.current, estimate)
        self.shed.add(group_id)
        self.engine.replan_soon(group_id)
