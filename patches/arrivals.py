"""Siblings come to SGLang's queue, for the first time or again: what becomes of each.

The first time it gets its place in its group and in the order of arrival, and a seed of its own;
again it comes when SGLang has retracted, preempted or paused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_deepprune.metrics import RETRACTIONS, Who
from sglang_deepprune.noise import sibling_seed
from sglang_deepprune.patches import finish, sampling, wire
from sglang_deepprune.probing import THINK_MARKS

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine

_THINK_TAIL = 8  # tokens of the prompt's end


class Arrival(Enum):
    """What becomes of a sibling that comes to SGLang's queue."""

    STARTS = "starts"
    IS_HELD = "is held"  # within its group, once SGLang has checked it as any other request
    RETURNS = "returns"  # was admitted before: retracted, preempted or paused
    DONE = "done"  # answered, or sent back to its group


@dataclass(slots=True)
class Live:
    """One sibling inside the engine."""

    req: Any  # sglang Req
    group_id: str
    index: int
    stem: str  # rid of the n>1 request it belongs to
    skipped_insert: bool = False  # what `skip_radix_cache_insert` was before we set it


class Arrivals:
    """Admits the siblings of one scheduler."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def arrive(self, req: Any) -> Arrival:
        """A sibling comes to SGLang's queue, for the first time or again."""
        engine = self.engine
        known = engine.live.get(req.rid)
        if known is not None and known.req is not req:
            return Arrival.STARTS  # a rid that is taken: no table has room for it
        if known is not None:
            if req.is_retracted:
                engine.dooms.forget(req)
                engine.meter.count(RETRACTIONS, value=Who.SGLANG)
            if isinstance(req.to_finish, finish.FinishStopped):
                # Doomed, and retracted: it holds no KV and must not start again.
                engine.dooms.end([req], req.to_finish.state)
                return Arrival.DONE
            if isinstance(req.to_finish, FINISH_ABORT):
                engine.rows.extras.pop(req.rid, None)  # SGLang ends it, in no group's waiting room
            if req.rid in engine.rows.extras:
                engine.rows.send_back(req)
                req.time_stats.set_wait_queue_entry_time()
                return Arrival.DONE
            engine.num_retracted += bool(req.is_retracted)
            return Arrival.RETURNS
        tagged = req.sampling_params.custom_params[wire.TAG]
        engine.at = group_id = engine.coordinator.name_of(tagged["gid"], tagged["index"])
        admission = engine.coordinator.admit(
            group_id, tagged["index"], tagged["size"], wire.settings_of(tagged),
            req.sampling_params.max_new_tokens or 0,
            starts_in_reasoning=self._opens_thinking(req.origin_input_ids),
            is_greedy=req.sampling_params.top_k == 1,  # what SGLang makes of temperature 0
            prompt_ids=req.origin_input_ids,
        )  # fmt: skip
        if admission is None:
            return Arrival.STARTS
        engine.live[req.rid] = Live(req, group_id, admission.index, tagged["rid"])
        engine.rids[group_id, admission.index] = req.rid
        run = engine.coordinator.runs[group_id]
        run.order = engine.room.stamp(req, run.order or None)
        seed = req.sampling_params.sampling_seed
        if seed is not None or engine.is_deterministic:
            own = sibling_seed(42 if seed is None else seed, admission.index)
            if engine.is_deterministic:
                req.sampling_params.sampling_seed = own
            else:
                sampling.SEEDS[req.rid] = own
        if admission.end is not None:
            engine.dooms.end([req], admission.end)
            return Arrival.DONE
        return Arrival.IS_HELD if admission.is_held else Arrival.STARTS

    def _opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Some chat templates end the prompt with an open think block (DeepSeek-R1)."""
        try:
            tail = self.engine.coordinator.decode(prompt_ids[-_THINK_TAIL:]).rstrip()
        except (OverflowError, TypeError, IndexError):
            return False  # an image's ids are hashes, beyond any vocabulary
        return tail.endswith(tuple(THINK_MARKS))
