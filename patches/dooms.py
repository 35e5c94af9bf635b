"""How the doomed end: on their row by SGLang's own finish path, or at once if they hold none.

A running sibling gets a `to_finish`, and SGLang ends it in the result processing that comes next;
one that waits in a queue and owns nothing is taken out and answered. What each of the former will
give back of the KV pool is weighed right before that, where somebody counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_deepprune.actions import Stop
from sglang_deepprune.group import State
from sglang_deepprune.metrics import FREED_SLOTS, Stopped
from sglang_deepprune.patches import finish
from sglang_deepprune.patches.metrics import private_slots

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine


class Dooms:
    """The siblings of one scheduler that are about to be stopped, and the KV of each."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.scheduler = engine.scheduler
        self.slots: dict[str, int] = {}  # rid of who is about to be stopped -> its own KV slots

    def doom(self, req: Any, stop: Stop) -> None:
        """SGLang ends it in the result processing that comes next."""
        req.to_finish = finish.FinishStopped(stop.state, len(req.output_ids))
        if self.engine.meter.is_on:
            self.slots[req.rid] = 0
        self.engine.live[req.rid].skipped_insert = req.skip_radix_cache_insert
        # The private tail goes back to the allocator instead of into the radix tree. Not before the
        # first token: the prompt of a sibling in prefill is everybody's.
        req.skip_radix_cache_insert |= len(req.output_ids) > 0

    def spare(self, req: Any) -> None:
        """Stopped in the step in which it ends anyway."""
        live = self.engine.live[req.rid]
        req.to_finish, req.skip_radix_cache_insert = None, live.skipped_insert

    def forget(self, req: Any) -> None:
        """It has ended, or gives nothing back any more."""
        self.slots.pop(req.rid, None)

    def weigh_doomed(self, batch: Any) -> None:
        """Right before SGLang ends them: the KV that each of them will give back."""
        for req in batch.reqs:
            is_doomed = req.rid in self.slots and self.engine.live_of(req) is not None
            if is_doomed and req.skip_radix_cache_insert:
                self.weigh(req)

    def weigh(self, req: Any) -> None:
        """What a sibling that is about to be stopped owns alone goes back to the allocator."""
        if not self.engine.meter.is_on:
            return
        self.slots[req.rid] = private_slots(req, self.scheduler.token_to_kv_pool_allocator)

    def freed(self, req: Any, state: State) -> None:
        """It has ended as `state`, and its slots are the pool's again."""
        slots = self.slots.get(req.rid, 0)
        if slots and state in (State.PRUNED, State.DECIDED):
            self.engine.meter.count(FREED_SLOTS, slots, Stopped(state.value))

    def take_from_queues(self, reqs: Sequence[Any]) -> set[int]:
        """Out of SGLang's waiting and grammar queue; the ids of those that were in one and own
        nothing. One walk for all: a queue may be as long as a group is large."""
        wanted = {id(req) for req in reqs if self._owns_nothing(req)}
        taken: set[int] = set()
        if not wanted:
            return taken
        grammar = getattr(self.scheduler.grammar_manager, "grammar_queue", [])
        for queue in (self.scheduler.waiting_queue, grammar):
            found = wanted.intersection(map(id, queue))
            if found:
                queue[:] = [req for req in queue if id(req) not in found]
                taken |= found
        return taken

    def _owns_nothing(self, req: Any) -> bool:
        """It may be in a queue, and has no pages there.

        One that has been given a mamba slot ends by `to_finish`, at its prefill, as does one with a
        storage prefetch where SGLang has no release for it yet (before 0.5.20).
        """
        kv = getattr(req, "kv", None)
        if getattr(req, "mamba_pool_idx", None) is not None or getattr(kv, "holds_mamba", False):
            return False
        old = not hasattr(self.scheduler, "_release_aborted_request")
        if old and getattr(self.scheduler, "enable_hicache_storage", False):
            return False
        return not req.output_ids or bool(req.is_retracted)  # else it runs: spare the walk

    def end(self, reqs: Sequence[Any], state: State) -> None:
        """End siblings that hold no row: one terminal output each, with what it has."""
        release = getattr(self.scheduler, "_release_aborted_request", None)  # 0.5.20 and later
        for req in reqs:
            if release is not None:
                release(req)
            req.to_finish = finish.FinishStopped(state, len(req.output_ids))
            req.update_finish_state()
        for wants_logprob in (False, True):
            some = [req for req in reqs if bool(req.return_logprob) is wants_logprob]
            if some:
                self.scheduler.output_streamer.stream_output(some, wants_logprob)
