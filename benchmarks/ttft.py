"""Time to first token of an n>1 stream, plain and with deepprune: what a user sees first, and when.

    python -m benchmarks.ttft --json benchmarks/results/ttft.json

Two servers on the embedded reasoner, one without deepprune and one with it, are asked the same
questions in turns, each by one streamed request at a time on an otherwise idle server. Two moments
are taken: the first chunk that holds text, and the end of the first choice that holds an answer.
Then the client leaves. Plain is measured twice a turn: how far its two rows are apart is what the
machine adds. Ratios are to both of them together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.clients import PLAIN, body_of, new_session
from benchmarks.report import Row, print_table, with_ratios, write_json
from benchmarks.serving import flush, serve
from benchmarks.serving_cells import NOISE_SEED, PLAIN_AGAIN, Cell, is_of_plugin, question_set
from benchmarks.serving_report import percentile
from sglang_deepprune.local_server import ServerError
from sglang_deepprune.reasoner import Question
from sglang_deepprune.reasoner.evaluate import boxed_answer

WARM_UPS = 2
MEASURES = ("first_chunk_p50_ms", "first_chunk_p95_ms", "first_answer_p50_ms",
            "first_answer_p95_ms")  # fmt: skip


@dataclass(slots=True)
class Seen:
    """What a client has seen of one stream so far; seconds since it asked."""

    first_chunk_s: float | None = None
    first_answer_s: float | None = None
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))

    def take(self, chunk: Mapping[str, Any], now_s: float) -> bool:
        """Note one chunk; whether nothing more is to be seen."""
        for choice in chunk.get("choices", ()):
            text = self.texts[choice["index"]] = self.texts[choice["index"]] + choice["text"]
            if text and self.first_chunk_s is None:
                self.first_chunk_s = now_s
            is_whole = choice.get("finish_reason") == "stop"  # a stopped sibling says "length"
            if is_whole and self.first_answer_s is None and boxed_answer(text) is not None:
                self.first_answer_s = now_s
        return self.first_answer_s is not None


def request_of(policy: str, question: Question, n: int, seed: int) -> dict[str, Any]:
    """A streamed request whose sibling i draws the same noise under every policy."""
    if is_of_plugin(policy):
        custom: dict[str, Any] = {"deepprune": {"preset": policy}}
        return body_of(question, custom, n=n, seed=seed, stream=True)
    custom = {"bench_seed": seed, "bench_key": uuid.uuid4().hex}
    return body_of(question, custom, n=n, stream=True)


async def watch(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Seen:
    """Send a request and read its stream up to the first answer."""
    seen, start = Seen(), time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise ServerError(f"/v1/completions: {reply.status} {(await reply.text())[:500]}")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ServerError(f"/v1/completions: {chunk['error']}")
            if seen.take(chunk, time.perf_counter() - start):
                reply.close()  # the server aborts what still runs
                break
    return seen


async def measure(
    urls: Mapping[str, str], asked: Sequence[Question], n: int
) -> dict[str, list[Seen]]:
    """All questions to all policies (name -> the server's URL), in turns."""
    found: dict[str, list[Seen]] = {policy: [] for policy in urls}
    policies = list(urls)
    async with new_session() as session:
        for number in tqdm(range(-WARM_UPS, len(asked)), unit="question"):
            # Everybody comes first, second, ... equally often.
            shift = number % len(policies)
            for policy in (*policies[shift:], *policies[:shift]):
                await flush(session, urls[policy])  # also waits for the last one's aborts
                body = request_of(policy, asked[number % len(asked)], n, NOISE_SEED + number)
                seen = await watch(session, urls[policy], body)
                if number >= 0:
                    found[policy].append(seen)
    return found


def rows_of(found: Mapping[str, Sequence[Seen]], n: int, slots: int) -> list[Row]:
    """A row a policy: medians and 95th percentiles, and their ratios to plain."""
    plain = [seen for policy in (PLAIN, PLAIN_AGAIN) for seen in found[policy]]
    rows = [
        {"policy": policy, "n": n, "slots": slots, "questions": len(many), **times_of(many)}
        for policy, many in found.items()
    ]
    baseline = times_of(plain)
    nothing = {f"{name}_ratio": None for name in MEASURES}
    return [{**row, **nothing, **with_ratios([row], baseline, _known(row))[0]} for row in rows]


def _known(row: Row) -> list[str]:
    return [name for name in MEASURES if row[name] is not None]


def times_of(many: Sequence[Seen]) -> Row:
    """Milliseconds; a stream without an answer has no time of one, and `answered` says how many."""
    chunks = [1e3 * seen.first_chunk_s for seen in many if seen.first_chunk_s is not None]
    answers = [1e3 * seen.first_answer_s for seen in many if seen.first_answer_s is not None]
    shares = [(values, share) for values in (chunks, answers) for share in (0.5, 0.95)]
    times = [percentile(values, share) for values, share in shares]
    return {**dict(zip(MEASURES, times, strict=True)), "answered": len(answers)}


def main() -> None:
    args = _arguments()
    cell = Cell("ttft", args.n, rows=args.rows)
    with ExitStack() as stack:
        off, _ = stack.enter_context(serve(cell, False, 0.0))
        on, _ = stack.enter_context(serve(cell, True, 0.0))
        urls = {PLAIN: off, PLAIN_AGAIN: off, **dict.fromkeys(args.presets, on)}
        found = asyncio.run(measure(urls, question_set(args.questions), args.n))
    rows = rows_of(found, args.n, args.rows)
    title = f"Time to first token, n={args.n}, {args.rows} rows, {args.questions} questions"
    print_table([{name: "" if value is None else value for name, value in row.items()}
                 for row in rows], title)  # fmt: skip
    if args.json:
        write_json(args.json, "ttft", rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="siblings that may run at once")
    parser.add_argument("--questions", type=int, default=40, help="asked once a policy")
    parser.add_argument("--presets", nargs="+", default=["balanced", "latency"])
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
