"""What a judge at work does to strangers: inter-token latency of ordinary requests beside groups.

One server on the embedded reasoner; a few clients stream ordinary requests while groups come one
after the other and never get anybody stopped (K2 is out of reach), so that the decode load is the
same under every judge. Modes: `none` (no judge; first and last, their distance is the noise),
`busy` (a language model that reads without a pause, with a backlog) and `stopped` (the same one,
under SIGSTOP: it never answers). First with server and clients pinned to the first core and the
judge to the last; then, `shared`, with all of them on all cores, as the kernel likes: there the
judge's low priority alone protects strangers. Ratios are to the mean of the two runs without a
judge of the same kind. Gaps are taken between the chunks of a stream, at the client.

    python -m benchmarks.bystanders --judge llm:MODEL --json benchmarks/results/bystanders.json
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.report import Row, print_table, with_ratios, write_json
from benchmarks.serving_report import percentile
from sglang_deepprune.local_server import LocalServer, post, stream
from sglang_deepprune.reasoner import model_path, questions

CLIENTS = 4
CORES = sorted(os.sched_getaffinity(0))
TOKENS = 32
LOAD_LIMIT_S = 120.0
MODES = ("none", "busy", "stopped", "none again")
SHARED_MODES = ("none", "busy", "none again")
FLAGS = ("--enable-deepprune", "--deepprune-fill", "0", "--stream-interval", "1",
         "--max-running-requests", "32")  # fmt: skip
GROUP = {
    "preset": "paper",
    "k2": 4096,
    "k3": 4096,
    "cut": "tokens",
    "cut_tokens": 40,
    "k1": 4096,
    "tau": 0.0,
}


def bystander(url: str, seed: int) -> list[float]:
    """Seconds between the chunks of one ordinary stream."""
    question = questions(40_000 + seed, 1)[0]
    body = {
        "text": question.prompt,
        "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0},
    }
    times = [time.perf_counter() for _ in stream(url, "/generate", body)]
    return [b - a for a, b in zip(times, times[1:], strict=False)]


@contextlib.contextmanager
def groups(url: str, n: int) -> Iterator[None]:
    """Groups of n, one after the other, until the block ends."""
    is_over = threading.Event()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            ask_all()
        except Exception as error:  # raised below: without groups there is nothing to measure
            errors.append(error)

    def ask_all() -> None:
        for question in questions(50_000, 10_000, "middle"):
            if is_over.is_set():
                return
            body = {
                "text": question.prompt,
                "sampling_params": {
                    "n": n, "max_new_tokens": 200, "ignore_eos": True, "temperature": 1.0,
                    "custom_params": {"deepprune": GROUP},
                },
            }  # fmt: skip
            post(url, "/generate", body)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]


def our_processes(server: LocalServer) -> list[psutil.Process]:
    """The judge's, and the answer fence's, which has little to do here."""
    return [
        child for child in psutil.Process(server.process.pid).children(recursive=True)
        if any("sglang_deepprune" in part for part in child.cmdline())
    ]  # fmt: skip


def judge_of(server: LocalServer) -> psutil.Process:
    """Of these the one that has read a model, once it has."""
    return max(our_processes(server), key=lambda child: child.memory_info().rss)


def wait_loaded(url: str) -> None:
    """Until a verdict comes in time: a model may take half a minute to load."""
    deadline = time.monotonic() + LOAD_LIMIT_S
    params = {"n": 2, "max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0,
              "custom_params": {"deepprune": {**GROUP, "cut_tokens": 8, "window": 8}}}  # fmt: skip
    while time.monotonic() < deadline:
        outputs = post(url, "/generate", {"text": "What is 3 + 4 ?", "sampling_params": params})
        if outputs[0]["meta_info"]["deepprune"]["group"]["judge_calls"]:
            return
    raise SystemExit("the judge gives no verdict")


def pin(process: psutil.Process) -> None:
    """To the last core. Whatever else runs here has inherited the first one."""
    for thread in process.threads():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread.id, {CORES[-1]})


def play(mode: str, spec: str, requests: int, n: int, *, is_pinned: bool) -> Row:
    """One mode on a server of its own."""
    os.sched_setaffinity(0, {CORES[0]} if is_pinned else CORES)
    name = spec if mode in ("busy", "stopped") else "none"
    flags = (*FLAGS, "--deepprune-judge", name, "--deepprune-judge-deadline-ms", "600000")
    with LocalServer(model_path(), *flags, max_total_tokens=60_000) as server:
        with groups(server.url, n):
            judge = None
            if name != "none":
                for process in our_processes(server) if is_pinned else ():
                    pin(process)
                wait_loaded(server.url)
                judge = judge_of(server)
                time.sleep(5)  # its backlog grows
            used = sum(judge.cpu_times()[:2]) if judge else 0.0
            if mode == "stopped":
                assert judge is not None
                judge.send_signal(signal.SIGSTOP)
            start = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                gaps = list(pool.map(lambda i: bystander(server.url, i), range(requests)))
            seconds = time.perf_counter() - start
            busy = (sum(judge.cpu_times()[:2]) - used) / seconds if judge else 0.0
            if mode == "stopped" and judge is not None:
                judge.send_signal(signal.SIGCONT)
        every = [gap for one in gaps for gap in one]
        return {
            "mode": mode, "cores": "apart" if is_pinned else "shared",
            "requests": len(gaps), "tokens": len(every) + len(gaps),
            "itl_mean_ms": 1e3 * statistics.fmean(every),
            "itl_p50_ms": 1e3 * (percentile(every, 0.5) or 0),
            "itl_p99_ms": 1e3 * (percentile(every, 0.99) or 0),
            "seconds": seconds, "judge_core_share": busy,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", required=True, help="llm:MODEL, slow enough to be always busy")
    parser.add_argument("--requests", type=int, default=1000, help="ordinary ones a mode")
    parser.add_argument("--n", type=int, default=8, help="siblings of a group")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for is_pinned, modes in ((True, MODES), (False, SHARED_MODES)):
        own = []
        for mode in modes:
            own.append(play(mode, args.judge, args.requests, args.n, is_pinned=is_pinned))
            print(own[-1], flush=True)
        quiet = [row for row in own if row["mode"].startswith("none")]
        keys = ("itl_mean_ms", "itl_p50_ms", "itl_p99_ms")
        base: Row = {key: statistics.fmean(row[key] for row in quiet) for key in keys}
        rows += with_ratios(own, base, keys)
    print_table(rows, "ordinary requests beside a judge at work")
    if args.json is not None:
        write_json(args.json, "bystanders", rows)


if __name__ == "__main__":
    main()
