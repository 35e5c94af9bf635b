"""Faults at random against a real server, and whether everything is back where it was.

    python -m tests.engine.faults --requests 2000 --seed 1 --json FILE
    python -m tests.engine.faults --replay SEED     # one round again

A round is 60 groups of every kind at once and whoever stands by, while the server is aborted,
paused, flushed, given new weights, and its judge raises, hangs, does not know, dies, is killed or
stopped. After each one: every client is answered and each answer is right in itself, bystanders got
what they get alone, /metrics has counted what clients were told, and pool, rows, radix tree and all
tables are at their baseline. A server that dies or hangs is a failure of its round, and the next
one gets another. All of a round follows from its seed, but for the timing of machines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from benchmarks.report import Row, print_table, write_json
from benchmarks.scripted import plugin_env, write_scripts
from sglang_deepprune import metrics
from sglang_deepprune.local_server import ServerError
from sglang_deepprune.policy import RENEWED
from tests.engine import fault_checks, fault_plugin, scenario
from tests.engine.counters import scrape
from tests.engine.fault_clients import LIMIT_S, Reference, Seen, run
from tests.engine.fault_plan import (
    BYSTANDERS,
    FAULTS,
    OTHER_STRANGERS,
    PROMPTS,
    ROUNDS_A_SERVER,
    STRANGERS,
    Fault,
    Round,
    Setup,
    round_of,
    setup_of,
)
from tests.engine.server import Server

REQUESTS_A_ROUND = 60  # n>1 requests and client-side groups; bystanders come on top
MANY = 10_000  # requests among which every kind of fault has come about
IDLE_LIMIT_S = 30.0
STATES = ("finished", "pruned", "decided", "not_started", "aborted", "failed")
LOG_TAIL = 3000  # letters
# What a server that is dying, or gone, does to who asks it.
BROKEN = (requests.RequestException, LookupError, ValueError, AssertionError, ServerError)
NEAR_TIE = 0.25  # log-probability between the first two: less may come out otherwise in bfloat16
PLAIN_FLAGS = ("--sleep-on-idle", "--schedule-conservativeness", "0.1")
FLAGS = (
    "--enable-deepprune", *PLAIN_FLAGS,
    "--deepprune-judge", "python:tests.marker_judge:make", "--deepprune-judge-deadline-ms", "700",
    "--deepprune-group-timeout-s", "1",
)  # fmt: skip

METERED = (*FLAGS, "--enable-metrics")
MIN_SURE, NUM_SURE = 2, 2  # so many strangers have so many tokens that no rounding can change


_PREPARING = threading.Lock()  # transformers is not to be imported by two threads at once


class Harness:
    """One server, and the rounds against it. `flags`: of the server, beside its setup's."""

    def __init__(self, model: Path, folder: Path, setup: Setup, flags: Sequence[str] = FLAGS):
        self.model = model
        self.setup = setup
        env = fault_plugin.plugin_env(folder / "faults") | {
            # SGLang admits more than fits, as it does when its guess of the lengths is too low.
            "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"
        }
        scripts = plugin_env(folder / "scripts.json", folder / "scripted")
        env |= scripts | {"PYTHONPATH": os.pathsep.join([scripts["PYTHONPATH"], env["PYTHONPATH"]])}
        self.server = Server(model, *flags, *setup.flags, env=env, max_total_tokens=setup.slots)
        self.references: dict[str, Reference] = {}
        self.slots = self.rows = 0
        self.seen: list[Seen] = []  # of the round that is played
        self.wrong: list[str] = []

    def __enter__(self) -> Harness:
        self.server.__enter__()
        try:
            self.references = references(self._alone)
            self.server.wait_idle()
            state = self.state()
            self.slots, self.rows = state["free"] + state["evictable"], state["rows"]
        except BaseException:
            self.server.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def _alone(self, prompt: str) -> Reference:
        params = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        body = {
            "text": prompt, "sampling_params": params, "return_logprob": True,
            "top_logprobs_num": 2,
        }  # fmt: skip
        output = self.server.post("/generate", body).json()
        tops = output["meta_info"]["output_top_logprobs"]
        gaps = [first[0] - second[0] for first, second in tops]
        sure = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), len(gaps))
        return Reference(prompt, list(output["output_ids"]), sure)

    def state(self) -> dict[str, Any]:
        """The server's inner state, by fault_plugin.py."""
        info = self.server.get("/server_info")
        return dict(info["internal_states"][0][fault_plugin.KEY])

    def play(self, plan: Round) -> Row:
        """One round and its row. Raises one of BROKEN where the server does not tell its state."""
        start = time.monotonic()
        self.seen, self.wrong = [], []
        before, counted = self.state(), scrape(self.server)
        chaos = Chaos(self, plan.faults)
        with ThreadPoolExecutor(self.setup.clients) as pool:
            jobs = [
                pool.submit(
                    run, self.server, ask, self.references, is_abort_due=plan.aborts_all
                )
                for ask in plan.asks
            ]  # fmt: skip
            chaos.start()
            self.seen = [job.result() for job in jobs]
        chaos.join(2 * LIMIT_S)
        wrong = self.wrong
        wrong += [f"client {one.ask.number} ({one.ask.kind}, {one.ask.fate}, {one.ask.prompt}, "
                  f"n={one.ask.n}): {what}" for one in self.seen for what in one.wrong]  # fmt: skip
        wrong += fault_checks.of_names(
            [(one.ask, {name for name, _ in one.places}) for one in self.seen]
        )
        if chaos.is_alive():
            wrong.append("a fault is not over: the server does not answer its operator")
        wrong += chaos.wrong
        leaked, left = self._after()
        wrong[:0] = left  # first: a dead server's log explains all the others
        happened: dict[str, int] = {}
        if not left:
            after = self.state()
            wrong += self._counters(before, after, self.seen)
            now = scrape(self.server).since(counted)
            wrong += fault_checks.of_counters(
                now.of(metrics.GROUPS), now.of(metrics.SIBLINGS), self.seen
            )
            if now.total(metrics.HOOK_ERRORS):
                wrong.append(f"{now.total(metrics.HOOK_ERRORS):g} hook errors")
            if after["missed"] > before["missed"]:
                wrong.append(f"{after['missed'] - before['missed']} siblings outlived their abort")
            names = ("retracted", "yielded", "relieved")
            happened = {name: after[name] - before[name] for name in names}
        row = row_of(plan, self.setup, self.seen, wrong, chaos.delivered)
        return row | happened | {
            "leaked_slots": leaked, "seconds": round(time.monotonic() - start, 1)
        }  # fmt: skip

    def _after(self) -> tuple[int, list[str]]:
        """Leaked KV slots, and what is not at its baseline when all is quiet."""
        if not self.server.is_alive:
            return 0, [f"the server is dead: {self.server.log[-1500:]}"]
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            state = self.state()
            busy = busy_of(state)
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        wrong = [f"not empty: {busy}"] if busy else []
        leaked = self.slots - state["free"] - state["evictable"]
        if leaked or state["protected"]:
            wrong.append(f"{leaked} slots leaked, {state['protected']} still protected")
        if state["rows"] != self.rows:
            wrong.append(f"{state['rows']} rows free of {self.rows}")
        if state.get("faults") or "live groups run on as plain sampling" in self.server.log:
            wrong.append(f"a fault of ours: {state.get('faults')}")
        try:
            self.server.wait_idle()
        except AssertionError:
            return leaked, [*wrong, "the cache cannot be flushed"]
        state = self.state()
        if state["free"] != self.slots or state["evictable"]:
            wrong.append(f"{state['free']} slots free of {self.slots} after a flush")
        return leaked, wrong

    def _counters(
        self, before: dict[str, Any], after: dict[str, Any], seen: Sequence[Seen]
    ) -> list[str]:
        """Every end that the scheduler has counted is one that a client saw, or that nobody was
        there to see."""
        counted = Counter(after["retired"])
        counted.subtract(before["retired"])
        told: Counter[str] = Counter()
        for one in seen:
            told += one.states
        unknown = sum(one.num_unknown for one in seen)
        more = {state: n - told[state] for state, n in counted.items() if n > told[state]}
        less = {state: n - counted[state] for state, n in told.items() if n > counted[state]}
        less.pop("aborted", None)  # before it reached the scheduler, or its group
        if less or sum(more.values()) > unknown:
            return [f"counted and not told: {more} of {unknown}; told and not counted: {less}"]
        return []


def references(alone: Callable[[str], Reference]) -> dict[str, Reference]:
    """What each stranger gets by itself. One that is a near-tie from the start compares nothing:
    another takes its place, and without NUM_SURE that are none no round is worth its time."""
    others = iter(OTHER_STRANGERS)
    found: dict[str, Reference] = {}
    for name in STRANGERS:
        reference = alone(name)
        while reference.num_sure < MIN_SURE and (other := next(others, "")):
            reference = alone(other)
        found[name] = reference
    num_sure = sum(one.num_sure >= MIN_SURE for one in found.values())
    if num_sure < NUM_SURE:
        raise ValueError(f"only {num_sure} strangers are sure of {MIN_SURE} tokens: {found}")
    return found


def busy_of(state: dict[str, Any]) -> dict[str, int]:
    """What is not empty; with the flag off nobody has tasks or questions."""
    open_ = {name: state.get(name, 0) for name in ("judge_tasks", "fence_open")}
    return {name: count for name, count in {**state["tables"], **open_}.items() if count}


def row_of(
    plan: Round, setup: Setup, seen: Sequence[Seen], wrong: Sequence[str],
    delivered: Sequence[str] = (),
) -> Row:  # fmt: skip
    """The row of a round, as far as its clients know."""
    told: Counter[str] = Counter()
    for one in seen:
        told += one.states
    kinds = [fault.kind for fault in plan.faults]
    return {
        "round": plan.seed,
        "requests": plan.num_groups,
        "bystanders": len(plan.asks) - plan.num_groups,
        "leaked_slots": 0,
        "hung_clients": sum(not one.is_answered for one in seen),
        "wrong_states": len(wrong),
        **{state: told[state] for state in STATES},
        "renewed": sum(one["reason"] == RENEWED for each in seen for one in each.records),
        "retracted": 0, "yielded": 0, "relieved": 0,
        "server": setup.name,
        "faults": ", ".join(kinds),
        "undelivered": ", ".join((Counter(kinds) - Counter(delivered)).elements()),
        "is_exact": plan.is_exact,
        "seconds": 0.0,
    }  # fmt: skip


def delivered_in(rows: Sequence[Row]) -> set[str]:
    """Kinds of faults that came about at least once."""
    found: set[str] = set()
    for row in rows:
        planned = Counter(str(row["faults"]).split(", "))
        found |= set(planned - Counter(str(row["undelivered"]).split(", ")))
    return found & set(FAULTS)


class NoJudge(Exception):
    """There is no judge just now whom a signal would reach."""


class Chaos(threading.Thread):
    """What happens to the server as a whole, at its times."""

    def __init__(self, harness: Harness, faults: Sequence[Fault]):
        super().__init__(daemon=True)
        self.harness, self.faults = harness, faults
        self.wrong: list[str] = []
        self.delivered: list[str] = []

    def run(self) -> None:
        start = time.monotonic()
        for fault in self.faults:
            time.sleep(max(0.0, start + fault.at_s - time.monotonic()))
            try:
                getattr(self, fault.kind.replace(" ", "_"))()
                self.delivered.append(fault.kind)
            except NoJudge:
                continue
            except Exception as error:
                self.wrong.append(f"{fault.kind}: {type(error).__name__}: {str(error)[:120]}")

    def _post(self, path: str, body: dict[str, Any], *allowed: int) -> None:
        url = f"{self.harness.server.url}{path}"
        reply = requests.post(url, json=body, timeout=LIMIT_S)
        if reply.status_code not in (200, *allowed):
            raise RuntimeError(f"{path}: {reply.status_code} {reply.text[:120]}")

    @contextlib.contextmanager
    def _paused(self, mode: str) -> Any:
        self._post("/pause_generation", {"mode": mode})
        try:
            time.sleep(0.2)
            yield
        finally:
            self._post("/continue_generation", {})

    def _new_weights(self, flush: bool) -> None:
        body = {
            "model_path": str(self.harness.model), "weight_version": f"v{time.monotonic():.3f}",
            "flush_cache": flush,
        }  # fmt: skip
        self._post("/update_weights_from_disk", body)

    def abort_all(self) -> None:
        self._post("/abort_request", {"abort_all": True})

    def flush(self) -> None:
        self._post("/flush_cache", {}, 400)

    def pause_in_place(self) -> None:
        with self._paused("in_place"):
            pass

    def pause_and_retract(self) -> None:
        with self._paused("retract"):
            self._post("/flush_cache", {})

    def pause_and_abort(self) -> None:
        with self._paused("abort"):
            pass

    def weights(self) -> None:
        # Under overlap a row outlives its client by a step: SGLang may refuse the flush.
        self._new_weights(flush=False)

    def pause_for_weights(self) -> None:
        with self._paused("retract"):
            self._new_weights(flush=True)

    def weights_in_place(self) -> None:
        with self._paused("in_place"):
            self._new_weights(flush=False)

    def _signal_judge(self, number: int) -> None:
        """One that is stopped while it loads would not be missed for two minutes."""
        deadline = time.monotonic() + 5
        while not self.harness.state()["is_judge_ready"] and time.monotonic() < deadline:
            time.sleep(0.2)
        state = self.harness.state()
        if not state["is_judge_ready"]:
            raise NoJudge
        try:
            os.kill(state["judge_pid"], number)
        except ProcessLookupError:
            raise NoJudge from None

    def kill_judge(self) -> None:
        self._signal_judge(signal.SIGKILL)

    def stop_judge(self) -> None:
        self._signal_judge(signal.SIGSTOP)


def prepare(folder: Path) -> Path:
    """The tiny model and the scripts; returns the model's path."""
    from transformers import AutoTokenizer

    from tests.engine.tiny_model import make_tiny_model

    model = folder / "model"
    make_tiny_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    write_scripts(
        folder / "scripts.json",
        {
            tuple(tokenizer.encode(prompt)): scenario.token_lists(tokenizer, texts)
            for prompt, texts in {**PROMPTS, **BYSTANDERS}.items()
        },
    )
    return model


def rounds(seeds: Sequence[int], requests_a_round: Sequence[int]) -> tuple[list[Row], list[str]]:
    """Play them all, neighbours on one server; rows, and what was wrong with the seed to replay."""
    rows: list[Row] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _PREPARING:
            model = prepare(folder)
        stack = contextlib.ExitStack()
        harness: Harness | None = None
        with stack:
            for seed, count in zip(seeds, requests_a_round, strict=True):
                plan, setup = round_of(seed, count), setup_of(seed)
                if harness is not None and (
                    setup != harness.setup
                    or seed % ROUNDS_A_SERVER == 0
                    or not harness.server.is_alive
                ):
                    stack.close()
                    harness = None
                wrong: list[str] = []
                try:
                    if harness is None:
                        harness = stack.enter_context(Harness(model, folder, setup, METERED))
                    row, wrong = harness.play(plan), harness.wrong
                except BROKEN as error:
                    wrong = broken(error, harness)
                    row = row_of(plan, setup, harness.seen if harness else (), wrong)
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                if wrong:
                    said = "\n  ".join(wrong[:12])
                    failures.append(
                        f"round {seed} on {setup.name}; again: python -m "
                        f"tests.engine.faults --replay {seed} --round {count}\n  {said}"
                    )
                    print(failures[-1], file=sys.stderr, flush=True)
                    stack.close()  # the next round starts from a clean server
                    harness = None
    return rows, failures


def broken(error: Exception, harness: Harness | None) -> list[str]:
    """What is wrong in a round that its server did not live to the end of, or did not start."""
    wrong = [f"the server is broken: {type(error).__name__}: {str(error)[-LOG_TAIL:]}"]
    if harness is not None:
        wrong += [f"its log ends: {harness.server.log[-LOG_TAIL:]}", *harness.wrong]
    return wrong


def play(
    num_requests: int, seed: int, a_round: int = REQUESTS_A_ROUND
) -> tuple[list[Row], list[str]]:
    """So many requests, in rounds whose seeds follow from `seed`."""
    first = seed * 1000 * ROUNDS_A_SERVER
    sizes = [a_round] * (num_requests // a_round)
    if num_requests % a_round:
        sizes.append(num_requests % a_round)
    rows, failures = rounds(range(first, first + len(sizes)), sizes)
    never = sorted(set(FAULTS) - delivered_in(rows))
    if never and num_requests >= MANY:
        failures.append(f"never came about: {', '.join(never)}")
    return rows, failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300, help="n>1 and client-side groups")
    parser.add_argument("--round", type=int, default=REQUESTS_A_ROUND, help="requests a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=int, help="the seed of one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.replay is not None:
        rows, failures = rounds([args.replay], [args.round])
    else:
        rows, failures = play(args.requests, args.seed, args.round)
    print_table(rows, "faults at random, and what they left behind")
    if args.json:
        write_json(args.json, "faults", rows)
    for failure in failures:
        print(failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
