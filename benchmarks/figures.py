"""The headline figures of docs/numbers.md, out of benchmarks/results: good ones and bad ones.

    python -m benchmarks.figures            # prints the table
    python -m benchmarks.figures --write    # puts it into docs/numbers.md

A test compares the page with `table()`, so that no figure there can differ from its JSON. Ratios
are to plain n>1 of the same study; `cons@k` is a vote of fewer plain samples at the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "numbers.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"

Row = dict[str, Any]
Line = tuple[str, str, str]  # question, figure, name of the results file


@cache
def rows(name: str, part: str = "rows") -> tuple[Row, ...]:
    return tuple(json.loads((RESULTS / f"{name}.json").read_text())[part])


def one(name: str, part: str = "rows", **wanted: Any) -> Row:
    """The row with these values. Raises ValueError unless there is exactly one."""
    found = [row for row in rows(name, part) if all(row.get(key) == wanted[key] for key in wanted)]
    if len(found) != 1:
        raise ValueError(f"{name}.json: {len(found)} rows with {wanted}")
    return found[0]


def best_pool(name: str, cell: str, by: Callable[[Row], float]) -> Row:
    """The client-side pool that is best in what is asked for."""
    pools = [r for r in rows(name) if r["cell"] == cell and r["policy"].startswith("pool")]
    return max(pools, key=by)


def times(value: float) -> str:
    return f"x{value:.2f}"


def recorded(n: int, preset: str) -> Line:
    """What a preset spends on recorded branches, and against fewer samples at the same tokens."""
    row = one("frontier", policy=preset, n=n)
    return (
        f"Recorded branches of an 8B model, n={n}, `{preset}`",
        f"tokens {times(row['tokens_ratio'])}, the winner of all n in {row['same_winner']:.1%}, "
        f"right {row['accuracy']:.1%} (plain {row['plain_accuracy']:.1%}, "
        f"cons@k {row['cons_equal_tokens']:.1%})",
        "frontier",
    )


def served(name: str, cell: str, what: str) -> Line:
    """`balanced` on a real server beside the best pool of requests that a client could keep."""
    ours = one(name, cell=cell, policy="balanced")
    pool = best_pool(name, cell, by=lambda row: float(row["questions_per_s_ratio"]))
    return (
        f"Real server, {what}, n={ours['n']}, `balanced`",
        f"questions/s {times(ours['questions_per_s_ratio'])}, latency "
        f"{times(ours['mean_latency_ratio'])}, tokens {times(ours['tokens_ratio'])}, engine passes "
        f"{times(ours['passes_ratio'])}, same winner {ours['same_winner']:.2f}; best client pool "
        f"({pool['policy']}): questions/s {times(pool['questions_per_s_ratio'])}, latency "
        f"{times(pool['mean_latency_ratio'])}, engine passes {times(pool['passes_ratio'])}",
        name,
    )


def neighbours() -> Line:
    name, cell = "serving", "poisson80-real"
    ours = one(name, cell=cell, policy="balanced")
    pool = best_pool(name, cell, by=lambda row: -float(row["n1_p99_ratio"]))
    return (
        "Ordinary n=1 requests beside groups, together 90 % of what the server can do",
        f"p99 latency {times(ours['n1_p99_ratio'])}; beside {pool['policy']} "
        f"{times(pool['n1_p99_ratio'])}",
        name,
    )


def paper() -> Line:
    row = one("replay_full", policy="paper")
    return (
        f"The paper's pruning, judge `{row['judge']}`, {row['questions']} questions, recorded "
        "traces of a 12B model",
        f"tokens {times(row['tokens_ratio'])}, over cons@k {100 * row['gain']:+.1f} points "
        f"[{100 * row['gain_low']:+.1f}, {100 * row['gain_high']:+.1f}], before the judge's "
        f"{row['judge_tokens'] / 1e6:.1f}M tokens",
        "replay_full",
    )


def judge() -> Line:
    row = one("judge_belief_reasoner", cut="share:0.5")
    return (
        "Judge `belief`, half of the trace, a model and questions that it never saw",
        f"AUROC {row['within_auroc']:.2f} inside a question; {row['pooled_auroc']:.2f} pooled, "
        f"where knowing only the question's difficulty has {row['difficulty_auroc']:.2f}",
        "judge_belief_reasoner",
    )


def overhead() -> Iterator[Line]:
    for state, what in (("idle", "no group live"), ("group live", "every row in a group")):
        row = one("overhead", measure="hook share", state=state, rows=64)
        yield (
            f"Our share of a decode step of a two-layer model, 64 rows, {what}",
            f"{row['share_percent']:.2f} %",
            "overhead",
        )


def bystanders() -> Line:
    row = one("bystanders", mode="busy", cores="apart")
    again = one("bystanders", mode="none again", cores="apart")
    return (
        "Inter-token latency of strangers while a judge works without a pause on another core",
        f"mean {times(row['itl_mean_ms_ratio'])}, p99 {times(row['itl_p99_ms_ratio'])}; without a "
        f"judge, again: {times(again['itl_mean_ms_ratio'])}, {times(again['itl_p99_ms_ratio'])}",
        "bystanders",
    )


def lines() -> Iterator[Line]:
    yield recorded(16, "balanced")
    yield recorded(64, "balanced")
    yield recorded(64, "faithful")
    yield recorded(64, "economy")
    yield served("serving_64_all", "all64-real", "full")
    yield served("serving", "all16-real", "full")
    yield served("serving", "all8-real", "full")
    yield served("serving", "two16-real", "two questions at a time")
    yield neighbours()
    yield paper()
    yield judge()
    yield from overhead()
    yield bystanders()


def table() -> str:
    """The page's table as Markdown."""
    head = ["| what | figure | data |", "| --- | --- | --- |"]
    link = "[{name}](../benchmarks/results/{name}.json)"
    body = [f"| {what} | {figure} | {link.format(name=name)} |" for what, figure, name in lines()]
    return "\n".join([*head, *body]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    if not args.write:
        print(table(), end="")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
