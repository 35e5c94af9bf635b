"""The judge beside the engine: a child process that scores and clusters, and its keeper.

Child side: `make_worker` loads the judge and answers batches of JudgeTasks (`batcher.py`).
Parent side: `JudgeWorker` queues, hands over, keeps the deadline and restarts. It runs on the
scheduler's thread, so no method of it waits: not for the judge, not for a back-off.

Every fault has one outcome, a JudgeResult with `error`: no verdict, prune nothing. A judge that
raises for one task spoils that task alone. A process that hangs, dies, cannot load or answers
nonsense is killed and launched anew after a back-off; `max_restarts` restarts in a row without an
answered batch in between turn the judge off for good. Each kind of fault is logged once, and no
log line or error text holds a request's text.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeGuard

from sglang_deepprune.batcher import Batcher, DeviceLost
from sglang_deepprune.child import Child
from sglang_deepprune.judges import OWN, is_remote_model, load_judge, memory
from sglang_deepprune.judges import attention as chosen_attention
from sglang_deepprune.judges.gpu import PLAIN, VISIBLE, visible_gpu
from sglang_deepprune.metrics import JUDGE_FAILURES, JUDGE_RESTARTS, Failure, Meter
from sglang_deepprune.types import JudgeResult, JudgeTask

LOAD_LIMIT_S = 120.0  # and what reading the weights may take
DISK_BYTES_PER_S = 50e6  # of a slow one
JIT_LIMIT_S = 600.0  # of FlashInfer's kernels, which no cache has yet
DOWNLOAD_LIMIT_S = 3600.0  # of a model that the hub has to send first
_MAX_WAITING = 1024  # tasks; beyond it the server asks more than any judge can answer
_MAX_BATCH_CHARS = 1_000_000  # bounds what one poll pickles on the scheduler's thread
_BUDGET_SHARE = 0.5  # of the deadline, after which the child starts no further task of a batch
_FIRST_BACKOFF_S = 0.5
_NICENESS = 5  # of the judge: where cores are short, loading and judging wait for the server
_LOG = logging.getLogger(__name__)

Answer = Callable[[tuple[list[JudgeTask], list[str]]], list[JudgeResult]]


class KernelsFailed(Exception):
    """A kernel that was tried while the judge loaded has broken its GPU's context. The parent knows
    it by its name."""


def make_worker(spec: str, budget_s: float = math.inf) -> Answer:
    """Child side: (tasks, groups that have ended) -> results of the first tasks (`batcher.py`)."""
    os.nice(_NICENESS)
    try:
        batcher = Batcher(load_judge(spec), budget_s)
    except DeviceLost as error:
        raise KernelsFailed(str(error)) from error

    def answer(request: tuple[list[JudgeTask], list[str]]) -> list[JudgeResult]:
        try:
            return batcher(*request)
        except DeviceLost as error:
            # At once: to take a broken CUDA context down in order may hang. The parent starts anew.
            print(f"deepprune: the judge's GPU has failed ({error})", file=sys.stderr, flush=True)
            os._exit(1)

    return answer


def child_env(
    spec: str, device: str = "cpu", memory_mib: int = 0, attention: str = "", gpu: str = ""
) -> dict[str, str]:
    """One thread; no network but for a judge that lies there; and no GPU but the one that was given
    to the judge. A judge of your own sees them all: it may want one. `gpu`: what `device` was found
    to be (`judges.gpu.visible_gpu`); unset, it is looked up among what this process sees."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = dict.fromkeys(threads, "1") | {"TOKENIZERS_PARALLELISM": "false"}
    env[memory.ENV] = str(memory_mib)
    env[chosen_attention.ENV] = attention
    if not is_remote_model(spec):
        env["HF_HUB_OFFLINE"] = "1"
    if spec.partition(":")[0] != OWN:
        # A CUDA context would take memory that the server has given to its KV cache.
        env[VISIBLE] = "" if device == "cpu" else gpu or visible_gpu(device)
    return env


def default_load_limit_s(spec: str, attention: str = "") -> float:
    """Seconds that a judge has to load. One on a GPU is off for good after them."""
    compile_s = JIT_LIMIT_S if attention == chosen_attention.FLASHINFER else 0.0
    if is_remote_model(spec):
        return DOWNLOAD_LIMIT_S + compile_s
    _, _, path = spec.partition(":")
    return LOAD_LIMIT_S + memory.file_bytes(path) / DISK_BYTES_PER_S + compile_s


class JudgeWorker:
    """Parent side: `submit` tasks, `poll` for results. One result a task, or none after `drop`."""

    def __init__(
        self,
        spec: str,
        deadline_s: float,
        max_restarts: int = 5,
        *,
        factory: str = "sglang_deepprune.judging:make_worker",
        backoff_s: float = _FIRST_BACKOFF_S,
        load_limit_s: float | None = None,
        device: str = "cpu",
        memory_mib: int = 0,
        attention: str = "",
        gpu: str = "",
    ):
        self.spec = spec
        self.deadline_s = deadline_s
        self.max_restarts = max_restarts
        self.backoff_s = backoff_s
        default_s = default_load_limit_s(spec, attention)
        self.load_limit_s = default_s if load_limit_s is None else load_limit_s
        self.meter = Meter()
        env = child_env(spec, device, memory_mib, attention, gpu)
        self._child = Child(factory, (spec, deadline_s * _BUDGET_SHARE), env=env)
        self._waiting: deque[JudgeTask] = deque()
        self._batch: list[JudgeTask] = []  # handed over
        self._forgotten: set[str] = set()  # groups of `_batch` that were dropped
        self._ended: list[str] = []  # groups that the process may forget, and was not told of yet
        self._seen: set[str] = set()  # groups that it was asked about, and that have not ended
        self._done: list[JudgeResult] = []  # for the next poll
        self._num_faults = 0  # in a row
        self._launch_at = 0.0
        self._off: str | None = None  # why no process is launched any more
        self._logged: set[str] = set()

    @property
    def is_ready(self) -> bool:
        """The judge is loaded and answers."""
        return self._child.is_ready

    @property
    def is_disabled(self) -> bool:
        """Given up on, or closed: every task is answered with an error."""
        return self._off is not None

    @property
    def is_idle(self) -> bool:
        """No `poll` is due: nothing waits to be sent or answered, and the process has loaded."""
        child = self._child
        is_free = child.is_ready and not child.is_busy
        return self.is_disabled or (is_free and not self._ended and not self._waiting)

    @property
    def num_pending(self) -> int:
        """Tasks that wait or are with the judge."""
        return len(self._waiting) + len(self._batch)

    def start(self) -> None:
        """Launch the process. It loads while the server goes on; tasks may be submitted."""
        if self._child.pid is None and not self.is_disabled:
            self._launch()

    def wait_loaded(self) -> bool:
        """Wait until the judge is loaded, at a server's start alone. One that cannot load is off
        for good: the memory that it was to have is the server's by then."""
        while self._child.pid is not None and not self._child.is_ready:
            time.sleep(0.05)
            self._receive()
            self._keep_time()
        if not self._child.is_ready:
            self.close()
            self._off = "the judge is off: it could not load before the server"
        return self._child.is_ready

    def submit(self, task: JudgeTask) -> None:
        """Queue one window of one group. Its result comes from a later `poll`."""
        if self._off is not None:
            self._fail([task], self._off)
        elif len(self._waiting) >= _MAX_WAITING:
            reason = f"{_MAX_WAITING} groups wait for the judge; it is too slow for this load"
            self._warn(Failure.QUEUE, reason)
            self._fail([task], reason)
        else:
            self._waiting.append(task)

    def poll(self) -> list[JudgeResult]:
        """Results since the last poll; hands over what waits. To be called at every step."""
        if self._off is None:
            self._receive()
            self._keep_time()
            self._revive()
            self._hand_over()
        done, self._done = self._done, []
        return done

    def drop(self, group_id: str) -> None:
        """Forget a group: nothing that was submitted for it so far will have a result."""
        self._waiting = deque(task for task in self._waiting if task.group_id != group_id)
        self._done = [result for result in self._done if result.group_id != group_id]
        if any(task.group_id == group_id for task in self._batch):
            self._forgotten.add(group_id)
        if group_id in self._seen:
            self._seen.discard(group_id)
            self._ended.append(group_id)

    def close(self) -> None:
        """End the process and forget all tasks."""
        self._off = "the judge is closed"
        self._child.kill()
        self._waiting.clear()
        self._done.clear()
        self._end_batch()

    def _receive(self) -> None:
        is_loading = not self._child.is_ready
        reply = self._child.poll()
        if reply is None:
            return
        if reply.error is None:
            self._accept(reply.value)
        elif self._child.pid is None:
            kind = reply.error.partition(":")[0]
            if is_loading and kind == KernelsFailed.__name__ and PLAIN not in self._child.env:
                # At once and as no fault: who waits for it to load waits on.
                _LOG.warning("judge %s: %s; it loads again without kernels", self.spec, reply.error)
                self._child.env[PLAIN] = "1"
                self._launch()
            elif is_loading:
                self._fault(Failure.LOAD, f"cannot load: {reply.error}", is_loading=True)
            else:
                self._fault(Failure.END, reply.error)
        else:
            # Raised outside any task, by pickling for one. Its message may quote a text.
            self._fault(Failure.REPLY, f"no answer: {reply.error.partition(':')[0]}")

    def _keep_time(self) -> None:
        child = self._child
        if child.pid is None:
            return
        if not child.is_ready and child.elapsed_s > self.load_limit_s:
            reason = f"cannot load: not ready within {self.load_limit_s:g} s"
            self._fault(Failure.LOAD_TIME, reason, is_loading=True)
        elif child.is_ready and child.is_busy and child.elapsed_s > self.deadline_s:
            self._fault(Failure.DEADLINE, f"no answer within {self.deadline_s:g} s")

    def _revive(self) -> None:
        if self._off is None and self._child.pid is None and time.monotonic() >= self._launch_at:
            self._launch()

    def _hand_over(self) -> None:
        child = self._child
        # A child that died since the last poll is that poll's to report: `Child.start` would
        # launch it anew past the back-off.
        is_free = child.is_ready and not child.is_busy and child.is_alive
        if is_free and (self._waiting or self._ended):
            self._batch = self._take()
            self._seen |= {task.group_id for task in self._batch}
            ended, self._ended = self._ended, []
            child.start((self._batch, ended))

    def _take(self) -> list[JudgeTask]:
        """The first waiting task of each group, up to a batch's size."""
        batch: list[JudgeTask] = []
        later: deque[JudgeTask] = deque()
        groups: set[str] = set()
        num_chars = 0
        for task in self._waiting:
            size = sum(len(trace.text) for trace in task.traces + task.members)
            if task.group_id in groups or (batch and num_chars + size > _MAX_BATCH_CHARS):
                later.append(task)
            else:
                batch.append(task)
                num_chars += size
            groups.add(task.group_id)  # a group's tasks keep their order
        self._waiting = later
        return batch

    def _accept(self, results: object) -> None:
        if not _is_answer(results, self._batch):
            self._fault(Failure.REPLY, "the reply does not belong to the batch")
            return
        self._num_faults = 0
        unanswered = [t for t in self._batch[len(results) :] if t.group_id not in self._forgotten]
        for result in results:
            if result.error is not None:
                self._warn(Failure.TASK, result.error)
            if result.group_id not in self._forgotten:
                self._done.append(result)
        self._waiting.extendleft(reversed(unanswered))
        self._end_batch()

    def _fault(self, failure: Failure, reason: str, *, is_loading: bool = False) -> None:
        """The process is of no use: answer for it, and plan its relaunch or give up."""
        self._child.kill()
        self._warn(failure, reason)
        lost = [task for task in self._batch if task.group_id not in self._forgotten]
        if is_loading:  # whoever waits has waited for a whole load already
            lost += self._waiting
            self._waiting.clear()
        self._end_batch()
        self._fail(lost, reason)
        self._num_faults += 1
        if self._num_faults > self.max_restarts:
            self._off = f"the judge is off after {self.max_restarts} restarts in a row: {reason}"
            self._warn(Failure.OFF, self._off)
            self._fail(self._waiting, self._off)
            self._waiting.clear()
        else:
            pause = self.backoff_s * 2 ** (self._num_faults - 1)
            self._launch_at = time.monotonic() + pause

    def _launch(self) -> None:
        self._ended.clear()  # a new process knows of no group
        self._seen.clear()
        if self._child.num_starts:
            self.meter.count(JUDGE_RESTARTS)
        try:
            self._child.launch()
        except OSError as error:  # out of processes, memory or descriptors
            self._fault(Failure.LAUNCH, f"cannot launch: {error}", is_loading=True)

    def _end_batch(self) -> None:
        self._batch = []
        self._forgotten.clear()

    def _fail(self, tasks: Iterable[JudgeTask], reason: str) -> None:
        self._done += [
            JudgeResult(task.group_id, task.epoch, error=reason, window=task.window)
            for task in tasks
        ]

    def _warn(self, failure: Failure, reason: str) -> None:
        """Counted each time, logged once a kind (and error of a task), so that a judge that fails
        at every window does not fill the log."""
        self.meter.count(JUDGE_FAILURES, value=failure)
        kind = reason.partition(":")[0] if failure is Failure.TASK else failure.value
        if kind not in self._logged:
            self._logged.add(kind)
            _LOG.warning("judge %s gives no verdict: %s", self.spec, reason)


def _is_answer(results: object, batch: list[JudgeTask]) -> TypeGuard[list[JudgeResult]]:
    """Whether these are results of the batch's first tasks, in order."""
    return (
        isinstance(results, list)
        and bool(results) == bool(batch)
        and len(results) <= len(batch)
        and all(
            isinstance(result, JudgeResult)
            and (result.group_id, result.epoch, result.window)
            == (task.group_id, task.epoch, task.window)
            for result, task in zip(results, batch, strict=False)
        )
    )
