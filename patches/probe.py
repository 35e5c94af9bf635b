"""A probe: a short request that reads a running sibling's KV, answers in a box, and disappears.

It is a request of our own class (`fork.py`) that goes through SGLang's prefill and decode as any
other. Here is when one starts, what it is asked, when it ends and who is told.

A sibling may end, be retracted or pruned while its probe runs. From then on the aliased slots are
somebody else's: the probe's row is pointed at a slot of its own (`detach`) and it ends with the
next result, which is dropped. A forward that is in flight reads what it reads; nobody sees it.

Rows and KV are lent: a probe starts only while nobody waits, inside the very pass that admits it,
and is taken off its row as soon as somebody waits for one or KV is short. What starts and what ends
rests on what all ranks share; probabilities are read on the leader alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH

from sglang_deepprune import probing
from sglang_deepprune.actions import Fork
from sglang_deepprune.faults import told
from sglang_deepprune.metrics import HOOK_ERRORS
from sglang_deepprune.patches import sampling
from sglang_deepprune.patches.fork import ProbeReq
from sglang_deepprune.patches.rows import can_be_released

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine

logger = logging.getLogger(__name__)

_PREFIX = "__deepprune_probe_"
_PATIENCE = 64  # scheduler passes that a wish waits for room
_SHARE = 8  # probes start an eighth of the rows at a time
_NEEDED = "its row or its KV was needed"
_SLACK = 16  # tokens that a thinking mark may add to a closing text
_HEAD = 16  # tokens of an output or of a prompt's end that may hold a thinking mark


@dataclass(slots=True)
class _Wish:
    """A probe that is to start."""

    fork: Fork
    patience: int = _PATIENCE


@dataclass(slots=True)
class _Running:
    """A probe inside the engine."""

    req: ProbeReq
    wish: _Wish
    failure: str | None = None  # set once its outcome is of no use; "" = not worth a log line
    values: list[torch.Tensor] = field(default_factory=list)  # [] float32 on the device, a token

    @property
    def fork(self) -> Fork:
        return self.wish.fork


class Probes:
    """All probes of one scheduler."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.scheduler = engine.scheduler
        self.wishes: dict[tuple[str, int], _Wish] = {}
        self.running: dict[str, _Running] = {}  # rid ->
        self._admitting: list[_Running] = []
        self._was_full = False
        self.num_taken = 0  # off their rows, before they had answered
        self._count = 0
        self._closing = probing.closing_of(engine.config.judge)
        self._ids: dict[str, list[int]] = {}  # closing text -> its tokens
        self._braces: dict[int, bool] = {}  # token -> whether it holds a closing brace
        self._parser: tuple[str, str, bool] | None = None
        self._off = ""
        if probing.is_probe(engine.config.judge):
            self._parser = _parser_marks(self.scheduler.server_args)
            self._off = _runtime_refusal(self.scheduler)

    @property
    def is_busy(self) -> bool:
        return bool(self.wishes or self.running)

    def guard(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run one of our steps. A fault ends all probes, for good, and nothing else: groups go on
        without verdicts."""
        try:
            return step(*args)
        except Exception as error:
            self.engine.meter.count(HOOK_ERRORS)
            if not self._off:
                self._off = f"{step.__name__} raised {type(error).__name__}"
                logger.error("deepprune: probe: %s; no more probes: %s", self._off, told(error))
            with contextlib.suppress(Exception):
                for key in list(self.wishes):
                    self._drop_wish(key, self._off)
                for one in self.running.values():
                    one.req.detach()
                    self._end(one, self._off)
            return None

    # -- wishes ------------------------------------------------------------------------------

    def wish(self, fork: Fork) -> None:
        self.wishes.setdefault((fork.group_id, fork.index), _Wish(fork))

    def before_prefill(self, batch: Any) -> None:
        """Nobody waits: some of the wished ones join SGLang's queue, for this pass."""
        if not self.wishes:
            return
        self._was_full = batch.batch_is_full
        room = self._room(batch)
        for key, wish in list(self.wishes.items()):
            run = self.engine.coordinator.runs.get(wish.fork.group_id)
            if run is None or run.group.epoch != wish.fork.epoch:
                del self.wishes[key]
                if self.engine.is_idle and not self.wishes:
                    self.engine.log_tables()
                continue
            wish.patience -= 1
            if wish.patience < 0 or self._off:
                self._drop_wish(key, self._off or "no row was free for long enough")
            elif room > 0 and not _is_fresh(self.engine.req_of(*key)):
                room -= 1
                self._inject(key, wish)

    def after_prefill(self, batch: Any) -> None:
        """What SGLang did not admit is wished for again."""
        if not self._admitting:
            return
        admitting, self._admitting = self._admitting, []
        waiting = {id(req) for req in self.scheduler.waiting_queue}
        refused = [one for one in admitting if id(one.req) in waiting]
        gone = {id(one.req) for one in refused}
        queue = self.scheduler.waiting_queue
        self.scheduler.waiting_queue = [req for req in queue if id(req) not in gone]
        for one in refused:
            one.req.give_row_back()
            self._forget(one)
            self.wishes.setdefault((one.fork.group_id, one.fork.index), one.wish)
        if refused and not self.scheduler.waiting_queue:
            # SGLang's note that the batch is full would keep out requests that ask for less.
            batch.batch_is_full = self._was_full

    def _room(self, batch: Any) -> int:
        """Probes that may start now: nobody waits, rows and KV are free beyond the next steps."""
        scheduler = self.scheduler
        if scheduler.waiting_queue or scheduler.chunked_req is not None or batch.batch_is_full:
            return 0
        if scheduler.grammar_manager.has_waiting_grammars():
            return 0  # they enter the queue inside the very pass that would admit the probes
        rows = len(batch.reqs)
        free = scheduler.get_num_allocatable_reqs(rows)
        page = scheduler.token_to_kv_pool_allocator.page_size
        each = _paged(self._longest_closing + _SLACK + probing.MAX_TOKENS, page) + 2 * page
        kv = self.engine.rows.free_tokens() - 2 * page * rows
        room = min(free, max(1, (rows + free) // _SHARE), kv // each)
        chunk = scheduler.chunked_prefill_size
        if chunk and chunk > 0:  # a probe is never prefilled in pieces
            room = min(room, chunk // each)
        return int(max(0, room))

    @property
    def _longest_closing(self) -> int:
        """Tokens of the closing text; its characters before it was first used."""
        return max((len(ids) for ids in self._ids.values()), default=len(self._closing))

    def _inject(self, key: tuple[str, int], wish: _Wish) -> None:
        sibling = self.engine.req_of(*key)
        del self.wishes[key]
        num_shared = self._num_shared(sibling)
        if num_shared <= 0:
            self._tell(wish.fork, failure="")
            return
        closing = self._closing_ids(sibling)
        ids = sibling.origin_input_ids + sibling.output_ids + array("q", closing)
        if len(ids) + probing.MAX_TOKENS >= self.scheduler.max_req_len:
            self._tell(wish.fork, failure="the trace fills the context")
            return
        self._count += 1
        rid = f"{_PREFIX}{key[0]}_{key[1]}_{self._count}"
        req = ProbeReq(sibling, ids, rid, self.scheduler.req_to_token_pool, num_shared)
        one = self.running[rid] = _Running(req, wish)
        sampling.PROBES[rid] = one.values
        req.time_stats.set_wait_queue_entry_time()
        self.scheduler.waiting_queue.append(req)
        self._admitting.append(one)

    def _num_shared(self, sibling: Any) -> int:
        """Tokens of the sibling whose KV is certain, in whole pages; 0: it cannot be forked.

        Under overlap the last one's KV is being written by the forward that is in flight, and the
        probe's prefill comes after that one on the same stream; its output is not known yet, so
        what is certain ends where both the KV and the token ids are.
        """
        if sibling is None or sibling.finished() or sibling.to_finish is not None:
            return 0
        if sibling.is_retracted or not sibling.kv.holds_kv or not sibling.output_ids:
            return 0
        if sibling.multimodal_inputs is not None or sibling.input_embeds is not None:
            return 0
        page = self.scheduler.token_to_kv_pool_allocator.page_size
        known = len(sibling.origin_input_ids) + len(sibling.output_ids)
        return int(min(sibling.kv.kv_committed_len, known)) // page * page

    def _closing_ids(self, sibling: Any) -> list[int]:
        mark = self._open_mark(sibling)
        text = mark + self._closing
        if text not in self._ids:
            tokenizer = self.scheduler.tokenizer
            self._ids[text] = list(tokenizer.encode(text, add_special_tokens=False))
        return self._ids[text]

    def _open_mark(self, sibling: Any) -> str:
        """What closes the sibling's thinking, by the reasoning parser's own marks; "": nothing."""
        decode = self.engine.coordinator.decode
        head = decode(sibling.output_ids[:_HEAD])
        tail = decode(sibling.origin_input_ids[-_HEAD:]).rstrip()
        if self._parser is not None:
            start, end, is_forced = self._parser
            is_open = is_forced or (bool(start) and (start in head or tail.endswith(start)))
            is_open = is_open and end not in tail
        else:
            found = [mark for mark in probing.THINK_MARKS if mark in head or tail.endswith(mark)]
            is_open, end = bool(found), probing.THINK_MARKS[found[0]] if found else ""
        if not is_open or self._holds(sibling.output_ids, end):
            return ""
        return end

    def _holds(self, output_ids: Any, mark: str) -> bool:
        ids = self.scheduler.tokenizer.encode(mark, add_special_tokens=False)
        if len(ids) == 1:
            return ids[0] in output_ids
        return mark in self.engine.coordinator.decode(output_ids)

    def _drop_wish(self, key: tuple[str, int], failure: str) -> None:
        self._tell(self.wishes.pop(key).fork, failure=failure)

    # -- while they run ----------------------------------------------------------------------

    def sweep(self) -> None:
        """Siblings that have ended, or lost their row, take their probes with them."""
        for one in self.running.values():
            sibling = one.req.sibling
            is_gone = sibling.finished() or sibling.is_retracted or not sibling.kv.holds_kv
            if is_gone:
                one.req.detach()
            if one.failure is None and (is_gone or sibling.to_finish is not None):
                self._end(one, "")

    def end_group(self, group_id: str) -> None:
        """The group is ours no more."""
        for key in [key for key in self.wishes if key[0] == group_id]:
            del self.wishes[key]
        for one in self.running.values():
            if one.fork.group_id == group_id:
                self._end(one, "")

    def _end(self, one: _Running, failure: str) -> None:
        """With its next result; SGLang frees what it owns there."""
        one.failure = failure
        if not one.req.finished() and one.req.to_finish is None:
            one.req.to_finish = FINISH_LENGTH(len(one.req.output_ids))

    def before_result(self, batch: Any, tokens: Sequence[int]) -> None:
        """This step's tokens are known: a closed box ends its probe."""
        self.sweep()
        for req, token in zip(batch.reqs, tokens, strict=False):
            if not isinstance(req, ProbeReq) or req.finished() or req.to_finish is not None:
                continue
            if self._may_close(token) and self.engine.coordinator.handover.is_answered(
                [*req.output_ids, token]
            ):
                req.to_finish = FINISH_LENGTH(len(req.output_ids) + 1)

    def _may_close(self, token: int) -> bool:
        """Whether it holds a brace: only then is the whole answer decoded."""
        known = self._braces.get(token)
        if known is None:
            known = self._braces[token] = "}" in self.engine.coordinator.decode([token])
        return known

    def after_result(self) -> None:
        """Finished ones have answered; siblings that ended in this step end theirs."""
        self.sweep()
        for one in [one for one in self.running.values() if one.req.finished()]:
            self._collect(one)

    def _collect(self, one: _Running) -> None:
        self._forget(one)
        ids = list(one.req.output_ids)
        tail = len(one.req.origin_input_ids) - one.req.num_shared
        if one.failure is not None or not ids or len(one.values) < len(ids):
            failure = "it was ended early" if one.failure is None else one.failure
            self._tell(one.fork, num_tokens=tail + len(ids), failure=failure)
            self._log(one, tail, len(ids), [])
            return
        # One small copy a probe; the forward has been waited for with this step's result.
        values = torch.stack(one.values[: len(ids)]).tolist()
        self._log(one, tail, len(ids), values)
        fork = one.fork
        self.engine.coordinator.handover.probed(
            fork.group_id, fork.index, fork.epoch, ids, values, num_tokens=tail + len(ids)
        )

    def lost(self, req: ProbeReq) -> None:
        """SGLang took it off its row: retracted, preempted, paused or aborted."""
        self._taken(req, _NEEDED)

    def give_way(self, batch: Any, count: int) -> int:
        """Take up to `count` rows from running probes; how many there were. Those without a token
        so far cannot be taken off: they end with it."""
        if not self.running:
            return 0
        places = [
            place for place, req in enumerate(batch.reqs)
            if isinstance(req, ProbeReq) and can_be_released(req)
        ][:count]  # fmt: skip
        for req in self.engine.rows.take_off(batch, places):
            self._taken(req, _NEEDED)
        fresh = [one for one in self.running.values()
                 if one.failure is None and not one.req.output_ids]  # fmt: skip
        for one in fresh[: count - len(places)]:
            self._end(one, _NEEDED)
        return len(places)

    def _taken(self, req: ProbeReq, failure: str) -> None:
        one = self.running.get(req.rid)
        if one is None:
            return
        self.num_taken += 1
        self._forget(one)
        tail = len(req.origin_input_ids) - req.num_shared
        self._tell(one.fork, num_tokens=tail + len(req.output_ids), failure=one.failure or failure)

    def owns(self, rid: Any) -> bool:
        return isinstance(rid, str) and rid in self.running

    def aborted(self, rid: str) -> None:
        """An AbortReq for it was about to leave for the tokenizer, which does not know it."""
        self._taken(self.running[rid].req, "it was aborted")

    def without(self, reqs: Sequence[Any]) -> list[Any]:
        """`reqs` less the probes: nothing of them is ever sent."""
        return [req for req in reqs if not isinstance(req, ProbeReq)]

    def _forget(self, one: _Running) -> None:
        self.running.pop(one.req.rid, None)
        sampling.PROBES.pop(one.req.rid, None)
        if self.engine.is_idle and not self.wishes:
            self.engine.log_tables()  # they outlive their group by a step

    def _tell(self, fork: Fork, *, num_tokens: int = 0, failure: str) -> None:
        self.engine.coordinator.handover.probed(
            fork.group_id, fork.index, fork.epoch, num_tokens=num_tokens, failure=failure
        )

    def _log(self, one: _Running, tail: int, decoded: int, values: Sequence[float]) -> None:
        if self.engine.steps.is_on:
            ids = one.req.output_ids
            line = {
                "group": one.fork.group_id, "index": one.fork.index,
                "shared": one.req.num_shared, "tail": tail, "decoded": decoded,
                "probabilities": [round(value, 6) for value in values], "failure": one.failure,
                "digest": hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest(),
            }  # fmt: skip
            logger.info("deepprune-probe %s", json.dumps(line))


def _is_fresh(sibling: Any) -> bool:
    """Its prefill's result may still be out: the tree then takes what it has already, frees the
    request's own copies and points its row elsewhere (`checkpoint_kv_cache`), but not a fork's."""
    return sibling is not None and sibling.kv.holds_kv and sibling.decode_batch_idx == 0


def _paged(tokens: int, page: int) -> int:
    return -(-tokens // page) * page


def _parser_marks(server_args: Any) -> tuple[str, str, bool] | None:
    """(opening mark, closing mark, whether output starts inside) of `--reasoning-parser`."""
    name = getattr(server_args, "reasoning_parser", None)
    if not name:
        return None
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    try:
        detector = ReasoningParser(name).detector
    except Exception as error:  # some want a request or a tokenizer
        logger.warning("deepprune: probe: marks of %s are not known: %s", name, error)
        return None
    is_forced = bool(getattr(detector, "_in_reasoning", False))
    return detector.think_start_token, detector.think_end_token, is_forced


def _runtime_refusal(scheduler: Any) -> str:
    """What only the built scheduler knows; "" = nothing stands against it."""
    tree = scheduler.tree_cache
    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm or tree.supports_mamba():
        return "hybrid caches hold state that no row names"
    if scheduler.model_config.is_encoder_decoder:
        return "encoder-decoder models have a second prefix"
    return ""
