"""What the plugin costs when the flag is on and no group lives: the promise is under 1 % of a step.

Two measurements on a tiny model, where a step is short and any cost shows most:
1. time inside our decode hook over the time from step to step, by the hook's own clock
   (`--deepprune-log-steps`), at 1, 8 and 64 rows;
2. interleaved pairs: the same requests to a server with the flag and to one without, in turns, and
   the bootstrap interval of the ratio of their times. One that holds 1 is no difference seen.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import print_table, write_json
from tests.engine.server import Server
from tests.engine.tiny_model import make_tiny_model

ROWS = (1, 8, 64)
TOKENS = 400
QUIET = ("--sleep-on-idle", "--max-running-requests", "64")


def load(server: Server, rows: int, settings: Any) -> float:
    """Seconds that `rows` siblings of TOKENS tokens take; `settings` may ask for a group."""
    params: dict[str, Any] = {"n": rows, "max_new_tokens": TOKENS, "ignore_eos": True}
    if settings is not None:
        params["custom_params"] = {"deepprune": settings}
    start = time.perf_counter()
    response = server.post("/generate", {"text": "wait thus", "sampling_params": params})
    response.raise_for_status()
    return time.perf_counter() - start


def share_of_step(model: Path, passes: int) -> list[dict[str, Any]]:
    """Measurement 1, idle (no group) and, for comparison, with every row in a live group."""
    rows = []
    flags = ("--enable-deepprune", "--deepprune-log-steps", "--deepprune-judge", "none")
    with Server(model, *QUIET, *flags, strict=False, max_total_tokens=60000) as server:
        for state, settings in (("idle", False), ("group live", {"preset": "collect"})):
            for size in ROWS:
                before = len(server.log_lines("deepprune-steps"))
                for _ in range(passes):
                    load(server, size, settings)
                steps = [s for s in server.log_lines("deepprune-steps")[before:]
                         if abs(s["rows"] - size) < 0.5]  # fmt: skip
                hook = statistics.median(step["hook_us"] for step in steps)
                whole = statistics.median(step["step_us"] for step in steps)
                rows.append({
                    "measure": "hook share", "state": state, "rows": size,
                    "steps": sum(step["steps"] for step in steps),
                    "hook_us": round(hook, 2), "step_us": round(whole, 1),
                    "share_percent": round(100 * hook / whole, 4),
                })  # fmt: skip
    return rows


def interval(ratios: list[float], draws: int = 10000) -> tuple[float, float]:
    """95 % bootstrap interval of the median, seeded."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def paired(model: Path, pairs: int) -> list[dict[str, Any]]:
    """Measurement 2."""
    rows = []
    with Server(model, *QUIET, strict=False, max_total_tokens=60000) as off, Server(
        model, *QUIET, "--enable-deepprune", "--deepprune-default", "opt-in",
        "--deepprune-judge", "none", strict=False, max_total_tokens=60000,
    ) as on:  # fmt: skip
        for size in ROWS:
            ratios, again = [], []
            for server in (off, on):
                load(server, size, None)
            for turn in range(pairs):
                order = (off, on) if turn % 2 else (on, off)
                spent = {id(server): load(server, size, None) for server in order}
                ratios.append(spent[id(on)] / spent[id(off)])
                # Off against itself: what the machine's own drift looks like.
                first, second = load(off, size, None), load(off, size, None)
                again.append(second / first)
            low, high = interval(ratios)
            base_low, base_high = interval(again)
            rows.append({
                "measure": "paired time", "state": "flag on / off", "rows": size, "pairs": pairs,
                "ratio": round(statistics.median(ratios), 4),
                "low": round(low, 4), "high": round(high, 4),
                "off_off_low": round(base_low, 4), "off_off_high": round(base_high, 4),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=4, help="requests a row count, hook share")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs a row count")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        make_tiny_model(model)
        shares = share_of_step(model, args.passes)
        print_table(shares, "Time in our decode hook over the step")
        pairs = paired(model, args.pairs)
        print_table(pairs, "Interleaved pairs, flag on over flag off")
    if args.json:
        write_json(args.json, "overhead", shares + pairs)


if __name__ == "__main__":
    main()
