"""The judge's side of the child process: the questions of many groups, asked together.

A window of one group asks in rounds (a trace is placed before the next one is compared, and with
sequential comparisons every pair waits for the one before it). One group at a time, a language
model reads one or a few prompts a pass. So several groups take their rounds side by side, and each
round is one call of the judge, which packs it by its own token budget.

Groups come in the order in which they were handed over; one batch holds one window of each
(`judging.py`), so no group waits for two windows of another. How many go side by side follows from
how fast the judge was so far: what is begun should end within the time that is left.

Only a judge whose scores do not depend on the company in a call says so (`mixes_groups = True`).
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_deepprune.clustering import JudgeError, Placed, checked, placing
from sglang_deepprune.types import JudgeResult, JudgeTask, Pair

MAX_CHUNK_TOKENS = 65_536  # of the pairs that groups side by side may ask about
CALL_PAIRS = 64  # of one call at most: what a process does between two looks at the clock
_CALL_SHARE = 0.5  # of the time left, that a call is meant to take at most
_PATIENCE = 1.8  # times the budget, half the deadline: who still asks then has no verdict
_KEPT_RATE = 0.5  # of the old rate, when a chunk or a call has told a new one
# What breaks a CUDA context for good, as plain RuntimeErrors of Triton and FlashInfer name it.
_FOR_GOOD = ("illegal memory access", "misaligned address", "illegal instruction",
             "unspecified launch failure", "device-side assert")  # fmt: skip


class Batcher:
    """Answers batches of tasks with one judge.

    Parameters
    ----------
    judge : Judge
        With `mixes_groups = True` it gets the pairs of several groups in one call; with a method
        `forget(group_ids)` it is told which groups have ended.
    budget_s : float
        Seconds after which no further task of a batch is begun.
    """

    def __init__(self, judge: Any, budget_s: float = math.inf):
        self.judge = judge
        self.budget_s = budget_s
        self.is_mixing = bool(getattr(judge, "mixes_groups", False))
        self._stop_s = math.inf  # when the batch at hand must be answered
        self._num_calls = 0  # of the batch at hand
        self._quickest_s = 0.0  # of its calls; 0: none has ended
        self._pair_s = 0.0  # seconds a pair; 0: not known yet. A process keeps it across batches
        self._rate = 0.0  # tokens a second, as `expected_tokens` counts them; 0: not known yet

    def __call__(self, tasks: Sequence[JudgeTask], ended: Sequence[str] = ()) -> list[JudgeResult]:
        """Results of a batch's first tasks: at least one, then as many as the budget allows.

        What is left over comes back with a later batch, so that many groups at once make a queue
        and not a time-out.
        """
        if ended and hasattr(self.judge, "forget"):
            self.judge.forget(ended)
        begin = time.monotonic()
        end, self._stop_s = begin + self.budget_s, begin + _PATIENCE * self.budget_s
        self._num_calls, self._quickest_s = 0, 0.0
        if hasattr(self.judge, "until"):
            self.judge.until = self._stop_s
        results: list[JudgeResult] = []
        while len(results) < len(tasks):
            left_s = end - time.monotonic()
            # What would not end in time waits for the next batch, and has all of that one's.
            if results and left_s <= self._expected_s(tasks[len(results)]):
                break
            chunk = self._chunk(tasks[len(results) :], left_s)
            results += self._answer(chunk)
        return results

    def _chunk(self, tasks: Sequence[JudgeTask], left_s: float) -> Sequence[JudgeTask]:
        """The first tasks that may go side by side: one at least."""
        if not self.is_mixing or not self._rate:
            return tasks[:1]
        room = min(MAX_CHUNK_TOKENS, self._rate * left_s)
        count, used = 1, expected_tokens(tasks[0])
        while count < len(tasks) and used + (more := expected_tokens(tasks[count])) <= room:
            count, used = count + 1, used + more
        return tasks[:count]

    def _expected_s(self, task: JudgeTask) -> float:
        return expected_tokens(task) / self._rate if self._rate else 0.0

    def _answer(self, tasks: Sequence[JudgeTask]) -> list[JudgeResult]:
        start = time.monotonic()
        # Scores that depend on their company are those of the full loop's calls, and of no others.
        asked = tasks if self.is_mixing else [replace(task, compare="full") for task in tasks]
        runs = [_Run(task) for task in asked]
        for run in runs:
            run.begin()
        while asking := [run for run in runs if run.asked]:
            try:
                self._round(asking)
            except _OutOfTime:
                # A client chooses how much is compared: it must not cost the process, which ends
                # at the deadline, nor after a few of these everybody the judge.
                for run in asking:
                    run.give_up()
                break
        spent_s = time.monotonic() - start
        if any(run.num_asked for run in runs) and spent_s > 0:
            rate = sum(map(expected_tokens, tasks)) / spent_s
            self._rate = _KEPT_RATE * self._rate + (1 - _KEPT_RATE) * rate if self._rate else rate
        return [run.result() for run in runs]

    def _round(self, runs: Sequence[_Run]) -> None:
        """One call for what all of them ask; where that fails, one call each."""
        if len(runs) == 1:
            runs[0].ask(self._scored)
            return
        start = time.monotonic()
        asked = [pair for run in runs for pair in run.asked]
        scores: list[float] = []
        try:
            scores = self._scored(asked)
        except _OutOfTime:
            raise
        except Exception:
            # Nothing is tried again in here: the error holds the frames of the failed pass, and
            # these its tensors, which a GPU that has just run out of memory needs back first.
            pass
        if not scores:  # whoever's fault it is, it stays with one group
            for run in runs:
                run.ask(self._scored)
            return
        share_s = (time.monotonic() - start) / len(asked)
        for run in runs:
            own, scores = scores[: len(run.asked)], scores[len(run.asked) :]
            run.learn(own, share_s * len(own))

    def _scored(self, pairs: Sequence[Pair]) -> list[float]:
        """[num_pairs] the judge's scores, in calls that should end in time. Raises `_OutOfTime`,
        `DeviceLost`."""
        scores: list[float] = []
        if not self._pair_s and not self.is_mixing and len(pairs) > 1:
            # Its speed is told by one pair. The score is thrown away: it may depend on the company
            # in a call, which would be another one in each process's first call.
            self._call(pairs[:1])
        while len(scores) < len(pairs):
            left_s = self._stop_s - time.monotonic()
            size = self._call_size(len(pairs) - len(scores), left_s)
            scores += self._call(pairs[len(scores) : len(scores) + size])
        return scores

    def _call(self, pairs: Sequence[Pair]) -> list[float]:
        """[num_pairs] the judge's scores of one call, whose speed is learnt."""
        start = time.monotonic()
        self._num_calls += 1
        try:
            found = self.judge.score(pairs)
        except Exception as error:
            raise_if_lost(error)
            raise
        scores = checked(found, len(pairs))
        self._learn(len(pairs), time.monotonic() - start)
        return scores

    def _call_size(self, num_asked: int, left_s: float) -> int:
        """Pairs of the next call, by how fast the judge was so far, and one of a judge that nobody
        knows: only one too slow for `CALL_PAIRS` is asked in other calls each time. Raises
        `_OutOfTime` where not even one would end in time: but the first of a batch is always asked,
        as what is known of the judge may be wrong."""
        # A call has its price, however few pairs it holds.
        if self._num_calls and max(self._pair_s, self._quickest_s) > left_s:
            raise _OutOfTime("more comparisons than its time allows")
        if not self._pair_s:
            return min(num_asked, 1)
        return int(min(num_asked, CALL_PAIRS, max(1.0, _CALL_SHARE * left_s / self._pair_s)))

    def _learn(self, num_pairs: int, spent_s: float) -> None:
        self._quickest_s = min(self._quickest_s or spent_s, spent_s)
        pair_s = max(spent_s / num_pairs, 1e-9)
        old = self._pair_s or pair_s
        self._pair_s = _KEPT_RATE * old + (1 - _KEPT_RATE) * pair_s


class DeviceLost(BaseException):
    """The judge's GPU has failed for as long as its process lives. No `Exception`: it is no single
    task's fault."""


class _OutOfTime(JudgeError):
    """The judge works, and too much was asked of it."""


@dataclass(slots=True)
class _Run:
    """One task on its way: whatever is raised stays with it."""

    task: JudgeTask
    asked: list[Pair] = field(default_factory=list)  # open questions; none: it is over
    num_asked: int = 0
    spent_s: float = 0.0
    placed: Placed = ((), 0, 0)
    error: str | None = None
    steps: Any = None

    def begin(self) -> None:
        self.steps = placing(self.task)
        self._go(None)

    def ask(self, scored: Callable[[Sequence[Pair]], list[float]]) -> None:
        """Calls of its own."""
        start = time.monotonic()
        try:
            scores = scored(self.asked)
        except _OutOfTime:
            self.give_up()
            return
        except Exception as error:
            self.asked, self.error = [], reason(error)
            self.spent_s += time.monotonic() - start
            return
        self.learn(scores, time.monotonic() - start)

    def learn(self, scores: list[float], spent_s: float) -> None:
        self.spent_s += spent_s
        self._go(scores)

    def give_up(self) -> None:
        self.asked, self.error = [], "JudgeError: more comparisons than its time allows"

    def _go(self, scores: list[float] | None) -> None:
        start = time.monotonic()
        self.asked = []
        try:
            self.asked = self.steps.send(scores)
            self.num_asked += len(self.asked)
        except StopIteration as end:
            self.placed = end.value
        except Exception as error:
            self.error = reason(error)
        self.spent_s += time.monotonic() - start

    def result(self) -> JudgeResult:
        task, placed = self.task, self.placed if self.error is None else ((), 0, 0)
        return JudgeResult(
            task.group_id, task.epoch, *placed, self.spent_s * 1e3, self.error, task.window
        )


def expected_tokens(task: JudgeTask) -> int:
    """Tokens of the pairs that a task may ask about, at most about so many."""
    if not task.traces:
        return 1
    compared = sum(min(task.num_compared, len(cluster)) for cluster in task.clusters)
    # The new ones are compared with each other too: with half of them on average.
    compared += min(task.num_compared * task.max_clusters, len(task.traces) // 2)
    mean = sum(trace.num_tokens for trace in task.traces) / len(task.traces)
    return max(1, int(2 * mean * compared * len(task.traces)))


def raise_if_lost(error: Exception) -> None:
    if is_device_lost(error):
        raise DeviceLost(type(error).__name__) from error


def is_device_lost(error: Exception) -> bool:
    """Whether every later CUDA call of this process will fail as this one did (an illegal access,
    an assertion on the device). One that found no memory may work the next time."""
    torch = sys.modules.get("torch")  # a judge without it has no such errors
    if torch is None:
        return False
    text = str(error)
    if "out of memory" in text:
        return False
    kind = getattr(torch, "AcceleratorError", None)
    if kind is not None and isinstance(error, kind):
        return True
    # torch before 2.8 raises a plain RuntimeError.
    is_old = kind is None and text.startswith("CUDA error")
    return type(error) is RuntimeError and (is_old or any(one in text for one in _FOR_GOOD))


def reason(error: Exception) -> str:
    """Type and place. A judge's own message is left out: it may quote a trace."""
    if isinstance(error, JudgeError):
        return f"JudgeError: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: raised at {Path(frame.filename).name}:{frame.lineno}"
