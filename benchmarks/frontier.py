"""What each policy spends and how often it is right, on recorded branches of a big model.

    python -m benchmarks.frontier --branches FILE... --json F --plot F

Two parts. One question at a time, with slots for everybody: the server's presets, DeepPrune under
judges of a known AUROC, and the rivals below, all on the same draws of n branches. Then all
questions at once on a server with few slots. Every draw is seeded; intervals are over questions.
The rivals are told here, the server's own policies in `frontier_sim`, the files in `frontier_data`.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.frontier_data import (
    Branch,
    BranchFileError,
    Draw,
    Question,
    SimulatedJudge,
    draws_of,
    load,
)
from benchmarks.frontier_report import Bench, Served, print_report, save_plot, server_row
from benchmarks.frontier_sim import Outcome, Server, outcome_of, outcome_of_all, vote
from benchmarks.report import Row, write_json
from sglang_deepprune.config import DeepPruneConfig

PROBE_TOKENS = 20  # what asking a running branch for its answer costs
AUROCS = (0.55, 0.65, 0.75, 0.87, 1.0)
SERVER_SIZE = 64  # n of the part with few slots
PLAIN = "collect"

Play = Callable[[Draw], Sequence[Outcome]]  # the tries that one draw is good for


def policies(size: int, judges: Sequence[SimulatedJudge]) -> Iterator[tuple[str, Play]]:
    """Everything that is compared for one question. Plain n comes first."""
    for preset in (PLAIN, "faithful", "balanced", "economy", "latency"):
        yield preset, partial(grouped, config=DeepPruneConfig(preset=preset))
    yield "decided .05, base 16", partial(grouped, config=DeepPruneConfig(base=16))
    yield "client pool 4", partial(grouped, config=client_pool(4))
    for judge in judges:
        for k2, name in ((20, "20"), (0, "n/4")):
            config = DeepPruneConfig(preset="paper", cut="tokens", k2=k2)
            yield (
                f"paper K2={name}, AUROC {judge.auroc:.2f}",
                partial(grouped, config=config, judge=judge),
            )
    for k in sorted({size // 2**halvings for halvings in range(size.bit_length())}):
        yield f"cons@{k}", partial(cons, k=k)
    yield "adaptive consistency", adaptive
    yield "ESC, waves of 8", waves
    yield "first n/2 of n", first_half
    yield "probes, same 3 times", partial(parallel_probe, rule=ProbeRule(3, share=0.5))
    yield "probes, as published", partial(parallel_probe, rule=PUBLISHED_PROBES)


def client_pool(width: int) -> DeepPruneConfig:
    """A client that keeps so many requests running, and stops when the vote is decided."""
    return DeepPruneConfig(base=width, widen=0.0)


def grouped(
    draw: Draw, config: DeepPruneConfig, judge: SimulatedJudge | None = None
) -> list[Outcome]:
    """One of the server's policies, with slots for everybody."""
    return Server([draw], config, score=judge.score_of(draw) if judge else None).play()


def compare(
    questions: Sequence[Question], sizes: Sequence[int], count: int, seed: int
) -> list[Bench]:
    """All policies on the same draws, one bench a size."""
    judges = [SimulatedJudge(questions, auroc, seed) for auroc in AUROCS]
    benches = []
    for size in sizes:
        bench = Bench.of(draws_of(questions, size, count, seed), seed)
        for name, play in tqdm(list(policies(size, judges)), desc=f"n={size}", unit="policy"):
            bench.add(name, play)
        benches.append(bench)
    return benches


def serve(
    questions: Sequence[Question], size: int, slots: Sequence[int], count: int, seed: int
) -> list[Row]:
    """All questions at once, on a server with so many slots."""
    draws = draws_of(questions, size, count, seed)
    rows = []
    for number in slots:
        plain: Served | None = None
        for name, config, is_client in _servers():
            fills = not is_client and name != PLAIN
            plays = [
                Server(column, config, slots=number, fills=fills, is_client=is_client).play()
                for column in zip(*draws, strict=True)
            ]
            served = Served.of(plays, [one.gold for one in questions])
            plain = plain or served
            label = f"{name}, fill" if fills else name
            rows.append({"policy": label, "n": size, "slots": number, **server_row(served, plain)})
    return rows


def _servers() -> Iterator[tuple[str, DeepPruneConfig, bool]]:
    """(name, config, whether the client holds the siblings)."""
    yield PLAIN, DeepPruneConfig(preset=PLAIN), False
    for width in (4, 8, 16):
        yield f"client pool {width}", client_pool(width), True
    for preset in ("faithful", "balanced", "economy"):
        yield preset, DeepPruneConfig(preset=preset), False


def cons(draw: Draw, k: int) -> list[Outcome]:
    """Plain sampling with k samples: each whole block of k siblings is one try."""
    branches = draw.branches
    blocks = [branches[first : first + k] for first in range(0, draw.size - k + 1, k)]
    return [outcome_of_all(block, max(one.length for one in block)) for block in blocks]


def adaptive(draw: Draw, confidence: float = 0.95) -> list[Outcome]:
    """Adaptive consistency: one sample after the other, until P(leader's share > runner-up's) is
    above `confidence` under a Beta(1 + a, 1 + b)."""
    branches = draw.branches
    for k in range(1, len(branches) + 1):
        counts = Counter(one.answer for one in branches[:k] if one.answer is not None)
        a, b = (*sorted(counts.values(), reverse=True), 0, 0)[:2]
        # I_1/2(b + 1, a + 1) = P(more than b of a + b + 1 fair coins)
        tosses = a + b + 1
        if sum(math.comb(tosses, x) for x in range(b + 1, tosses + 1)) > confidence * 2**tosses:
            break
    return [outcome_of_all(branches[:k], sum(one.length for one in branches[:k]))]


def waves(draw: Draw, width: int = 8) -> list[Outcome]:
    """Early-stopping self-consistency: wave after wave, until one of them is unanimous."""
    branches = draw.branches
    latency, used = 0, 0
    for first in range(0, len(branches), width):
        wave = branches[first : first + width]
        used += len(wave)
        latency += max(one.length for one in wave)
        answers = {one.answer for one in wave}
        if len(answers) == 1 and None not in answers:
            break
    return [outcome_of_all(branches[:used], latency)]


def first_half(draw: Draw) -> list[Outcome]:
    """All start; the vote is that of the first half that finishes."""
    branches, most = draw.branches, max(1, draw.size // 2)
    order = sorted(range(draw.size), key=lambda index: branches[index].length)
    end = branches[order[most - 1]].length
    answers = [branches[index].answer for index in sorted(order[:most])]
    return [outcome_of(vote(answers), [min(one.length, end) for one in branches], end)]


@dataclass(frozen=True, slots=True)
class ProbeRule:
    """Parallel-Probe: all branches run, and every `probe_every` tokens say what they would answer.

    After `warmup` probes, and while the leading answer has more than `share` of the branches, it
    stops once that answer has led for `patience` probes, and prunes a branch that has disagreed
    for `deviations` probes running. A pruned branch votes no more.
    """

    patience: int
    share: float = 0.0
    warmup: int = 0
    deviations: int = 3


# As in the evaluation that its authors published, for probes every 500 tokens.
PUBLISHED_PROBES = ProbeRule(40, warmup=15, deviations=7)


def parallel_probe(draw: Draw, rule: ProbeRule) -> list[Outcome]:
    branches, every = draw.branches, draw.question.probe_every
    spent = [0] * draw.size
    active = list(range(draw.size))
    against = [0] * draw.size
    leader: str | None = None
    num_probes = num_asked = streak = end = 0
    while any(spent[index] < branches[index].length for index in active):
        end += every
        num_probes += 1
        for index in active:
            num_asked += branches[index].length > end
            spent[index] = min(branches[index].length, end)
        answers = {index: _probed(branches[index], num_probes, end) for index in active}
        before, leader = leader, vote(list(answers.values()))
        streak = streak + 1 if leader == before else 1
        share = sum(one == leader for one in answers.values()) / len(active)
        if leader is None or num_probes <= rule.warmup or share <= rule.share:
            continue
        if streak >= rule.patience:
            break
        for index in active:
            against[index] = against[index] + 1 if answers[index] != leader else 0
        active = [
            index
            for index in active
            if against[index] < rule.deviations or spent[index] == branches[index].length
        ]
    found = outcome_of(leader, spent, max(spent))
    return [replace(found, tokens=found.tokens + PROBE_TOKENS * num_asked)]


def _probed(branch: Branch, number: int, end: int) -> str | None:
    if branch.length <= end or not branch.probes:
        return branch.answer
    return branch.probes[min(number, len(branch.probes)) - 1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    default = os.environ.get("DEEPPRUNE_BRANCHES", "").split()
    parser.add_argument(
        "--branches", type=Path, nargs="+", default=[Path(one) for one in default],
        required=not default, help="recordings (default: $DEEPPRUNE_BRANCHES)",
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="n")
    parser.add_argument("--slots", type=int, nargs="*", default=[64, 128], help="few slots")
    parser.add_argument("--draws", type=int, default=8, help="draws of n branches a question")
    parser.add_argument("--server-draws", type=int, default=4, help="the same with few slots")
    parser.add_argument("--questions", type=int, help="the first ones of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        questions = load(args.branches, args.questions)
    except BranchFileError as error:
        parser.error(str(error))
    fewest = min((len(one.branches) for one in questions), default=0)
    if not all(1 <= size <= fewest for size in args.sizes):
        parser.error(f"--sizes must be 1 to {fewest}: a question has that many branches")
    benches = compare(questions, args.sizes, args.draws, args.seed)
    rows = [row for bench in benches for row in bench.rows()]
    size = min(SERVER_SIZE, max(args.sizes))
    served = serve(questions, size, args.slots, min(args.draws, args.server_draws), args.seed)
    print_report(rows, served, len(questions), args.draws)
    if args.json:
        write_json(
            args.json, "frontier", rows,
            server=served, questions=len(questions), draws=args.draws, seed=args.seed,
        )  # fmt: skip
    if args.plot:
        save_plot(benches, args.plot)


if __name__ == "__main__":
    main()
