"""Does a tau that learns within the group pay? `tau_step` beside a fixed tau, in lazy groups.

Groups run as in `frontier` (the engine's own policies, a token a step, slots for everybody), preset
`balanced`, with a judge that is let prune whatever its card says. Its scores are those of a real
judge on recorded traces (tau calibrated on them, which flatters the fixed one), or, with
--branches, of a simulated one with a known AUROC inside each question.

    python -m benchmarks.tau_study --traces FILE --judge belief --folds 5 --cut 2000
    python -m benchmarks.tau_study --branches FILE --n 64
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.frontier_data import Branch, Draw, Question, SimulatedJudge, draws_of, load
from benchmarks.frontier_report import Bench
from benchmarks.frontier_sim import Outcome, Server
from benchmarks.report import Row, print_table, write_json
from sglang_deepprune import evaluation, traces
from sglang_deepprune.clustering import Score
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.judges import load_judge
from sglang_deepprune.tau import FALSE_MERGE
from sglang_deepprune.types import Pair

STEPS = (0.02, 0.05, 0.1, 0.2)
AUROCS = (0.65, 0.75, 0.87)
CHECK_ONLY = 1e-9  # tau stays where it is; what remains is that a group may stop pruning
_SHOWN = (
    "judge", "policy", "n", "tau", "tokens_ratio", "accuracy", "plain_accuracy", "same_winner",
    "cons_equal_tokens", "gain", "gain_low", "gain_high",
)  # fmt: skip

ScoreOf = Callable[[Draw], Score]


def policies(cut_tokens: int, tau: float, score_of: ScoreOf) -> Iterator[tuple[str, object]]:
    """(name, play), plain n first."""
    yield "plain n", partial(_play, config=DeepPruneConfig(preset="collect"), score_of=None)
    yield "balanced, no judge", partial(_play, config=DeepPruneConfig(), score_of=None)
    steps = {"tau fixed": 0.0, "fixed, may give up pruning": CHECK_ONLY}
    steps |= {f"tau_step {step:g}": step for step in STEPS}
    for name, step in steps.items():
        config = DeepPruneConfig(
            cut_tokens=cut_tokens, tau_step=step, card_taus=((f"tokens:{cut_tokens}", tau),)
        )
        yield name, partial(_play, config=config, score_of=score_of)


def _play(draw: Draw, config: DeepPruneConfig, score_of: ScoreOf | None) -> list[Outcome]:
    return Server([draw], config, score=score_of(draw) if score_of else None).play()


def rows_of(
    judge: str, draws: Sequence[Sequence[Draw]], cut: int, tau: float, score_of: ScoreOf, seed: int
) -> list[Row]:
    bench = Bench.of(draws, seed)
    for name, play in policies(cut, tau, score_of):
        bench.add(name, play)  # type: ignore[arg-type]
    return [{"judge": judge, "cut_tokens": cut, "tau": tau, **row} for row in bench.rows()]


def recorded(args: argparse.Namespace) -> list[Row]:
    """A real judge on real traces: scores of all pairs once, then groups over them."""
    questions = [one for one in traces.load(args.traces) if len(one.traces) > 1]
    questions = questions[: args.questions or None]
    if args.folds:
        judge_of = evaluation.folded_belief(questions, args.folds, args.seed)
    else:
        judge = load_judge(args.judge)
        judge_of = lambda place: judge  # noqa: E731
    scored = evaluation.score_cut(questions, f"tokens:{args.cut}", judge_of)
    tau = evaluation.calibrate(scored.labels, scored.scores, FALSE_MERGE)
    tau = 0.5 if tau is None else tau
    replayed, matrices = [], []
    for number, case in enumerate(scored.cases):
        branches = tuple(
            Branch((), length, None if own is None else f"answer {own}")
            for length, own in zip(case.tokens, case.classes, strict=True)
        )
        gold = None if case.gold is None else f"answer {case.gold}"
        replayed.append(Question(number, gold, 1, branches))
        matrices.append(case.scores.astype(np.float64))
    size = args.n or min(len(one.branches) for one in replayed)

    def score_of(draw: Draw) -> Score:
        return partial(_look_up, matrices[draw.question.number], draw.picked)

    draws = draws_of(replayed, size, args.draws, args.seed)
    return rows_of(args.judge, draws, args.cut, tau, score_of, args.seed)


def _look_up(
    matrix: npt.NDArray[np.float64], picked: Sequence[int], pairs: Sequence[Pair]
) -> npt.NDArray[np.float64]:
    left = [picked[pair.left.sibling] for pair in pairs]
    right = [picked[pair.right.sibling] for pair in pairs]
    return matrix[left, right]


def simulated(args: argparse.Namespace) -> list[Row]:
    """Judges of known quality on recorded branches."""
    questions = load(args.branches, args.questions or None)
    draws = draws_of(questions, args.n or 64, args.draws, args.seed)
    rows: list[Row] = []
    for auroc in AUROCS:
        judge = SimulatedJudge(questions, auroc, args.seed)
        rows += rows_of(f"AUROC {auroc:g}", draws, args.cut, 0.5, judge.score_of, args.seed)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--traces", help="recorded traces, JSONL or .gz")
    source.add_argument("--branches", type=Path, nargs="+", help="recordings, as in `frontier`")
    parser.add_argument("--judge", default="belief", help="NAME[:PATH], with --traces")
    parser.add_argument("--folds", type=int, default=0, help="belief is fitted in K folds")
    parser.add_argument("--cut", type=int, default=500, help="tokens")
    parser.add_argument("--n", type=int, default=0, help="0: what --traces has, 64 of --branches")
    parser.add_argument("--draws", type=int, default=8, help="orders a question")
    parser.add_argument("--questions", type=int, default=0, help="the first ones; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = recorded(args) if args.traces else simulated(args)
    print_table([{name: row[name] for name in _SHOWN} for row in rows], "tau at run time")
    if args.json:
        write_json(args.json, "tau", rows, draws=args.draws, seed=args.seed)


if __name__ == "__main__":
    main()
