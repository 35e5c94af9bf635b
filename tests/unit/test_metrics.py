"""What is counted and when, without a server: closed labels, and a group once, at its end."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from sglang_deepprune import metrics, policy
from sglang_deepprune.actions import End
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.metrics import Failure, Meter, Metric, Reason
from sglang_deepprune.patches.metrics import Gauges, PrometheusMeter, meter_of, private_slots
from sglang_deepprune.types import JudgeResult
from tests.unit.coordinators import Clock, FakeFence, FakeJudge, decode, end, fill, step, verdict

DOCS = Path(__file__).resolve().parents[2] / "docs"
LABELS = {"model_name": "m", "tp_rank": 0, "dp_rank": 1}


class Tally(Meter):
    """Keeps (metric, label value) -> sum, and every observation."""

    is_on = True

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        self.seen: dict[str, list[float]] = {}

    def count(self, metric: Metric, amount: float = 1, value: Enum | None = None) -> None:
        assert metric in metrics.ALL and (value is None) == (metric.values is None)
        self.sums[metric.name, value.value if value is not None else ""] += amount  # type: ignore[assignment]

    def observe(self, metric: Metric, amount: float) -> None:
        self.seen.setdefault(metric.name, []).append(amount)

    def of(self, metric: Metric) -> dict[str, float]:
        """Label value -> sum, where it is not zero."""
        return {label: n for (name, label), n in self.sums.items() if name == metric.name and n}


def coordinator(**settings: Any) -> tuple[Coordinator, Tally]:
    config = DeepPruneConfig(**{"window": 4, "cut_tokens": 4, "cut": "tokens", **settings})
    tally = Tally()
    judge: Any = FakeJudge()
    fence: Any = FakeFence()
    return Coordinator(config, decode, judge=judge, fence=fence, clock=Clock(), meter=tally), tally


def exported(
    *, has_judge: bool = True
) -> tuple[PrometheusMeter, prometheus_client.CollectorRegistry]:
    registry = prometheus_client.CollectorRegistry()
    collector = SimpleNamespace(labels=LABELS)
    return PrometheusMeter(collector, has_judge=has_judge, registry=registry), registry


# -- the table -----------------------------------------------------------------------------------


def test_the_docs_hold_the_table_of_all_metrics():
    assert metrics.table() in (DOCS / "metrics.md").read_text()


def test_names_are_prometheus_names_and_unique():
    names = [metric.full_name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    for metric in metrics.ALL:
        assert metric.full_name.startswith("sglang:deepprune_") and metric.meaning
        assert metric.name.endswith("_total") == (metric.kind is metrics.Kind.COUNTER)
        assert bool(metric.label) == (metric.values is not None)
        assert bool(metric.buckets) == (metric.kind is metrics.Kind.HISTOGRAM)


def test_end_states_are_those_of_a_sibling():
    assert {end.value for end in metrics.End} == {state.value for state in State if state.is_end}
    assert {one.value for one in metrics.Stopped} == {State.PRUNED.value, State.DECIDED.value}


# -- groups --------------------------------------------------------------------------------------


def test_a_group_counts_once_at_its_end_and_from_its_record():
    c, tally = coordinator(preset="latency")
    fill(c, 8)
    for index in range(3):
        end(c, index, 1)
    for index in range(3, 7):
        c.retire("g", index, State.DECIDED, 10)
    assert not tally.sums, "half a group is none"
    record = c.retire("g", 7, State.NOT_STARTED, 0).group  # type: ignore[union-attr]
    assert record is not None
    assert tally.of(metrics.GROUPS) == {"decided": 1}
    assert tally.of(metrics.SIBLINGS) == {"finished": 3, "decided": 4, "not_started": 1}
    assert tally.of(metrics.GENERATED_TOKENS) == {"": 49} == {"": record.generated_tokens}
    assert tally.of(metrics.SAVED_TOKENS) == {"": 4 * 90 + 100} == {"": record.saved_tokens_at_most}


def test_a_group_whose_last_output_waits_for_the_fence_counts_when_it_is_settled():
    c, tally = coordinator(preset="collect")
    fill(c, 2)
    end(c, 0, 8)
    c.vote("g", [End(1, [0, 0, 9], False)])
    assert c.retire("g", 1, State.FINISHED, 3).is_pending  # type: ignore[union-attr]
    assert not tally.sums
    c.fence.answers = [(0, True)]  # type: ignore[union-attr]
    for command in c.poll():
        c.apply(command)
    c.settle("g")
    assert tally.of(metrics.GROUPS) == {"finished": 1}
    assert tally.of(metrics.SIBLINGS) == {"finished": 2}


def test_a_client_side_group_counts_when_the_last_one_leaves_or_its_time_is_out():
    c, tally = coordinator(preset="collect", group_timeout_s=10.0)
    for _ in range(2):
        c.admit("sized", -1, 2, {}, 100)
        c.admit("open", -1, 0, {}, 100)
    end(c, 0, 1, gid="sized")
    end(c, 0, 1, gid="open")
    assert not tally.sums
    end(c, 1, 1, gid="sized")
    assert tally.of(metrics.GROUPS) == {"finished": 1}
    end(c, 1, 1, gid="open")
    assert tally.of(metrics.GROUPS) == {"finished": 1}
    c.clock.now = 11.0  # type: ignore[attr-defined]
    for command in c.poll():
        c.apply(command)
    assert c.is_idle and tally.of(metrics.GROUPS) == {"finished": 2}
    assert tally.of(metrics.SIBLINGS) == {"finished": 4}


def test_an_abandoned_group_is_named_as_such_and_its_siblings_are_plain_requests():
    c, tally = coordinator()
    for gid in "gh":
        c.admit(gid, 0, 3, {}, 100)
    c.abandon()
    assert tally.of(metrics.GROUPS) == {"abandoned": 2} and not tally.of(metrics.SIBLINGS)


def test_the_judge_counts_with_its_group_and_a_verdict_when_it_is_acted_on():
    c, tally = coordinator(preset="paper", k2=1)
    fill(c, 3)
    for length in range(1, 5):
        step(c, [0, 1, 2], length)
    c.clock.now = 0.25  # type: ignore[attr-defined]
    c.apply(verdict(c, (0, 0), (1, 0), (2, 0)))
    assert tally.seen == {metrics.VERDICT_LATENCY.name: [0.25]}
    for index in (1, 2):
        c.retire("g", index, State.PRUNED, 6)
    end(c, 0, 1)
    assert tally.of(metrics.GROUPS) == {"pruned": 1}
    assert tally.of(metrics.JUDGE_WINDOWS) == {"": 1} and tally.of(metrics.JUDGE_PAIRS) == {"": 3}
    assert tally.of(metrics.JUDGE_TOKENS) == {"": 30} and not tally.of(metrics.PROBE_TOKENS)
    assert tally.of(metrics.JUDGE_SECONDS) == {"": pytest.approx(0.0015)}


def test_no_verdict_has_no_latency():
    c, tally = coordinator(preset="paper", k2=1)
    fill(c, 3)
    for length in range(1, 5):
        step(c, [0, 1, 2], length)
    c.apply(JudgeResult("g", c.runs["g"].group.epoch, error="it raised", window=1))
    assert not c.runs["g"].in_flight
    assert not tally.seen


@pytest.mark.parametrize(
    ("reason", "meant"),
    [("all siblings finished", Reason.FINISHED), ("aborted: 9 of 12 siblings", Reason.ABORTED),
     ("decided: 3:0 of 3 votes, at most 5 to come", Reason.DECIDED), ("decided", Reason.DECIDED),
     ("gave up: the leader has 2 of 16 votes", Reason.GAVE_UP),
     ("pruned: largest of 2 clusters has 5 members", Reason.PRUNED),
     ("pruned: the KV pool was full", Reason.PRUNED),
     ("redundant: its cluster has K2 members", Reason.PRUNED),
     (policy.OPEN_ENDED, Reason.OPEN_ENDED), (policy.RENEWED, Reason.WEIGHTS_CHANGED),
     ("what is 17 * 28 + 4?", Reason.OTHER), ("", Reason.OTHER)],
)  # fmt: skip
def test_a_reason_is_one_of_a_closed_set(reason: str, meant: Reason):
    assert Reason.of(reason) is meant


# -- Prometheus ----------------------------------------------------------------------------------


def samples(registry: prometheus_client.CollectorRegistry) -> dict[tuple[str, str], float]:
    """(sample, value of its own label) -> value; every sample carries SGLang's labels."""
    found: dict[tuple[str, str], float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue  # SGLang's multiprocess mode has none
            rest = dict(sample.labels)
            assert {name: rest.pop(name) for name in LABELS} == {
                k: str(v) for k, v in LABELS.items()
            }
            rest.pop("le", None)
            (own,) = rest.values() or [""]
            found[sample.name, own] = sample.value
    return found


def test_every_series_is_there_from_the_start_at_zero():
    _, registry = exported()
    found = samples(registry)
    assert set(found.values()) == {0.0}
    for metric in metrics.ALL:
        suffix = "_count" if metric.kind is metrics.Kind.HISTOGRAM else ""
        for value in [one.value for one in metric.values or ()] or [""]:
            assert (metric.full_name + suffix, value) in found
    # A HELP text is what people read who have no docs at hand.
    text = prometheus_client.generate_latest(registry).decode()
    assert f"# HELP {metrics.GROUPS.full_name} {metrics.GROUPS.meaning}" in text


def test_without_a_judge_nothing_is_said_about_one():
    meter, registry = exported(has_judge=False)
    meter.count(metrics.JUDGE_PAIRS, 3)
    meter.observe(metrics.VERDICT_LATENCY, 1.0)
    assert not [name for name, _ in samples(registry) if "judge" in name or "verdict" in name]


def test_counts_observations_and_gauges_reach_their_series():
    meter, registry = exported()
    meter.count(metrics.GROUPS, value=Reason.DECIDED)
    meter.count(metrics.GROUPS, 2, Reason.DECIDED)
    meter.count(metrics.GENERATED_TOKENS, 7)
    meter.observe(metrics.VERDICT_LATENCY, 0.3)
    meter.set(metrics.LIVE_GROUPS, 4)
    found = samples(registry)
    assert found["sglang:deepprune_groups_total", "decided"] == 3
    assert found["sglang:deepprune_generated_tokens_total", ""] == 7
    assert found["sglang:deepprune_verdict_latency_seconds_sum", ""] == 0.3
    assert found["sglang:deepprune_live_groups", ""] == 4


def test_a_series_that_cannot_be_written_costs_the_metrics_and_nothing_else(caplog: Any):
    meter, registry = exported()
    meter._series = {key: SimpleNamespace() for key in meter._series}
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            meter.count(metrics.GENERATED_TOKENS)
    assert len(caplog.records) == 1 and "no metrics from now on" in caplog.text


def test_only_a_leader_whose_sglang_counts_has_a_meter(caplog: Any):
    off = SimpleNamespace(metrics_collector=None)
    on = SimpleNamespace(metrics_collector=SimpleNamespace(labels=LABELS))
    taken = SimpleNamespace(metrics_collector=SimpleNamespace(labels={**LABELS, "reason": "x"}))
    assert not meter_of(off, is_leader=True, has_judge=True).is_on
    assert not meter_of(SimpleNamespace(), is_leader=True, has_judge=True).is_on
    assert not meter_of(on, is_leader=False, has_judge=True).is_on
    assert not caplog.records
    # A label of the operator's own that is called as one of ours.
    assert not meter_of(taken, is_leader=True, has_judge=True).is_on
    assert "no metrics" in caplog.text


def test_sglangs_own_classes_are_used_where_it_has_some():
    made: list[str] = []

    def own(name: str, **options: Any) -> Any:
        made.append(name)
        return SimpleNamespace(labels=lambda **labels: None)

    classes = {f"_{kind.value}_cls": own for kind in metrics.Kind}
    PrometheusMeter(SimpleNamespace(labels=LABELS, **classes), has_judge=True)
    assert made == [metric.full_name for metric in metrics.ALL]


# -- gauges --------------------------------------------------------------------------------------


class FakeWorker(FakeJudge):
    is_ready = True
    num_polls = 0

    def poll(self) -> list[JudgeResult]:
        self.num_polls += 1
        return super().poll()


def engine_with(meter: Meter) -> Any:
    worker = FakeWorker()
    board = SimpleNamespace(is_idle=True, runs={}, judge=worker)
    return SimpleNamespace(meter=meter, coordinator=board, room=SimpleNamespace(held={}))


def test_gauges_look_at_once_when_the_first_group_comes_or_the_last_has_gone():
    meter, registry = exported()
    engine = engine_with(meter)
    gauges = Gauges(engine)
    gauges.tick()
    assert samples(registry)["sglang:deepprune_judge_up", ""] == 1
    engine.coordinator.is_idle, engine.coordinator.runs = False, {"g": 1}
    engine.room.held = {"a": 1, "b": 2}
    gauges.tick()
    found = samples(registry)
    assert found["sglang:deepprune_live_groups", ""] == 1
    assert found["sglang:deepprune_held_siblings", ""] == 2
    engine.room.held = {}
    gauges.tick()  # within the second: not looked at
    assert samples(registry)["sglang:deepprune_held_siblings", ""] == 2
    engine.coordinator.is_idle, engine.coordinator.runs = True, {}
    gauges.tick()
    found = samples(registry)
    assert (
        found["sglang:deepprune_live_groups", ""]
        == found["sglang:deepprune_held_siblings", ""]
        == 0
    )


def test_an_idle_judge_is_polled_by_the_gauges_and_a_busy_one_is_not():
    engine = engine_with(exported()[0])
    gauges = Gauges(engine)
    gauges.tick()
    assert engine.coordinator.judge.num_polls == 1
    engine.coordinator.is_idle = False
    gauges.tick()
    assert engine.coordinator.judge.num_polls == 1


def test_gauges_that_fail_stop_alone():
    tally = Tally()
    engine = engine_with(tally)
    engine.room = None
    gauges = Gauges(engine)
    gauges.tick()
    gauges.tick()
    assert tally.of(metrics.HOOK_ERRORS) == {"": 1}


def test_a_pass_of_the_loop_costs_less_than_a_hundredth_of_a_millisecond_step():
    """A step of a real model takes ten milliseconds and more. The best of some runs: this machine
    may have other work."""
    gauges = Gauges(engine_with(exported()[0]))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            gauges.tick()
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 1e-5


# -- what a verdict frees ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocated", "protected", "page", "slots"),
    [
        (66, 25, 1, 41),
        (66, 16, 16, 64),
        (64, 16, 16, 48),
        (0, 0, 16, 0),
        (0, 25, 1, 0),
        (None, None, 16, 0),
    ],
)
def test_private_slots_are_whole_pages_beyond_the_shared_prompt(allocated, protected, page, slots):
    allocator = SimpleNamespace(page_size=page)
    lengths = {"kv_allocated_len": allocated, "cache_protected_len": protected}
    assert private_slots(SimpleNamespace(kv=SimpleNamespace(**lengths)), allocator) == slots
    assert private_slots(SimpleNamespace(**lengths), allocator) == slots  # before there was Req.kv


def test_failures_have_a_label_each():
    meter, registry = exported()
    for failure in Failure:
        meter.count(metrics.JUDGE_FAILURES, value=failure)
    found = samples(registry)
    name = metrics.JUDGE_FAILURES.full_name
    assert all(found[name, failure.value] == 1 for failure in Failure)


# -- the dashboard -------------------------------------------------------------------------------


def test_the_dashboard_shows_every_metric_and_no_other():
    board = json.loads((DOCS / "grafana" / "deepprune.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found = {name for text in texts for name in re.findall(r"sglang:\w+", text)}
    endings = ("", "_bucket", "_sum", "_count")
    known = {metric.full_name + end: metric for metric in metrics.ALL for end in endings}
    assert {known[name].name for name in found} == {metric.name for metric in metrics.ALL}
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"])
             for y in range(p["y"], p["y"] + p["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
