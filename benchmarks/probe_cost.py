"""What the judge `probe` costs: tokens a probe, and the time that it adds to its group.

The embedded reasoner, n siblings a question, seeded. The same question with probes and without, in
turns on one server; settings under which nobody is stopped, so that both decode the same tokens.
A probe's time is the difference over the probes; in decode steps it is that over a step without.

    python -m benchmarks.probe_cost --json benchmarks/results/probe_cost.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.overhead import interval
from benchmarks.report import print_table, write_json
from sglang_deepprune.reasoner import model_path, questions
from tests.engine.server import Server

TEXT = "probe: thus the answer is \\boxed{"
N = 16
# No similarity is above 1: all clusters are of one, and K3 keeps them all.
NOBODY_STOPS = {"preset": "paper", "tau": 1.0, "k2": 4096, "k3": 4096, "cut": "tokens"}


def ask(server: Server, prompt: str, settings: dict[str, Any]) -> tuple[float, dict[str, Any], int]:
    """(seconds, the group's record, decode steps of its longest sibling)."""
    params = {
        "n": N, "max_new_tokens": 700, "temperature": 1.0, "sampling_seed": 3,
        "custom_params": {"deepprune": settings},
    }  # fmt: skip
    start = time.perf_counter()
    reply = server.post("/generate", {"text": prompt, "sampling_params": params})
    spent = time.perf_counter() - start
    reply.raise_for_status()
    outputs = reply.json()
    steps = max(output["meta_info"]["completion_tokens"] for output in outputs)
    return spent, outputs[0]["meta_info"]["deepprune"]["group"], steps


def measure(server: Server, page: int, cut: int, count: int) -> dict[str, Any]:
    """One row: `count` questions, twice each."""
    probed_s: list[float] = []
    plain_s: list[float] = []
    steps: list[int] = []
    probes: list[dict[str, Any]] = []
    judge_tokens = generated = 0
    settings = {**NOBODY_STOPS, "cut_tokens": cut}
    for turn, question in enumerate(questions(seed=21, count=count)):
        ask(server, question.prompt, {"preset": "collect"})  # its prompt is cached then
        for is_probed in (True, False) if turn % 2 else (False, True):
            before = len(server.log_lines("deepprune-probe"))
            used = settings if is_probed else {"preset": "collect"}
            spent, group, longest = ask(server, question.prompt, used)
            (probed_s if is_probed else plain_s).append(spent)
            if is_probed:
                server.wait_idle()
                probes += server.log_lines("deepprune-probe")[before:]
                judge_tokens += group["judge_tokens"]
                generated += group["generated_tokens"]
            else:
                steps.append(longest)
    answered = [one for one in probes if one["failure"] is None]
    step_ms = 1e3 * sum(plain_s) / sum(steps)
    extra_ms = 1e3 * (sum(probed_s) - sum(plain_s)) / max(1, len(probes))
    low, high = interval([a / b for a, b in zip(probed_s, plain_s, strict=True)])
    return {
        "page": page, "cut": cut, "questions": count, "probes": len(probes),
        "shared": round(statistics.fmean(one["shared"] for one in probes), 1),
        "tail": round(statistics.fmean(one["tail"] for one in probes), 1),
        "decoded": round(statistics.fmean(one["decoded"] for one in answered), 1),
        "tokens_a_probe": round(judge_tokens / max(1, len(probes)), 1),
        "share_of_tokens": round(judge_tokens / generated, 4),
        "step_ms": round(step_ms, 2), "ms_a_probe": round(extra_ms, 2),
        "steps_a_probe": round(extra_ms / step_ms, 2),
        "time_ratio": round(statistics.median(a / b for a, b in zip(probed_s, plain_s,
                                                                    strict=True)), 3),
        "low": round(low, 3), "high": round(high, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--cuts", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for page in args.pages:
        flags = (
            "--enable-deepprune", "--deepprune-log-steps", "--deepprune-judge", TEXT,
            "--deepprune-window", "8", "--deepprune-fill", "0", "--page-size", str(page),
            "--sleep-on-idle",
        )  # fmt: skip
        with Server(model_path(), *flags, strict=False, max_total_tokens=40000) as server:
            rows += [measure(server, page, cut, args.questions) for cut in args.cuts]
    print_table(rows, f"A probe's cost, embedded reasoner, n={N}")
    if args.json:
        write_json(args.json, "probe_cost", rows)


if __name__ == "__main__":
    main()
