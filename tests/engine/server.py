"""The test form of a local server: strict memory checks on, and its log lines as JSON.

A leaked KV slot kills the server under these checks, and with it the test.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from sglang_deepprune.local_server import CPU_ENV, CPU_FLAGS, LocalServer

__all__ = ["CPU_FLAGS", "Server", "cpu_env"]

ROOT = Path(__file__).resolve().parents[2]
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


def cpu_env(extra: dict[str, str] | None = None, *, strict: bool = True) -> dict[str, str]:
    """The whole environment of a server process: one compute thread, our sources importable."""
    env = {
        **os.environ,
        **CPU_ENV,
        "HF_HUB_OFFLINE": "1",
        **(STRICT if strict else {}),
        **(extra or {}),
    }
    # What a test asks for comes first: a clone may hold metadata of ours (egg-info), which counts.
    own, ambient = (extra or {}).get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")
    parts = (own, str(ROOT), str(ROOT / "tests"), ambient)
    return {**env, "PYTHONPATH": os.pathsep.join(part for part in parts if part)}


class Server(LocalServer):
    """One server process; use as a context manager."""

    def __init__(
        self,
        model: str | Path,
        *flags: str,
        env: dict[str, str] | None = None,
        strict: bool = True,
        **options: Any,
    ):
        self.name = ""
        super().__init__(model, *flags, env=cpu_env(env, strict=strict), **options)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=timeout_s)

    def get(self, path: str) -> Any:
        return requests.get(f"{self.url}{path}", timeout=60).json()

    def generate(self, text: str, **params: Any) -> Any:
        """POST /generate; `params` are sampling parameters."""
        response = self.post("/generate", {"text": text, "sampling_params": params})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event; ends at [DONE]."""
        with requests.post(
            f"{self.url}{path}", json={**body, "stream": True}, stream=True, timeout=300
        ) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])

    def log_lines(self, kind: str) -> list[dict[str, Any]]:
        """The JSON lines that `--deepprune-log-steps` writes."""
        return [json.loads(found) for found in re.findall(rf"{kind} (\{{.*\}})", self.log)]

    def wait_idle(self, limit_s: float = 30.0) -> None:
        """Until nothing runs or waits; a leak shows here, under the strict idle check."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if requests.post(f"{self.url}/flush_cache", timeout=30).status_code == 200:
                return
            time.sleep(0.2)
        raise AssertionError(f"the server is not idle:\n{self.log[-3000:]}")
