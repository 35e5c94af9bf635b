"""What the serving benchmark runs: cells (a load, an n, a kind of step), policies, questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.clients import DECLINED, PLAIN, is_rival
from sglang_deepprune.reasoner import Question, questions

PLAIN_AGAIN = "plain again"  # the last pass without deepprune: how far the machine drifted
# Plain requests that decline deepprune, first and last where it is on: the drift since then, and
# what the plugin costs whoever does not use it.
DECLINED_AGAIN = "declined again"
PLAINS = (PLAIN, PLAIN_AGAIN, DECLINED, DECLINED_AGAIN)  # what ratios are taken to
CAPACITY = "capacity"  # plain, all at once: what a Poisson rate is a share of
FLAT_STEP_MS = 25.0
QUESTION_SEED = 31_000
ORDINARY_SEED = 32_000  # questions of the ordinary n=1 requests
NOISE_SEED = 1_000  # question q draws from NOISE_SEED + q
ARRIVAL_SEED = 7
# Chosen so that a plain vote is right in .6 to .8 and a fifth is out of reach, as on real sets.
LEVEL_SHARES = {"easy": 0.2, "middle": 0.25, "hard": 0.32, "hopeless": 0.23}

POOLS = ("pool4", "pool8", "pool16")
POLICIES = (PLAIN, "balanced", *POOLS, "economy")
MORE_POLICIES = ("faithful", "latency", "paper", "waves", "adaptive", "esc", "first_m")


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on one kind of server."""

    name: str
    n: int
    concurrency: int = 0  # questions at a time; 0: all at once
    poisson: float = 0.0  # share of plain's capacity at which questions arrive; 0: closed loop
    is_flat: bool = False
    rows: int = 32
    policies: tuple[str, ...] = POLICIES

    @property
    def load(self) -> str:
        if self.poisson:
            return f"Poisson {self.poisson:.0%}"
        return f"{self.concurrency} at a time" if self.concurrency else "all at once"

    @property
    def num_questions(self) -> int:
        return 60 if self.n >= 64 else 100

    @property
    def capacity_cell(self) -> str:
        """The cell whose plain pass tells the capacity of this one."""
        return f"all{self.n}-{'flat' if self.is_flat else 'real'}"


_ALL = (*POLICIES, *MORE_POLICIES)
CELLS = (
    Cell("all64-real", 64, policies=_ALL),
    Cell("all64-flat", 64, is_flat=True),
    Cell("all16-real", 16, policies=_ALL),
    Cell("all16-flat", 16, is_flat=True),
    Cell("all8-real", 8),
    Cell("two16-real", 16, concurrency=2),
    Cell("two16-flat", 16, concurrency=2, is_flat=True),
    Cell("four64-flat", 64, concurrency=4, is_flat=True),
    Cell("poisson80-real", 16, poisson=0.8),
    Cell("poisson80-flat", 16, poisson=0.8, is_flat=True),
    Cell("poisson110-real", 16, poisson=1.1),
    Cell("all64-flat-64rows", 64, is_flat=True, rows=64),
)
SMOKE = Cell("smoke", 8, policies=(PLAIN, "pool4", "balanced"))
SMOKE_QUESTIONS = 4
BY_NAME = {cell.name: cell for cell in (*CELLS, SMOKE)}


def is_of_plugin(policy: str) -> bool:
    """Whether a policy needs a server with deepprune on."""
    return policy not in (PLAIN, PLAIN_AGAIN, CAPACITY) and not is_rival(policy)  # DECLINED too


def passes_of(cell: Cell, chosen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Policies for the server without deepprune, in order, and for the one with it."""
    wanted = [policy for policy in (chosen or cell.policies) if policy not in PLAINS]
    rivals = [policy for policy in wanted if not is_of_plugin(policy)]
    ours = [policy for policy in wanted if is_of_plugin(policy)]
    off = [PLAIN, *rivals, PLAIN_AGAIN]
    return off, [DECLINED, *ours, DECLINED_AGAIN] if ours else []


def question_set(count: int, seed: int = QUESTION_SEED) -> list[Question]:
    """`count` questions, levels by LEVEL_SHARES, in an order that says nothing about the level."""
    # Whole numbers that add up: the largest remainders get what rounding down left over.
    shares = {level: share * count for level, share in LEVEL_SHARES.items()}
    counts = {level: int(share) for level, share in shares.items()}
    by_rest = sorted(shares, key=lambda level: counts[level] - shares[level])
    for level in by_rest[: count - sum(counts.values())]:
        counts[level] += 1
    asked = [one for level, many in counts.items() for one in questions(seed, many, level)]
    random.Random(seed).shuffle(asked)
    return asked


def arrivals(count: int, rate: float) -> list[float]:
    """Seconds at which `count` questions arrive, `rate` a second; the same for every policy."""
    rng = random.Random(ARRIVAL_SEED)
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times
