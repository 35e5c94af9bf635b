"""What the plugin costs when the flag is on and no group lives: the promise is under 1 % of a step.

Two measurements on a tiny model, where a step is short and any cost shows most:
1. time inside our decode hook over the time from step to step, by the hook's own clock
   (`--deepprune-log-steps`), at 1, 8 and 64 rows;
2. interleaved pairs: the same requests to a server with the flag, to one without it, and to one in
   which the plugin is not loaded at all, in turns, and the bootstrap intervals of the ratios of
   their times (on over off, off over absent). One that holds 1 is no difference seen.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import print_table, write_json
from tests.engine.server import Server
from tests.engine.tiny_model import make_tiny_model

ROWS = (1, 8, 64)
TOKENS = 400
# SGLang loads the plugins that are named here alone: none of ours.
ABSENT = {"SGLANG_PLUGINS": "someone_else"}
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


def ratio_row(state: str, size: int, ratios: list[float]) -> dict[str, Any]:
    """A row of measurement 2."""
    low, high = interval(ratios)
    return {
        "measure": "paired time", "state": state, "rows": size, "pairs": len(ratios),
        "ratio": round(statistics.median(ratios), 4), "low": round(low, 4), "high": round(high, 4),
    }  # fmt: skip


def paired(model: Path, pairs: int, sizes: Sequence[int] = ROWS) -> list[dict[str, Any]]:
    """Measurement 2."""
    rows = []
    flags = ("--enable-deepprune", "--deepprune-default", "opt-in", "--deepprune-judge", "none")
    said: dict[str, Any] = {"strict": False, "max_total_tokens": 60000}
    with (
        Server(model, *QUIET, env=ABSENT, **said) as absent,
        Server(model, *QUIET, **said) as off,
        Server(model, *QUIET, *flags, **said) as on,
    ):
        servers = (absent, off, on)
        for size in sizes:
            on_off, off_absent, again = [], [], []
            for server in servers:
                load(server, size, None)
            for turn in range(pairs):
                order = servers if turn % 2 else servers[::-1]
                spent = {id(server): load(server, size, None) for server in order}
                on_off.append(spent[id(on)] / spent[id(off)])
                off_absent.append(spent[id(off)] / spent[id(absent)])
                # Off against itself: what the machine's own drift looks like.
                first, second = load(off, size, None), load(off, size, None)
                again.append(second / first)
            low, high = interval(again)
            drift = {"off_off_low": round(low, 4), "off_off_high": round(high, 4)}
            rows.append(ratio_row("flag on / off", size, on_off) | drift)
            rows.append(ratio_row("flag off / absent", size, off_absent) | drift)
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
        print_table(pairs, "Interleaved pairs: flag on over off, off over no plugin")
    if args.json:
        write_json(args.json, "overhead", shares + pairs)


if __name__ == "__main__":
    main()
