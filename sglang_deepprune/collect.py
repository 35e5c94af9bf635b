"""`sglang-deepprune collect`: samples traces from any OpenAI-compatible server into a recording.

One request a trace, with `seed` = the trace's index, so that a run that was cut short goes on where
it stopped: what the output file already holds is not asked again. The file is the schema of
`traces.py`, one trace a line, written as they come. Key: environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sglang_deepprune.answers import extract

REASONER_MAX_TOKENS = 1024  # its context is 2,048, and its longest traces end before this

_RETRIES = 4
_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class CollectError(RuntimeError):
    """The questions or the server cannot be used; one sentence."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to be sampled."""

    question_id: str
    prompt: str
    gold: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where traces come from.

    Attributes
    ----------
    url : str
        Of the server, without /v1.
    is_chat : bool
        /v1/chat/completions, else /v1/completions.
    """

    url: str
    model: str
    is_chat: bool
    max_tokens: int
    temperature: float
    top_p: float
    has_logprobs: bool
    timeout_s: float

    def sample(self, asked: Asked, seed: int) -> dict[str, Any]:
        """One trace, as a row of the recording. Raises `CollectError`."""
        body: dict[str, Any] = {
            "model": self.model, "n": 1, "seed": seed, "max_tokens": self.max_tokens,
            "temperature": self.temperature, "top_p": self.top_p,
        }  # fmt: skip
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": asked.prompt}]
            body |= {"logprobs": True} if self.has_logprobs else {}
        else:
            body["prompt"] = asked.prompt
            body |= {"logprobs": 1} if self.has_logprobs else {}
        reply = self._post("/v1/chat/completions" if self.is_chat else "/v1/completions", body)
        try:
            (choice,) = reply["choices"]
            text = _text(choice, self.is_chat)
            row = {
                "question_id": asked.question_id, "seed": seed, "prompt": asked.prompt,
                "text": text, "num_tokens": max(1, int(reply["usage"]["completion_tokens"])),
                "answer": _answer(text, choice["finish_reason"]), "gold": asked.gold,
                "finish_reason": choice["finish_reason"],
            }  # fmt: skip
            if self.has_logprobs:
                row["logprobs"] = _logprobs(choice, self.is_chat)
        except (KeyError, TypeError, ValueError) as error:
            raise CollectError(f"the server's reply is no completion: {error!r}") from error
        return row

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        for left in reversed(range(_RETRIES)):
            request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                if error.code not in _AGAIN or not left:
                    detail = error.read(500).decode(errors="replace")
                    raise CollectError(f"{path}: HTTP {error.code}: {detail}") from error
            except (OSError, ValueError, http.client.HTTPException) as error:
                if not left:
                    raise CollectError(f"{path}: {error}") from error
            time.sleep(0.5 * 2 ** (_RETRIES - 1 - left))
        raise AssertionError("unreachable")


def _text(choice: dict[str, Any], is_chat: bool) -> str:
    if not is_chat:
        return str(choice["text"])
    message = choice["message"]
    thinking, content = message.get("reasoning_content"), message.get("content") or ""
    return f"<think>\n{thinking}\n</think>\n{content}" if thinking else str(content)


def _answer(text: str, finish_reason: str | None) -> str | None:
    found = extract(text, is_cut=finish_reason != "stop")
    return found.answer if found else None


def _logprobs(choice: dict[str, Any], is_chat: bool) -> list[float]:
    """[num_tokens], natural logarithms."""
    found = choice["logprobs"]
    if is_chat:
        return [float(one["logprob"]) for one in found["content"]]
    return [float(one) for one in found["token_logprobs"]]


def load_questions(path: str) -> list[Asked]:
    """JSONL of question_id, prompt and, if known, gold. Raises `CollectError`."""
    found = []
    try:
        # Not `splitlines`: a text may hold line separators of its own, as U+2028.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CollectError(f"{Path(path).name}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            gold = row.get("gold")
            prompt = row["prompt"]
            if not isinstance(prompt, str):
                raise TypeError("prompt is no string")
            found.append(
                Asked(str(row["question_id"]), prompt, None if gold is None else str(gold))
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CollectError(f"{Path(path).name}, line {number}: {error!r}") from error
    if not found:
        raise CollectError(f"{Path(path).name} holds no question")
    twice = [name for name, count in Counter(one.question_id for one in found).items() if count > 1]
    if twice:
        raise CollectError(f"{Path(path).name}: two questions are called {twice[0]!r}")
    return found


def reasoner_questions(count: int, seed: int) -> list[Asked]:
    """Questions of the embedded reasoner, of every difficulty."""
    from sglang_deepprune.reasoner import questions

    return [
        Asked(f"reasoner-{seed}-{place}", one.prompt, str(one.answer))
        for place, one in enumerate(questions(seed, count))
    ]


def already_there(path: Path) -> set[tuple[str, int]]:
    """(question_id, seed) of each whole line. A line that was cut off is taken away."""
    if not path.is_file():
        return set()
    done, whole = set(), []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            done.add((row["question_id"], row["seed"]))
            whole.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_bytes(b"".join(line + b"\n" for line in whole))
    partial.replace(path)
    return done


def collect(
    source: Source, questions: Sequence[Asked], n: int, output: Path, concurrency: int
) -> tuple[int, int]:
    """Sample what is missing. Returns (traces written, traces that were there)."""
    done = already_there(output)
    missing = [(q, i) for q in questions for i in range(n) if (q.question_id, i) not in done]
    written = 0
    with output.open("a", encoding="utf-8") as file, ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(source.sample, question, seed) for question, seed in missing]
        try:
            for future in as_completed(futures):
                row = json.dumps(future.result(), ensure_ascii=False)
                file.write(row + "\n")
                file.flush()
                written += 1
                _show(written, len(missing), sys.stderr)
        finally:
            for future in futures:
                future.cancel()
    return written, len(done)


def _show(done: int, total: int, stream: TextIO) -> None:
    if stream.isatty() or done == total or done % max(1, total // 10) == 0:
        end = "\r" if stream.isatty() and done < total else "\n"
        print(f"{done} of {total} traces", end=end, file=stream, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-deepprune collect", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--questions", metavar="FILE", help="JSONL: question_id, prompt, gold")
    which.add_argument("--reasoner", type=int, metavar="N", help="N questions of the reasoner")
    parser.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:30000")
    parser.add_argument("--model", default="default")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="JSONL; goes on where it is"
    )
    parser.add_argument("--n", type=int, default=16, help="traces a question")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument(
        "--max-tokens", type=int, help=f"default: 4096, of the reasoner {REASONER_MAX_TOKENS}"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--logprobs", action="store_true", help="of every token")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="of the reasoner's questions")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    max_tokens = args.max_tokens
    if max_tokens is None:
        max_tokens = 4096 if args.questions else REASONER_MAX_TOKENS
    source = Source(
        args.url, args.model, args.endpoint == "chat", max_tokens, args.temperature,
        args.top_p, args.logprobs, args.timeout_s,
    )  # fmt: skip
    try:
        if args.n < 1 or args.concurrency < 1 or (args.reasoner is not None and args.reasoner < 1):
            raise CollectError("--n, --concurrency and --reasoner must be at least 1")
        if args.questions:
            questions = load_questions(args.questions)
        else:
            questions = reasoner_questions(args.reasoner, args.seed)
        written, there = collect(source, questions, args.n, Path(args.output), args.concurrency)
    except CollectError as error:
        print(f"sglang-deepprune collect: {error}", file=sys.stderr)
        return 2
    print(f"{written} traces written, {there} were there: {args.output}")
    return 0
