"""LiteLLM, in process and as a proxy: what is left of the choices and of the record."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

from sglang_deepprune.local_server import free_port
from tests.engine.server import Server
from tests.stacks.recipes import PROGRAMS, RECIPES, environ, run_json
from tests.stacks.test_openai import check_reply

START_LIMIT_S = 180


def test_a_whole_reply_keeps_choices_and_record(server: Server, environment: Any):
    python = environment("litellm").python
    said = run_json([python, RECIPES / "litellm_completion.py"], env=environ(server.url))
    check_reply(said)
    assert said["winner"].count("\\boxed{135}") == 1


def test_a_stream_keeps_texts_and_loses_record_and_finish_reasons(server: Server, environment: Any):
    python = environment("litellm").python
    left = run_json([python, PROGRAMS / "litellm_stream.py"], env=environ(server.url))
    assert left["has_record"] is False
    assert len(left["reasons"]) == 1, "one finish reason for eight choices"
    whole = run_json([python, RECIPES / "litellm_completion.py"], env=environ(server.url))
    for index, text in enumerate(whole["texts"]):
        if whole["finish_reasons"][index] == "stop":
            assert left["texts"][str(index)] == text


def test_the_proxy_hands_on_settings_and_record(server: Server, environment: Any, tmp_path: Path):
    """The OpenAI recipe, unchanged, with the proxy in between; its stream loses the record."""
    litellm = environment("litellm").folder / "bin" / "litellm"
    port = free_port()
    log = tmp_path / "proxy.log"
    with log.open("w") as out:
        proxy = subprocess.Popen(
            [str(litellm), "--config", str(RECIPES / "litellm_proxy.yaml"), "--host", "127.0.0.1",
             "--port", str(port)],
            env=environ(SGLANG_BASE_URL=f"{server.url}/v1"), stdout=out, stderr=subprocess.STDOUT,
            cwd=tmp_path,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health/liveliness", proxy, log)
        said = run_json([sys.executable, RECIPES / "openai_sdk.py"], env=environ(url))
    finally:
        proxy.kill()
        proxy.wait()
    check_reply(said)
    assert said["streamed"] is None
    for index, text in enumerate(said["texts"]):
        if said["finish_reasons"][index] == "stop":
            assert said["streamed_texts"][index] == text


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers; fails with the end of the log."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
