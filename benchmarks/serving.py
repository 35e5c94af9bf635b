"""Questions a second and latency of a real server: plain n>1, client rivals and the plugin.

    python -m benchmarks.serving --json benchmarks/results/serving.json

Each cell (`serving_cells`) is a load on the embedded reasoner. A server without deepprune plays
plain, the rivals (`clients`) and plain again; then one with deepprune plays plain requests that
decline it, the presets, and those again. Sibling i
of a question draws the same noise everywhere (`bench_plugin`), so policies differ in what they
start and stop and in nothing else. A finished pass is kept: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import aiohttp
from tqdm import tqdm

from benchmarks.bench_plugin import difference, plugin_env, read_totals
from benchmarks.clients import DECLINED, MAX_NEW_TOKENS, PLAIN, Outcome, ask, ask_one, new_session
from benchmarks.report import Row, write_json
from benchmarks.serving_cells import (
    ARRIVAL_SEED,
    BY_NAME,
    CAPACITY,
    CELLS,
    DECLINED_AGAIN,
    FLAT_STEP_MS,
    LEVEL_SHARES,
    NOISE_SEED,
    ORDINARY_SEED,
    PLAIN_AGAIN,
    QUESTION_SEED,
    SMOKE,
    SMOKE_QUESTIONS,
    Cell,
    arrivals,
    passes_of,
    question_set,
)
from benchmarks.serving_report import Pass, cell_rows, print_cell, save_plot
from sglang_deepprune.local_server import LocalServer, ServerError, has_gpu
from sglang_deepprune.reasoner import Question, model_path

ORDINARY_EVERY_S = 1.0
WARM_UPS = 8
KV_TOKENS_A_ROW = 2_000  # ample: a prompt and MAX_NEW_TOKENS are about half of it
_IDLE_LIMIT_S = 60.0
_ASKED_AS = {PLAIN_AGAIN: PLAIN, CAPACITY: PLAIN, DECLINED_AGAIN: DECLINED}
# The checkpoint's own precision. SGLang would take float16, at half the speed on a CPU.
_CPU_FLAGS = ("--dtype", "float32")


class Results:
    """The finished passes in DIR/results.jsonl."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as out:
                out.write("\n")  # ends the line that a killed run was writing
        self.passes = {(one.cell, one.policy): one for one in _read(self.path)}

    def forget(self, cells: Iterable[Cell], policies: Sequence[str] = ()) -> None:
        """Drop these policies' passes of these cells; no policies: all of them."""
        names = {cell.name for cell in cells}
        self.passes = {
            (cell, policy): one
            for (cell, policy), one in self.passes.items()
            if cell not in names or (policies and policy not in policies)
        }
        lines = [json.dumps(asdict(one)) + "\n" for one in self.passes.values()]
        self.path.write_text("".join(lines), encoding="utf-8")

    def add(self, played: Pass) -> None:
        self.passes[played.cell, played.policy] = played
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(played)) + "\n")

    def of(self, cell: Cell, policies: Iterable[str]) -> list[Pass]:
        keys = [(cell.name, policy) for policy in policies]
        return [self.passes[key] for key in keys if key in self.passes]

    def missing(self, cell: Cell, policies: Iterable[str]) -> list[str]:
        return [policy for policy in policies if (cell.name, policy) not in self.passes]


def _read(path: Path) -> Iterator[Pass]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that was cut off
                yield Pass(**json.loads(line))


class Player:
    """Plays passes of one cell on one server."""

    def __init__(self, url: str, log: Path, cell: Cell, asked: Sequence[Question], bar: tqdm):
        self.url = url
        self.log = log
        self.cell = cell
        self.asked = asked
        self.bar = bar

    async def play(self, policy: str, rate: float = 0.0) -> Pass:
        """All questions under one policy, `rate` a second, or by the cell's closed loop."""
        asks_as = _ASKED_AS.get(policy, policy)
        async with new_session() as session:
            await flush(session, self.url)
            before = read_totals(self.log)
            ordinary = asyncio.create_task(self._ordinary(session)) if rate else None
            start = time.perf_counter()
            if rate:
                outcomes = await self._at(session, asks_as, arrivals(len(self.asked), rate))
            else:
                limit = 0 if policy == CAPACITY else self.cell.concurrency
                outcomes = await self._closed(session, asks_as, limit or len(self.asked))
            wall_s = time.perf_counter() - start
            n1_latencies_s = []
            if ordinary is not None:
                ordinary.cancel()
                n1_latencies_s = await ordinary
            await flush(session, self.url)
        return Pass(
            self.cell.name, policy, wall_s,
            answers=[one.answer for one in outcomes],
            tokens=[one.tokens for one in outcomes],
            started=[one.started for one in outcomes],
            latencies_s=[one.latency_s for one in outcomes],
            steps=difference(before, read_totals(self.log)),
            rate=rate, n1_latencies_s=n1_latencies_s,
        )  # fmt: skip

    async def warm_up(self) -> None:
        """A few ordinary requests, so that the first pass is not the one that pays for them."""
        async with new_session() as session:
            prompts = question_set(WARM_UPS, ORDINARY_SEED)
            await asyncio.gather(*(ask_one(session, self.url, one, 0) for one in prompts))

    async def _closed(
        self, session: aiohttp.ClientSession, policy: str, limit: int
    ) -> list[Outcome]:
        """`limit` questions at a time, in order."""
        gate = asyncio.Semaphore(limit)

        async def one(number: int) -> Outcome:
            async with gate:
                return await self._ask(session, policy, number)

        return await _together(one(number) for number in range(len(self.asked)))

    async def _at(
        self, session: aiohttp.ClientSession, policy: str, times: Sequence[float]
    ) -> list[Outcome]:
        """Question i at second times[i], whatever still runs."""

        async def one(number: int) -> Outcome:
            await asyncio.sleep(times[number])
            return await self._ask(session, policy, number)

        return await _together(one(number) for number in range(len(self.asked)))

    async def _ask(self, session: aiohttp.ClientSession, policy: str, number: int) -> Outcome:
        question = self.asked[number]
        outcome = await ask(policy, session, self.url, question, self.cell.n, NOISE_SEED + number)
        self.bar.update()
        return outcome

    async def _ordinary(self, session: aiohttp.ClientSession) -> list[float]:
        """An n=1 request a second until cancelled; then waits for those in flight."""
        prompts = question_set(len(self.asked), ORDINARY_SEED)
        tasks: list[asyncio.Task[float]] = []
        with suppress(asyncio.CancelledError):
            while True:
                number = len(tasks)
                prompt = prompts[number % len(prompts)]
                one = ask_one(session, self.url, prompt, ORDINARY_SEED + number)
                tasks.append(asyncio.create_task(one))
                await asyncio.sleep(ORDINARY_EVERY_S)
        return await asyncio.gather(*tasks)


async def flush(session: aiohttp.ClientSession, url: str) -> None:
    """Empty the prefix cache once nothing runs; the plugin writes its totals then."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    while time.monotonic() < deadline:
        with suppress(aiohttp.ServerDisconnectedError):
            async with session.post(f"{url}/flush_cache") as reply:
                if reply.status == 200:
                    return
        await asyncio.sleep(0.1)
    raise ServerError("the server does not become idle")


async def _together(many: Iterable[Awaitable[Outcome]]) -> list[Outcome]:
    """All of them in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in many]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


@contextmanager
def serve(cell: Cell, is_deepprune_on: bool, flat_step_ms: float) -> Iterator[tuple[str, Path]]:
    """URL and step log of a server for a cell."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps.jsonl"
        flags = ["--max-running-requests", str(cell.rows), "--sleep-on-idle"]
        if not has_gpu():
            flags += _CPU_FLAGS
        if is_deepprune_on:
            flags += ["--enable-deepprune"]  # with the default judge, whom `paper` alone asks
        env = plugin_env(
            Path(folder) / "plugin", log=log, is_deepprune_on=is_deepprune_on,
            flat_ms=flat_step_ms if cell.is_flat else 0.0,
        )  # fmt: skip
        tokens = cell.rows * KV_TOKENS_A_ROW
        server = LocalServer(model_path(), *flags, env=env, max_total_tokens=tokens)
        try:
            with server:
                yield server.url, log
        except Exception:
            print(f"the server's log: {server.log_file.name}", file=sys.stderr)
            raise
        Path(server.log_file.name).unlink(missing_ok=True)


def run_cell(
    cell: Cell,
    asked: Sequence[Question],
    chosen: Sequence[str],
    results: Results,
    flat_step_ms: float,
) -> None:
    """Play whatever the results file lacks, one server after the other."""
    off, on = passes_of(cell, chosen)
    if cell.poisson:
        off = [CAPACITY, *off]
        known = results.passes.get((cell.capacity_cell, PLAIN))
        if known is not None and results.missing(cell, [CAPACITY]):
            # Kept here as well: later passes of this cell must not see another rate.
            results.add(replace(known, cell=cell.name, policy=CAPACITY))
    for policies, is_on in ((off, False), (on, True)):
        todo = results.missing(cell, policies)
        if not todo:
            continue
        with (
            tqdm(total=len(todo) * len(asked), unit="question") as bar,
            serve(cell, is_on, flat_step_ms) as (url, log),
        ):
            player = Player(url, log, cell, asked, bar)
            asyncio.run(player.warm_up())
            for policy in todo:
                bar.set_description(f"{cell.name}: {policy}")
                rate = 0.0 if policy == CAPACITY else _rate(cell, results)
                results.add(asyncio.run(player.play(policy, rate)))


def _rate(cell: Cell, results: Results) -> float:
    """Questions a second that arrive; 0 in a closed loop."""
    if not cell.poisson:
        return 0.0
    # An ordinary request is a question's n-th part, and of the load like any other.
    ordinary = 1 / (ORDINARY_EVERY_S * cell.n)
    return max(
        cell.poisson * results.passes[cell.name, CAPACITY].questions_per_s - ordinary, ordinary
    )


def run(
    cells: Sequence[Cell],
    chosen: Sequence[str],
    num_questions: int,
    results: Results,
    flat_step_ms: float = FLAT_STEP_MS,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All cells; each is printed when it is complete."""
    rows: list[Row] = []
    for cell in cells:
        asked = question_set(min(num_questions or cell.num_questions, cell.num_questions))
        run_cell(cell, asked, chosen, results, flat_step_ms)
        off, on = passes_of(cell, chosen)
        own = cell_rows(cell, results.of(cell, [*off[:-1], *on, PLAIN_AGAIN]), asked)
        print_cell(cell, own)
        rows += own
        done(rows)
    return rows


def results_folder(num_questions: int, flat_step_ms: float = FLAT_STEP_MS) -> Path:
    """One folder a setting that changes what is measured. Never in the repository."""
    cells = [replace(cell, policies=()) for cell in CELLS]
    settings = [
        num_questions, MAX_NEW_TOKENS, flat_step_ms, LEVEL_SHARES, KV_TOKENS_A_ROW,
        QUESTION_SEED, ORDINARY_SEED, NOISE_SEED, ARRIVAL_SEED, [asdict(cell) for cell in cells],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    return root / f"deepprune-serving-{digest}"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the server too
    _allow_connections()
    arguments = _arguments()
    names = [SMOKE.name] if arguments.smoke else arguments.cells
    num_questions = SMOKE_QUESTIONS if arguments.smoke else arguments.questions
    cells = [BY_NAME[name] for name in names]
    flat_step_ms = arguments.flat_step_ms
    results = Results(arguments.resume or results_folder(num_questions, flat_step_ms))
    if arguments.fresh:
        results.forget(cells, arguments.policies)

    def keep(rows: list[Row]) -> None:
        if arguments.json is not None:
            write_json(
                arguments.json, "serving", rows,
                flat_step_ms=flat_step_ms, max_new_tokens=MAX_NEW_TOKENS, levels=LEVEL_SHARES,
            )  # fmt: skip

    rows = run(cells, arguments.policies, num_questions, results, flat_step_ms, keep)
    plot = arguments.plot or (arguments.json and arguments.json.with_suffix(".png"))
    if plot is not None:
        save_plot(rows, plot)


def _allow_connections() -> None:
    """A rival holds a connection a trace: as many open files as may be, for the server too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--cells", nargs="+", choices=list(BY_NAME), default=[cell.name for cell in CELLS]
    )
    parser.add_argument(
        "--policies", nargs="+", default=[],
        help="instead of the cell's own, as balanced or balanced,base=8; plain is played first and "
        "last in any case",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=0, help="at most so many a cell; 0: all")
    parser.add_argument(
        "--flat-step-ms", type=_step_ms, default=FLAT_STEP_MS, metavar="MS",
        help="what a pass takes at least in the flat cells (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="one tiny cell, for CI")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="default: beside --json")
    parser.add_argument("--resume", type=Path, help="where finished passes are kept")
    parser.add_argument(
        "--fresh", action="store_true", help="play again what --cells and --policies name"
    )
    return parser.parse_args()


def _step_ms(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


if __name__ == "__main__":
    main()
