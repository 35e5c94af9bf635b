"""Between the groups and their judge: windows go out, verdicts come in, probes are asked and told.

What the judge is given and what its word does to a group's state; who is stopped for it is the
policy's to say. All ranks act alike: only the leader has a judge, and the others hand nothing over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sglang_deepprune import tau
from sglang_deepprune.actions import Action, Command, Fork
from sglang_deepprune.group import Group, State
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.metrics import VERDICT_LATENCY, Meter
from sglang_deepprune.probing import ProbeDesk, box_end, read
from sglang_deepprune.run import Run
from sglang_deepprune.types import ABSENT, JudgeResult, JudgeTask, Probe, Trace


class Handover:
    """For all groups of one scheduler process.

    Parameters
    ----------
    runs : Mapping[str, Run]
        The coordinator's own table.
    judge : JudgeWorker | ProbeDesk | None
        The leader's only.
    decode : Callable[[Sequence[int]], str]
        For the tokens of probes.
    clock : Callable[[], float]
        Seconds; for the time that a verdict took.
    meter : Meter
        What counts them.
    failed : list[Command]
        Where the answer goes of what could not even be asked.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        judge: JudgeWorker | ProbeDesk | None,
        decode: Callable[[Sequence[int]], str],
        clock: Callable[[], float],
        meter: Meter,
        failed: list[Command],
    ):
        self.judge = judge
        self.desk = judge if isinstance(judge, ProbeDesk) else None  # the same, if it is a probe's
        self._runs = runs
        self._decode = decode
        self._clock = clock
        self._meter = meter
        self._failed = failed

    # -- windows and verdicts ----------------------------------------------------------------

    def look(self, run: Run) -> None:
        """Hand over what was cut, unless the judge is at it already."""
        group = run.group
        if self.desk is not None and group.steps % group.config.window == 0:
            self.desk.window(group.group_id)
        fresh, traces = run.reader.fresh, run.reader.traces
        if not fresh or run.in_flight or group.is_decided or group.is_released:
            return
        placed = [traces[index] for cluster in group.clusters for index in cluster]
        group.windows += 1
        task = JudgeTask(
            group_id=group.group_id,
            epoch=group.epoch,
            traces=tuple(traces[index] for index in fresh),
            members=tuple(placed),
            clusters=tuple(tuple(cluster) for cluster in group.clusters),
            tau=tau.merge_tau(group),
            max_clusters=group.config.k,
            num_compared=group.config.k1,
            seed=group.config.seed,
            compare=group.config.compare,
            compare_error=group.config.compare_error,
            window=group.windows,
        )
        for index in fresh:
            group.siblings[index].is_submitted = True
        run.in_flight, run.asked_s = frozenset(fresh), self._clock()
        self._submit(task)

    def tidy(self) -> None:
        """Leader, while no group lives: the process loads, ends what it was asked, and is told what
        to forget. What it says is about no group."""
        if self.judge is not None and not self.judge.is_idle:
            self.judge.poll()

    def place(self, run: Run, result: JudgeResult) -> None:
        """A verdict: who belongs to whom."""
        group = run.group
        if not run.in_flight or result.window != group.windows:
            return  # placed already: a command may come twice, the next window being out or not
        run.in_flight = frozenset()
        if result.error is None:
            self._meter.observe(VERDICT_LATENCY, self._clock() - run.asked_s)
        group.judge_calls += result.num_pairs
        group.judge_tokens += result.num_tokens
        group.judge_ms += result.elapsed_ms
        for one in result.assignments:
            sibling = group.siblings[one.sibling]
            known = one.similarity == one.similarity  # not NaN
            sibling.similarity = one.similarity if known else None
            sibling.cluster = one.cluster
            sibling.has_verdict = known or one.cluster != ABSENT
            if one.cluster == len(group.clusters):
                group.clusters.append([])
            if one.cluster != ABSENT:
                group.clusters[one.cluster].append(one.sibling)

    def _submit(self, task: JudgeTask) -> None:
        """Leader only, and as careful as `Questions.ask`."""
        if self.judge is None:
            return
        try:
            self.judge.submit(task)
        except OSError as error:
            reason = type(error).__name__
            failed = JudgeResult(task.group_id, task.epoch, error=reason, window=task.window)
            self._failed.append(failed)

    # -- probes ------------------------------------------------------------------------------

    def ended(self, group_id: str, trace: Trace) -> None:
        """A sibling has ended whose trace was cut before: nobody need ask it."""
        if self.desk is not None:
            self.desk.ended(group_id, trace)

    def forks(self, group: Group, command: Probe) -> list[Action]:
        """Of the siblings that run; the others cannot be asked now."""
        forks: list[Action] = []
        for index in command.indices:
            sibling = group.siblings[index]
            if sibling.state is State.RUNNING and sibling.is_live and not sibling.has_voted:
                forks.append(Fork(command.group_id, index, command.epoch))
            elif self.desk is not None:
                self.desk.told(command.group_id, index, None)
        return forks

    def is_answered(self, ids: Sequence[int]) -> bool:
        """Whether a probe's tokens have closed the box that its text opened."""
        return box_end(self._decode(ids)) is not None

    def probed(
        self,
        group_id: str,
        index: int,
        epoch: int,
        ids: Sequence[int] = (),
        probabilities: Sequence[float] = (),
        *,
        num_tokens: int = 0,
        failure: str = "",
    ) -> None:
        """A probe has ended, on every rank. Its probabilities are the leader's to read.

        `num_tokens`: prefilled beside what was in the cache, and decoded. `failure`: why it has no
        tokens, if that is worth a log line.
        """
        run = self._runs.get(group_id)
        if run is None or run.group.epoch != epoch:
            return
        run.group.judge_tokens += num_tokens
        if self.desk is None:
            return
        reading = None
        if ids:
            reading = read(ids, probabilities, self._decode)
            failure = "" if reading is not None else "no answer in its box"
        self.desk.told(group_id, index, reading, failure)
