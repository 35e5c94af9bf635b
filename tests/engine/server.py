"""A real SGLang server on CPU for tests and benchmarks: start, wait, read its log, stop.

Strict memory checks are on, so a leaked KV slot kills the server and with it the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 240

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
CPU_FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--disable-cuda-graph", "--mem-fraction-static", "0.2",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_env(extra: dict[str, str] | None = None, *, strict: bool = True) -> dict[str, str]:
    """The environment of a server process: one compute thread, CPU engine, strict checks."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **(STRICT if strict else {}),
        **(extra or {}),
    }
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")) if part
    )
    return env


class Server:
    """One server process; use as a context manager."""

    def __init__(
        self,
        model: str | Path,
        *flags: str,
        env: dict[str, str] | None = None,
        strict: bool = True,
        max_total_tokens: int = 20000,
        command: tuple[str, ...] = (sys.executable, "-m", "sglang.launch_server"),
    ):
        self.name = ""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)
        line = [
            *command, "--model-path", str(model), *CPU_FLAGS,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--max-total-tokens", str(max_total_tokens), *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            line,
            env=cpu_env(env, strict=strict),
            stdin=subprocess.DEVNULL,
            stdout=self.log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Server:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return Path(self.log_file.name).read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if not self.is_alive:
                raise RuntimeError(f"the server ended at start:\n{self.log[-6000:]}")
            try:
                if requests.get(f"{self.url}/health_generate", timeout=30).status_code == 200:
                    return
            except requests.RequestException:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"the server did not start in time:\n{self.log[-6000:]}")

    def wait_exit(self, limit_s: float = START_LIMIT_S) -> int:
        """The exit code of a server that is expected to refuse its start."""
        code = self.process.wait(timeout=limit_s)
        self.stop()
        return code

    def stop(self) -> None:
        """At once: SGLang's own way down sleeps for crash diagnostics. Leaks were checked before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        self.log_file.close()

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=timeout_s)

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
