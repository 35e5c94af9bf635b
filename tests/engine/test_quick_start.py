"""What docs/index.md tells a new user to type on a CPU, typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_deepprune.local_server import free_port, has_gpu
from tests.engine.server import cpu_env

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300

pytestmark = [pytest.mark.slow, pytest.mark.skipif(has_gpu(), reason="the section for a CPU")]


def blocks(port: int) -> list[str]:
    """The section's commands; only the port and the environment's place are this machine's."""
    page = (ROOT / "docs" / "index.md").read_text()
    section = page.partition("## On a CPU")[2].partition("\n## ")[0]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    place = f"{Path(sys.executable).parent}/"
    return [one.replace("30000", str(port)).replace(".venv/bin/", place) for one in found]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The commands of the section, with its server running."""
    port = free_port()
    found = blocks(port)
    assert found[0] == "make venv\n"
    log = tmp_path_factory.mktemp("quick-start") / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            ["bash", "-c", found[1]], cwd=ROOT, env=cpu_env(strict=False), stdout=sink, stderr=sink,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_LIMIT_S
        # The page says what to wait for.
        while "ready to roll" not in log.read_text(errors="replace"):
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield found
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=10)


def test_the_request_of_the_page_brings_one_voted_answer(commands: list[str]):
    done = subprocess.run(
        ["bash", "-c", commands[2]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    reply = json.loads(done.stdout)
    group = reply["metadata"]["deepprune"]
    assert group["active"] and group["preset"] == "balanced" and group["size"] == 16
    assert group["answer"] == group["votes"][0]["answer"] and group["votes"][0]["votes"] >= 3
    (choice,) = reply["choices"]
    assert group["answer"] == "138"  # 33 + 53 - 26 + 28 + 50
    assert group["answer"] in choice["message"]["content"]
    ends = {one["state"] for one in group["choices"]}
    assert "finished" in ends and ends <= {"finished", "decided", "not_started"}


def test_the_section_shows_no_other_command(commands: list[str]):
    assert len(commands) == 3
