"""Whatever a judge does, its worker never waits or invents a verdict. No server, no model."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_deepprune.batcher import is_device_lost
from sglang_deepprune.judging import JudgeWorker, child_env, default_load_limit_s
from sglang_deepprune.metrics import JUDGE_FAILURES, JUDGE_RESTARTS
from sglang_deepprune.types import ABSENT, JudgeResult, JudgeTask, Trace
from tests.unit.test_metrics import Tally

TESTS = str(Path(__file__).resolve().parent.parent)
BLOCKED_S = 0.25  # a poll that waits for a stopped or hung child takes far longer
SECRET = "the patient's name is"  # in every trace, so never in a log line


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeWorker]]:
    monkeypatch.setenv("PYTHONPATH", TESTS)
    workers: list[JudgeWorker] = []

    def build(name: str, deadline_s: float = 20.0, **settings: Any) -> JudgeWorker:
        settings.setdefault("backoff_s", 0.01)
        spec = name if name == "similarity" else f"python:faulty_judges:{name}"
        worker = JudgeWorker(spec, deadline_s, **settings)
        workers.append(worker)
        worker.start()
        return worker

    yield build
    for worker in workers:
        worker.close()


def task(group_id: str = "g", epoch: int = 0, text: str = "", num_traces: int = 3) -> JudgeTask:
    traces = tuple(
        Trace(i, f"{SECRET} {group_id} {i} {text}", 5, "tokens") for i in range(num_traces)
    )
    return JudgeTask(group_id, epoch, traces, (), (), 0.5, 32, 10, 0)


def drive(worker: JudgeWorker, is_done: Callable[[list[JudgeResult]], bool]) -> list[JudgeResult]:
    """Poll as a decode loop would. No single poll may have waited for the child."""
    results: list[JudgeResult] = []
    end = time.monotonic() + 30.0
    while not is_done(results):
        assert time.monotonic() < end, f"not within 30 s; results: {results}"
        start = time.perf_counter()
        results += worker.poll()
        assert time.perf_counter() - start < BLOCKED_S
        time.sleep(0.002)
    return results


def results_of(worker: JudgeWorker, num: int) -> list[JudgeResult]:
    return drive(worker, lambda results: len(results) >= num)


def poll_until(worker: JudgeWorker, is_true: Callable[[], bool]) -> None:
    assert drive(worker, lambda results: is_true()) == []


def pid_of(worker: JudgeWorker) -> int:
    pid = worker._child.pid
    assert pid is not None
    return pid


def assert_polls_are_quick(worker: JudgeWorker, num: int = 50) -> None:
    """The median, as a busy machine may preempt one; the longest, as one wait is too many."""
    spent = []
    for _ in range(num):
        start = time.perf_counter()
        assert worker.poll() == []
        spent.append(time.perf_counter() - start)
        time.sleep(0.001)
    assert statistics.median(spent) < 0.005
    assert max(spent) < BLOCKED_S


@pytest.mark.parametrize("name", ["same", "similarity"])
def test_a_group_is_clustered_in_the_child(make, name):
    worker = make(name)
    worker.submit(task(epoch=7))
    assert worker.num_pending == 1
    (result,) = results_of(worker, 1)
    assert (result.group_id, result.epoch, result.error) == ("g", 7, None)
    assert [a.sibling for a in result.assignments] == [0, 1, 2]
    assert [a.cluster for a in result.assignments][:2] == [0, 0]
    assert result.num_pairs > 0 and result.num_tokens > 0 and result.elapsed_ms > 0
    assert worker.is_ready and worker.num_pending == 0


def test_waiting_groups_go_as_one_batch_and_a_group_keeps_its_order(make):
    worker = make("same")
    for submitted in (task("a", 1), task("b", 1), task("a", 2), task("c", 1)):
        worker.submit(submitted)
    order = [(result.group_id, result.epoch) for result in results_of(worker, 4)]
    assert order == [("a", 1), ("b", 1), ("c", 1), ("a", 2)]


def test_many_slow_groups_are_a_queue_and_not_a_time_out(make):
    """Together they need several deadlines; the child answers what fits, the rest follows."""
    worker = make("slow", deadline_s=1.5)
    names = [f"g{i}" for i in range(8)]
    for name in names:
        worker.submit(task(name))
    results = results_of(worker, 8)
    assert [result.group_id for result in results] == names
    assert [result.error for result in results] == [None] * 8
    assert worker._child.num_starts == 1


def test_a_batch_is_bounded_by_its_text(make):
    worker = make("same")
    worker.submit(task("a", text="x" * 700_000, num_traces=1))
    worker.submit(task("b", text="x" * 700_000, num_traces=1))
    worker.submit(task("a", 1, num_traces=1))
    worker.submit(task("c", num_traces=1))
    assert [t.group_id for t in worker._take()] == ["a", "c"]
    assert [(t.group_id, t.epoch) for t in worker._take()] == [("b", 0), ("a", 1)]


def test_a_judge_without_verdicts_places_nobody(make, caplog):
    worker = make("no_verdict")
    worker.submit(task())
    (result,) = results_of(worker, 1)
    assert result.error is None
    clusters = [a.cluster for a in result.assignments]
    assert clusters.count(ABSENT) == len(clusters) - 1  # the first had nothing to compare with


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raising", "ValueError: raised at faulty_judges.py:"),
        ("wrong_shape", "JudgeError: "),
        ("wrong_dtype", "JudgeError: "),
        ("out_of_range", "JudgeError: "),
        ("nothing", "JudgeError: "),
    ],
)
def test_a_judge_that_fails_a_task_gives_errors_is_logged_once_and_lives_on(
    make, caplog, name, reason
):
    worker = make(name)
    worker.meter = tally = Tally()
    for epoch in range(3):
        worker.submit(task(epoch=epoch))
        (result,) = results_of(worker, 1)
        assert result.error is not None and result.error.startswith(reason)
        assert result.assignments == ()
        assert SECRET not in result.error
    assert len(caplog.records) == 1
    assert SECRET not in caplog.text
    assert worker._child.num_starts == 1 and not worker.is_disabled
    assert tally.of(JUDGE_FAILURES) == {"task": 3} and not tally.of(JUDGE_RESTARTS)


def test_one_bad_group_does_not_spoil_the_batch(make):
    worker = make("raising_for_left_out")
    worker.submit(task("good"))
    worker.submit(task("bad", text="unreadable"))
    worker.submit(task("fine"))
    errors = {result.group_id: result.error for result in results_of(worker, 3)}
    assert errors["good"] is None and errors["fine"] is None
    assert errors["bad"] is not None and errors["bad"].startswith("KeyError")


def test_a_hung_judge_is_killed_at_its_deadline_and_its_successor_answers(
    make, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("FAULTY_JUDGES_FLAG", str(tmp_path / "hung"))
    worker = make("hanging_once", deadline_s=1.0)
    poll_until(worker, lambda: worker.is_ready)
    worker.submit(task("lost"))
    worker.poll()
    worker.submit(task("patient"))  # not handed over yet: not lost either
    first, second = results_of(worker, 2)
    assert (first.group_id, first.error) == ("lost", "no answer within 1 s")
    assert (second.group_id, second.error) == ("patient", None)
    assert worker._child.num_starts == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "deadline_s"), [("hanging", 0.1), ("ending", 20.0), ("exiting", 20.0)]
)
def test_a_judge_that_always_fails_its_process_is_switched_off(make, caplog, name, deadline_s):
    worker = make(name, deadline_s, max_restarts=2)
    worker.meter = tally = Tally()
    for epoch in range(3):
        worker.submit(task(epoch=epoch))
        (result,) = results_of(worker, 1)
        assert result.error is not None and result.assignments == ()
    assert worker.is_disabled and not worker.is_ready
    assert worker._child.num_starts == 3
    failures = tally.of(JUDGE_FAILURES)
    assert failures.pop("off") == 1 and list(failures.values()) == [3]
    assert set(failures) <= {"end", "deadline"} and tally.of(JUDGE_RESTARTS) == {"": 2}
    worker.submit(task())
    (result,) = worker.poll()
    assert result.error is not None and "off after 2 restarts" in result.error
    assert len(caplog.records) == 2  # the fault, and that it is off
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("name", "load_limit_s", "reason"),
    [
        ("unloadable", 60.0, "cannot load: RuntimeError: no weights here"),
        ("not_a_judge", 60.0, "cannot load: TypeError"),
        ("never_loaded", 0.5, "cannot load: not ready within 0.5 s"),
    ],
)
def test_a_judge_that_cannot_load_gives_errors_and_is_switched_off(
    make, caplog, name, load_limit_s, reason
):
    worker = make(name, max_restarts=1, load_limit_s=load_limit_s)
    worker.meter = tally = Tally()
    worker.submit(task("a"))
    worker.submit(task("b"))
    results = results_of(worker, 2)
    assert all(result.error is not None and result.error.startswith(reason) for result in results)
    poll_until(worker, lambda: worker.is_disabled)
    assert worker._child.num_starts == 2
    assert len(caplog.records) == 2
    kind = "load_time" if name == "never_loaded" else "load"
    assert tally.of(JUDGE_FAILURES) == {kind: 2, "off": 1}


def test_large_weights_have_longer_to_load_and_so_has_what_is_compiled(tmp_path):
    usual = default_load_limit_s(f"llm:{tmp_path}")
    assert usual == default_load_limit_s("probe:" + "x" * 5000) == default_load_limit_s("none")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(8 * 10**9)  # holds nothing
    (tmp_path / "consolidated.safetensors").touch()
    assert default_load_limit_s(f"llm:{tmp_path}") == usual + 160
    assert default_load_limit_s(f"llm:{tmp_path}", "flashinfer") == usual + 760
    assert JudgeWorker(f"llm:{tmp_path}", 1.0).load_limit_s == usual + 160


@pytest.mark.parametrize("name", ["babbling", "quoting"])
def test_a_reply_that_is_no_answer_is_a_fault(make, caplog, name):
    worker = make("same", max_restarts=0, factory=f"faulty_judges:{name}")
    worker.submit(task())
    (result,) = results_of(worker, 1)
    assert result.error is not None and SECRET not in result.error
    assert worker.is_disabled
    assert SECRET not in caplog.text


def test_relaunches_wait_longer_each_time(make):
    worker = make("unloadable", max_restarts=3, backoff_s=0.2)
    starts: list[float] = []

    def is_off(_: list[JudgeResult]) -> bool:
        if worker._child.num_starts > len(starts):
            starts.append(time.monotonic())
        return worker.is_disabled

    drive(worker, is_off)
    pauses = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.2, 0.4, 0.8), strict=True))


def test_restarts_count_only_in_a_row(make):
    worker = make("same", max_restarts=1)
    for round_ in range(3):
        worker.submit(task(epoch=round_))
        (result,) = results_of(worker, 1)
        assert result.error is None
        os.kill(pid_of(worker), signal.SIGKILL)
        poll_until(worker, lambda: not worker.is_ready)
    assert not worker.is_disabled


def test_poll_and_submit_do_not_wait_for_a_stopped_child(make):
    worker = make("same", deadline_s=60.0)
    poll_until(worker, lambda: worker.is_ready)
    os.kill(pid_of(worker), signal.SIGSTOP)
    worker.submit(task(text="x" * 1_000_000))  # more than the socket takes
    assert_polls_are_quick(worker)
    os.kill(pid_of(worker), signal.SIGCONT)
    (result,) = results_of(worker, 1)
    assert result.error is None


def test_where_cores_are_short_a_judge_waits_for_the_server(make):
    worker = make("same")
    poll_until(worker, lambda: worker.is_ready)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid_of(worker)) > own


def test_poll_does_not_wait_for_a_hung_judge(make):
    worker = make("hanging", deadline_s=60.0)
    poll_until(worker, lambda: worker.is_ready)
    worker.submit(task())
    assert_polls_are_quick(worker)


def test_a_stopped_child_misses_its_deadline_and_the_relaunch_does_not_wait_either(make):
    worker = make("same", deadline_s=0.2)
    poll_until(worker, lambda: worker.is_ready)
    os.kill(pid_of(worker), signal.SIGSTOP)
    worker.submit(task())
    results = drive(worker, lambda results: bool(results) and worker.is_ready)
    assert [result.error for result in results] == ["no answer within 0.2 s"]


def test_a_dropped_group_has_no_result_wherever_it_was(make):
    worker = make("slow")
    poll_until(worker, lambda: worker.is_ready)
    worker.submit(task("handed over"))
    worker.submit(task("kept"))
    worker.poll()
    worker.submit(task("waiting"))
    for group_id in ("handed over", "waiting"):
        worker.drop(group_id)
    worker.submit(task("handed over", epoch=5))  # a new group of that name
    results = results_of(worker, 2)
    assert [(r.group_id, r.epoch) for r in results] == [("kept", 0), ("handed over", 5)]


def test_the_process_is_told_of_ended_groups_that_it_knows(make):
    worker = make("forgetful")
    worker.submit(task("a"))
    (result,) = results_of(worker, 1)
    assert {one.cluster for one in result.assignments} == {0, 1, 2}
    worker.drop("never asked about")
    worker.drop("a")
    poll_until(worker, lambda: not worker._child.is_busy and not worker._ended)
    worker.submit(task("b"))
    (result,) = results_of(worker, 1)
    # The judge says in its scores whom it forgot: all of "b" is then one cluster.
    assert {one.cluster for one in result.assignments} == {0}


def test_a_judge_is_idle_once_it_has_loaded_answered_and_been_told(make):
    worker = make("slow")
    assert not worker.is_idle  # it loads
    poll_until(worker, lambda: worker.is_idle)
    worker.submit(task("a"))
    assert not worker.is_idle
    results_of(worker, 1)
    assert worker.is_idle
    worker.submit(task("b"))
    worker.poll()
    worker.drop("b")
    assert not worker.is_idle  # it still reads for a group that is gone
    poll_until(worker, lambda: worker.is_idle)
    assert not worker._ended and not worker._child.is_busy
    worker.close()
    assert worker.is_idle


def test_half_a_request_is_sent_whole_though_its_group_has_ended(make):
    """Left where it was, the process would be killed at the next group for not answering."""
    worker = make("same", deadline_s=2.0)
    poll_until(worker, lambda: worker.is_idle)
    os.kill(pid_of(worker), signal.SIGSTOP)
    worker.submit(task(text="x" * 2_000_000))  # more than the socket takes
    worker.poll()
    assert worker._child._out
    worker.drop("g")
    os.kill(pid_of(worker), signal.SIGCONT)
    poll_until(worker, lambda: worker.is_idle)
    assert worker._num_faults == 0 and worker.is_ready


def test_more_groups_than_the_queue_holds_are_refused(make, monkeypatch, caplog):
    monkeypatch.setattr("sglang_deepprune.judging._MAX_WAITING", 2)
    worker = make("hanging", deadline_s=60.0)
    worker.meter = tally = Tally()
    for name in "abcd":
        worker.submit(task(name))
    refused = worker.poll()
    assert [result.group_id for result in refused] == ["c", "d"]
    assert worker.num_pending == 2
    assert len(caplog.records) == 1
    assert tally.of(JUDGE_FAILURES) == {"queue": 2}


def test_close_ends_the_process_and_later_tasks_fail(make):
    worker = make("hanging")
    poll_until(worker, lambda: worker.is_ready)
    pid = pid_of(worker)
    worker.submit(task())
    worker.poll()
    worker.close()
    assert worker.num_pending == 0 and not worker.is_ready
    worker.submit(task())
    (result,) = worker.poll()
    assert result.error == "the judge is closed"
    end = time.monotonic() + 5.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        worker._child.poll()  # reaps
    assert not Path(f"/proc/{pid}").exists()


def test_a_gpu_that_has_failed_for_good_costs_a_process_and_not_the_judge(
    make, monkeypatch, tmp_path
):
    monkeypatch.setenv("FAULTY_JUDGES_FLAG", str(tmp_path / "broken"))
    worker = make("device_lost_once")
    worker.meter = tally = Tally()
    worker.submit(task("a"))
    (lost,) = results_of(worker, 1)
    assert lost.error == "the child has ended"
    worker.submit(task("b"))
    (result,) = results_of(worker, 1)
    assert result.error is None and tally.of(JUDGE_FAILURES) == {"end": 1}


def test_a_kernel_that_breaks_the_gpu_at_load_costs_the_kernels_and_not_the_judge(make, caplog):
    worker = make("losing_the_device_by_a_kernel", max_restarts=0)
    worker.submit(task())
    assert worker.wait_loaded() and worker._child.num_starts == 2
    (result,) = results_of(worker, 1)
    assert result.error is None
    (record,) = caplog.records
    assert "it loads again without kernels" in record.getMessage()


def test_a_gpu_that_fails_without_kernels_too_is_a_fault_as_any(make):
    worker = make("losing_the_device", max_restarts=1)
    worker.meter = tally = Tally()
    poll_until(worker, lambda: worker.is_disabled)
    assert worker._child.num_starts == 3 and tally.of(JUDGE_FAILURES) == {"load": 2, "off": 1}


def test_which_errors_of_a_gpu_are_for_good():
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert is_device_lost(lost)
    assert not is_device_lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not is_device_lost(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_device_lost(RuntimeError("shapes do not match"))
    triton = "Triton Error [CUDA]: {}"
    assert is_device_lost(RuntimeError(triton.format("an illegal memory access was encountered")))
    assert not is_device_lost(RuntimeError(triton.format("out of memory")))


def test_before_torch_2_8_they_are_told_by_their_text(monkeypatch):
    monkeypatch.delattr(torch, "AcceleratorError")
    assert is_device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_device_lost(RuntimeError("CUDA out of memory"))
    assert not is_device_lost(ValueError("CUDA error"))


def test_only_a_judge_of_your_own_may_see_gpus():
    assert child_env("similarity")["CUDA_VISIBLE_DEVICES"] == ""
    assert child_env("encoder:/models/x")["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in child_env("python:mine:judge")


@pytest.fixture(autouse=True)
def _capture(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="sglang_deepprune.judging")
