"""The fence around the slow path: hangs, dead children, order, memory. Real child processes."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_deepprune.answers.fence import Fence

# Sums in two orders: `compare` leaves them to the slow path. The first letter tells the fake.
SAME, HANGS, DIES, RAISES = (f"{name}+1" for name in ("s", "h", "d", "r"))
FAKE = """
    import os, time
    def make_comparer():
        def compare(pair):
            names = "".join(pair)
            if "h" in names:
                time.sleep(3600)
            if "d" in names:
                os._exit(1)
            if "r" in names:
                raise ValueError("unreadable")
            return "s" in names
        return compare
    def fail():
        raise ImportError("no algebra here")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fence]:
    (tmp_path / "fake_comparer.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fence = Fence(comparer="fake_comparer:make_comparer", limit_s=0.3)
    yield fence
    fence.close()


def drain(fence: Fence, timeout_s: float = 30.0) -> list[tuple[int, bool | None]]:
    answers: list[tuple[int, bool | None]] = []
    deadline = time.monotonic() + timeout_s
    while fence.num_open and time.monotonic() < deadline:
        answers += fence.poll()
        time.sleep(0.001)
    return answers


def flipped(answer: str) -> str:
    left, right = answer.split("+")
    return f"{right}+{left}"


def test_real_algebra_answers_through_the_fence() -> None:
    fence = Fence(limit_s=20.0)
    try:
        assert fence.equivalent("\\sqrt{8}", "2\\sqrt{2}") is True
        assert fence.equivalent("(x+1)^2", "x^2+1") is False
        assert fence.equivalent("9^{9^{9^{9}}}", "8^{8^{8^{8}}}") is False
        assert fence.num_timeouts == 0
    finally:
        fence.close()


def test_decided_pairs_never_start_the_child(fake: Fence) -> None:
    ticket = fake.ask("3/4", "0.75")
    assert fake.poll() == [(ticket, True)]
    assert fake._child.num_starts == 0


def test_answers_come_in_the_order_of_the_questions(fake: Fence) -> None:
    tickets = [fake.ask(f"{name}+1", f"1+{name}") for name in "sabs"]
    assert drain(fake) == list(zip(tickets, [True, False, False, True], strict=True))


def test_hung_pair_is_given_up_and_the_next_is_answered(
    fake: Fence, caplog: pytest.LogCaptureFixture
) -> None:
    hung, fine = fake.ask(HANGS, flipped(HANGS)), fake.ask(SAME, flipped(SAME))
    assert drain(fake) == [(hung, None), (fine, True)]
    assert fake.num_timeouts == 1
    assert len(caplog.records) == 1


def test_pair_that_hung_once_is_not_tried_again(fake: Fence) -> None:
    assert fake.equivalent(HANGS, flipped(HANGS)) is None
    starts = fake._child.num_starts
    assert fake.equivalent(flipped(HANGS), HANGS) is None
    assert fake._child.num_starts == starts


def test_a_dropped_pair_is_held_to_its_limit_and_the_next_is_answered(fake: Fence) -> None:
    assert fake.equivalent("s+2", "2+s") is True  # loaded
    fake.drop([fake.ask(HANGS, flipped(HANGS))])
    drain(fake)
    assert fake.num_timeouts == 1 and fake.num_open == 0
    assert fake.equivalent(SAME, flipped(SAME)) is True


def test_answers_that_nobody_wants_do_not_come(fake: Fence) -> None:
    known, queued = fake.ask("3/4", "0.75"), fake.ask(SAME, flipped(SAME))
    last = fake.ask("s+2", "2+s")
    fake.drop([known, last])
    assert [ticket for ticket, _ in drain(fake)] == [queued]


def test_poll_returns_at_once_while_the_child_hangs(fake: Fence) -> None:
    fake.ask(HANGS, flipped(HANGS))
    durations = []
    while fake.num_open:
        start = time.perf_counter()
        fake.poll()
        durations.append(time.perf_counter() - start)
        time.sleep(0.001)
    # The poll that kills and relaunches forks a process; none waits out the pair's limit.
    assert sorted(durations)[-2] < 0.1
    assert max(durations) < 0.3


@pytest.mark.parametrize("answer", [DIES, RAISES])
def test_fence_outlives_a_child_that_fails(fake: Fence, answer: str) -> None:
    assert fake.equivalent(answer, flipped(answer)) is None
    assert fake.equivalent(SAME, flipped(SAME)) is True


def test_fence_outlives_a_killed_and_a_stopped_child(fake: Fence) -> None:
    assert fake.equivalent(SAME, flipped(SAME)) is True
    assert fake._child.pid is not None
    os.kill(fake._child.pid, signal.SIGKILL)
    assert fake.equivalent("s+2", "2+s") in (True, None)
    assert fake.equivalent("s+3", "3+s") is True
    os.kill(fake._child.pid, signal.SIGSTOP)
    assert fake.equivalent("s+4", "4+s") is None
    assert fake.equivalent("s+5", "5+s") is True


def test_loading_does_not_count_against_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import time\ndef make():\n    time.sleep(1.0)\n    return lambda pair: True\n"
    (tmp_path / "slow_loader.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fence = Fence(comparer="slow_loader:make", limit_s=0.3)
    try:
        assert fence.equivalent(SAME, flipped(SAME)) is True
    finally:
        fence.close()


def test_child_that_cannot_load_is_given_up(fake: Fence) -> None:
    fence = Fence(comparer="fake_comparer:fail")
    try:
        tickets = [fence.ask(f"{name}+1", f"1+{name}") for name in "abcdefg"]
        assert drain(fence) == [(ticket, None) for ticket in tickets]
        assert fence._child.num_starts == 3
    finally:
        fence.close()


def test_a_machine_without_room_for_a_process_costs_a_comparison_and_no_more(
    fake: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the poll nor the questions that come once there is room again."""

    def full(*args: object, **kwargs: object) -> None:
        raise BlockingIOError("no process left")

    with monkeypatch.context() as patched:
        patched.setattr("sglang_deepprune.child.subprocess.Popen", full)
        fake.ask(SAME, flipped(SAME))
        assert fake.poll() == [(0, None)]
    fake.ask("s+2", "2+s")
    assert drain(fake) == [(1, True)]
    fake.ask(HANGS, flipped(HANGS))
    time.sleep(0.4)
    with monkeypatch.context() as patched:
        patched.setattr("sglang_deepprune.child.subprocess.Popen", full)
        assert fake.poll() == [(2, None)]
    fake.ask("s+3", "3+s")
    assert drain(fake) == [(3, True)]


def test_memory_of_decided_pairs_is_bounded(fake: Fence) -> None:
    fake.max_decided = 2
    for digit in range(2, 6):
        assert fake.equivalent(f"s+{digit}", f"{digit}+s") is True
    assert len(fake._decided) == 2


def test_close_answers_what_is_open(fake: Fence) -> None:
    tickets = [fake.ask(HANGS, flipped(HANGS)), fake.ask(SAME, flipped(SAME))]
    fake.close()
    assert fake.poll() == [(ticket, None) for ticket in tickets]
    assert fake.num_open == 0
