"""What one round of the fault harness does, drawn from its seed alone: server, requests, faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from tests.engine import scenario
from tests.engine.scenario import trace

ROUNDS_A_SERVER = 6  # rounds of neighbouring seeds share one
CUT = {"cut": "tokens", "cut_tokens": 8, "window": 4}
PRESETS = ("balanced", "faithful", "economy", "latency", "paper", "paper", "collect")
MARKS = ("RAISE", "SHAPE", "NAN", "SLOW", "HANG", "DIE")

# prompt -> one text a sibling
PROMPTS: dict[str, list[str]] = {
    "faults: agree": [trace("A", 20 + 3 * i, "7", i) for i in range(16)],
    "faults: split": [trace("A", 24 + 2 * i, str(i % 5), i) for i in range(16)],
    "faults: clusters": [trace("AB"[i % 3 == 2], 50 + i, "59"[i % 3 == 2], i) for i in range(16)],
    "faults: long": [trace("A", 140, str(i % 3), i) for i in range(12)],
    "faults: poem": [trace("A", 30 + i, None, i) for i in range(8)],
    "faults: fence": scenario.PROMPTS["fence: expand"],
    **{f"faults: {mark}": [trace(mark, 40, "3", i) for i in range(8)] for mark in MARKS},
}
# Hanging and dying judges cost a restart each, and only so many are made in a row.
COSTLY = ("faults: HANG", "faults: DIE")
# Of nobody's group, one text each: these come back to the letter whatever happens beside them.
BYSTANDERS = {f"bystander {i}": [trace("Z", 10 + 20 * i, str(i))] for i in range(4)}
# Sampled greedily, unscripted, and far from any near-tie on the machine that chose them; elsewhere
# one of the others may take the place of one that is not.
STRANGERS = ("a stranger asks", "my cat counts to ten", "the sun is late again", "xyz " * 12)
OTHER_STRANGERS = (
    "an old clock sleeps",
    "green rain asks for tea",
    "no one is late again",
    "d" * 20,
)


@dataclass(frozen=True)
class Setup:
    """A server's options."""

    page_size: int
    is_overlap: bool
    slots: int  # of the KV pool; the fewest hold about three long siblings
    rows: int
    fill: float
    clients: int  # at once

    @property
    def flags(self) -> tuple[str, ...]:
        overlap = () if self.is_overlap else ("--disable-overlap-schedule",)
        return (
            "--page-size", str(self.page_size), "--max-running-requests", str(self.rows),
            "--deepprune-fill", str(self.fill), *overlap,
        )  # fmt: skip

    @property
    def name(self) -> str:
        overlap = "overlap" if self.is_overlap else "no overlap"
        pool = f"{self.slots} slots, {self.rows} rows, fill {self.fill:g}"
        return f"page {self.page_size}, {overlap}, {pool}"


def setup_of(seed: int) -> Setup:
    """All combinations of page size and overlap come in turn, the rest at random."""
    number = seed // ROUNDS_A_SERVER
    rng = random.Random(f"server {number}")
    return Setup(
        (1, 16)[number % 2], number // 2 % 2 == 0, rng.choice([480, 800, 1200, 6000]),
        rng.choice([8, 16, 32]), rng.choice([0.0, 0.25, 100.0]), rng.choice([6, 14, 28]),
    )  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One client: what it sends, and what it does then."""

    number: int
    kind: str  # "group", "members" (n single requests that name one), "bystander", "stranger"
    fate: str  # "waits", "streams", "completes" (OpenAI), "leaves", "aborts", "reuses" its rid
    prompt: str
    n: int
    max_new_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    pause_s: float = 0.0  # from sending to leaving or aborting
    rid: str = ""

    @property
    def is_group(self) -> bool:
        """One of those that a round counts; the others stand by."""
        return self.kind in ("group", "members")


@dataclass(frozen=True)
class Fault:
    """Something that happens to the whole server."""

    at_s: float
    kind: str


@dataclass(frozen=True)
class Round:
    """`is_exact`: nobody leaves, so all that the server counts was told to somebody."""

    seed: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    is_exact: bool = False

    @property
    def num_groups(self) -> int:
        return sum(ask.is_group for ask in self.asks)

    @property
    def aborts_all(self) -> bool:
        """Whether anybody at all may be aborted, whatever it has done itself."""
        return any(fault.kind in ABORTING for fault in self.faults)


FAULTS = (
    "abort all", "flush", "pause in place", "pause and retract", "pause and abort", "weights",
    "pause for weights", "weights in place", "kill judge", "stop judge",
)  # fmt: skip
ABORTING = ("abort all", "pause and abort")
OF_JUDGE = ("kill judge", "stop judge")  # there may be none to signal just then


def round_of(seed: int, num_groups: int) -> Round:
    """So many groups, n>1 and client-side ones, and whoever stands by: about a fifth as many."""
    rng = random.Random(f"round {seed}")
    is_exact = seed % 2 == 1
    asks: list[Ask] = []
    left = num_groups
    while left:
        one = _ask(rng, seed, len(asks), may_leave=not is_exact)
        asks.append(one)
        left -= one.is_group
        if one.is_group and left and rng.random() < (0.1 if one.kind == "group" else 0.4):
            asks.append(_twin(rng, one, seed, len(asks)))
            left -= 1
    span_s = num_groups / 12
    kinds = [rng.choice(FAULTS) for _ in range(rng.randint(1, 4))]
    faults = tuple(Fault(rng.uniform(0.1, span_s), kind) for kind in kinds)
    by_time = sorted(faults, key=lambda fault: fault.at_s)
    return Round(seed, tuple(asks), tuple(by_time), is_exact)


def _ask(rng: random.Random, seed: int, number: int, *, may_leave: bool) -> Ask:
    rid = f"r{seed}n{number}"
    draw = rng.random()
    if draw < 0.12:
        return Ask(number, "bystander", "waits", rng.choice(list(BYSTANDERS)), 1, 200, rid=rid)
    if draw < 0.2:
        return Ask(number, "stranger", "waits", rng.choice(STRANGERS), 1, 12, rid=rid)
    is_judged = rng.random() < 0.25
    if is_judged:
        mark = rng.choice(MARKS if rng.random() < 0.15 else MARKS[:4])
        prompt, preset = f"faults: {mark}", "paper"
    else:
        prompt = rng.choice([*list(PROMPTS)[: -len(MARKS)], "faults: long", "faults: long"])
        preset = rng.choice(PRESETS)
    settings: dict[str, Any] = {"preset": preset, "k2": rng.choice([1, 2, 4]), **CUT}
    if rng.random() < 0.3:
        settings["base"] = rng.choice([1, 2])
    if draw < 0.28:
        fate = rng.choice(["waits", "aborts"])
        settings |= {"group": rid, "size": rng.choice([0, 3, 4])}
        return Ask(number, "members", fate, prompt, 3, 200, settings, rng.uniform(0, 0.4), rid)
    fate = rng.choices(
        ["waits", "streams", "completes", "leaves", "aborts", "reuses"],
        [8, 4, 3, 3 * may_leave, 3, 2],
    )[0]
    if rng.random() < 0.15 and fate == "waits":
        settings["return"] = rng.choice(["survivors", "vote"])
    tokens = rng.choice([1, 12, 60, 200, 200])
    # Equal texts need no judge: a judged prompt has eight that differ early.
    n = rng.choice([2, 3, 4, 6, 8, 12, 16][: 5 if is_judged else 7])
    return Ask(number, "group", fate, prompt, n, tokens, settings, rng.uniform(0, 0.5), rid)


def _twin(rng: random.Random, one: Ask, seed: int, number: int) -> Ask:
    """Another user, with the same bytes at the same time. A client-side group's name is scoped by
    its prompt: equal in both they share a group, under another prompt they must not."""
    twin = replace(one, number=number, rid=f"r{seed}n{number}")
    if one.kind == "members" and rng.random() < 0.5:
        others = [prompt for prompt in PROMPTS if prompt != one.prompt and prompt not in COSTLY]
        twin = replace(twin, prompt=rng.choice(others))
    return twin
