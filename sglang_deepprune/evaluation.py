"""`sglang-deepprune eval-judge`: how good a judge is on recorded traces, cut by cut, and its card.

Figures (pairs i < j of one question; label: same answer under our equivalence; pairs with an
abstention or without a verdict are left out, their share is `left_out`):

- `pooled_auroc`: over the pairs of all questions. Misleading alone: see `difficulty_auroc`.
- `within_auroc`: mean over the questions whose pairs have both labels. What pruning lives on.
- `difficulty_auroc`: pooled, of a score that knows only the question's share of agreeing pairs.
- `both_unfinished_auroc`: pooled, of pairs of which neither trace ends before the cut.
- `tnr_at_fnr_0_2`: the paper's TNR@0.2. "Positive" = same answer; at the highest threshold that
  calls at most 20 % of the positives different, the share of negatives called different.
- `brier`, and `reliability` in the JSON: [mean score, share of the same, pairs] by tenths.
- `false_merge`: of the pairs with a score > tau, the share whose answers differ, at the smallest
  tau of a grid that keeps it at or below the wanted rate (`tau`; None: no tau does).
- `false_merge_unseen`: the same rate where tau was chosen on the other questions (5 folds).
- `cost_ms`: judge time a trace.
- `same_*`: the vote's winner equals that of all n, by `vote_study`: clustering alone (`paper`),
  with the decided stop, and the rivals at the tokens of the latter.

`_low` / `_high`: 95 % bootstrap interval over questions; `gain`'s of all cuts of the run together.
`--folds K` refits a belief judge K times and judges each question with weights that never saw it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_deepprune import card as cards
from sglang_deepprune import training, vote_study
from sglang_deepprune.clustering import JudgeError
from sglang_deepprune.config import ConfigError
from sglang_deepprune.judges import Judge, check_offline, load_judge
from sglang_deepprune.judges.belief import save_weights
from sglang_deepprune.judges.permission import weights_of
from sglang_deepprune.report import Row, print_table, write_json
from sglang_deepprune.traces import (
    CUTS,
    CutError,
    Question,
    TraceFileError,
    load,
    parse_cut,
    truncate,
)
from sglang_deepprune.types import Pair, Trace

TAUS = np.round(np.arange(0.30, 1.0, 0.01), 2)
MIN_QUESTIONS = 60  # for a card that lets prune: a bad judge passes 20 in 8 % of the draws
_BOOTSTRAP = 1000
_MIN_MERGED = 20  # pairs; fewer say nothing about a rate


@dataclass(frozen=True, slots=True)
class Scored:
    """The judged pairs of all questions at one cut; arrays of [num_pairs]."""

    scores: np.ndarray  # float64
    labels: np.ndarray  # bool: same answer
    questions: np.ndarray  # int: index of the question
    is_unfinished: np.ndarray  # bool: both traces are longer than the cut
    left_out: float  # share of the pairs
    cost_ms: float  # a trace
    cases: list[vote_study.Case]


JudgeOf = Callable[[int], Judge]  # the judge of a question, by its index


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """P(a positive scores above a negative), ties half; NaN without both labels."""
    from scipy.stats import rankdata

    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def within_aurocs(scored: Scored) -> dict[int, float]:
    """AUROC of each question whose pairs have both labels."""
    found = {}
    for question in np.unique(scored.questions):
        own = scored.questions == question
        value = auroc(scored.labels[own], scored.scores[own])
        if not np.isnan(value):
            found[int(question)] = value
    return found


def tnr_at_fnr(labels: np.ndarray, scores: np.ndarray, fnr: float = 0.2) -> float:
    """See the module's docstring. NaN without both labels."""
    positives, negatives = np.sort(scores[labels]), scores[~labels]
    if not len(positives) or not len(negatives):
        return float("nan")
    threshold = positives[int(fnr * len(positives))]  # below it lie at most fnr of the positives
    return float((negatives < threshold).mean())


def calibrate(labels: np.ndarray, scores: np.ndarray, rate: float) -> float | None:
    """The smallest tau from which on the false-merge rate stays at or below `rate`."""
    best = None
    for tau in TAUS[::-1]:
        merged = scores > tau
        if merged.sum() < _MIN_MERGED:
            continue
        if (~labels[merged]).mean() > rate:
            break
        best = float(tau)
    return best


def false_merge(labels: np.ndarray, scores: np.ndarray, tau: float) -> float:
    """Share of the merged pairs (score > tau) whose answers differ; NaN when none is merged."""
    merged = scores > tau
    return float((~labels[merged]).mean()) if merged.any() else float("nan")


def false_merge_unseen(scored: Scored, rate: float, seed: int, num_folds: int = 5) -> float:
    """False merges over all merged pairs, tau of each fold of questions chosen on the others."""
    fold = np.random.default_rng(seed).permutation(scored.questions.max() + 1) % num_folds
    of_pair = fold[scored.questions]
    wrong = merged = 0
    for one in range(num_folds):
        own = of_pair == one
        tau = calibrate(scored.labels[~own], scored.scores[~own], rate)
        if tau is not None:
            is_merged = own & (scored.scores > tau)
            merged += int(is_merged.sum())
            wrong += int((is_merged & ~scored.labels).sum())
    return wrong / merged if merged else float("nan")


def score_cut(questions: Sequence[Question], cut: str, judge_of: JudgeOf) -> Scored:
    """Ask the judge about all C(n, 2) pairs of every question."""
    scores, labels, owners, unfinished = [], [], [], []
    seconds, num_traces, num_pairs, cases = 0.0, 0, 0, []
    for place, question in enumerate(questions):
        short = [truncate(trace, cut, i) for i, trace in enumerate(question.traces)]
        size = len(short)
        asked = [(i, j) for i in range(size) for j in range(i)]
        # Answers that have been given are facts: the judge sees texts alone.
        blind = [_without_answer(trace) for trace in short]
        judge = judge_of(place)
        start = time.perf_counter()
        found = judge.score([Pair(blind[i], blind[j]) for i, j in asked])
        seconds += time.perf_counter() - start
        num_traces += size
        matrix = np.full((size, size), np.nan, dtype=np.float32)
        classes = vote_study.class_ids([trace.answer for trace in question.traces])
        for (i, j), value in zip(asked, found, strict=True):
            matrix[i, j] = matrix[j, i] = value
            num_pairs += 1
            if np.isnan(value) or classes[i] is None or classes[j] is None:
                continue
            scores.append(float(value))
            labels.append(classes[i] == classes[j])
            owners.append(place)
            unfinished.append(short[i].cut != "end" and short[j].cut != "end")
        gold = vote_study.class_ids([*(t.answer for t in question.traces), question.gold])[-1]
        cases.append(
            vote_study.Case(
                classes,
                gold if gold in classes else None,
                tuple(trace.num_tokens for trace in question.traces),
                tuple(short),
                matrix,
            )  # fmt: skip
        )
    return Scored(
        np.array(scores), np.array(labels, dtype=bool), np.array(owners, dtype=int),
        np.array(unfinished, dtype=bool), 1 - len(scores) / max(1, num_pairs),
        seconds / max(1, num_traces) * 1e3, cases,
    )  # fmt: skip


def _without_answer(trace: Trace) -> Trace:
    """A trace without the answer that the file holds: no judge may peek."""
    return replace(trace, answer=None)


def evaluate(
    scored: Scored, judge: str, cut: str, rate: float, seed: int, num_cuts: int = 1
) -> Row:
    """One row of the table. `num_cuts`: of the run, among which the card takes the best."""
    labels, scores = scored.labels, scored.scores
    within = within_aurocs(scored)
    share = {q: labels[scored.questions == q].mean() for q in np.unique(scored.questions)}
    both = scored.is_unfinished
    tau = calibrate(labels, scores, rate)
    low, high = _pooled_interval(scored, seed)
    low_w, high_w = _interval(np.array(list(within.values())), seed)
    row: Row = {
        "judge": judge, "cut": cut, "pairs": len(scores),
        "pooled_auroc": auroc(labels, scores), "pooled_low": low, "pooled_high": high,
        "within_auroc": _mean(list(within.values())), "within_low": low_w, "within_high": high_w,
        "difficulty_auroc": auroc(labels, np.array([share[q] for q in scored.questions])),
        "both_unfinished_auroc": auroc(labels[both], scores[both]),
        "unfinished_share": _mean(both), "left_out": scored.left_out,
        "tnr_at_fnr_0_2": tnr_at_fnr(labels, scores),
        "brier": _mean((scores - labels) ** 2),
        "tau": tau, "false_merge": false_merge(labels, scores, 0.5 if tau is None else tau),
        "false_merge_unseen": false_merge_unseen(scored, rate, seed),
        "cost_ms": scored.cost_ms,
    }  # fmt: skip
    row |= _votes(scored.cases, 0.5 if tau is None else tau, seed, num_cuts)
    # Not every figure exists at every cut, and NaN is no JSON.
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _votes(cases: Sequence[vote_study.Case], tau: float, seed: int, num_cuts: int) -> Row:
    plain = [vote_study.everybody(case) for case in cases]
    paper = [vote_study.clustered(case, tau, with_decided=False) for case in cases]
    both = [vote_study.clustered(case, tau, with_decided=True) for case in cases]
    alone = [vote_study.decided_alone(case, range(len(case.tokens))) for case in cases]
    total = sum(one.tokens for one in plain)

    def same(outcomes: Sequence[vote_study.Outcome]) -> np.ndarray:
        return np.array([a.winner == b.winner for a, b in zip(outcomes, plain, strict=True)], float)

    budget = sum(one.tokens for one in both) / len(both)
    curve = vote_study.rival_curve(cases, with_decided=True, seed=seed)
    fewer = vote_study.rival_curve(cases, with_decided=False, seed=seed)
    rival = vote_study.equal_tokens(curve, budget)
    low, high = _interval(same(both) - rival, seed, num_cuts)
    return {
        "same_paper": _mean(same(paper)),
        "tokens_paper": sum(one.tokens for one in paper) / total,
        "same_cluster_decided": _mean(same(both)),
        "tokens_cluster_decided": sum(one.tokens for one in both) / total,
        "right_present": _mean([one.has_right for one in paper]),
        "right_present_plain": _mean([one.has_right for one in plain]),
        "same_decided": _mean(same(alone)),
        "tokens_decided": sum(one.tokens for one in alone) / total,
        "same_decided_equal_tokens": _mean(rival),
        "same_fewer_equal_tokens": _mean(vote_study.equal_tokens(fewer, budget)),
        "gain_low": low, "gain_high": high,
    }  # fmt: skip


def judge_rule(rows: Sequence[Row], num_siblings: int, num_questions: int) -> tuple[bool, str]:
    """Whether a judge may prune under `balanced`: where clustering with the decided stop keeps the
    winner at least as often as the decided stop alone at equal tokens, by the lower bound."""
    if num_questions < MIN_QUESTIONS:
        return False, f"{num_questions} questions are too few to tell, {MIN_QUESTIONS} the least"
    # A cut at which no tau keeps false merges low enough decides nothing.
    best = max(rows, key=lambda row: (row["tau"] is not None, row["gain_low"]))
    if best["tau"] is None:
        return False, "at no cut is there a tau that keeps the rate of false merges low enough"
    may = best["gain_low"] >= 0
    verb = "keeps" if may else "is not shown to keep"
    return may, (
        f"at {best['cut']} and n={num_siblings}, clustering with the decided stop {verb} the "
        f"winner as often as the decided stop alone at equal tokens: "
        f"{best['same_cluster_decided']:.2f} against {best['same_decided_equal_tokens']:.2f}, "
        f"gain at least {best['gain_low']:+.3f}"
    )


def reliability(scored: Scored) -> list[list[float]]:
    """[mean score, share of the same, pairs] of the non-empty tenths."""
    tenth = np.clip((scored.scores * 10).astype(int), 0, 9)
    curve = []
    for number in np.unique(tenth):
        own = tenth == number
        curve.append([_mean(scored.scores[own]), _mean(scored.labels[own]), int(own.sum())])
    return curve


def _mean(values: Any) -> float:
    found = np.asarray(values, dtype=float)
    return float(found.mean()) if found.size else float("nan")


def _interval(values: np.ndarray, seed: int, num_looks: int = 1) -> tuple[float, float]:
    """95 % of the mean, of all `num_looks` such intervals together (Bonferroni)."""
    if not values.size:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (_BOOTSTRAP, len(values)))].mean(axis=1)
    outside = 0.025 / num_looks
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)


def _pooled_interval(scored: Scored, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    names = np.unique(scored.questions)
    places = [np.flatnonzero(scored.questions == name) for name in names]
    found = []
    for _ in range(_BOOTSTRAP // 4):
        drawn = np.concatenate([places[i] for i in rng.integers(0, len(names), len(names))])
        found.append(auroc(scored.labels[drawn], scored.scores[drawn]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def folded_belief(questions: Sequence[Question], num_folds: int, seed: int) -> JudgeOf:
    """A belief judge for each question that was fitted to the other folds."""
    folds = training.folds_of(questions, seed, num_folds)
    readings = training.read_all(questions, folds)
    judges = {}
    with tempfile.TemporaryDirectory() as folder:
        for fold in range(num_folds):
            weights = training.fit([one for one in readings if one.fold != fold], seed)
            path = Path(folder) / f"{fold}.json"
            save_weights(path, weights, {})
            judges[fold] = load_judge(f"belief:{path}")
    return lambda place: judges[folds[place]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune eval-judge", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--judge", required=True, nargs="+", help="NAME[:PATH], as --deepprune-judge; one or more"
    )
    parser.add_argument("--traces", required=True, help="recorded traces, JSONL or .gz")
    parser.add_argument("--cut", action="append", help=f"default: {', '.join(CUTS)}")
    parser.add_argument(
        "--folds", type=int, default=0, help="belief is fitted and judged in K folds"
    )
    parser.add_argument("--questions", type=int, default=0, help="the first N only; 0: all")
    parser.add_argument(
        "--false-merge", type=float, default=0.2, help="rate that tau is chosen for"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="reliability of each cut (needs matplotlib)")
    parser.add_argument("--card", metavar="FILE")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    try:
        cuts = tuple(args.cut or CUTS)
        for cut in cuts:
            parse_cut(cut)
        questions = [q for q in load(args.traces) if len(q.traces) > 1]
        questions = questions[: args.questions or None]
        if not questions:
            raise TraceFileError("no question has two traces")
        if not 0 < args.false_merge < 1:
            raise ConfigError("false-merge", "must be between 0 and 1")
        if len(args.judge) > 1 and (args.card or args.plot):
            raise ConfigError("judge", "a card and a plot are of one judge; name one")
        if args.folds and "belief" not in args.judge:
            raise ConfigError("folds", "only --judge belief (without a path) is fitted in folds")
        judges = [(_name(spec, args), _judge_of(spec, args, questions)) for spec in args.judge]
    except (TraceFileError, CutError, ConfigError, training.TrainingError, ValueError) as error:
        print(f"sglang-deepprune eval-judge: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    curves: dict[str, dict[str, list[list[float]]]] = {}
    verdicts = {}
    size = min(len(question.traces) for question in questions)
    for name, judge_of in judges:
        try:
            own, curves[name] = _rows(name, judge_of, questions, cuts, args)
        except JudgeError as error:
            print(f"sglang-deepprune eval-judge: {name}: {error}", file=sys.stderr)
            return 1
        if own:
            verdicts[name] = judge_rule(own, size, len(questions))
        rows += own
    if not rows:
        print("sglang-deepprune eval-judge: nothing could be judged", file=sys.stderr)
        return 1
    _print(rows, ", ".join(verdicts))
    for name, (may_prune, why) in verdicts.items():
        print(f"{name}: may prune under balanced: {'yes' if may_prune else 'no'}; {why}.")
    name, (may_prune, reason) = next(iter(verdicts.items()))
    if args.json:
        may = {one: found[0] for one, found in verdicts.items()}
        write_json(args.json, "eval-judge", rows, reliability=curves, may_prune=may)
    if args.plot:
        _plot(args.plot, name, curves[name])
    if args.card:
        data = {**training.describe(args.traces, questions, args.seed), "folds": args.folds}
        taus = {row["cut"]: row["tau"] for row in rows if row["tau"] is not None}
        judge = _short(args.judge[0])  # as a server knows it; the folds are among the data
        weights = "" if args.folds else weights_of(args.judge[0])
        card = cards.Card(judge, data, rows, taus, may_prune, reason, weights)
        cards.save(card, args.card)
    return 0


def _rows(
    name: str,
    judge_of: JudgeOf,
    questions: Sequence[Question],
    cuts: Sequence[str],
    args: argparse.Namespace,
) -> tuple[list[Row], dict[str, list[list[float]]]]:
    """One judge: a row and a reliability curve for each cut that has pairs of both labels."""
    rows, curves = [], {}
    for cut in cuts:
        scored = score_cut(questions, cut, judge_of)
        if len(set(scored.labels.tolist())) < 2:
            print(f"{cut}: no pairs of both labels with a verdict; left out", file=sys.stderr)
            continue
        rows.append(evaluate(scored, name, cut, args.false_merge, args.seed, len(cuts)))
        curves[cut] = reliability(scored)
    return rows, curves


def _print(rows: Sequence[Row], names: str) -> None:
    """All judges in one table, cut by cut; then what their clustering does to the vote."""
    split = len(rows[0]) - len(_VOTE_COLUMNS)
    cuts = list(dict.fromkeys(row["cut"] for row in rows))
    ordered = sorted(rows, key=lambda row: cuts.index(row["cut"]))
    print_table([dict(list(row.items())[:split]) for row in ordered], f"{names}: pairs")
    print_table(
        [{"judge": row["judge"], "cut": row["cut"], **dict(list(row.items())[split:])}
         for row in ordered],
        f"{names}: the vote",
    )  # fmt: skip


_VOTE_COLUMNS = (
    "same_paper", "tokens_paper", "same_cluster_decided", "tokens_cluster_decided", "right_present",
    "right_present_plain", "same_decided", "tokens_decided", "same_decided_equal_tokens",
    "same_fewer_equal_tokens", "gain_low", "gain_high",
)  # fmt: skip


def _name(spec: str, args: argparse.Namespace) -> str:
    return _short(spec) + (f", {args.folds} folds" if args.folds and spec == "belief" else "")


def _judge_of(spec: str, args: argparse.Namespace, questions: Sequence[Question]) -> JudgeOf:
    if args.folds and spec == "belief":
        if not 2 <= args.folds <= len(questions):
            raise ConfigError("folds", f"must be 2 to {len(questions)}, the number of questions")
        return folded_belief(questions, args.folds, args.seed)
    check_offline(spec)
    judge = load_judge(spec)
    return lambda place: judge


def _short(spec: str) -> str:
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).name}" if path and "://" not in path else name


def _plot(path: str, title: str, curves: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for cut, points in curves.items():
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=cut)
    axes.set(xlabel="P(same answer) of the judge", ylabel="share with the same answer", title=title)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
