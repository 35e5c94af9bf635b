"""Every query of the dashboard and of docs/metrics.md, by a real Prometheus on a real server.

Needs the program `prometheus` (Debian: `apt-get install prometheus`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.scripted import plugin_env
from sglang_deepprune import metrics
from sglang_deepprune.local_server import free_port
from tests.engine import scenario
from tests.engine.conftest import COMMON, MARKER
from tests.engine.counters import scrape
from tests.engine.server import Server
from tests.engine.test_groups import DECIDE, PAPER, PRUNE
from tests.engine.test_metrics import HEADS
from tests.engine.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="no program `prometheus` on this machine"
    ),
]

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCRAPE_S = 1
RANGE = "1m"  # what Grafana would put in for its own variables
WAIT_S = 60


class Prometheus:
    """One Prometheus that scrapes one server; a context manager."""

    def __init__(self, target: str, folder: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # The scrape job is the one that the docs give, with this server's address.
        page = (DOCS / "metrics.md").read_text()
        (job,) = re.findall(r"```\n(scrape_configs:.*?)```", page, re.DOTALL)
        assert "localhost:30000" in job
        config = folder / "prometheus.yml"
        config.write_text(
            f"global:\n  scrape_interval: {SCRAPE_S}s\n" + job.replace("localhost:30000", target)
        )
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> Prometheus:
        deadline = time.monotonic() + WAIT_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            try:
                if requests.get(f"{self.url}/-/ready", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(timeout=10)

    def api(self, path: str, **params: Any) -> Any:
        """`data` of the HTTP API. A query that Prometheus refuses fails with its own words."""
        reply = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        assert reply.status_code == 200, f"{params}: {reply.text}"
        return reply.json()["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """The instant vector of a query, now."""
        data = self.api("query", query=text)
        assert data["resultType"] == "vector", text
        return list(data["result"])

    def value(self, text: str) -> float:
        (sample,) = self.query(text)
        return float(sample["value"][1])


def traffic(server: Server) -> None:
    """A vote that is decided, a judge that prunes, a lazy group, and one whose judge dies."""
    for prompt, size, settings in (
        (PRUNE, 8, PAPER), (DECIDE, 12, {"preset": "latency"}),
        (DECIDE, 12, {"preset": "balanced"}), ("fault: DIE", 4, PAPER),
    ):  # fmt: skip
        custom = {"deepprune": settings}
        server.generate(prompt, n=size, max_new_tokens=400, temperature=1.0, custom_params=custom)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Prometheus]]:
    """A server with group traffic, and the Prometheus that has seen it happen."""
    from transformers import AutoTokenizer

    model, folder = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("prometheus")
    print(subprocess.run(["prometheus", "--version"], capture_output=True, text=True).stdout)
    make_tiny_model(model)
    scenario.write(AutoTokenizer.from_pretrained(model), folder / "scripts.json")
    env = plugin_env(folder / "scripts.json", folder)
    with (
        Server(model, *COMMON, *MARKER, "--enable-metrics", env=env) as server,
        Prometheus(server.url.removeprefix("http://"), folder) as prometheus,
    ):
        # Of a rate Prometheus needs two looks before the events, as it has in real life.
        until(lambda: len(looks(prometheus)) >= 2)
        traffic(server)
        server.wait_idle()
        told = scrape(server).total(metrics.GENERATED_TOKENS)
        name = metrics.GENERATED_TOKENS.full_name
        until(lambda: prometheus.value(f"sum({name})") == told)
        yield server, prometheus


def looks(prometheus: Prometheus) -> list[Any]:
    """What it has seen of one counter so far."""
    data = prometheus.api("query", query=f"{metrics.GENERATED_TOKENS.full_name}[1m]")
    return [value for series in data["result"] for value in series["values"]]


def until(is_true: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, "Prometheus has not seen it in time"
        time.sleep(0.3)


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DOCS / "grafana" / "deepprune.json").read_text()))


def filled(text: str) -> str:
    """As Grafana sends it, everything selected."""
    for name in ("$__rate_interval", "$__range"):
        text = text.replace(name, RANGE)
    for name in ("$instance", "$model_name"):
        text = text.replace(name, ".*")
    assert "$" not in text, text
    return text


def panel_queries() -> list[tuple[str, str]]:
    return [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def doc_queries(section: str) -> list[str]:
    """The queries in a table of docs/metrics.md."""
    page = (DOCS / "metrics.md").read_text()
    (body,) = re.findall(rf"## {section}\n(.*?)(?=\n## |\Z)", page, re.DOTALL)
    found = re.findall(r"`([^`]*sglang:deepprune_[^`]*)`", body)
    assert len(found) >= 5
    return found


@pytest.mark.parametrize(("title", "text"), panel_queries())
def test_each_panel_has_data(scraped: Any, title: str, text: str):
    _, prometheus = scraped
    result = prometheus.query(filled(text))
    assert result, f"{title}: no data"
    values = [float(sample["value"][1]) for sample in result]
    assert all(value >= 0 for value in values), f"{title}: {values}"  # a NaN is none
    now = time.time()
    series = prometheus.api("query_range", query=filled(text), start=now - 60, end=now, step=5)
    assert series["result"], f"{title}: nothing to draw"


@pytest.mark.parametrize("text", doc_queries("Questions and their queries"))
def test_each_question_of_the_docs_has_an_answer(scraped: Any, text: str):
    _, prometheus = scraped
    (sample, *_) = prometheus.query(text)
    assert math.isfinite(float(sample["value"][1]))


@pytest.mark.parametrize("text", doc_queries("Alerts"))
def test_each_alert_is_a_query(scraped: Any, text: str):
    """Most of them are silent here, as they should be; what they compare has data."""
    _, prometheus = scraped
    prometheus.query(text)
    left = re.split(r" (?:>|==) ", text)[0]
    assert prometheus.query(left)


def test_the_variables_of_the_dashboard_have_values(scraped: Any):
    server, prometheus = scraped
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "model_name", "instance"]
    for name, expected in (("model_name", None), ("instance", server.url.removeprefix("http://"))):
        text = variables[name]["query"]["query"]
        ((metric, label),) = re.findall(r"label_values\((.*), (\w+)\)", text)
        assert label == name
        (value,) = prometheus.api(f"label/{label}/values", **{"match[]": filled(metric)})
        assert expected is None or value == expected


def test_prometheus_holds_what_the_server_says(scraped: Any):
    server, prometheus = scraped
    told = scrape(server)
    for metric in metrics.ALL:
        suffix = "_count" if metric.kind is metrics.Kind.HISTOGRAM else ""
        found = prometheus.value(f"sum({metric.full_name}{suffix})")
        assert found == pytest.approx(told.total(metric)), metric.full_name
    reasons = {
        sample["metric"]["reason"]: float(sample["value"][1])
        for sample in prometheus.query(f"{metrics.GROUPS.full_name} > 0")
    }
    assert reasons == told.of(metrics.GROUPS) and set(reasons) <= set(HEADS.values())
    assert prometheus.value('increase(sglang:deepprune_judge_failures_total{kind="end"}[1m])') > 0
