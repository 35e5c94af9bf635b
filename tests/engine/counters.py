"""What a server's /metrics says about deepprune."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_deepprune import metrics
from sglang_deepprune.metrics import Kind, Metric
from tests.engine.server import Server

OWN = {metric.label for metric in metrics.ALL} | {"le"}


@dataclass
class Scrape:
    """One look. Sums are over SGLang's labels: over ranks."""

    sums: Counter[tuple[str, str]] = field(default_factory=Counter)  # (sample, own label's value)
    labels: dict[str, set[str]] = field(default_factory=dict)  # SGLang's label -> values seen
    by_rank: Counter[str] = field(default_factory=Counter)  # dp rank -> groups
    stock: dict[str, set[str]] = field(default_factory=dict)  # the same of a metric of SGLang's

    def of(self, metric: Metric) -> dict[str, float]:
        """Value of the metric's own label -> sum; zeros left out. A histogram: its observations."""
        name = metric.full_name + ("_count" if metric.kind is Kind.HISTOGRAM else "")
        return {own: value for (known, own), value in self.sums.items() if known == name and value}

    def total(self, metric: Metric) -> float:
        return sum(self.of(metric).values())

    def since(self, before: Scrape) -> Scrape:
        """What has been counted in between; for counters and histograms."""
        sums = Counter(self.sums)
        sums.subtract(before.sums)
        return Scrape(sums, self.labels, self.by_rank, self.stock)


def scrape(server: Server) -> Scrape:
    """GET /metrics."""
    reply = requests.get(f"{server.url}/metrics", timeout=30)
    assert reply.status_code == 200
    found = Scrape()
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            is_stock = sample.name == "sglang:num_running_reqs"
            if not (is_stock or sample.name.startswith(metrics.PREFIX)):
                continue
            seen = found.stock if is_stock else found.labels
            for name, value in sample.labels.items():
                if name not in OWN:
                    seen.setdefault(name, set()).add(value)
            if is_stock or "le" in sample.labels:
                continue
            (own,) = [sample.labels[name] for name in OWN if name in sample.labels] or [""]
            found.sums[sample.name, own] += sample.value  # type: ignore[assignment]
            if sample.name == metrics.GROUPS.full_name:
                found.by_rank[sample.labels.get("dp_rank", "0")] += int(sample.value)
    return found


def wait_for(server: Server, is_true: Callable[[Scrape], bool], limit_s: float = 20.0) -> Scrape:
    """Scrape until it is as it should be; gauges follow within a second."""
    deadline = time.monotonic() + limit_s
    while True:
        found = scrape(server)
        if is_true(found):
            return found
        assert time.monotonic() < deadline, f"still so after {limit_s} s: {dict(found.sums)}"
        time.sleep(0.2)
