"""`sglang-deepprune train-judge`: fits a belief judge to recorded traces. Seconds on one core.
With `--base MODEL` it fine-tunes a causal LM instead (`lm_training.py`).

The softmax over candidates is a conditional logit (L-BFGS, L2); every trace is shown at every cut.
The pair head is a logistic regression on pairs of beliefs that were made *out of fold* (questions
split five ways), so that it is calibrated for questions the softmax has not seen.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_deepprune import lm_recipe as recipes
from sglang_deepprune.answers import canonical, compare
from sglang_deepprune.judges import belief as judge
from sglang_deepprune.judges.candidates import NUM_FEATURES, Candidates
from sglang_deepprune.pairs import same_answer
from sglang_deepprune.traces import (
    CUTS,
    CutError,
    Question,
    TraceFileError,
    load,
    parse_cut,
    truncate,
)

_L2 = 30.0
_PAIRS_A_QUESTION = 200  # at one cut
NUM_FOLDS = 5


class TrainingError(ValueError):
    """The recording does not hold what training needs; one sentence."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One trace at one cut."""

    fold: int
    group: int  # (question, cut): pairs are made inside it
    kind: str
    candidates: Candidates
    length: float
    answer: str
    target: int | None  # place among the candidates; None = none of them


def folds_of(questions: Sequence[Question], seed: int, num_folds: int = NUM_FOLDS) -> list[int]:
    """Fold of each question: a seeded split by question, never by trace."""
    order = np.random.default_rng(seed).permutation(len(questions))
    folds = [0] * len(questions)
    for place, which in enumerate(order):
        folds[which] = place % num_folds
    return folds


def read_all(
    questions: Sequence[Question], folds: Sequence[int], cuts: Sequence[str] = CUTS
) -> list[Reading]:
    """Every trace that gave an answer, at every cut that ends before it."""
    readings = []
    for place, (question, fold) in enumerate(zip(questions, folds, strict=True)):
        for number, cut in enumerate(cuts):
            for trace in question.traces:
                short = truncate(trace, cut)
                if trace.answer is None or not short.text.strip():
                    continue
                kind, candidates = judge.read(short)
                target = _target(candidates.names, trace.answer)
                if kind == "options" and target is None:
                    continue  # its answer is not among the options
                readings.append(
                    Reading(
                        fold,
                        place * len(cuts) + number,
                        kind,
                        candidates,
                        judge.scaled_length(short.text),
                        trace.answer,
                        target,
                    )  # fmt: skip
                )
    return readings


def _target(names: Sequence[str], answer: str) -> int | None:
    wanted = canonical(answer)
    for place, name in enumerate(names):
        if name in (wanted, answer) or compare(name, answer):
            return place
    return None


def fit(readings: Sequence[Reading], seed: int = 0) -> dict[str, judge.Weights]:
    """Weights by kind of candidates. Raises `TrainingError`."""
    weights = {}
    for kind in judge.KINDS:
        own = [reading for reading in readings if reading.kind == kind]
        if own:
            weights[kind] = _fit_kind(own, kind, seed)
    if not weights:
        raise TrainingError("no trace in the recording has an answer")
    return weights


def _fit_kind(readings: Sequence[Reading], kind: str, seed: int) -> judge.Weights:
    has_other = kind == "results"
    pairs: list[list[float]] = []
    labels: list[bool] = []
    rng = np.random.default_rng(seed)
    for fold in sorted({reading.fold for reading in readings}):
        train = [reading for reading in readings if reading.fold != fold]
        if not train:
            raise TrainingError("training needs traces of at least two questions")
        candidate, other = _fit_softmax(train, has_other)
        blank = judge.Weights(candidate, other, [0.0] * (judge.NUM_PAIR_FEATURES + 1))
        groups: dict[int, list[tuple[Reading, judge.Belief]]] = {}
        for one in (reading for reading in readings if reading.fold == fold):
            own = judge.belief(one.candidates, one.length, blank, has_other=has_other)
            groups.setdefault(one.group, []).append((one, own))
        for members in groups.values():
            for i, j in _some_pairs(len(members), rng):
                (left, p), (right, q) = members[i], members[j]
                pairs.append(judge.pair_features(p, q, (left.length, right.length)))
                labels.append(same_answer(left.answer, right.answer))
    candidate, other = _fit_softmax(readings, has_other)
    return judge.Weights(candidate, other, _fit_pairs(pairs, labels))


def _some_pairs(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    every = [(i, j) for i in range(count) for j in range(i)]
    if len(every) <= _PAIRS_A_QUESTION:
        return every
    return [every[k] for k in rng.choice(len(every), _PAIRS_A_QUESTION, replace=False)]


def _fit_softmax(readings: Sequence[Reading], has_other: bool) -> tuple[list[float], list[float]]:
    """([2 * NUM_FEATURES] candidate weights, [2] weights of "none of these")."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    width = max(len(reading.candidates.names) for reading in readings) + has_other
    size = 2 * NUM_FEATURES + 2
    design = np.zeros((len(readings), width, size), dtype=np.float32)
    is_there = np.zeros((len(readings), width), dtype=bool)
    target = np.zeros(len(readings), dtype=np.int64)
    for row, reading in enumerate(readings):
        count = len(reading.candidates.names)
        features = reading.candidates.features
        design[row, :count, :NUM_FEATURES] = features
        design[row, :count, NUM_FEATURES : 2 * NUM_FEATURES] = features * reading.length
        if has_other:
            design[row, count, -2:] = 1.0, reading.length
        is_there[row, : count + has_other] = True
        target[row] = count if reading.target is None else reading.target
    scale = design[is_there].std(axis=0) + 1e-6
    scale[-2:] = 1.0  # the bias has hardly any spread
    design /= scale
    rows = np.arange(len(readings))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.where(is_there, design @ w.astype(np.float32), -1e9)
        norm = logsumexp(logits, axis=1)
        error = np.exp(logits - norm[:, None])
        error[rows, target] -= 1
        slope = np.einsum("rc,rcf->f", error, design) + _L2 * w
        return float((norm - logits[rows, target]).sum() + 0.5 * _L2 * w @ w), slope

    start = np.zeros(size)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x / scale
    return found[:-2].tolist(), found[-2:].tolist()


def _fit_pairs(pairs: Sequence[Sequence[float]], labels: Sequence[bool]) -> list[float]:
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:
        raise TrainingError("all pairs have the same label; training needs answers that differ")
    head = LogisticRegression(C=1.0, max_iter=1000).fit(np.asarray(pairs), np.asarray(labels))
    return [*head.coef_[0].tolist(), float(head.intercept_[0])]


def describe(path: str, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """Which data a judge was trained on."""
    return {
        "file": Path(path).name,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "questions": len(questions),
        "traces": sum(len(question.traces) for question in questions),
        "seed": seed,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sglang-deepprune train-judge", description=__doc__)
    parser.add_argument("--traces", required=True, help="recorded traces, JSONL or .gz")
    parser.add_argument("--output", required=True, help="what belief:PATH or llm:PATH loads")
    parser.add_argument("--seed", type=int, default=0)
    recipes.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        questions = load(args.traces)
        if args.base:
            parse_cut(args.cut)
            return _train_lm(args, questions)
        readings = read_all(questions, folds_of(questions, args.seed))
        weights = fit(readings, args.seed)
    except (TraceFileError, CutError, TrainingError) as error:
        print(f"sglang-deepprune train-judge: {error}", file=sys.stderr)
        return 2
    judge.save_weights(args.output, weights, describe(args.traces, questions, args.seed))
    kinds = " and ".join(weights)
    print(f"{len(questions)} questions, {len(readings)} readings of {kinds}: {args.output}")
    return 0


def _train_lm(args: argparse.Namespace, questions: Sequence[Question]) -> int:
    from sglang_deepprune import lm_training  # torch and transformers: not for a belief judge

    return lm_training.run(args, questions)
