"""How many judge calls a placement takes: the paper's full loop against sequential comparisons.

`--branches` (recorded branches; judges of a given AUROC inside a question are simulated, all traces
cut at 500 tokens) and `--traces` (recorded texts; a real judge, its pairs scored once). Rows: calls
and tokens of both texts a trace, the ratio to the full loop, `same_assignments` (the trace is in
the cluster that the full loop gave it, errors of earlier traces included), `same_decisions` (after
the full loop's own earlier placements) and `same_largest` (the largest cluster has the same members
to 90 %). Token-equal traces and answers that are known ask nobody, in both.

    python -m benchmarks.comparisons --branches FILE --json benchmarks/results/comparisons.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.frontier_data import SimulatedJudge, draws_of
from benchmarks.frontier_data import load as load_branches
from benchmarks.report import Row, print_table, write_json
from sglang_deepprune.clustering import Score, place
from sglang_deepprune.judges import check_judge, load_judge
from sglang_deepprune.traces import load, truncate
from sglang_deepprune.types import ABSENT, Assignment, JudgeTask, Pair, Trace

AUROCS = (0.65, 0.87, 0.95, 1.0)
MODES = (
    ("full", 0.0), ("sequential", 0.0), ("sequential", 0.05), ("sequential", 0.2),
    ("exclusive", 0.05), ("exclusive", 0.2),
)  # fmt: skip
CUT_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Case:
    """One group at its window: all its traces, and who judges them."""

    task: JudgeTask
    score: Score


@dataclass(frozen=True, slots=True)
class Placed:
    """What one mode did with one case."""

    found: tuple[Assignment, ...]
    pairs: int
    tokens: int


def task_of(name: str, traces: Sequence[Trace], tau: float) -> JudgeTask:
    """The paper's K and K1."""
    return JudgeTask(name, 0, tuple(traces), (), (), tau, 32, 10, 0)


def branch_cases(path: str, size: int, auroc: float, tau: float, seed: int) -> Iterator[Case]:
    questions = load_branches([Path(path)])
    judge = SimulatedJudge(questions, auroc, seed)
    for (draw,) in draws_of(questions, size, 1, seed):
        traces = [
            # The simulated judge knows the pair by its siblings; texts differ, so none is equal.
            Trace(i, str(i), min(CUT_TOKENS, one.length), "tokens")
            for i, one in enumerate(draw.branches)
        ]
        yield Case(task_of(str(draw.question.number), traces, tau), judge.score_of(draw))


def trace_cases(path: str, spec: str, cut: str, tau: float, limit: int) -> Iterator[Case]:
    check_judge(spec)
    judge = load_judge(spec)
    if not getattr(judge, "mixes_groups", False):
        raise SystemExit(f"{spec}: its scores depend on the company in a call; it is asked in full")
    questions = [one for one in load(path) if len(one.traces) > 1]
    for question in questions[: limit or None]:
        traces = [replace(truncate(t, cut, i), answer=None) for i, t in enumerate(question.traces)]
        size = len(traces)
        asked = [(i, j) for i in range(size) for j in range(i)]
        found = judge.score([Pair(traces[i], traces[j]) for i, j in asked])
        matrix = np.full((size, size), np.nan)
        for (i, j), value in zip(asked, found, strict=True):
            matrix[i, j] = matrix[j, i] = value
        yield Case(task_of(question.question_id, traces, tau), looked_up(matrix))


def looked_up(matrix: np.ndarray) -> Score:
    """[n, n] scores, by sibling: the judge has been asked already."""

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        return np.array([matrix[p.left.sibling, p.right.sibling] for p in pairs])

    return score


def play(case: Case, mode: str, error: float) -> Placed:
    task = replace(case.task, compare=mode, compare_error=error)
    found, pairs, tokens = place(task, case.score)
    return Placed(found, pairs, tokens)


def same_decisions(case: Case, full: Placed, mode: str, error: float) -> list[bool]:
    """Each trace placed alone, after the full loop's placements of those before it."""
    clusters: list[list[int]] = []
    same = []
    for number, wanted in enumerate(full.found):
        task = replace(
            case.task, traces=case.task.traces[number : number + 1],
            members=case.task.traces[:number], clusters=tuple(map(tuple, clusters)),
            compare=mode, compare_error=error,
        )  # fmt: skip
        (one,), _, _ = place(task, case.score)
        same.append(one.cluster == wanted.cluster)
        if wanted.cluster == len(clusters):
            clusters.append([])
        if wanted.cluster != ABSENT:
            clusters[wanted.cluster].append(wanted.sibling)
    return same


def largest(found: Sequence[Assignment]) -> set[int]:
    members: dict[int, set[int]] = {}
    for one in found:
        if one.cluster != ABSENT:
            members.setdefault(one.cluster, set()).add(one.sibling)
    return max(members.values(), key=len, default=set())


def rows_of(name: str, size: int, tau: float, cases: Callable[[], Iterator[Case]]) -> list[Row]:
    """One row a mode; the full loop is the baseline."""
    group = list(cases())
    full = [play(case, "full", 0.0) for case in group]
    total = sum(len(case.task.traces) for case in group)
    base = sum(one.tokens for one in full)
    rows: list[Row] = []
    for mode, error in MODES:
        found = [play(case, mode, error) for case in group]
        pairs, tokens = sum(one.pairs for one in found), sum(one.tokens for one in found)
        same = [
            a.cluster == b.cluster
            for one, wanted in zip(found, full, strict=True)
            for a, b in zip(one.found, wanted.found, strict=True)
        ]
        alone = [
            s for c, w in zip(group, full, strict=True) for s in same_decisions(c, w, mode, error)
        ]
        sets = [(largest(a.found), largest(b.found)) for a, b in zip(found, full, strict=True)]
        rows.append({
            "judge": name, "n": size, "tau": tau,
            "comparisons": mode, "error": error,
            "calls_a_trace": pairs / total, "tokens_a_trace": tokens / total,
            "tokens_ratio": tokens / base if base else None,
            "same_assignments": float(np.mean(same)), "same_decisions": float(np.mean(alone)),
            "same_largest": float(np.mean([len(a & b) >= 0.9 * len(a | b) for a, b in sets])),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--branches", help="recorded branches")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--traces", help="recorded texts, JSONL or .gz")
    parser.add_argument("--judge", default="trigrams", help="of --traces: NAME[:PATH]")
    parser.add_argument("--cut", default="words:25", help="of --traces")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--questions", type=int, default=0, help="of --traces: the first N; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.branches or arguments.traces):
        parser.error("name a recording: --branches, --traces or both")
    rows: list[Row] = []
    for tau in arguments.tau:
        for size in arguments.sizes if arguments.branches else ():
            for auroc in AUROCS:
                rows += rows_of(
                    f"AUROC {auroc:.2f}", size, tau,
                    lambda a=auroc, s=size, t=tau: branch_cases(  # type: ignore[misc]
                        arguments.branches, s, a, t, arguments.seed
                    ),
                )  # fmt: skip
        if arguments.traces:
            own = list(trace_cases(
                arguments.traces, arguments.judge, arguments.cut, tau, arguments.questions
            ))  # fmt: skip
            most = max(len(case.task.traces) for case in own)
            rows += rows_of(f"{arguments.judge}, {arguments.cut}", most, tau, lambda o=own: iter(o))  # type: ignore[misc]
    print_table(rows, "judge calls a trace")
    if arguments.json is not None:
        write_json(arguments.json, "comparisons", rows)


if __name__ == "__main__":
    main()
