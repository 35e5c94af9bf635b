"""The scheduler side: where SGLang's steps meet the coordinator. One `Engine` a scheduler process.

Every hook has an O(1) gate (no live group: the original, at once) and is guarded: an exception of
ours is logged once, its groups run on as plain sampling would, and the original is called. A
sibling ends through one of two doors, `stream_output` or an AbortReq to the tokenizer, and is
retired there exactly once. KV is never freed here: a stopped sibling ends by `to_finish`
(`dooms.py`), so SGLang's own finish path releases it within the same `process_batch_result_decode`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from sglang_deepprune.actions import Action, Command, End, Fork, Retired, Start, Stop
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.faults import told
from sglang_deepprune.group import State
from sglang_deepprune.metrics import HOOK_ERRORS
from sglang_deepprune.patches import finish, sampling
from sglang_deepprune.patches.arrivals import Arrivals, Live
from sglang_deepprune.patches.dooms import Dooms
from sglang_deepprune.patches.ends import ends_with, text_ids, tokens_of
from sglang_deepprune.patches.metrics import Gauges
from sglang_deepprune.patches.prefix import PrefixHold
from sglang_deepprune.patches.pressure import Pressure
from sglang_deepprune.patches.probe import Probes
from sglang_deepprune.patches.rows import Rows
from sglang_deepprune.patches.server_args import token_of
from sglang_deepprune.patches.steplog import StepLog
from sglang_deepprune.patches.waiting import WaitingRoom
from sglang_deepprune.types import Close, Expire, FenceResult, Fill, JudgeResult, Probe

logger = logging.getLogger(__name__)

_COMMANDS = (JudgeResult, FenceResult, Close, Expire, Fill, Probe)


class Engine:
    """Binds one SGLang scheduler to one coordinator."""

    def __init__(self, scheduler: Any, config: DeepPruneConfig, coordinator: Coordinator):
        self.scheduler = scheduler
        self.config = config
        self.coordinator = coordinator
        self.live: dict[str, Live] = {}  # rid ->
        self.rids: dict[tuple[str, int], str] = {}  # (group, index) -> rid
        # group -> its last output, while its vote is not counted
        self.pending: dict[str, tuple[Any, Retired]] = {}
        self.outbox: list[Command] = []  # the leader's, until seen back in the broadcast
        self.token = token_of(scheduler.server_args)
        self.meter = coordinator.meter
        self.gauges = Gauges(self)
        self.dooms = Dooms(self)
        self.is_deterministic = bool(scheduler.server_args.enable_deterministic_inference)
        self.steps = StepLog(scheduler, config.log_steps)
        self.room = WaitingRoom(scheduler, lambda: len(self.rows.extras))
        self.arrivals = Arrivals(self)
        self.rows = Rows(self, config.fill)
        self.prefixes = PrefixHold(scheduler.tree_cache)
        self.pressure = Pressure(self)
        self.probes = Probes(self)
        self.num_retracted = 0  # siblings that SGLang retracted
        self._lost: set[str] = set()  # groups that lost siblings or rows, not replanned yet
        self._faults: set[str] = set()
        self.at = ""  # the group that a guarded step is at

    @property
    def is_idle(self) -> bool:
        """No group lives and no probe of one is left: every hook returns at once."""
        return not self.coordinator.runs and not self.probes.running

    @property
    def faults(self) -> list[str]:
        """Kinds of our own errors since the start; the log has the first of each kind."""
        return sorted(self._faults)

    def live_of(self, req: Any) -> Live | None:
        """The sibling that this very request is. Clients choose rids, and each tokenizer worker
        sees only its own: another request may bear the same one."""
        live = self.live.get(req.rid)
        return live if live is not None and live.req is req else None

    def req_of(self, group_id: str, index: int) -> Any:
        """The Req of a sibling; None when it has ended."""
        rid = self.rids.get((group_id, index))
        return self.live[rid].req if rid is not None else None

    # -- the decode step ---------------------------------------------------------------------

    def before_result(self, batch: Any, result: Any) -> None:
        """This step's tokens are known, nothing is finished yet: see natural ends first, so that a
        deciding vote ends its group's siblings in this very step."""
        tokens = tokens_of(batch, result)
        if tokens is None:
            return
        self.replan_lost()
        self._see_ends(zip(batch.reqs, tokens, strict=False))
        if self.probes.running:
            self.probes.guard(self.probes.before_result, batch, tokens)

    def before_mixed_result(self, batch: Any, result: Any) -> None:
        """The same for the rows that decode within a prefill pass."""
        tokens = tokens_of(batch, result)
        if tokens is None:
            return
        decoding = {id(req) for req in batch.decoding_reqs}
        rows = zip(batch.reqs, tokens, strict=False)
        self._see_ends((req, token) for req, token in rows if id(req) in decoding)

    def _see_ends(self, rows: Iterable[tuple[Any, int]]) -> None:
        """(request, its token of this step): who ends with it votes."""
        ends: dict[str, list[End]] = {}
        for req, token in rows:
            live = self.live_of(req)
            if live is None or req.finished() or req.is_retracted:
                continue
            is_end, is_cut = ends_with(req, token)
            if not is_end or isinstance(req.to_finish, FINISH_ABORT):
                continue
            if req.to_finish is not None:
                # Stopped in the step in which it ends anyway: its whole answer counts.
                self.dooms.spare(req)
                self.coordinator.revive(live.group_id, live.index)
            output_ids = [*req.output_ids, token] if is_cut else list(req.output_ids)
            ends.setdefault(live.group_id, []).append(End(live.index, output_ids, is_cut))
        self._vote(ends)

    def _vote(self, ends: Mapping[str, Sequence[End]]) -> None:
        """By group: what ends in this step votes before anybody is stopped for it."""
        num_ends = sum(map(len, ends.values()))
        for group_id, some in ends.items():
            self.at = group_id
            self._act(self.coordinator.vote(group_id, some, num_ends))

    def before_prefill_result(self, batch: Any, result: Any) -> None:
        """Probes in a prefill batch: their first token is known."""
        tokens = tokens_of(batch, result)
        if tokens is not None:
            self.probes.guard(self.probes.before_result, batch, tokens)

    def after_prefill(self, batch: Any) -> None:
        """First tokens: a group that holds siblings back keeps its prompt's pages for them."""
        for req in batch.reqs:
            live = self.live_of(req)
            if live is not None and not req.finished() and len(req.output_ids) == 1:
                run = self.coordinator.runs.get(live.group_id)
                if run is not None and run.group.has_held:
                    self.prefixes.take(live.group_id, req)

    def after_result(self, batch: Any) -> None:
        """Count the step for the groups in this batch; the window may hand traces to the judge."""
        outputs: dict[str, dict[int, Sequence[int]]] = {}
        for req in batch.reqs:
            live = self.live_of(req)
            if live is not None and not req.finished():
                outputs.setdefault(live.group_id, {})[live.index] = req.output_ids
        if outputs:
            self.coordinator.observe(outputs)

    # -- verdicts ----------------------------------------------------------------------------

    def poll(self) -> list[Command | Fill]:
        """Leader: commands for the next broadcast, and those that were not seen back yet.

        Not guarded: to abandon groups on this rank alone would split the ranks.
        """
        fills: list[Fill] = []
        try:
            self.outbox += self.coordinator.poll()
            fills = self.rows.wanted()
        except Exception as error:
            self.meter.count(HOOK_ERRORS)
            if "poll" not in self._faults:
                self._faults.add("poll")
                logger.error("deepprune: polling judge, fence or free rows failed: %s", told(error))
        return [*self.outbox, *fills]

    def apply(self, commands: Sequence[Command | Fill]) -> None:
        """Every rank, at the top of the same loop iteration."""
        seen = set(commands)
        self.outbox = [command for command in self.outbox if command not in seen]
        for command in commands:
            if isinstance(command, Fill):
                self.rows.take(command)
                continue
            self.at = command.group_id
            self._act(self.coordinator.apply(command))
            last = self.pending.get(command.group_id)
            if last is not None:
                self._settle(command.group_id, *last)
            else:
                self.coordinator.settle(command.group_id)

    def settle_pending(self) -> None:
        """No output may wait for the fence any longer: the votes count as they stand."""
        runs = self.coordinator.runs
        self.apply([Expire(group_id, runs[group_id].group.epoch) for group_id in self.pending])

    def renew(self) -> None:
        """Before SGLang changes the weights: held siblings join its queue, where it also notes for
        each request which version wrote which tokens; and no prompt of the old ones is kept."""
        self._act(self.coordinator.renew())
        self.prefixes.let_go_all()

    def _settle(self, group_id: str, req: Any, retired: Retired) -> None:
        record = self.coordinator.settle(group_id)
        if record is None:
            return
        del self.pending[group_id]
        finish.annotate(req.finished_reason, Retired(retired.choice, record))
        self.scheduler.output_streamer.stream_output([req], req.return_logprob)
        self.log_tables()

    def _act(self, actions: Sequence[Action]) -> None:
        stops: list[tuple[Any, Stop]] = []
        for action in actions:
            req = self.req_of(action.group_id, action.index)
            if req is None:
                continue
            if isinstance(action, Fork):
                self.probes.wish(action)
                continue
            if isinstance(action, Start):
                if self.room.take(req):
                    was_shed = action.group_id in self.pressure.shed
                    (self.room.queue_last if was_shed else self.room.queue)(req)
                continue
            stops.append((req, action))
        self._stop(stops)
        for group_id in {action.group_id for action in actions}:
            self._let_go(group_id)
        self.steps.doomed(len(stops))

    def _stop(self, stops: Sequence[tuple[Any, Stop]]) -> None:
        """Whoever is held or queued ends now, whoever runs when its step is processed."""
        waiting = {id(req) for req, _ in stops if self.room.take(req)}
        waiting |= self.dooms.take_from_queues([req for req, _ in stops if id(req) not in waiting])
        ended: dict[State, list[Any]] = {}
        for req, stop in stops:
            if id(req) in waiting:
                ended.setdefault(stop.state, []).append(req)
            elif not req.finished() and not isinstance(req.to_finish, FINISH_ABORT):
                self.dooms.doom(req, stop)
        for state, reqs in ended.items():
            self.dooms.end(reqs, state)

    def prune(self, group_id: str, index: int) -> None:
        """End a sibling that was just taken off its row."""
        self._act([self.coordinator.prune(group_id, index)])

    def _let_go(self, group_id: str) -> None:
        """Nobody of the group is held any more: its prompt's pages are its running siblings'."""
        if group_id in self.prefixes.locks:
            run = self.coordinator.runs.get(group_id)
            if run is None or run.group.is_decided or not run.group.has_held:
                self.prefixes.let_go(group_id)

    # -- the two doors -----------------------------------------------------------------------

    def close(self, reqs: Sequence[Any], skip: Any) -> None:
        """Finished siblings among `reqs`: votes, then records, or the last output is held back."""
        ended = [
            live
            for req in reqs
            if req is not skip and (live := self.live_of(req)) is not None
            and req.finished() and not req.finished_output
        ]  # fmt: skip
        ends: dict[str, list[End]] = {}
        for live in ended:
            reason = live.req.finished_reason
            if finish.state_of(reason) is State.FINISHED:
                # A no-op for ends that `before_result` saw; stop strings and grammar come here.
                end = End(live.index, text_ids(live.req), finish.is_cut(reason))
                ends.setdefault(live.group_id, []).append(end)
        self._vote(ends)
        for live in ended:
            self.at = live.group_id
            self._retire(live, finish.state_of(live.req.finished_reason))
        for group_id in dict.fromkeys(live.group_id for live in ended):
            self.at = group_id
            self.wake(group_id)
            self._let_go(group_id)

    def without_pending(self, reqs: Sequence[Any]) -> list[Any]:
        """`reqs` less the last outputs that wait for their group's vote to be counted."""
        waiting = {id(req) for req, _ in self.pending.values()}
        return [req for req in reqs if id(req) not in waiting]

    def _retire(self, live: Live, state: State) -> None:
        """The sibling's last output is about to leave, or to be held until the vote is counted."""
        req = live.req
        tokens = len(req.output_ids)
        if tokens == 0 and isinstance(req.finished_reason, finish.FinishStopped):
            state = State.NOT_STARTED
        self.dooms.freed(req, state)
        self._drop(live)
        retired = self.coordinator.retire(live.group_id, live.index, state, tokens)
        if state in (State.ABORTED, State.FAILED):
            self._lost.add(live.group_id)
        if retired is None:
            return
        if retired.is_pending:
            self.pending[live.group_id] = (req, retired)
        else:
            finish.annotate(req.finished_reason, retired)
        self.log_tables()

    def aborted(self, output: AbortReq, req: Any = None) -> None:
        """SGLang tells the tokenizer that a queued sibling is gone, or a stranger that bears its
        rid: `req` is whom it speaks of, where SGLang says.

        Only noted: SGLang is walking its queue by index right now (`Scheduler.abort_request`), so
        nothing may be taken out of it before it is done.
        """
        live = self.live.get(output.rid)
        if live is None or (isinstance(req, Req) and req is not live.req):
            return
        self.at = live.group_id
        reason = output.finished_reason or {}
        state = State.FAILED if reason.get("status_code") else State.ABORTED
        self._drop(live)
        tokens = len(live.req.output_ids)
        retired = self.coordinator.retire(live.group_id, live.index, state, tokens)
        self._let_go(live.group_id)
        if retired is not None and retired.is_pending:
            # SGLang has no output left that could wait for the fence.
            retired = Retired(retired.choice, self.coordinator.give_up(live.group_id))
        if retired is not None:
            # Its record rides on the abort, and the group's if it is the last to leave. Without a
            # reason of the abort's own SGLang's tokenizer side would make this one.
            message = getattr(output, "abort_message", None) or "Abort in waiting queue"
            reason = output.finished_reason or {"type": "abort", "message": message}
            output.finished_reason = {**reason, **finish.payload(retired)}
        self._lost.add(live.group_id)
        self.log_tables()

    def wake(self, group_id: str) -> None:
        """No group is ever asleep: with nothing started and somebody held it is replanned."""
        if self.coordinator.is_asleep(group_id):
            self.replan_soon(group_id)

    def replan_soon(self, group_id: str) -> None:
        """At the next safe point: it has lost a sibling, for good or from its row."""
        self._lost.add(group_id)

    def after_admission(self, planned: Any, batch: Any) -> None:
        """Nothing runs and nobody was admitted although somebody waits: our locks may be why."""
        is_stuck = planned is None and not batch.reqs and self.scheduler.chunked_req is None
        if is_stuck and self.scheduler.waiting_queue:
            self.prefixes.let_go_all()

    @property
    def has_lost(self) -> bool:
        """Groups have lost siblings and were not replanned yet."""
        return bool(self._lost)

    def replan_lost(self) -> None:
        """At a safe point: fewer siblings may still vote, which can decide their groups."""
        lost, self._lost = sorted(self._lost), set()
        for group_id in lost:
            self.at = group_id
            self._act(self.coordinator.lost(group_id))
        self.pressure.shed.clear()

    def _drop(self, live: Live) -> None:
        self.live.pop(live.req.rid, None)
        self.rids.pop((live.group_id, live.index), None)
        self.room.take(live.req)
        self.rows.extras.pop(live.req.rid, None)
        sampling.SEEDS.pop(live.req.rid, None)
        self.dooms.forget(live.req)

    def log_tables(self) -> None:
        own = {
            "live": len(self.live), "rids": len(self.rids), "pending": len(self.pending),
            "held": len(self.room.held), "extras": len(self.rows.extras),
            "prefixes": len(self.prefixes.locks),
            "probes": len(self.probes.wishes) + len(self.probes.running),
        }  # fmt: skip
        self.steps.tables({**self.coordinator.sizes, **own, "seeds": len(sampling.SEEDS)})
        self.steps.counts({
            "yielded": self.rows.num_yielded, "relieved": self.pressure.num_relieved,
            "retracted": self.num_retracted, "probes_taken": self.probes.num_taken,
        })  # fmt: skip

    def siblings_of(self, stem: str) -> list[str]:
        """The rids of the n>1 request that a client knows by `stem`."""
        return [rid for rid, live in self.live.items() if stem and live.stem == stem]

    def guard(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run one of our steps; a fault of ours never reaches SGLang.

        It is logged once a kind, and the group at hand runs on as plain sampling would: a
        half-applied step must not act again. Where the step was about no single group, all do.
        """
        self.at = ""
        try:
            return step(*args)
        except Exception as error:
            self.meter.count(HOOK_ERRORS)
            kind = f"{step.__name__}: {type(error).__name__}"
            if kind not in self._faults:
                self._faults.add(kind)
                text = "deepprune: %s; live groups run on as plain sampling: %s"
                logger.error(text, kind, told(error))
            self._abandon(self.at)
            return None

    def _abandon(self, group_id: str) -> None:
        gone = set(self.coordinator.abandon(group_id))
        if not self.coordinator.runs:
            gone |= {live.group_id for live in self.live.values()} | set(self.pending)
        for live in [live for live in self.live.values() if live.group_id in gone]:
            is_held = live.req.rid in self.room.held
            self._drop(live)
            if is_held:
                self.room.queue(live.req)
        for one in gone:
            self.probes.end_group(one)
            self.prefixes.let_go(one)
            req, _ = self.pending.pop(one, (None, None))
            if req is not None:
                self.scheduler.output_streamer.stream_output([req], req.return_logprob)
