"""Recorded traces of a big model through the real engine: tokens, time, KV and votes by policy.

    python -m benchmarks.replay --traces FILE --json benchmarks/results/replay.json

A tiny model says the recorded traces word for word (`replay_data`, `scripted`); scheduler, radix
cache, KV pool, hooks, judge and API are the real ones, so a stopped sibling saves real decode
steps. Counted are decode tokens (every token of every started sibling), prefix tokens (prompt
tokens computed), tokens that the judge read (both traces of each pair), wall clock of a pass and
KV slots in use. Plain n>1 is the baseline, in the same server without judge; `cons@k` beside each
policy is plain sampling with fewer traces at the same tokens (`replay_curve`), `gain` the
difference. K2=20 is the paper's value for n=512; K2=n/4 is min(20, ceil(n/4)).

The judge runs beside the decode loop, and this model decodes faster than a big one: siblings get
further before a slow judge's verdict than they would behind a GPU. Its deadline is raised
accordingly. Wall clock holds for this machine and this model only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from benchmarks.replay_data import Workspace, cache_root, prepare
from benchmarks.replay_report import print_report, report_of, save_plot
from benchmarks.replay_results import PLAIN, Outcome, Policy, Results
from benchmarks.replay_run import judge_faults, play, serve
from benchmarks.report import write_json

# Without pruning, or blind to the judge: one server without a judge serves them all.
UNJUDGED = (PLAIN, "latency", "collect")
PRESETS = (*UNJUDGED, "paper")
JUDGES = ("similarity", "encoder", "oracle", "none")


def policies_of(
    presets: Sequence[str], judges: Sequence[str], k2_values: Sequence[int]
) -> list[Policy]:
    """What is run, sorted by server. `paper` takes each judge with each K2."""
    chosen = [Policy(name) for name in UNJUDGED if name in presets]
    if "paper" in presets:
        chosen += [Policy("paper", judge, k2) for judge in judges for k2 in k2_values]
    return sorted(chosen, key=lambda policy: ("none", *JUDGES).index(policy.judge))


def run(
    workspace: Workspace,
    policies: Sequence[Policy],
    results: Results,
    concurrency: int,
    deadline_ms: int,
) -> None:
    """Play whatever the results file lacks."""
    questions = workspace.questions
    total = len(policies) * len(questions)
    left = sum(len(results.missing(policy, questions)) for policy in policies)
    rows = concurrency * max(len(played.lengths) for played in questions)
    with tqdm(total=total, initial=total - left, unit="question") as bar:
        spent = 0

        def done(outcome: Outcome) -> None:
            nonlocal spent
            results.add(outcome)
            spent += outcome.decode_tokens
            rate = spent / max(bar.format_dict["elapsed"], 1e-6)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update()

        for (judge, _), group in groupby(policies, key=_server_of):
            todo = [policy for policy in group if results.missing(policy, questions)]
            if not todo:
                continue
            with serve(workspace, judge, rows, deadline_ms) as server:
                for policy in todo:
                    bar.set_description(policy.label)
                    play(server, policy, results.missing(policy, questions), concurrency, done)
                for line in judge_faults(server):
                    bar.write(line)


def _server_of(policy: Policy) -> tuple[str, int | None]:
    """A judged pass has a server of its own: a judge that knows the texts by now costs nothing."""
    return policy.judge, policy.k2


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the server too
    arguments = _arguments()
    policies = policies_of(arguments.presets, arguments.judges, arguments.k2)
    workspace = prepare(arguments.traces, arguments.questions)
    results = Results(arguments.resume or _resume_folder(arguments, workspace), arguments.fresh)
    run(workspace, policies, results, arguments.concurrency, arguments.judge_deadline_ms)
    report = report_of(workspace, policies, results)
    print_report(report)
    if arguments.json is not None:
        write_json(
            arguments.json, "replay", report.rows,
            concurrency=arguments.concurrency, judge_deadline_ms=arguments.judge_deadline_ms,
            questions=report.questions, cons=report.cons,
        )  # fmt: skip
    plot = arguments.plot or (arguments.json and arguments.json.with_suffix(".png"))
    if plot is not None:
        save_plot(report, plot)


def _resume_folder(arguments: argparse.Namespace, workspace: Workspace) -> Path:
    """One folder a setting that changes what is measured."""
    names = [played.question.question_id for played in workspace.questions]
    settings = [workspace.folder.name, names, arguments.concurrency, arguments.judge_deadline_ms]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return cache_root() / f"results-{digest}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    default = os.environ.get("DEEPPRUNE_TRACES")
    parser.add_argument(
        "--traces", type=Path, default=default, required=default is None,
        help="recording, JSON lines, may be gzipped (default: $DEEPPRUNE_TRACES)",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=12, help="spread evenly; 0: all")
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, default=[PLAIN, "latency", "paper"]
    )
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=["similarity"])
    parser.add_argument("--k2", nargs="+", type=int, default=[20, 0], help="0: min(20, n/4)")
    parser.add_argument("--concurrency", type=int, default=2, help="questions at a time")
    parser.add_argument("--judge-deadline-ms", type=int, default=120_000)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="default: beside --json")
    parser.add_argument("--resume", type=Path, help="where finished questions are kept")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
