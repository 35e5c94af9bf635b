"""Our metrics beside SGLang's at /metrics: the Prometheus side of `sglang_deepprune/metrics.py`.

They exist where SGLang's own scheduler has a collector (`Scheduler.metrics_collector`, set where
`--enable-metrics` is), and carry its labels (model, tp and dp rank, ...). Of the ranks that share
one queue the leader alone counts, because all of them do the same, so a sum over ranks is right
with `--enable-metrics-for-all-schedulers` too; each data-parallel rank has groups of its own.

SGLang runs Prometheus' client in multiprocess mode, with a folder that it names in
PROMETHEUS_MULTIPROC_DIR after plugins were loaded. To import the client before that would lock the
process into the other mode: it is imported when the scheduler has been built.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from sglang_deepprune.metrics import (
    ALL,
    HELD_SIBLINGS,
    HOOK_ERRORS,
    JUDGE_UP,
    LIVE_GROUPS,
    Kind,
    Meter,
    Metric,
)
from sglang_deepprune.probing import ProbeDesk

if TYPE_CHECKING:
    from sglang_deepprune.patches.scheduler import Engine

logger = logging.getLogger(__name__)

_EVERY_S = 1.0  # between two looks at the gauges


def meter_of(scheduler: Any, *, is_leader: bool, has_judge: bool) -> Meter:
    """The meter of a scheduler process; one that counts nothing where SGLang counts nothing."""
    collector = getattr(scheduler, "metrics_collector", None)
    if collector is None or not is_leader:
        return Meter()
    try:
        return PrometheusMeter(collector, has_judge=has_judge)
    except Exception as error:  # say, a label that `--extra-metric-labels` has taken already
        logger.warning("deepprune: no metrics: %s: %s", type(error).__name__, error)
        return Meter()


class PrometheusMeter(Meter):
    """Every series of ours, made at the start: a rate needs the zero before the first event.

    Parameters
    ----------
    collector : Any
        SGLang's `SchedulerMetricsCollector`: its labels, and its own counter, gauge and histogram
        classes where it has some (Ray's).
    has_judge : bool
        Whether a judge is configured; its metrics are left out otherwise.
    registry : Any
        A `CollectorRegistry` other than the process's own, for tests.
    """

    is_on = True

    def __init__(self, collector: Any, *, has_judge: bool, registry: Any = None):
        import prometheus_client

        labels = {name: str(value) for name, value in collector.labels.items()}
        more = {} if registry is None else {"registry": registry}
        self._series: dict[tuple[str, str], Any] = {}  # (metric, value of its own label) ->
        for metric in ALL:
            if metric.of_judge and not has_judge:
                continue
            kind = metric.kind.value
            make = getattr(collector, f"_{kind}_cls", None)
            make = make or getattr(prometheus_client, kind.capitalize())
            options = dict(more)
            if metric.kind is Kind.GAUGE:
                options["multiprocess_mode"] = "mostrecent"
            if metric.kind is Kind.HISTOGRAM:
                options["buckets"] = metric.buckets
            own = [metric.label] if metric.label else []
            family = make(
                name=metric.full_name, documentation=metric.meaning, labelnames=[*labels, *own],
                **options,
            )  # fmt: skip
            for value in [one.value for one in metric.values or ()] or [""]:
                mine = {metric.label: value} if metric.label else {}
                self._series[metric.name, value] = family.labels(**labels, **mine)

    def count(self, metric: Metric, amount: float = 1, value: Enum | None = None) -> None:
        self._write("inc", metric, amount, value)

    def observe(self, metric: Metric, amount: float) -> None:
        self._write("observe", metric, amount)

    def set(self, metric: Metric, amount: float) -> None:
        self._write("set", metric, amount)

    def _write(self, how: str, metric: Metric, amount: float, value: Enum | None = None) -> None:
        series = self._series.get((metric.name, value.value if value is not None else ""))
        if series is None:
            return  # of a judge, and there is none; or switched off below
        try:
            getattr(series, how)(amount)
        except Exception:
            # It must not look like a fault of the step that counts: no group pays for it.
            self._series.clear()
            logger.exception("deepprune: %s could not be written; no metrics from now on", metric)


class Gauges:
    """What is live and held now, and whether the judge is up; a look a second at most."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.is_on = engine.meter.is_on
        self._was_idle = False
        self._next_s = 0.0

    def tick(self) -> None:
        """In every pass of the scheduler's loop, on the leader. At once when the first group comes
        or the last one has gone: SGLang may sleep for long after that."""
        if not self.is_on:
            return
        engine = self.engine
        now, is_idle = time.monotonic(), engine.coordinator.is_idle
        if now < self._next_s and is_idle is self._was_idle:
            return
        self._next_s, self._was_idle = now + _EVERY_S, is_idle
        try:
            self._look()
        except Exception:  # not the groups' fault: they go on
            self.is_on = False
            engine.meter.count(HOOK_ERRORS)
            logger.exception("deepprune: the gauges stay as they are from now on")

    def _look(self) -> None:
        engine = self.engine
        engine.meter.set(LIVE_GROUPS, len(engine.coordinator.runs))
        engine.meter.set(HELD_SIBLINGS, len(engine.room.held))
        judge = engine.coordinator.judge
        if judge is None:
            return
        if engine.coordinator.is_idle:
            judge.poll()  # nobody else does now: it may have loaded, or died. No result is due.
        worker = judge.worker if isinstance(judge, ProbeDesk) else judge
        engine.meter.set(JUDGE_UP, float(worker.is_ready))


def private_slots(req: Any, allocator: Any) -> int:
    """KV slots, in whole pages, that a request holds outside the radix tree; what
    `release_kv_cache` gives back for one that is not inserted there.

    SGLang's `kv_private_tokens` in 0.5.23; the fields lay on the request itself before `Req.kv`.
    """
    kv = getattr(req, "kv", None)

    def field(name: str) -> int:
        found = getattr(kv, name, None)
        return int((getattr(req, name, None) if found is None else found) or 0)

    page = int(allocator.page_size)
    allocated = -(-field("kv_allocated_len") // page) * page
    return max(0, allocated - field("cache_protected_len"))
