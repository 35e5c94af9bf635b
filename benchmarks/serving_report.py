"""From finished passes to rows, tables and the plot of the serving benchmark. Pure but for output.

Ratios are to the mean of the cell's plain passes, two without deepprune and two that decline it;
`plain_spread` is how far apart the farthest of them are. `product` is questions/s x tokens x step
time, each as a ratio to plain: 1 where throughput follows from the tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from benchmarks.clients import PLAIN
from benchmarks.report import Row, print_table, with_ratios
from benchmarks.serving_cells import PLAINS, Cell
from sglang_deepprune.equal_tokens import is_same
from sglang_deepprune.reasoner import Question

RATIOS = {
    "questions_per_s": "questions_per_s_ratio",
    "mean_latency_s": "mean_latency_ratio",
    "p99_latency_s": "p99_latency_ratio",
    "tokens": "tokens_ratio",
    "kv_time": "kv_time_ratio",
    "step_ms": "step_ratio",
    "passes": "passes_ratio",
    "n1_p50_s": "n1_p50_ratio",
    "n1_p99_s": "n1_p99_ratio",
}
_COLUMNS = (
    "policy", "questions_per_s", "questions_per_s_ratio", "mean_latency_ratio",
    "p99_latency_ratio", "tokens_ratio", "kv_time_ratio", "rows_busy", "step_ms", "passes_ratio",
    "product",
    "started", "same_winner", "accuracy", "retractions", "n1_p50_ratio", "n1_p99_ratio",
)  # fmt: skip


@dataclass(slots=True)
class Pass:
    """One policy over all questions of a cell. Flat: a line of the results file."""

    cell: str
    policy: str
    wall_s: float
    answers: list[str | None]  # [questions], as are the next three
    tokens: list[int]
    started: list[int]
    latencies_s: list[float]
    steps: dict[str, float]  # bench_plugin.Totals, over this pass
    rate: float = 0.0  # questions a second that arrived; 0: closed loop
    n1_latencies_s: list[float] = field(default_factory=list)

    @property
    def questions_per_s(self) -> float:
        return len(self.answers) / self.wall_s


def percentile(values: Sequence[float], share: float) -> float | None:
    """By the nearest rank; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def measures(cell: Cell, played: Pass) -> Row:
    """One pass in absolute numbers; tokens and KV time are a question's."""
    count, steps = len(played.answers), played.steps
    num_steps = max(1.0, steps["decode_steps"])
    return {
        "cell": cell.name, "load": cell.load, "policy": played.policy, "n": cell.n,
        "slots": cell.rows, "flat": cell.is_flat, "questions": count,
        "questions_per_s": played.questions_per_s,
        "mean_latency_s": fmean(played.latencies_s),
        "p99_latency_s": percentile(played.latencies_s, 0.99),
        "tokens": sum(played.tokens) / count,
        "kv_time": steps["kv_tokens"] / count,
        "rows_busy": steps["decode_rows"] / num_steps,
        "step_ms": 1e3 * steps["decode_s"] / num_steps,
        # A question's share of the engine's passes: no clock in it, so no drift of the machine.
        "passes": (steps["decode_steps"] + steps["prefill_steps"]) / count,
        "started": fmean(played.started),
        "retractions": int(steps["retractions"]),
        "n1_p50_s": percentile(played.n1_latencies_s, 0.5),
        "n1_p99_s": percentile(played.n1_latencies_s, 0.99),
    }  # fmt: skip


def mean_of(rows: Sequence[Row]) -> Row:
    """The numbers that ratios are taken to."""
    return {
        name: fmean(values)
        for name in RATIOS
        if len(values := [row[name] for row in rows if row[name] is not None]) == len(rows)
    }


def same_winners(answers: Sequence[str | None], plain: Sequence[str | None]) -> list[bool]:
    """[questions]"""
    return [a == b or is_same(a, b) for a, b in zip(answers, plain, strict=True)]


def _share(name: str, held: Sequence[bool]) -> Row:
    """A share of questions and its 95 % Wilson interval, which has a width at 0 and 1 too."""
    from scipy.stats import binomtest

    interval = binomtest(sum(held), len(held)).proportion_ci(method="wilson")
    return {name: fmean(held), f"{name}_low": interval.low, f"{name}_high": interval.high}


def accuracy(answers: Sequence[str | None], asked: Sequence[Question]) -> float:
    return fmean(is_same(a, one.answer) for a, one in zip(answers, asked, strict=True))


def cell_rows(cell: Cell, passes: Sequence[Pass], asked: Sequence[Question]) -> list[Row]:
    """All rows of a cell, in the order of the passes; none before its first plain pass."""
    plain = next((one for one in passes if one.policy == PLAIN), None)
    if plain is None:
        return []
    rows = [measures(cell, one) for one in passes]
    plain_rows = [row for row in rows if row["policy"] in PLAINS]
    baseline = mean_of(plain_rows)
    speeds = [row["questions_per_s"] for row in plain_rows]
    extended = []
    for one, row in zip(passes, rows, strict=True):
        known = [name for name in RATIOS if name in baseline and row[name] is not None]
        (row,) = with_ratios([row], baseline, known)
        row = {RATIOS.get(name.removesuffix("_ratio"), name) if name.endswith("_ratio") else name:
               value for name, value in row.items()}  # fmt: skip
        row |= {ratio: None for ratio in RATIOS.values() if ratio not in row}
        factors = [row["questions_per_s_ratio"], row["tokens_ratio"], row["step_ratio"]]
        row["product"] = None if None in factors else math.prod(factors)
        row |= _share("same_winner", same_winners(one.answers, plain.answers))
        row["accuracy"] = accuracy(one.answers, asked)
        row["plain_accuracy"] = accuracy(plain.answers, asked)
        row["plain_spread"] = (max(speeds) - min(speeds)) / fmean(speeds)
        row["plain_questions_per_s"] = baseline["questions_per_s"]
        row["arrivals_per_s"] = one.rate or None
        extended.append(row)
    return extended


def print_cell(cell: Cell, rows: Sequence[Row]) -> None:
    shown = [{name: "" if row[name] is None else row[name] for name in _COLUMNS} for row in rows]
    first = rows[0]
    print_table(
        shown,
        f"{cell.name}: {cell.load}, n={cell.n}, {cell.rows} rows, "
        f"{'flat' if cell.is_flat else 'real'} steps, {first['questions']} questions, "
        f"plain right {first['plain_accuracy']:.2f}, spread {first['plain_spread']:.1%}",
    )


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Questions a second over plain's: a group of bars a cell, a bar a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    shown = [row for row in rows if row["policy"] not in PLAINS]
    policies = list(dict.fromkeys(row["policy"] for row in shown))
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.3 * len(cells)), 4.5), layout="constrained")
    width = 0.8 / max(1, len(policies))
    for place, policy in enumerate(policies):
        own = [row for row in shown if row["policy"] == policy]
        shift = (place - (len(policies) - 1) / 2) * width
        axes.bar(
            [cells.index(row["cell"]) + shift for row in own],
            [row["questions_per_s_ratio"] for row in own], width, label=policy,
        )  # fmt: skip
    axes.axhline(1.0, color="k", linewidth=1)
    axes.set_xticks(range(len(cells)), cells, rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("questions/s, plain n>1 = 1")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
