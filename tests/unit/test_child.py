"""A child answers, fails and dies without its parent ever waiting. No server, no model loading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_deepprune.child import Child, Reply

TESTS = str(Path(__file__).resolve().parent.parent)
BLOCKED_S = 0.25  # a call that waits for a stopped or hung child takes far longer


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Child]]:
    monkeypatch.setenv("PYTHONPATH", TESTS)
    children: list[Child] = []

    def build(name: str) -> Child:
        children.append(Child(f"faulty_judges:{name}"))
        return children[-1]

    yield build
    for child in children:
        child.kill()


def poll_until_reply(child: Child, limit_s: float = 20.0) -> Reply:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        reply = child.poll()
        if reply is not None:
            return reply
        time.sleep(0.002)
    raise AssertionError("no reply")


def poll_until_ready(child: Child) -> None:
    end = time.monotonic() + 20.0
    while not child.is_ready and time.monotonic() < end:
        assert child.poll() is None
        time.sleep(0.002)
    assert child.is_ready


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(is_true: Callable[[], bool], limit_s: float = 10.0) -> bool:
    end = time.monotonic() + limit_s
    while not is_true() and time.monotonic() < end:
        time.sleep(0.005)
    return is_true()


def test_a_request_before_it_is_loaded_is_answered_after(make):
    child = make("echo")
    child.start("early")
    assert child.is_busy and not child.is_ready
    assert poll_until_reply(child).value == "early"
    assert child.is_ready and not child.is_busy


def test_ready_is_known_without_a_request(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    assert child.poll() is None


def test_an_exception_is_an_error_and_the_child_lives_on(make):
    child = make("failing")
    child.start("boom")
    assert poll_until_reply(child).error == "ValueError: boom"
    pid = child.pid
    child.start("again")
    assert poll_until_reply(child).error == "ValueError: again"
    assert child.pid == pid


def test_a_factory_that_raises_is_an_error_and_the_child_is_gone(make):
    child = make("unloadable")
    child.launch()
    assert poll_until_reply(child).error == "RuntimeError: no weights here"
    assert child.pid is None and not child.is_ready


def test_a_stopped_child_blocks_neither_start_nor_poll(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    os.kill(child.pid, signal.SIGSTOP)
    assert seconds(lambda: child.start("x")) < BLOCKED_S
    assert seconds(child.poll) < BLOCKED_S
    assert child.poll() is None and child.is_busy
    os.kill(child.pid, signal.SIGCONT)
    assert poll_until_reply(child).value == "x"


def test_a_large_request_to_a_stopped_child_does_not_block_and_arrives_whole(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    os.kill(child.pid, signal.SIGSTOP)
    request = bytes(range(256)) * (50_000_000 // 256)
    child.start(request)
    assert max(seconds(child.poll) for _ in range(20)) < BLOCKED_S
    os.kill(child.pid, signal.SIGCONT)
    assert poll_until_reply(child, 60.0).value == request


def test_killing_a_stopped_child_does_not_wait_and_leaves_no_zombie(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    pid = child.pid
    os.kill(pid, signal.SIGSTOP)
    assert seconds(child.kill) < BLOCKED_S
    assert child.pid is None and not child.is_ready

    def is_reaped() -> bool:
        child.poll()
        return not Path(f"/proc/{pid}").exists()

    assert wait_until(is_reaped)


def test_a_child_killed_from_outside_is_an_error_and_the_next_start_launches_anew(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    os.kill(child.pid, signal.SIGSTOP)
    child.start("lost")
    os.kill(child.pid, signal.SIGKILL)
    error = poll_until_reply(child).error
    assert error is not None and error.startswith("the child")
    assert not child.is_busy
    child.start("found")
    assert poll_until_reply(child).value == "found"
    assert child.num_starts == 2


def test_an_idle_child_that_dies_is_noticed(make):
    child = make("echo")
    child.launch()
    poll_until_ready(child)
    os.kill(child.pid, signal.SIGKILL)
    assert poll_until_reply(child).error is not None
    assert child.pid is None


def test_wait_kills_a_child_that_takes_too_long(make):
    child = make("sleeper")
    child.start(3600)
    assert child.wait(0.1).error == "no answer within 0.1 s"
    assert child.pid is None


@pytest.mark.parametrize("request_s", [None, 3600])
def test_a_parent_that_is_killed_takes_its_child_along(request_s):
    """Idle, the child reads the end of its socket; busy, the kernel's death signal ends it."""
    script = (
        "import sys, time\n"
        "from sglang_deepprune.child import Child\n"
        "child = Child('faulty_judges:sleeper')\n"
        "child.launch()\n"
        "while not child.is_ready: child.poll(); time.sleep(0.01)\n"
        f"if {request_s}: child.start({request_s})\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    path = os.pathsep.join((TESTS, str(Path(TESTS).parent)))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    assert wait_until(lambda: not is_running(pid))
