"""The main job, for real, anywhere: serve the embedded reasoner, prune live, print the table.

One real SGLang server with `--enable-deepprune`; the same questions and seeds under plain n>1 and
under each preset (`demo_rows.py` says what plain is). The server is ended whatever happens: a
failure, Ctrl-C, a closed terminal.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from sglang_deepprune.demo_rows import MODES, Mode, Outcome, modes, row_of
from sglang_deepprune.demo_view import Cell, Row, View, table_of
from sglang_deepprune.local_server import LocalServer, ServerError, has_gpu, post, stream
from sglang_deepprune.reasoner import Question, model_path, questions
from sglang_deepprune.report import with_ratios, write_json

MAX_NEW_TOKENS = 1000
SERVER_FLAGS = (
    "--enable-deepprune", "--max-running-requests", "64", "--stream-interval", "8",
)  # fmt: skip
# The checkpoint's own precision. SGLang would take float16, at half the speed on a CPU.
CPU_SERVER_FLAGS = ("--dtype", "float32")
FAILURES = (ServerError, OSError, HTTPException)  # of the server or of talking to it
NARROWEST = 100  # columns of a table that goes to a file or a pipe


class Runner:
    """Asks all questions in one mode, some at a time."""

    def __init__(self, url: str, size: int, seed: int, concurrency: int, console: Console):
        self.url = url
        self.size = size
        self.seed = seed
        self.concurrency = concurrency
        self.console = console
        self.is_live = False
        self._is_cancelled = threading.Event()

    def run(self, mode: Mode, asked: Sequence[Question]) -> tuple[list[Outcome], float]:
        """Outcomes in order, and the wall clock in seconds."""
        view = View(mode.name, total=len(asked), on_close=None if self.is_live else self._tell)
        start = time.monotonic()
        pool = ThreadPoolExecutor(self.concurrency)
        with ExitStack() as stack:
            if self.is_live:
                live = Live(view, console=self.console, refresh_per_second=8, transient=True)
                stack.enter_context(live)
            try:
                jobs = [pool.submit(self._ask, mode, n, one, view) for n, one in enumerate(asked)]
                outcomes = [job.result() for job in jobs]
            finally:
                # After an error or Ctrl-C nobody waits for the questions that are still open.
                self._is_cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
        self._is_cancelled.clear()
        return outcomes, time.monotonic() - start

    def _tell(self, view: View) -> None:
        if view.done % max(1, view.total // 4) == 0:
            self.console.print(view.progress, highlight=False)

    def _ask(self, mode: Mode, number: int, question: Question, view: View) -> Outcome:
        params = {
            "n": self.size, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0,
            "sampling_seed": self.seed * 100_003 + number,
            "custom_params": {"deepprune": mode.settings},
        }  # fmt: skip
        row = Row(question.prompt, question.answer, [Cell() for _ in range(self.size)])
        view.open(number, row)
        for chunk in self._chunks({"text": question.prompt, "sampling_params": params}):
            row.take(chunk)
            if self._is_cancelled.is_set():
                raise ServerError("cancelled")
        if row.group is None or not row.group["active"]:
            why = row.group["reason"] if row.group else "is it started with --enable-deepprune?"
            raise ServerError(f"no group record came back from {self.url}: {why}")
        outcome = Outcome(question, row.group, tuple(cell.text for cell in row.cells))
        view.close(number, outcome.is_right)
        return outcome

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The reply bit by bit for the live view, else in one piece, which costs the server less.

        Both name their choices by `index`, which a whole reply leaves out.
        """
        if self.is_live:
            yield from stream(self.url, "/generate", body)
            return
        for index, choice in enumerate(post(self.url, "/generate", body)):
            yield {"index": index, **choice}


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """A plain `kill` or a closed terminal unwinds like Ctrl-C does, so the server is ended."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {sign: signal.signal(sign, interrupt) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


@contextmanager
def own_server(console: Console, port: int) -> Iterator[str]:
    """The URL of a server of our own. Its log stays when something fails, and is named."""
    flags = SERVER_FLAGS if has_gpu() else (*SERVER_FLAGS, *CPU_SERVER_FLAGS)
    if port:
        check_free(port)
    server = LocalServer(model_path(), *flags, max_total_tokens=80_000, port=port)
    log = Path(server.log_file.name)
    is_failed = False
    try:
        with ExitStack() as stack:
            with console.status("starting a real SGLang server on the embedded reasoner"):
                if not console.is_terminal:
                    console.print("starting a real SGLang server on the embedded reasoner ...")
                stack.enter_context(server)
            yield server.url
    except FAILURES as error:
        is_failed = True
        raise ServerError(f"{error}\nthe server's log: {log}") from error
    finally:
        if not is_failed:
            log.unlink(missing_ok=True)


def check_free(port: int) -> None:
    """Raise ServerError where another process listens: SGLang would find out after minutes."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"--port {port}: {error.strerror}; choose another one") from error


def compare_modes(
    runner: Runner, chosen: Sequence[Mode], asked: Sequence[Question], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All rows, plain n>1 first."""
    rows: list[dict[str, Any]] = []
    plain: list[Outcome] = []
    for mode in chosen:
        outcomes, seconds = runner.run(mode, asked)
        plain = plain or outcomes
        rows.append(row_of(mode, outcomes, seconds, plain))
        say(f"{mode.name}: {seconds:.1f} s, {rows[-1]['tokens']:.0f} tokens a question")
    stopped = rows[0]["questions"] * runner.size - rows[0]["finished"]
    if stopped:
        say(f"WARNING: {stopped} plain siblings did not finish; the ratios mean little")
    return with_ratios(rows, rows[0], ["tokens", "seconds"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--questions", type=_positive, default=24, help="default: 24")
    parser.add_argument("--n", type=_positive, default=16, help="siblings a question; default: 16")
    parser.add_argument("--seed", type=int, default=1, help="of questions and sampling; default: 1")
    parser.add_argument("--concurrency", type=_positive, default=4,
                        help="questions at a time; default: 4")  # fmt: skip
    parser.add_argument("--presets", nargs="*", default=list(MODES), choices=list(MODES),
                        help="beside plain n>1; default: all")  # fmt: skip
    parser.add_argument("--url", default="", help="a server of this model that runs already")
    parser.add_argument("--port", type=int, default=0, help="of the server; default: a free one")
    parser.add_argument("--no-live", action="store_true", help="lines instead of the live view")
    parser.add_argument("--json", type=Path, help="write rows, versions and machine to this file")
    args = parser.parse_args(argv)
    if args.n < 2:
        parser.error("--n: a group has at least 2 siblings")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, NARROWEST))
    try:
        with signals_as_interrupts(), ExitStack() as stack:
            url = args.url or stack.enter_context(own_server(console, args.port))
            runner = Runner(url, args.n, args.seed, args.concurrency, console)
            runner.is_live = console.is_terminal and not args.no_live
            asked = questions(seed=args.seed, count=args.questions)
            rows = compare_modes(
                runner, modes(args.presets), asked, lambda line: console.print(line)
            )
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped")
        return 130
    except FAILURES as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(table_of(rows, f"n={args.n}, temperature 1, the same seeds in every mode"))
    console.print(
        "cons@k: a vote of k plain siblings, k chosen to spend as many tokens as the mode"
    )
    if args.json:
        write_json(args.json, "demo", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
