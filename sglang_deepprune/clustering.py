"""The paper's greedy clustering (section 4.2), online: traces are placed as they reach their cut.

A trace is compared with p = min(K1, |c|) members of every cluster, drawn without replacement;
sim(t, c) is the mean of the judge's P(same answer). The best cluster takes the trace when its
sim > tau, else a new cluster is opened while there are fewer than K. Pure: the same task and the
same scores give the same placement, in any process and Python run.

Where the paper is silent:
- Ties go to the older cluster: it has more evidence behind it.
- K clusters and none matches: the trace is left out (cluster ABSENT, its best sim). It is evidence
  for no cluster, and stops together with the small ones.
- No usable score at all (NaN is a judge's "no verdict") although there were clusters: ABSENT with a
  NaN similarity. Nothing was found out about the trace, so nothing may stop it.
- Known facts need no judge: two final answers are compared, and equal texts are the same.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Generator, Sequence

import numpy as np
import numpy.typing as npt

from sglang_deepprune import sequential
from sglang_deepprune.types import ABSENT, Assignment, JudgeTask, Pair, Trace

Score = Callable[[Sequence[Pair]], npt.NDArray[np.floating]]  # [num_pairs], P(same answer)
Placed = tuple[tuple[Assignment, ...], int, int]  # also: pairs that were scored, and their tokens
# Asks for pairs, is sent what `checked` makes of their scores, ends with the placement.
Placing = Generator[list[Pair], list[float], Placed]

_SLACK = 1e-6  # rounding that a probability may leave [0, 1] by


class JudgeError(Exception):
    """A judge's answer that is no list of probabilities. The task gets no verdict."""


def place(task: JudgeTask, score: Score) -> Placed:
    """Place `task.traces` in order."""
    steps = placing(task)
    try:
        asked = next(steps)
        while True:
            asked = steps.send(checked(score(asked), len(asked)))
    except StopIteration as end:
        placed: Placed = end.value
        return placed


def placing(task: JudgeTask) -> Placing:
    """`place` step by step, so that the questions of many groups can be asked together."""
    known = {trace.sibling: trace for trace in (*task.members, *task.traces)}
    clusters = [list(cluster) for cluster in task.clusters]
    assignments: list[Assignment] = []
    num_pairs = num_tokens = 0
    for trace in task.traces:
        drawn = [_draw(task, trace.sibling, j, c, known) for j, c in enumerate(clusters)]
        if task.compare == "full" or task.tau >= 1:
            similarities, asked = yield from _similarities(trace, drawn, task)
        else:
            similarities, asked = yield from _until_clear(trace, drawn, task)
        num_pairs += len(asked)
        num_tokens += sum(pair.left.num_tokens + pair.right.num_tokens for pair in asked)
        cluster, similarity = _choose(similarities, task.tau, task.max_clusters)
        if cluster == len(clusters):
            clusters.append([])
        if cluster != ABSENT:
            clusters[cluster].append(trace.sibling)
        assignments.append(Assignment(trace.sibling, cluster, similarity))
    return tuple(assignments), num_pairs, num_tokens


def _choose(similarities: Sequence[float], tau: float, max_clusters: int) -> tuple[int, float]:
    """The cluster that takes a trace (len(similarities): a new one) and its best similarity."""
    best, highest = ABSENT, math.nan
    for cluster, similarity in enumerate(similarities):
        if not math.isnan(similarity) and (best == ABSENT or similarity > highest):
            best, highest = cluster, similarity
    if similarities and best == ABSENT:
        return ABSENT, math.nan
    if best != ABSENT and highest > tau:
        return best, highest
    is_full = len(similarities) >= max_clusters
    return (ABSENT if is_full else len(similarities)), highest


def _draw(
    task: JudgeTask, sibling: int, cluster: int, members: Sequence[int], known: dict[int, Trace]
) -> list[Trace]:
    """The members that a trace is compared with: K1 at most, the same ones in every replay."""
    here = [member for member in members if member in known]
    # In a drawn order, too: what `sequential` hears first must not be the cluster's founders.
    # Not Python's hash(): that differs from process to process.
    name = f"{task.seed}\0{task.group_id}\0{sibling}\0{cluster}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    here = random.Random(seed).sample(here, min(len(here), task.num_compared))
    return [known[member] for member in here]


_Means = Generator[list[Pair], list[float], tuple[list[float], list[Pair]]]


def _similarities(trace: Trace, drawn: Sequence[Sequence[Trace]], task: JudgeTask) -> _Means:
    """sim(trace, c) of every cluster, with one call of the judge; and the pairs that it got."""
    facts = [[_known_same(trace, member) for member in members] for members in drawn]
    asked = [
        Pair(trace, member, task.group_id)
        for members, row in zip(drawn, facts, strict=True)
        for member, fact in zip(members, row, strict=True)
        if fact is None
    ]
    scores = iter((yield asked) if asked else ())
    rows = [[next(scores) if fact is None else fact for fact in row] for row in facts]
    return [_mean(row) for row in rows], asked


def _until_clear(trace: Trace, drawn: Sequence[Sequence[Trace]], task: JudgeTask) -> _Means:
    """The same with no more pairs than the placement needs, one at a time (`sequential.py`)."""
    asked: list[Pair] = []
    facts = [[_known_same(trace, member) for member in members] for members in drawn]
    is_exclusive = task.compare == "exclusive"
    steps = sequential.similarities(facts, task.tau, task.compare_error, is_exclusive=is_exclusive)
    try:
        cluster, place = next(steps)
        while True:
            asked.append(Pair(trace, drawn[cluster][place], task.group_id))
            (score,) = yield asked[-1:]
            cluster, place = steps.send(score)
    except StopIteration as end:
        return end.value, asked


def _known_same(left: Trace, right: Trace) -> float | None:
    """1.0 or 0.0 where no judge is needed. Answers first: they are what a judge only guesses."""
    if left.answer is not None and right.answer is not None:
        # Imported late: only groups with finished siblings pay for loading it.
        from sglang_deepprune.answers import compare

        is_same = compare(left.answer, right.answer)
        if is_same is not None:
            return float(is_same)
    # Two empty texts say nothing about two answers.
    return 1.0 if left.text and left.text == right.text else None


def _mean(values: Sequence[float]) -> float:
    usable = [value for value in values if not math.isnan(value)]
    return math.fsum(usable) / len(usable) if usable else math.nan


def checked(scores: object, num_pairs: int) -> list[float]:
    """The scores as probabilities or NaN; JudgeError for anything else."""
    if not isinstance(scores, np.ndarray) or not np.issubdtype(scores.dtype, np.floating):
        kind = scores.dtype if isinstance(scores, np.ndarray) else type(scores).__name__
        raise JudgeError(f"a judge must return a float array, got {kind}")
    if scores.shape != (num_pairs,):
        raise JudgeError(f"a judge got {num_pairs} pairs and returned the shape {scores.shape}")
    values = scores.astype(np.float64)
    is_bad = (values < -_SLACK) | (values > 1.0 + _SLACK)
    if is_bad.any():
        raise JudgeError(f"a judge must return probabilities, got {values[is_bad][0]:g}")
    return [float(value) for value in np.clip(values, 0.0, 1.0)]
