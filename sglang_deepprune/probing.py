"""Judge `probe`, the part without an engine: whom to ask and when, and what an answer is worth.

`ProbeDesk` stands where a `JudgeWorker` stands, on the leader alone. It takes a window's task, has
the engine ask each of its traces (`Probe`, which rides the leader's broadcast, so that every rank
asks at the same step), and hands the task on to the worker once every trace is read: clustering,
tau, cards and faults are those of any other judge.

The gate: a reading counts from a probability of SURE on. One below is asked again at the next
window, as the trace has gone on; below at two windows running it is no evidence, and the trace is
left out of the clustering: nothing was found out about it, so nothing may stop it. The worker never
sees such a trace: as the first of its group it would open a cluster that can be compared with
nobody.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sglang_deepprune.answers import extract
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.types import ABSENT, Assignment, JudgeResult, JudgeTask, Probe, Reading, Trace

logger = logging.getLogger(__name__)

SURE = 0.99
MOST_LOOKS = 2  # windows at which one trace is asked
MAX_TOKENS = 16  # that a probe decodes
CLOSING = "\n\nFinal answer: \\boxed{"
THINK_MARKS = {  # what opens a think block, and what closes it
    "<think>": "</think>", "<thinking>": "</thinking>", "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]", "◁think▷": "◁/think▷",
}  # fmt: skip
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def is_probe(spec: str) -> bool:
    return spec.partition(":")[0] == "probe"


def closing_of(spec: str) -> str:
    """The text that ends in an open box, as `probe[:TEXT]` gives it."""
    return spec.partition(":")[2] or CLOSING


def box_end(text: str) -> int | None:
    """Where the box closes that was open before `text`; None: it does not."""
    depth = 1
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def read(
    ids: Sequence[int], probabilities: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> Reading | None:
    """What a probe's tokens say; None: no box was closed, or there is no answer in it.

    Parameters
    ----------
    ids : Sequence[int]
        [num_tokens] what the probe decoded after the closing text.
    probabilities : Sequence[float]
        [num_tokens] of these tokens, at temperature 1.
    """
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        end = box_end(text)
        if end is None:
            continue
        found = extract(f"\\boxed{{{text[:end]}}}")
        if found is None:
            return None
        return Reading(found.answer, math.prod(probabilities[:count]))
    return None


@dataclass(slots=True)
class _Case:
    """One group's task at the desk."""

    task: JudgeTask
    out: set[int] = field(default_factory=set)  # siblings that are being asked
    again: set[int] = field(default_factory=set)  # to be asked at the next window
    looks: dict[int, int] = field(default_factory=dict)  # sibling -> windows at which it was asked


class ProbeDesk:
    """Leader only. One task a group at a time, as the coordinator hands them over."""

    def __init__(self, worker: JudgeWorker):
        self.worker = worker
        self._cases: dict[str, _Case] = {}
        self._readings: dict[str, dict[int, Reading]] = {}  # group -> sibling ->
        self._gated: dict[str, tuple[int, ...]] = {}  # group -> traces kept from the worker
        self._asks: list[Probe] = []
        self._done: list[JudgeResult] = []
        self._logged: set[str] = set()

    @property
    def num_pending(self) -> int:
        """Tasks at the desk or with the worker."""
        return len(self._cases) + len(self._gated)

    @property
    def is_idle(self) -> bool:
        """See `JudgeWorker.is_idle`; a desk without groups has nothing of its own."""
        return self.worker.is_idle

    def start(self) -> None:
        self.worker.start()

    def close(self) -> None:
        self.worker.close()

    def submit(self, task: JudgeTask) -> None:
        """Ask every trace of the window that has not ended by itself."""
        case = self._cases[task.group_id] = _Case(task)
        self._ask(case, [t.sibling for t in task.traces if t.answer is None and t.cut != "end"])

    def window(self, group_id: str) -> None:
        """A window later: those that were not sure are asked once more."""
        case = self._cases.get(group_id)
        if case is not None and case.again and not case.out:
            again, case.again = sorted(case.again), set()
            self._ask(case, again)

    def told(self, group_id: str, sibling: int, reading: Reading | None, failure: str = "") -> None:
        """One probe's outcome. `failure`: why there is no reading, if that is worth a log line."""
        if failure:
            self._warn(failure)
        case = self._cases.get(group_id)
        if case is None or sibling not in case.out:
            return
        case.out.discard(sibling)
        if reading is not None and reading.probability >= SURE:
            self._readings.setdefault(group_id, {})[sibling] = reading
        elif case.looks[sibling] < MOST_LOOKS:
            case.again.add(sibling)
        self._hand_on(case)

    def ended(self, group_id: str, trace: Trace) -> None:
        """A sibling has ended: its answer stands for a probe's, and nobody need ask it."""
        case = self._cases.get(group_id)
        if case is None or all(t.sibling != trace.sibling for t in case.task.traces):
            return
        traces = tuple(trace if t.sibling == trace.sibling else t for t in case.task.traces)
        case.task = replace(case.task, traces=traces)
        case.out.discard(trace.sibling)
        case.again.discard(trace.sibling)
        self._hand_on(case)

    def poll(self) -> list[JudgeResult | Probe]:
        """Whom the engine is to ask, and results. Costs are counted where probes end, in tokens."""
        found: list[JudgeResult | Probe] = [*self._asks, *self._done]
        self._asks, self._done = [], []
        for result in self.worker.poll():
            gated = self._gated.pop(result.group_id, ())
            left_out = tuple(Assignment(one, ABSENT, math.nan) for one in gated)
            found.append(
                replace(result, assignments=(*result.assignments, *left_out), num_tokens=0)
            )
        return found

    def drop(self, group_id: str) -> None:
        """Forget a group."""
        for table in (self._cases, self._readings, self._gated):
            table.pop(group_id, None)
        self._asks = [one for one in self._asks if one.group_id != group_id]
        self._done = [one for one in self._done if one.group_id != group_id]
        self.worker.drop(group_id)

    def _ask(self, case: _Case, siblings: Sequence[int]) -> None:
        if not siblings:
            self._hand_on(case)
            return
        case.out.update(siblings)
        for one in siblings:
            case.looks[one] = case.looks.get(one, 0) + 1
        self._asks.append(Probe(case.task.group_id, case.task.epoch, tuple(siblings)))

    def _hand_on(self, case: _Case) -> None:
        """To the worker, once all that can be found out is."""
        if case.out or case.again:
            return
        task = case.task
        self._cases.pop(task.group_id, None)
        known = self._readings.get(task.group_id, {})
        traces = [replace(trace, reading=known.get(trace.sibling)) for trace in task.traces]
        sure = tuple(t for t in traces if t.reading is not None or t.answer is not None)
        gated = tuple(t.sibling for t in traces if t.reading is None and t.answer is None)
        if not sure:
            left_out = tuple(Assignment(one, ABSENT, math.nan) for one in gated)
            self._done.append(JudgeResult(task.group_id, task.epoch, left_out, window=task.window))
            return
        members = tuple(replace(one, reading=known.get(one.sibling)) for one in task.members)
        self._gated[task.group_id] = gated
        self.worker.submit(replace(task, traces=sure, members=members))

    def _warn(self, reason: str) -> None:
        """Once a kind, as `JudgeWorker` does."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("judge probe gives no verdict: %s", reason)
