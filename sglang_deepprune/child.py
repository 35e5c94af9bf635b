"""A killable child process that answers one request at a time, over a non-blocking socket pair.

Owns the process, the socket and the framing. The parent never blocks on it: `start` and `poll`
return at once even when the child is stopped (SIGSTOP) or dead, so a decode loop may call both.
Judges and the answer fence run in such children because a thread would hold the scheduler's GIL,
and because a hung sympy call can only be ended by killing its process.

The child runs `module:factory(*args)`, which loads whatever it needs and returns the function
that answers requests. What crosses the border is pickled plain data between our own processes. A
child that has gone mad can neither run code in its parent, nor fill its memory, nor keep it busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("!Q")
_READ_BYTES = 1 << 20
_MOST_READ_BYTES = 4 << 20  # in one poll: whoever writes without end does not keep the parent there
_MOST_REPLY_BYTES = 64 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request: a value, or the reason why there is none."""

    value: Any = None
    error: str | None = None


class Child:
    """One worker process. At most one request is in flight; a dead child answers with an error."""

    def __init__(
        self, factory: str, args: tuple[Any, ...] = (), *, env: dict[str, str] | None = None
    ):
        self.factory = factory
        self.args = args
        self.env = env or {}
        self.num_starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []  # not reaped yet
        self._socket: socket.socket | None = None
        self._is_ready = False
        self._is_busy = False
        self._clock = 0.0
        self._out = bytearray()
        self._in = bytearray()
        self._failure: str | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """The factory has returned; requests are being answered."""
        return self._is_ready

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the child has had for what it does now (loading, or the request)."""
        return time.monotonic() - self._clock

    def launch(self) -> None:
        """Start (or restart) the process; returns before it has loaded."""
        self.kill()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        # One compute thread: the cores belong to the server.
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **self.env}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_deepprune.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self.num_starts += 1
        self._clock = time.monotonic()
        self._push((self.factory, self.args))

    def start(self, request: Any) -> None:
        """Hand over one request. The caller keeps at most one in flight."""
        assert not self._is_busy, "one request at a time"
        if not self.is_alive:
            self.launch()
        self._is_busy = True
        if self._is_ready:
            self._clock = time.monotonic()
        self._push(request)

    def poll(self) -> Reply | None:
        """The finished request's reply, or None while there is none. Never blocks."""
        if self._killed:
            self._reap()
        if self._socket is None:
            return None
        self._flush()
        self._fill()
        while (frame := self._pop()) is not None:
            if not self._is_ready:
                if frame.error is not None:
                    return self._fail(frame.error)
                self._is_ready = True
                self._clock = time.monotonic()
            elif self._is_busy:
                self._is_busy = False
                return frame
        return self._fail(self._failure) if self._failure else None

    def wait(self, timeout_s: float) -> Reply:
        """Blocking form of `poll` for scripts and tests; kills the child when time is out."""
        while self._is_busy:
            reply = self.poll()
            if reply is not None:
                return reply
            if self._is_ready and self.elapsed_s > timeout_s:
                self.kill()
                return Reply(error=f"no answer within {timeout_s:g} s")
            time.sleep(0.0005)
        return Reply(error="nothing was asked")

    def kill(self) -> None:
        """End the process at once. A request in flight is lost; the next `start` launches anew."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            # SIGKILL also ends a stopped process, but not at once: a later call reaps it.
            self._killed.append(self._process)
        self._reap()
        self._process = self._socket = None
        self._is_ready = self._is_busy = False
        self._failure = None
        self._out.clear()
        self._in.clear()

    def _reap(self) -> None:
        self._killed = [process for process in self._killed if process.poll() is None]

    def _fail(self, reason: str) -> Reply:
        self.kill()
        return Reply(error=reason)

    def _push(self, message: Any) -> None:
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._out += _HEADER.pack(len(body)) + body
        self._flush()

    def _flush(self) -> None:
        assert self._socket is not None
        try:
            while self._out:
                sent = self._socket.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            self._failure = f"the child is gone: {error}"

    def _fill(self) -> None:
        assert self._socket is not None
        most = len(self._in) + _MOST_READ_BYTES
        try:
            while len(self._in) < most:
                chunk = self._socket.recv(_READ_BYTES)
                if not chunk:
                    self._failure = self._failure or "the child has ended"
                    return
                self._in += chunk
        except BlockingIOError:
            return
        except OSError as error:
            self._failure = f"the child is gone: {error}"

    def _pop(self) -> Reply | None:
        if len(self._in) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._in)
        if size > _MOST_REPLY_BYTES:
            self._failure = "the child's reply is too long"
            return None
        if len(self._in) < _HEADER.size + size:
            return None
        body = bytes(self._in[_HEADER.size : _HEADER.size + size])
        del self._in[: _HEADER.size + size]
        try:
            value, error = _Plain(io.BytesIO(body)).load()
        except Exception:  # a broken pickle raises nearly anything
            self._failure = "the child's reply is not readable"
            return None
        return Reply(value=value, error=None if error is None else str(error))


class _Plain(pickle.Unpickler):
    """Reads plain data and the frozen classes of `types`; no other name is looked up, so nothing
    that a child sends is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "sglang_deepprune.types" or "." in name:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = stream.recv(size - len(data))
        if not chunk:
            sys.exit(0)
        data += chunk
    return bytes(data)


def _receive(stream: socket.socket) -> Any:
    (size,) = _HEADER.unpack(_read(stream, _HEADER.size))
    return pickle.loads(_read(stream, size))


def _send(stream: socket.socket, value: Any, error: str | None) -> None:
    body = pickle.dumps((value, error), protocol=pickle.HIGHEST_PROTOCOL)
    stream.sendall(_HEADER.pack(len(body)) + body)


def _serve(descriptor: int) -> None:
    """The child's main loop. Ends with its parent, even in the middle of a computation."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = socket.socket(fileno=descriptor)
    factory, args = _receive(stream)
    module, _, name = factory.partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(*args)
    except Exception as error:
        _send(stream, None, f"{type(error).__name__}: {error}")
        return
    _send(stream, None, None)
    while True:
        request = _receive(stream)
        try:
            _send(stream, answer(request), None)
        except Exception as error:
            _send(stream, None, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
