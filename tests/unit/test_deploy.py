"""deploy/ is built nowhere in the tests: what it says about the rest of the project holds."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = load("compose.yaml")["services"]
    return found


def words(instruction: str) -> list[str]:
    """A Dockerfile's instruction in its JSON form."""
    match = re.search(rf"^{instruction} (\[.*?\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert match, instruction
    return list(json.loads(match[1]))


def server_port() -> str:
    entry = words("ENTRYPOINT")
    return entry[entry.index("--port") + 1]


def container_port(published: str) -> str:
    return published.rpartition(":")[2]


def test_the_image_is_the_newest_sglang_that_was_tested(services: dict[str, Any]):
    # By text: importing it would import SGLang.
    patches = "\n".join(path.read_text() for path in (ROOT / "patches").glob("*.py"))
    newest = re.search(r'^OLDEST, NEWEST = "[\d.]+", "([\d.]+)"$', patches, re.MULTILINE)
    pinned = re.search(
        r"^SGLANG := sglang==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    default = re.search(r"^ARG SGLANG_VERSION=([\d.]+)$", DOCKERFILE, re.MULTILINE)
    assert newest and pinned and default
    build = services["server"]["build"]
    assert newest[1] == pinned[1] == default[1] == build["args"]["SGLANG_VERSION"]
    assert re.search(r"^FROM lmsysorg/sglang:v\$\{SGLANG_VERSION\}$", DOCKERFILE, re.MULTILINE)
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_no_image_is_whatever_is_newest(services: dict[str, Any]):
    images = [service["image"] for service in services.values() if "image" in service]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(images) == 4
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_the_server_has_the_plugin_and_is_scraped(services: dict[str, Any]):
    entry = words("ENTRYPOINT")
    assert {"--enable-deepprune", "--enable-metrics"} <= set(entry)
    assert entry[entry.index("--host") + 1] == "0.0.0.0"  # else nobody reaches the container
    assert "entrypoint" not in services["server"]
    port = server_port()
    assert re.search(rf"^EXPOSE {port}$", DOCKERFILE, re.MULTILINE)
    assert [container_port(one) for one in services["server"]["ports"]] == [port]
    (job,) = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert services["server"]["healthcheck"]["test"][-1] == f"http://localhost:{port}/health"


def test_grafana_asks_the_prometheus_of_the_file(services: dict[str, Any]):
    (source,) = load("grafana/datasource.yml")["datasources"]
    port = container_port(services["prometheus"]["ports"][0])
    assert source["type"] == "prometheus" and source["url"] == f"http://prometheus:{port}"
    (provider,) = load("grafana/dashboards.yml")["providers"]
    places = {one.split(":")[1]: one.split(":")[0] for one in services["grafana"]["volumes"]}
    assert places[provider["options"]["path"]] == "../docs/grafana"


def test_the_dashboards_find_the_data_source():
    (source,) = load("grafana/datasource.yml")["datasources"]
    boards = sorted((ROOT / "docs" / "grafana").glob("*.json"))
    assert boards
    for board in boards:
        text = board.read_text()
        choosers = {
            f"${{{one['name']}}}"
            for one in json.loads(text)["templating"]["list"]
            if one["type"] == "datasource" and one["query"] == source["type"]
        }
        # By a variable, which takes the default, or by the very name.
        found = set(re.findall(r'"type": "prometheus",\s*"uid": "([^"]+)"', text))
        assert found and found <= {source["uid"], *choosers} and source["isDefault"]


def test_what_is_mounted_exists_and_cannot_be_written(services: dict[str, Any]):
    names = load("compose.yaml")["volumes"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source, _, rest = mount.partition(":")
            options = rest.partition(":")[2]
            if source in names:
                continue
            assert source.startswith(".") and options == "ro", mount
            assert (DEPLOY / source).exists(), mount


def test_ports_are_open_to_this_machine_alone(services: dict[str, Any]):
    published = [one for service in services.values() for one in service.get("ports", [])]
    assert len(published) == 3
    assert all(one.startswith("127.0.0.1:") for one in published)


def test_the_images_build_has_all_that_the_wheel_is_made_of(monkeypatch: pytest.MonkeyPatch):
    """An ignore file that leaves out a package would build an image without it."""
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in kept)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: seen.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    needed = {"setup.py", "pyproject.toml", "README.md", *seen["license_files"]}
    needed |= set(seen["package_dir"].values())
    needed |= {name.partition(".")[0] for name in seen["packages"]}
    assert needed <= kept
