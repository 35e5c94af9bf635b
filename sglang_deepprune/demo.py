"""The main job, for real, anywhere: serve the embedded reasoner, prune live, print the table.

One real SGLang server with `--enable-deepprune`; the same questions and seeds under plain n>1 and
under each preset. Plain is the preset `collect`: it stops nothing and only adds the record, and as
a group its siblings draw from (seed, i), so every mode sees the same noise and "same winner" means
something. The traces are short, so the demo's cut is shorter than the paper's and shown as such.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from sglang_deepprune.demo_view import Cell, Row, View
from sglang_deepprune.equal_tokens import Sampled, cons_at_tokens, is_same
from sglang_deepprune.local_server import LocalServer, post, stream
from sglang_deepprune.reasoner import Question, model_path, questions
from sglang_deepprune.report import print_table, with_ratios, write_json

MAX_NEW_TOKENS = 1000
CUT: dict[str, Any] = {"cut": "words", "cut_words": 8, "cut_max_tokens": 120, "window": 8}


@dataclass(frozen=True, slots=True)
class Mode:
    """One row of the table."""

    name: str
    settings: dict[str, Any]
    cut: str = "-"


def modes(names: Sequence[str]) -> list[Mode]:
    """Plain first: it is everybody's baseline."""
    cut = f"{CUT['cut_words']} words (paper: 25)"
    known = {
        "latency": Mode("latency (decided vote)", {"preset": "latency"}),
        "paper": Mode("paper, K2=20", {"preset": "paper", **CUT}, cut),
        "paper-scaled": Mode("paper, K2=n/4", {"preset": "paper", "k2": 0, **CUT}, cut),
    }
    return [Mode("plain n>1", {"preset": "collect"}), *(known[name] for name in names)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one question brought in one mode."""

    question: Question
    group: dict[str, Any]
    choices: list[dict[str, Any]]

    @property
    def is_right(self) -> bool:
        answer = self.group["answer"]
        return answer is not None and is_same(answer, self.question.answer)

    @property
    def sampled(self) -> Sampled:
        answers = tuple(choice["answer"] for choice in self.choices)
        tokens = tuple(choice["tokens"] for choice in self.choices)
        return Sampled(answers, tokens, self.question.answer)


class Runner:
    """Asks all questions in one mode, some at a time."""

    def __init__(self, url: str, size: int, seed: int, concurrency: int, console: Console | None):
        self.url = url
        self.size = size
        self.seed = seed
        self.concurrency = concurrency
        self.console = console  # None: no live view

    def run(self, mode: Mode, asked: Sequence[Question]) -> tuple[list[Outcome], float]:
        """Outcomes in order, and the wall clock in seconds."""
        view = View(mode.name, total=len(asked))
        start = time.monotonic()
        with ExitStack() as stack:
            if self.console is not None:
                stack.enter_context(Live(view, console=self.console, refresh_per_second=8))
            pool = stack.enter_context(ThreadPoolExecutor(self.concurrency))
            jobs = [pool.submit(self._ask, mode, n, one, view) for n, one in enumerate(asked)]
            outcomes = [job.result() for job in jobs]
        return outcomes, time.monotonic() - start

    def _ask(self, mode: Mode, number: int, question: Question, view: View) -> Outcome:
        params = {
            "n": self.size, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0,
            "sampling_seed": self.seed * 100_003 + number,
            "custom_params": {"deepprune": mode.settings},
        }  # fmt: skip
        body = {"text": question.prompt, "sampling_params": params}
        row = Row(question.prompt, question.answer, [Cell() for _ in range(self.size)])
        view.open(number, row)
        if self.console is not None:
            for chunk in stream(self.url, "/generate", body):
                row.take(chunk)
            group = row.group
        else:
            group = post(self.url, "/generate", body)[0]["meta_info"]["deepprune"]["group"]
        view.close(number)
        assert group is not None, "the stream ended without a record"
        return Outcome(question, group, group["choices"])


def row_of(
    mode: Mode, outcomes: Sequence[Outcome], seconds: float, plain: Sequence[Outcome]
) -> dict[str, Any]:
    """One mode's row; cons@k beside it is drawn from the plain siblings at the mode's tokens."""
    states = Counter(choice["state"] for one in outcomes for choice in one.choices)
    finished = [c["answer"] for one in outcomes for c in one.choices if c["state"] == "finished"]
    golds = [
        one.question.answer
        for one in outcomes
        for choice in one.choices
        if choice["state"] == "finished"
    ]
    tokens = statistics.mean(one.group["generated_tokens"] for one in outcomes)
    rival = cons_at_tokens([one.sampled for one in plain], tokens)
    return {
        "mode": mode.name,
        "questions": len(outcomes),
        "vote_right": round(statistics.mean(one.is_right for one in outcomes), 4),
        "single_right": round(
            statistics.mean(
                a is not None and is_same(a, g) for a, g in zip(finished, golds, strict=True)
            ),
            4,
        ),
        "same_winner": round(
            statistics.mean(
                _same(one.group["answer"], other.group["answer"])
                for one, other in zip(outcomes, plain, strict=True)
            ),
            4,
        ),
        "tokens": round(tokens, 1),
        "seconds": round(seconds, 2),
        "finished": states["finished"],
        "pruned": states["pruned"],
        "decided": states["decided"],
        "not_started": states["not_started"],
        "judge_calls": sum(one.group["judge_calls"] for one in outcomes),
        "judge_tokens": sum(one.group["judge_tokens"] for one in outcomes),
        "cons_k": round(rival.k, 2),
        "cons_k_right": round(rival.accuracy, 4),
        "cut": mode.cut,
    }


def _same(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and is_same(a, b))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang-deepprune demo", description=__doc__)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--n", type=int, default=16, help="siblings a question")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=4, help="questions at a time")
    parser.add_argument("--presets", nargs="*", default=["latency", "paper", "paper-scaled"],
                        choices=["latency", "paper", "paper-scaled"])  # fmt: skip
    parser.add_argument("--url", default="", help="a server that runs already")
    parser.add_argument("--no-live", action="store_true", help="no live view")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    console = Console()
    live = console if console.is_terminal and not args.no_live else None
    asked = questions(seed=args.seed, count=args.questions)
    with ExitStack() as stack:
        url = args.url
        if not url:
            console.print("starting a real SGLang server on the embedded reasoner ...")
            server = LocalServer(
                model_path(), "--enable-deepprune", "--max-running-requests", "64",
                max_total_tokens=80_000,
            )  # fmt: skip
            url = stack.enter_context(server).url
        runner = Runner(url, args.n, args.seed, args.concurrency, live)
        rows: list[dict[str, Any]] = []
        plain: list[Outcome] = []
        for mode in modes(args.presets):
            outcomes, seconds = runner.run(mode, asked)
            plain = plain or outcomes
            rows.append(row_of(mode, outcomes, seconds, plain))
            console.print(
                f"{mode.name}: {seconds:.1f} s, {rows[-1]['tokens']:.0f} tokens a question"
            )
    rows = with_ratios(rows, rows[0], ["tokens", "seconds"])
    title = f"{args.questions} questions, n={args.n}, temperature 1, same seeds in every mode"
    print_table(rows, title)
    print("cons_k: plain sampling of k siblings at the same tokens, and what its vote scores")
    if args.json:
        write_json(args.json, "demo", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
