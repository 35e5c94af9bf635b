"""Serves a recording's questions under one policy after another, and keeps what each one cost.

One real server a judge (the judge is a server flag); the policy rides in each request. Plain n>1
runs in the same server with `custom_params.deepprune` false: its siblings carry no tag, so every
hook returns at its gate. The prefix cache is flushed before each pass.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

from benchmarks.replay_curve import is_right, winner
from benchmarks.replay_data import MAX_POSITIONS, Played, Workspace, write_workspace_scripts
from benchmarks.replay_results import PLAIN, Outcome, Policy, Usage
from benchmarks.scripted import plugin_env
from sglang_deepprune.answers import extract
from tests.engine.server import Server

POLL_S = 0.1
REQUEST_LIMIT_S = 3600.0
POOL_TOKENS = 1 << 20
ANSWER_CHARS = 8000  # of a reply's end; the server reads 2,048 tokens of it


class LoadPoller:
    """KV slots in use as `/v1/loads` tells them, every 100 ms while something runs."""

    def __init__(self, server: Server):
        self._server = server
        self._usage = Usage()
        self._since, self._cpu_s = time.monotonic(), cpu_seconds(server.process.pid)
        self._steps = self._num_steps()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> LoadPoller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def take(self) -> Usage:
        """What came together since the last call."""
        steps = self._num_steps()
        with self._lock:
            now, cpu_s = time.monotonic(), cpu_seconds(self._server.process.pid)
            taken, self._usage = self._usage, Usage()
            taken.wall_s, self._since = now - self._since, now
            taken.cpu_s, self._cpu_s = max(0.0, cpu_s - self._cpu_s), cpu_s
            taken.steps, self._steps = steps - self._steps, steps
            return taken

    def _load(self) -> dict[str, Any]:
        loads = requests.get(f"{self._server.url}/v1/loads", timeout=30).json()["loads"]
        return dict(loads[0])

    def _num_steps(self) -> int:
        """Decode steps since the start; the first of SGLang's sums over steps is their number."""
        return int((self._load().get("decode_moments") or [0])[0])

    def _poll(self) -> None:
        while not self._is_over.wait(POLL_S):
            with suppress(requests.RequestException):
                load = self._load()
                if load["num_running_reqs"]:
                    self._note(int(load["num_used_tokens"]))

    def _note(self, used: int) -> None:
        with self._lock:
            self._usage.kv_sum += used
            self._usage.kv_samples += 1
            self._usage.kv_peak = max(self._usage.kv_peak, used)


def cpu_seconds(session: int) -> float:
    """CPU time of the live processes of a session, as Linux counts it."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name: state, parent, group, session, ...; user and system time at 11, 12.
            values = stat.read_text().rpartition(")")[2].split()
            if int(values[3]) == session:
                ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve(workspace: Workspace, judge: str, rows: int, deadline_ms: int) -> Iterator[Server]:
    """A server that plays the workspace under one judge."""
    spec = f"oracle:{workspace.oracle}" if judge == "oracle" else judge
    with tempfile.TemporaryDirectory() as folder:
        scripts = Path(folder) / "scripts.json"
        write_workspace_scripts(workspace, scripts)
        flags = (
            # The fastest type of torch's attention on a CPU.
            "--dtype", "float32",
            "--context-length", str(MAX_POSITIONS), "--max-running-requests", str(rows),
            "--enable-deepprune", "--deepprune-judge", spec,
            "--deepprune-judge-deadline-ms", str(deadline_ms),
        )  # fmt: skip
        with Server(
            workspace.model,
            *flags,
            env=plugin_env(scripts, Path(folder) / "plugin"),
            strict=False,
            max_total_tokens=POOL_TOKENS,
        ) as server:
            yield server


def play(
    server: Server,
    policy: Policy,
    questions: Sequence[Played],
    concurrency: int,
    done: Callable[[Outcome], None],
) -> None:
    """One pass: the questions in order, `concurrency` at a time."""
    server.wait_idle()  # flushes the prefix cache
    with ThreadPoolExecutor(concurrency) as pool, LoadPoller(server) as poller:
        futures = [pool.submit(_ask, server, policy, played) for played in questions]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                done(Outcome(**{**_fields(outcome), "usage": poller.take()}))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            server.stop()  # ends the requests in flight, which the pool would wait for
            raise


def judge_faults(server: Server) -> list[str]:
    """Kinds of judge faults in the server's log: such windows had no verdict and pruned nothing."""
    return [line for line in server.log.splitlines() if "gives no verdict" in line]


def _fields(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__slots__}


def _ask(server: Server, policy: Policy, played: Played) -> Outcome:
    body = {
        "input_ids": list(played.prompt_ids),
        "sampling_params": {
            "n": len(played.lengths),
            "temperature": 1.0,
            "max_new_tokens": max(played.lengths) + 1,
            "custom_params": {"deepprune": policy.settings},
        },
    }
    start = time.monotonic()
    response = server.post("/generate", body, timeout_s=REQUEST_LIMIT_S)
    latency_s = time.monotonic() - start
    if response.status_code != 200:
        raise RuntimeError(f"the server answered {response.status_code}: {response.text[:500]}")
    return read_reply(policy, played, response.json(), latency_s)


def read_reply(
    policy: Policy, played: Played, choices: Sequence[dict[str, Any]], latency_s: float
) -> Outcome:
    """Token accounting and vote of one reply.

    Prefix tokens are prompt tokens that were computed: the whole prompt once, by the warm-up
    request that SGLang sends ahead of the siblings, and what each started sibling found uncached.
    """
    metas = [choice["meta_info"] for choice in choices]
    tokens = [int(meta["completion_tokens"]) for meta in metas]
    started = [meta for meta, count in zip(metas, tokens, strict=True) if count]
    states = [meta["deepprune"]["choice"]["state"] for meta in metas]
    record = metas[0]["deepprune"]["group"]
    if policy.name == PLAIN:
        _check_plain(played, tokens, choices)
        best, tie = winner(played.answers)
        counts = Counter(answer for answer in played.answers if answer is not None)
        votes = dict(counts.most_common())
    else:
        if not record["active"]:
            raise RuntimeError(f"no group: {record['reason']}")
        best, tie = record["answer"], record["tie"]
        votes = {vote["answer"]: vote["votes"] for vote in record["votes"]}
    question = played.question
    return Outcome(
        policy.name, policy.judge, policy.k2, question.question_id, len(metas), question.gold,
        winner=best, is_right=is_right(best, question.gold), tie=tie, votes=votes,
        decode_tokens=sum(tokens),
        prefix_tokens=metas[0]["prompt_tokens"]
        + sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in started),
        judge_tokens=record["judge_tokens"], judge_calls=record["judge_calls"],
        judge_ms=record["judge_ms"], pruned=states.count("pruned"),
        decided=states.count("decided"), not_started=states.count("not_started"),
        longest=max(tokens), retractions=sum(meta.get("num_retractions") or 0 for meta in metas),
        latency_s=round(latency_s, 3), reason=record["reason"],
    )  # fmt: skip


def _check_plain(played: Played, tokens: Sequence[int], choices: Sequence[dict[str, Any]]) -> None:
    """Plain n>1 must have said exactly what was recorded, token for token."""
    found = [extract(choice["text"][-ANSWER_CHARS:]) for choice in choices]
    answers = tuple(one.answer if one else None for one in found)
    if tuple(tokens) != played.lengths or answers != played.answers:
        raise RuntimeError(f"question {played.question.question_id}: not what was recorded")
