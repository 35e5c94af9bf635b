"""A plugin for the fault harness: the server's inner state as numbers, in `/server_info`.

Read at the top of a scheduler pass, so all of it belongs to one moment. Nothing of the product is
changed; each retirement is counted by the state that its client is told.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plugin_folder import plugin_path
from tests.engine.c_heap import used_mib

KEY = "deepprune_state"
_MANAGERS = "sglang.srt.managers"
_retired: Counter[str] = Counter()
_num_missed = 0  # siblings that an abort named and did not reach
_chunked: Counter[str] = Counter()  # siblings in the middle of their prompt: "doomed", "aborted"
_longest_ms: dict[
    str, float
] = {}  # function of ours -> its longest call, in CPU time of its thread


def plugin_env(folder: Path) -> dict[str, str]:
    """Environment for a server with this plugin; `folder` receives the plugin's metadata."""
    return plugin_path(folder, "faults", "tests.engine.fault_plugin:register")


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_deepprune.coordinator import Coordinator
    from sglang_deepprune.patches.dooms import Dooms

    controller = f"{_MANAGERS}.scheduler_components.internal_state.SchedulerInternalStateController"
    HookRegistry.register(f"{controller}.get_internal_state", of_scheduler, HookType.AFTER)
    manager = f"{_MANAGERS}.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}.get_internal_state", of_tokenizer, HookType.AROUND)
    HookRegistry.register(f"{_MANAGERS}.scheduler.Scheduler.abort_request", aborted, HookType.AFTER)
    retire = Coordinator.retire

    def counted(self: Coordinator, *args: Any) -> Any:
        retired = retire(self, *args)
        if retired is not None:
            _retired[retired.choice.state] += 1
        return retired

    Coordinator.retire = counted  # type: ignore[assignment,method-assign]
    doom = Dooms.doom

    def seen(self: Dooms, req: Any, stop: Any) -> None:
        _chunked["doomed"] += req is self.scheduler.chunked_req
        doom(self, req, stop)

    Dooms.doom = seen  # type: ignore[method-assign]
    _time_ours()


def _time_ours() -> None:
    """Time whatever of ours runs in the decode step, or on the tokenizer side's event loop."""
    from sglang_deepprune.patches import output, tokenizer_manager
    from sglang_deepprune.patches.scheduler import Engine

    guard = Engine.guard

    def guarded(self: Engine, step: Callable[..., Any], *args: Any) -> Any:
        return _timed(step.__name__, guard, self, step, *args)

    Engine.guard = guarded  # type: ignore[method-assign]
    for place, name in (
        (Engine, "poll"), (tokenizer_manager, "_fan_of"), (tokenizer_manager, "_client_side_tag"),
        (output, "unpack"), (output.Reply, "whole"), (output.Reply, "_describe"),
    ):  # fmt: skip
        setattr(place, name, _timing(name, getattr(place, name)))


def _timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *args, **kw: _timed(name, function, *args, **kw))


def _timed(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    start = time.thread_time()
    try:
        return function(*args, **kwargs)
    finally:
        spent_ms = (time.thread_time() - start) * 1e3
        _longest_ms[name] = max(spent_ms, _longest_ms.get(name, 0.0))


def aborted(result: Any, self: Any, recv_req: Any) -> None:
    """AFTER `Scheduler.abort_request`: whom it names is gone, or ends in the next pass."""
    global _num_missed
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    from sglang_deepprune.patches import hooks

    ours = hooks.engine()
    for rid, live in ours.live.items() if ours is not None else ():
        if recv_req.abort_all or (recv_req.rid and recv_req.rid in (rid, live.stem)):
            req = live.req
            is_ending = req.finished() or isinstance(req.to_finish, FINISH_ABORT)
            _num_missed += not is_ending and req is not self.chunked_req
            _chunked["aborted"] += req is self.chunked_req


def of_scheduler(result: Any, self: Any, recv_req: Any) -> Any:
    """AFTER `get_internal_state`: pools, queues and, with the flag on, our tables."""
    from sglang_deepprune.patches import hooks, sampling

    scheduler, ours = self.scheduler, hooks.engine()
    tree = scheduler.tree_cache
    queues = {"queue": len(scheduler.waiting_queue), "running": len(scheduler.running_batch.reqs)}
    state = result.internal_state[KEY] = {
        "tables": queues,
        "free": int(scheduler.token_to_kv_pool_allocator.available_size()),
        "evictable": int(tree.evictable_size()),
        "protected": int(tree.protected_size()),
        "rows": int(scheduler.req_to_token_pool.available_size()),
        "slots": int(scheduler.max_total_num_tokens),
        "python_blocks": sys.getallocatedblocks(),
        "c_heap_mib": used_mib(),
    }
    if ours is None:
        return None
    coordinator = ours.coordinator
    judge, fence = coordinator.judge, coordinator.fence
    worker: Any = getattr(judge, "worker", judge)  # a probe's desk stands before it
    tables = {
        **coordinator.sizes, "live": len(ours.live), "rids": len(ours.rids),
        "pending": len(ours.pending), "held": len(ours.room.held), "extras": len(ours.rows.extras),
        "prefixes": len(ours.prefixes.locks), "seeds": len(sampling.SEEDS),
        "lost": len(ours._lost), **queues,
    }  # fmt: skip
    state |= {
        "tables": tables,
        "judge_pid": worker._child.pid if worker is not None else None,
        "judge_tasks": judge.num_pending if judge is not None else 0,
        "is_judge_ready": worker is not None and worker.is_ready,
        "fence_open": fence.num_open if fence is not None else 0,
        "retired": dict(_retired),
        "missed": _num_missed,
        "chunked": dict(_chunked),
        "is_chunking": getattr(scheduler.chunked_req, "rid", None) in ours.live,
        "faults": sorted(ours._faults),
        "longest_ms": dict(_longest_ms),
        "retracted": ours.num_retracted,
        "yielded": ours.rows.num_yielded,
        "relieved": ours.pressure.num_relieved,
    }
    return None


async def of_tokenizer(original: Callable[..., Any], self: Any) -> Any:
    """AROUND `TokenizerManager.get_internal_state`: who waits for an answer there."""
    from sglang_deepprune.patches import tokenizer_manager

    states = await original(self)
    if KEY in states[0]:
        states[0][KEY]["tables"]["rid_to_state"] = len(self.rid_to_state)
        states[0][KEY]["tables"]["stems"] = len(tokenizer_manager._BY_STEM)
        states[0][KEY]["longest_ms"] = {**states[0][KEY].get("longest_ms", {}), **_longest_ms}
    return states
