"""A long mixed load at capacity, and whether the server's processes stay as large as they are.

    python -m tests.engine.soak --minutes 30 --json FILE
    python -m tests.engine.soak --plain     # the same load with the flag off, to compare with

The load is that of `faults.py` without what its operator does: groups of every kind, streams,
aborts, disconnects, members that join by name, bystanders, judges that fail; always more clients
than rows. Every few seconds: resident memory, file descriptors and threads of each process, and how
full our tables are. The first third is warm-up: caches fill, heaps settle. Flat is, for the rest:
 - memory: a straight line through it grows by no more than MEMORY_SHARE of its mean, or MEMORY_MIB;
 - Python's own heap in the scheduler, in blocks: by no more than BLOCKS_SHARE; its C heap in use,
   as memory. What resident memory grows by beyond both are holes between blocks;
 - descriptors, threads and tables: the median of the last half is at most that of the first one,
   plus what one client or one restart of a judge needs (SLACK);
and at the end, with nobody there, all tables are empty.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.report import Row, print_table, write_json
from tests.engine.fault_clients import run
from tests.engine.fault_plan import Ask, Setup, round_of
from tests.engine.faults import FLAGS, PLAIN_FLAGS, Harness, prepare

MIB = 1 << 20
WARM_UP = 1 / 3  # of the run
MEMORY_SHARE, MEMORY_MIB = 0.02, 8.0
BLOCKS_SHARE = 0.005
SLACK = {"fds": 8, "threads": 4, "entries": 40}
MEASURES = ("rss_mib", "fds", "threads")
# More clients than rows: the waiting room and the queue are never empty for long.
SETUP = Setup(page_size=1, is_overlap=True, slots=3000, rows=16, fill=0.25, clients=24)
_ASKS_A_SEED = 60
_OPEN = ("judge_tasks", "fence_open")
_ROLES = (
    ("sglang_deepprune.child", "children"), ("scheduler", "scheduler"),
    ("detokenizer", "detokenizer"), ("resource_tracker", "resource tracker"),
)  # fmt: skip


@dataclass
class Load:
    """Clients that ask, one question after the other, until it is over."""

    harness: Harness
    seed: int
    num_asked: int = 0
    num_hung: int = 0
    wrong: list[str] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Load:
        asks = self._asks()
        self._threads = [
            threading.Thread(target=self._client, args=(asks,), daemon=True)
            for _ in range(self.harness.setup.clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(180)
        self.num_hung += sum(thread.is_alive() for thread in self._threads)

    def _asks(self) -> Iterator[Ask]:
        for seed in itertools.count(self.seed):
            yield from round_of(seed, _ASKS_A_SEED).asks

    def _client(self, asks: Iterator[Ask]) -> None:
        while not self._is_over.is_set():
            with self._lock:
                ask = next(asks)
            seen = run(self.harness.server, ask, self.harness.references)
            with self._lock:
                self.num_asked += 1
                self.num_hung += not seen.is_answered
                self.states += seen.states
                self.wrong += [f"{ask}: {what}" for what in seen.wrong]


def role_of(process: psutil.Process) -> str:
    """What a process is to the server, by its command line or the title that SGLang gives it."""
    line = " ".join(process.cmdline()) or process.name()
    return next((role for mark, role in _ROLES if mark in line), "main")


def sample(server_pid: int) -> dict[str, dict[str, float]]:
    """role -> what its processes hold now; one that ends meanwhile is left out."""
    root = psutil.Process(server_pid)
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(MEASURES, 0.0))
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                role = role_of(process)
                held = (process.memory_info().rss / MIB, process.num_fds(), process.num_threads())
        except psutil.Error:
            continue
        for name, value in zip(MEASURES, held, strict=True):
            found[role][name] += value
    return dict(found)


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """By how much a straight line through the values (least squares) rises over their time."""
    if len(values) < 2 or times[0] == times[-1]:
        return 0.0
    slope, _ = statistics.linear_regression(times, values)
    return slope * (times[-1] - times[0])


def verdict(samples: Sequence[Row]) -> list[Row]:
    """One row a role and measure: after the warm-up, at the end, and whether it is flat."""
    start = samples[-1]["seconds"] * WARM_UP
    after = [one for one in samples if one["seconds"] >= start]
    times = [one["seconds"] for one in after]
    middle = len(after) // 2
    rows: list[Row] = []
    for role in dict.fromkeys(role for one in after for role in one["processes"]):
        for measure in MEASURES:
            values = [one["processes"].get(role, {}).get(measure, 0.0) for one in after]
            rows.append(_row(role, measure, times, values, middle))
    blocks = [float(one["python_blocks"]) for one in after]
    rows.append(_row("scheduler", "python_blocks", times, blocks, middle))
    c_heap = [float(one["c_heap_mib"]) for one in after]
    rows.append(_row("scheduler", "c_heap_mib", times, c_heap, middle))
    for name in dict.fromkeys(name for one in after for name in one["tables"]):
        values = [float(one["tables"].get(name, 0)) for one in after]
        rows.append(_row("tables", name, times, values, middle))
    return rows


def _row(
    role: str, measure: str, times: Sequence[float], values: Sequence[float], middle: int
) -> Row:
    rise = growth(times, values)
    early, late = (statistics.median(part) for part in (values[:middle], values[middle:]))
    if measure.endswith("_mib"):
        most = max(MEMORY_MIB, MEMORY_SHARE * statistics.fmean(values))
        is_flat = rise <= most
    elif measure == "python_blocks":
        is_flat = rise <= BLOCKS_SHARE * statistics.fmean(values)
    else:
        is_flat = late <= early + SLACK.get(measure, SLACK["entries"])
    return {
        "what": role, "measure": measure, "first_half": round(early, 1),
        "last_half": round(late, 1), "max": round(max(values), 1), "rise": round(rise, 2),
        "rise_an_hour": round(rise / max(1e-9, times[-1] - times[0]) * 3600, 1), "is_flat": is_flat,
    }  # fmt: skip


def soak(
    minutes: float, every_s: float = 5.0, seed: int = 1, *, is_plain: bool = False
) -> tuple[list[Row], list[Row], Row]:
    """(verdicts, samples, what the load was), of so many minutes on a server of its own.

    `is_plain`: with the flag off. Then nobody says what became of a sibling: no answer is checked.
    """
    samples: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = PLAIN_FLAGS if is_plain else FLAGS
        with Harness(prepare(folder), folder, SETUP, flags) as harness:
            start = time.monotonic()
            with Load(harness, seed * 1_000_000) as load:
                while (spent := time.monotonic() - start) < minutes * 60:
                    state = harness.state()
                    samples.append({
                        "seconds": round(spent, 1), "requests": load.num_asked,
                        "processes": sample(harness.server.process.pid),
                        "python_blocks": state["python_blocks"],
                        "c_heap_mib": state["c_heap_mib"],
                        "tables": {**state["tables"],
                                   **{name: state[name] for name in _OPEN if name in state}},
                    })  # fmt: skip
                    time.sleep(every_s)
            if is_plain:
                load.wrong.clear()
            leaked, left = harness._after()
            if leaked or left:
                load.wrong.append(f"after the last client: {'; '.join(left)}")
            about = {
                "minutes": minutes, "requests": load.num_asked, "hung": load.num_hung,
                "wrong": len(load.wrong), "leaked_slots": leaked, "states": dict(load.states),
                "server": harness.setup.name, "flags": list(flags),
                "faults_of_ours": harness.state().get("faults", []),
                "examples": load.wrong[:10],
            }  # fmt: skip
    return verdict(samples), samples, about


def is_good(verdicts: Sequence[Row], about: Row) -> bool:
    """All flat, nobody hangs, nothing is left."""
    clean = not (about["hung"] or about["wrong"] or about["leaked_slots"])
    return clean and all(row["is_flat"] for row in verdicts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="the flag off: SGLang's own growth")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    verdicts, samples, about = soak(args.minutes, args.every, args.seed, is_plain=args.plain)
    print_table(verdicts, f"{about['requests']} requests in {args.minutes:g} minutes: is it flat?")
    for name, value in about.items():
        print(f"{name}: {value}")
    good = is_good(verdicts, about)
    print("flat" if good else "NOT flat")
    if args.json:
        write_json(args.json, "soak", verdicts, about=about, is_flat=good, samples=samples)
    return not good


if __name__ == "__main__":
    sys.exit(main())
