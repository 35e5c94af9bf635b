"""What users do today to sample n traces and vote: clients of an ordinary OpenAI server.

A rival draws n=1 requests and stops by a rule of its own; `plain` sends one n>1 request; a preset
of the plugin's goes to a server with deepprune on. The rules know no HTTP: they draw from a
`Source`. A rival's latency ends when its answer is known; what it then aborts is waited for, so
that its tokens count, and the reply to an aborted request says how many they were.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import aiohttp

from sglang_deepprune.local_server import ServerError
from sglang_deepprune.policy import decided
from sglang_deepprune.reasoner import Question
from sglang_deepprune.reasoner.evaluate import boxed_answer, vote

PLAIN, DECLINED = "plain", "declined"  # the second where deepprune is on, and not wanted
MAX_NEW_TOKENS = 1024
DECIDED_EPS = 0.05  # chance of another winner at which `pool` stops
AGREEMENT = 0.75  # share of the answers at which `waves` stops
LEAST_ANSWERS = 3  # before `waves` trusts that share
CONFIDENCE = 0.95  # of adaptive consistency's Beta criterion
ESC_WINDOW = 8
_REQUEST_LIMIT_S = 3600.0
# uvicorn closes a connection that was idle for 5 s, maybe just as it is used again.
_KEEP_ALIVE_S = 4.0
_TRIES = 4
_ABORT_AGAIN_S = 0.5  # an abort may arrive before the request that it is about


@dataclass(frozen=True, slots=True)
class Trace:
    """One sampled trace."""

    index: int
    answer: str | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy brought for one question."""

    answer: str | None
    votes: dict[str, int]
    tokens: int  # of every started trace, aborted ones too
    latency_s: float
    started: int


class Source(Protocol):
    """Where a rival's traces come from."""

    async def draw(self, index: int) -> Trace: ...

    async def abort(self, index: int) -> None:
        """Make `draw(index)` return soon, with what there is."""


@dataclass(slots=True)
class Sampled:
    """What a rival drew until it had enough."""

    finished: list[Trace] = field(default_factory=list)
    dropped: list[Trace] = field(default_factory=list)
    decided_at: float = 0.0

    @property
    def answers(self) -> list[str | None]:
        """In the order in which they came."""
        return [trace.answer for trace in self.finished]

    def outcome(self, start: float) -> Outcome:
        ordered = sorted(self.finished, key=lambda trace: trace.index)
        answers = [trace.answer for trace in ordered]
        everything = [*self.finished, *self.dropped]
        tokens = sum(trace.tokens for trace in everything)
        return Outcome(
            vote(answers), count(answers), tokens, self.decided_at - start, len(everything)
        )


Rule = Callable[[Sequence[str | None]], bool]  # answers of the finished traces -> enough
Rival = Callable[[Source, int], Awaitable[Sampled]]


def count(answers: Iterable[str | None]) -> dict[str, int]:
    """Votes by answer, most first; a tie goes to the one that came first."""
    return dict(Counter(one for one in answers if one is not None).most_common())


def top_two(answers: Iterable[str | None]) -> tuple[int, int]:
    first, second, *_ = (*count(answers).values(), 0, 0)
    return first, second


# -- the ways to draw ----------------------------------------------------------------------------


async def rolling(source: Source, n: int, width: int, is_enough: Rule) -> Sampled:
    """Keep `width` traces running; ask the rule at each that finishes, then abort the others."""
    sampled = Sampled()
    indices = iter(range(n))
    running: dict[asyncio.Task[Trace], int] = {}
    while True:
        for index in islice(indices, width - len(running)):
            running[asyncio.create_task(source.draw(index))] = index
        if not running:
            break
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=running.__getitem__):
            del running[task]
            sampled.finished.append(task.result())
        if is_enough(sampled.answers):
            break
    sampled.decided_at = time.perf_counter()
    sampled.dropped = await _drop(source, running)
    return sampled


async def _drop(source: Source, running: dict[asyncio.Task[Trace], int]) -> list[Trace]:
    left = set(running)
    while left:
        await asyncio.gather(*(source.abort(running[task]) for task in left))
        _, left = await asyncio.wait(left, timeout=_ABORT_AGAIN_S)
    return [task.result() for task in running]


async def in_waves(source: Source, sizes: Iterable[int], is_enough: Rule) -> Sampled:
    """One wave after the other; ask the rule after each."""
    sampled = Sampled()
    for size in sizes:
        start = len(sampled.finished)
        wave = (source.draw(index) for index in range(start, start + size))
        sampled.finished += await asyncio.gather(*wave)
        if is_enough(sampled.answers):
            break
    sampled.decided_at = time.perf_counter()
    return sampled


def doubling(n: int) -> Iterator[int]:
    """2, 4, 8, ...; n in all."""
    size = 2
    while n > 0:
        yield min(size, n)
        n, size = n - size, 2 * size


def equal_waves(n: int, size: int) -> Iterator[int]:
    """`size` each; n in all."""
    for start in range(0, n, size):
        yield min(size, n - start)


# -- the rules -----------------------------------------------------------------------------------


def is_decided(answers: Sequence[str | None], n: int) -> bool:
    """The plugin's own rule, on what a client sees."""
    return decided(*top_two(answers), len(answers), n - len(answers), DECIDED_EPS)


def is_agreed(answers: Sequence[str | None]) -> bool:
    enough = len(answers) >= LEAST_ANSWERS
    return enough and top_two(answers)[0] >= AGREEMENT * len(answers)


def is_confident(answers: Sequence[str | None]) -> bool:
    """Adaptive consistency: the leader's share of the top two is above 1/2 with 95 % probability,
    which under a flat prior is Beta(a + 1, b + 1)."""
    a, b = top_two(answers)
    draws = a + b + 1
    chance = sum(math.comb(draws, k) for k in range(a + 1)) / 2**draws
    return a > 0 and chance > CONFIDENCE


def is_unanimous(answers: Sequence[str | None], size: int) -> bool:
    """Early-stopping self-consistency: the last wave says one thing."""
    window = answers[-size:]
    return len(window) == size and window[0] is not None and len(set(window)) == 1


def rival(name: str) -> Rival:
    """By name: pool<width>, waves, adaptive, esc, first_m. Raises KeyError."""
    width = name.removeprefix("pool")
    if width.isdigit():
        return lambda source, n: rolling(source, n, int(width), partial(is_decided, n=n))
    return _RIVALS[name]


def first_finished(source: Source, n: int, share: float = 0.5) -> Awaitable[Sampled]:
    """Short-m@k: start all, take those that finish first."""
    most = math.ceil(share * n)
    return rolling(source, n, n, lambda answers: len(answers) >= most)


_RIVALS: dict[str, Rival] = {
    "waves": lambda source, n: in_waves(source, doubling(n), is_agreed),
    "adaptive": lambda source, n: rolling(source, n, 1, is_confident),
    "esc": lambda source, n: in_waves(
        source, equal_waves(n, ESC_WINDOW), partial(is_unanimous, size=ESC_WINDOW)
    ),
    "first_m": first_finished,
}


def is_rival(name: str) -> bool:
    return name in _RIVALS or name.removeprefix("pool").isdigit()


# -- HTTP ----------------------------------------------------------------------------------------


def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S),
    )


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text; once more where the server had just closed the connection."""
    for left in reversed(range(_TRIES)):
        try:
            async with session.post(url, json=body) as reply:
                return reply.status, await reply.text()
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not left:
                raise
    raise AssertionError("unreachable")


def body_of(question: Question, custom_params: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "reasoner", "prompt": question.prompt, "max_tokens": MAX_NEW_TOKENS,
        "temperature": 1.0, "custom_params": custom_params, **more,
    }  # fmt: skip


async def complete(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> dict[str, Any]:
    """POST /v1/completions. Raises ServerError with the server's own words."""
    status, text = await post(session, f"{url}/v1/completions", body)
    if status != 200:
        raise ServerError(f"/v1/completions: {status} {text[:500]}")
    reply: dict[str, Any] = json.loads(text)
    return reply


class HttpTraces:
    """A `Source`: one n=1 request a trace, each with a rid by which it can be aborted."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question, seed: int):
        self.session = session
        self.url = url
        self.question = question
        self.seed = seed
        self._key = uuid.uuid4().hex
        self._aborted: set[int] = set()

    def _rid(self, index: int) -> str:
        return f"{self._key}-{index:04d}"  # SGLang aborts by prefix

    async def draw(self, index: int) -> Trace:
        noise = {"bench_seed": self.seed, "bench_index": index}
        body = body_of(self.question, noise, rid=self._rid(index))
        try:
            reply = await complete(self.session, self.url, body)
        except ServerError:
            if index not in self._aborted:
                raise
            return Trace(index, None, 0)  # aborted in the queue: SGLang has no reply for it
        answer = None if index in self._aborted else boxed_answer(reply["choices"][0]["text"])
        return Trace(index, answer, reply["usage"]["completion_tokens"])

    async def abort(self, index: int) -> None:
        self._aborted.add(index)
        await post(self.session, f"{self.url}/abort_request", {"rid": self._rid(index)})


# -- the policies --------------------------------------------------------------------------------


async def ask(
    policy: str, session: aiohttp.ClientSession, url: str, question: Question, n: int, seed: int
) -> Outcome:
    """One question under `plain`, a rival, or else a preset of the plugin's."""
    if policy in (PLAIN, DECLINED):
        declines = {"deepprune": False} if policy == DECLINED else {}
        return await ask_plain(session, url, question, n, seed, declines)
    if not is_rival(policy):
        return await ask_deepprune(policy, session, url, question, n, seed)
    start = time.perf_counter()
    sampled = await rival(policy)(HttpTraces(session, url, question, seed), n)
    return sampled.outcome(start)


async def ask_plain(
    session: aiohttp.ClientSession,
    url: str,
    question: Question,
    n: int,
    seed: int,
    more: dict[str, Any],
) -> Outcome:
    """One n>1 request and a plurality. `more`: custom parameters beside the noise's."""
    start = time.perf_counter()
    noise = {"bench_seed": seed, "bench_key": uuid.uuid4().hex}
    reply = await complete(session, url, body_of(question, {**noise, **more}, n=n))
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    answers = [boxed_answer(choice["text"]) for choice in choices]
    tokens = reply["usage"]["completion_tokens"]
    return Outcome(vote(answers), count(answers), tokens, time.perf_counter() - start, n)


async def ask_deepprune(
    preset: str, session: aiohttp.ClientSession, url: str, question: Question, n: int, seed: int
) -> Outcome:
    """One n>1 request; the server stops and votes. `preset`: see `settings_of`."""
    start = time.perf_counter()
    body = body_of(question, {"deepprune": settings_of(preset)}, n=n, seed=seed)
    reply = await complete(session, url, body)
    group = (reply.get("metadata") or {}).get("deepprune") or {}
    if not group.get("active"):
        raise ServerError(f"no group record came back: {group.get('reason', 'is deepprune on?')}")
    return Outcome(
        group["answer"],
        {one["answer"]: one["votes"] for one in group["votes"]},
        reply["usage"]["completion_tokens"],
        time.perf_counter() - start,
        sum(choice["state"] != "not_started" for choice in group["choices"]),
    )


def settings_of(policy: str) -> dict[str, Any]:
    """Of `PRESET` or `PRESET,FIELD=VALUE,...`, as in `balanced,base=8`."""
    preset, *fields = policy.split(",")
    settings: dict[str, Any] = {"preset": preset}
    for one in fields:
        name, _, value = one.partition("=")
        settings[name] = json.loads(value)
    return settings


async def ask_one(session: aiohttp.ClientSession, url: str, question: Question, seed: int) -> float:
    """An ordinary n=1 request of somebody else's; its latency in seconds."""
    start = time.perf_counter()
    await complete(session, url, body_of(question, {"bench_seed": seed, "bench_index": 0}))
    return time.perf_counter() - start
