"""A real SGLang server as a child process, on this machine: start it, wait, talk to it, end it.

Used by the demo, the studies and the engine tests. Names SGLang only on a command line. On a
machine without a GPU it adds the flags and the environment that SGLang's CPU engine needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_LIMIT_S = 300
CPU_FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--disable-cuda-graph", "--mem-fraction-static", "0.2",
)  # fmt: skip
# torch's threads spin: more than one a process starves everybody on a small machine.
CPU_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}


class ServerError(RuntimeError):
    """The server did not start, or answered a request with an error."""


def has_gpu() -> bool:
    """An NVIDIA card that the driver knows."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def free_port() -> int:
    """Below those that Linux gives to outgoing connections: SGLang binds it some twenty seconds
    later. And low enough for what SGLang adds to it (up to 10,000, for ZMQ and gRPC)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class LocalServer:
    """One server process; a context manager."""

    def __init__(
        self,
        model: str | Path,
        *flags: str,
        env: dict[str, str] | None = None,
        max_total_tokens: int = 20000,
        command: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
        port: int = 0,
    ):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Kept after the server: its end is where a failed start is explained.
        self.log_file = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
        cpu = () if has_gpu() else (*CPU_FLAGS, "--max-total-tokens", str(max_total_tokens))
        self.process = subprocess.Popen(
            [*command, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port),
             *cpu, *flags],
            env={**os.environ, **({} if has_gpu() else CPU_ENV), "PYTHONUNBUFFERED": "1",
                 **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Any:
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
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
        """Until it has generated a token. Raises ServerError with the end of its log."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if not self.is_alive:
                raise ServerError(f"the server ended at start:\n{self.log[-6000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise ServerError(f"the server did not start in time:\n{self.log[-6000:]}")

    def stop(self) -> None:
        """End the whole process group at once; SGLang's own way down sleeps for diagnostics."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        self.log_file.close()


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 600) -> Any:
    """POST JSON, get JSON. Raises ServerError with the server's own words."""
    try:
        with _open(url, path, body, timeout_s) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{path}: {error.code} {error.read().decode()[:500]}") from error


def stream(url: str, path: str, body: dict[str, Any], timeout_s: float = 600) -> Iterator[Any]:
    """POST with `stream`; the JSON of each server-sent event, up to [DONE]."""
    with _open(url, path, {**body, "stream": True}, timeout_s) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def _open(url: str, path: str, body: dict[str, Any], timeout_s: float) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=timeout_s)
