"""A second SGLang plugin, for the serving benchmark: paired noise, flat steps and a step log.

Paired noise: sibling i of a request with seed S draws from `sibling_seed(S, i)` under every policy,
so that policies are compared on the same traces. Where deepprune is on it does this itself for its
groups; this plugin does it for everybody else. A request says so in `custom_params`: `bench_seed`
with `bench_index` where n=1, `bench_seed` with `bench_key` (a text that no other request has) where
n>1, whose siblings are numbered as they arrive.

Flat steps: every pass through the model takes at least so long, as on a GPU below saturation, where
a step costs the same for few rows as for many.

Step log: running totals as JSON lines, one a second at most and one at each flush of the prefix
cache, which is how a reader asks for the totals of now.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.plugin_folder import plugin_path
from sglang_deepprune.noise import sibling_seed
from sglang_deepprune.patches import sampling

FLAT_VARIABLE = "DEEPPRUNE_FLAT_STEP_MS"
LOG_VARIABLE = "DEEPPRUNE_BENCH_LOG"
NOISE_VARIABLE = "DEEPPRUNE_BENCH_NOISE"  # "1": deepprune is off and has not hooked the sampler

ROOT = Path(__file__).resolve().parents[1]
_MOST_SEEDS = 16384  # a request aborted in the queue leaves its seed behind
_MOST_KEYS = 4096
_LOG_EVERY_S = 1.0
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"


@dataclass(slots=True)
class Totals:
    """Since the start of the server."""

    decode_steps: int = 0
    decode_rows: int = 0
    decode_s: float = 0.0  # padding included
    kv_tokens: int = 0  # in use, summed over decode steps
    prefill_steps: int = 0
    prefill_s: float = 0.0
    retractions: int = 0


_totals = Totals()
_arrivals: dict[str, int] = {}  # bench_key -> siblings seen
_flat_s = 0.0
_log: Path | None = None
_last_write = 0.0


def plugin_env(
    folder: Path, *, log: Path | None = None, flat_ms: float = 0.0, is_deepprune_on: bool = False
) -> dict[str, str]:
    """Environment for a server with this plugin; `folder` receives the plugin's metadata."""
    return {
        **plugin_path(folder, "bench", "benchmarks.bench_plugin:register", ROOT),
        FLAT_VARIABLE: str(flat_ms),
        LOG_VARIABLE: str(log or ""),
        NOISE_VARIABLE: "0" if is_deepprune_on else "1",
    }


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    global _flat_s, _log
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _flat_s = float(os.environ.get(FLAT_VARIABLE) or 0) / 1e3
    _log = Path(os.environ[LOG_VARIABLE]) if os.environ.get(LOG_VARIABLE) else None
    hooks: dict[str, Callable[..., Any]] = {
        f"{_SCHEDULER}._add_request_to_queue": note,
        f"{_SCHEDULER}.run_batch": run_batch,
        f"{_SCHEDULER}.flush_cache": flush_cache,
        f"{_STREAMER}.stream_output": forget,
    }
    if os.environ.get(NOISE_VARIABLE) == "1":
        hooks |= {
            "sglang.srt.model_executor.model_runner.ModelRunner.sample": sampling.sample,
            "sglang.srt.layers.sampler.Sampler._sample_from_probs": sampling.sample_from_probs,
        }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def note(original: Callable[..., Any], self: Any, req: Any, is_retracted: bool = False) -> Any:
    """AROUND `Scheduler._add_request_to_queue`: give the request its noise."""
    if is_retracted:
        _totals.retractions += 1
        return original(self, req, is_retracted)
    custom = req.sampling_params.custom_params or {}
    # The warm-up of an n>1 request generates nothing and is no sibling.
    if "bench_seed" in custom and req.sampling_params.max_new_tokens:
        index = custom["bench_index"] if "bench_index" in custom else _arrival(custom["bench_key"])
        sampling.SEEDS[req.rid] = sibling_seed(custom["bench_seed"], index)
        while len(sampling.SEEDS) > _MOST_SEEDS:
            del sampling.SEEDS[next(iter(sampling.SEEDS))]
    return original(self, req, is_retracted)


def _arrival(key: str) -> int:
    index = _arrivals.pop(key, 0)
    _arrivals[key] = index + 1  # at the end: the oldest is dropped first
    while len(_arrivals) > _MOST_KEYS:
        del _arrivals[next(iter(_arrivals))]
    return index


def forget(original: Callable[..., Any], self: Any, reqs: Any, *rest: Any, **options: Any) -> Any:
    """AROUND `SchedulerOutputStreamer.stream_output`: a finished request needs no noise."""
    result = original(self, reqs, *rest, **options)
    for req in reqs:
        if req.finished():
            sampling.SEEDS.pop(req.rid, None)
    return result


def run_batch(
    original: Callable[..., Any], self: Any, batch: Any, *rest: Any, **options: Any
) -> Any:
    """AROUND `Scheduler.run_batch`: pad the pass and count it."""
    mode = batch.forward_mode
    is_decode, rows = mode.is_decode(), len(batch.reqs)
    if not (is_decode or mode.is_extend()):
        return original(self, batch, *rest, **options)
    start = time.perf_counter()
    result = original(self, batch, *rest, **options)
    pad_s = _flat_s - (time.perf_counter() - start)
    if pad_s > 0:
        time.sleep(pad_s)
    spent_s = time.perf_counter() - start
    if is_decode:
        _totals.decode_steps += 1
        _totals.decode_rows += rows
        _totals.decode_s += spent_s
        _totals.kv_tokens += _kv_in_use(self)
    else:
        _totals.prefill_steps += 1
        _totals.prefill_s += spent_s
    if time.monotonic() - _last_write > _LOG_EVERY_S:
        _write()
    return result


def flush_cache(original: Callable[..., Any], self: Any, *rest: Any, **options: Any) -> Any:
    """AROUND `Scheduler.flush_cache`: write the totals of now."""
    _write()
    return original(self, *rest, **options)


def _kv_in_use(scheduler: Any) -> int:
    free = scheduler.token_to_kv_pool_allocator.available_size()
    return int(scheduler.max_total_num_tokens - free - scheduler.tree_cache.evictable_size())


def _write() -> None:
    global _last_write
    _last_write = time.monotonic()
    if _log is not None:
        with _log.open("a") as out:
            out.write(json.dumps(asdict(_totals)) + "\n")


def read_totals(log: Path) -> Totals:
    """The newest line of a log; all zero before the first."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return Totals(**json.loads(lines[-1])) if lines else Totals()


def difference(before: Totals, after: Totals) -> dict[str, float]:
    """What came together between two reads."""
    first = asdict(before)
    return {name: value - first[name] for name, value in asdict(after).items()}
