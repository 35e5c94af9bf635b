"""`sglang-deepprune pairs`: every labelled pair of traces of a recording, split by question.

One pair a line: `question_id`, `left`, `right` (places of the traces within their question, in the
order of the recording, left < right), `same` (the same answer under our equivalence) and `split`.
All C(n, 2) pairs of a question are in one split: a judge must be measured on questions it has not
seen. Pairs with an abstention have no label and are left out, their number is reported. Texts stay
in the recording, because a trace is in n - 1 pairs; `--cut` writes both truncated texts as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_deepprune.answers import compare
from sglang_deepprune.report import Row, print_table, write_json
from sglang_deepprune.traces import (
    CutError,
    Question,
    Recorded,
    TraceFileError,
    load,
    parse_cut,
    truncate,
)

SPLITS = ("train", "dev", "test")
DEFAULT_SHARES = (0.7, 0.15, 0.15)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Two traces of one question, by their places in it, and whether their answers are the same."""

    question: int
    left: int
    right: int
    is_same: bool


def is_same(left: Recorded, right: Recorded) -> bool | None:
    """None: one of the two gave no answer."""
    if left.answer is None or right.answer is None:
        return None
    return same_answer(left.answer, right.answer)


def same_answer(left: str, right: str) -> bool:
    """Under our equivalence; what cannot be shown to be the same is different."""
    return left == right or bool(compare(left, right))


def labelled(questions: Sequence[Question], place: int) -> Iterator[Labelled]:
    """The pairs of question `place` that have a label."""
    traces = questions[place].traces
    for right in range(len(traces)):
        for left in range(right):
            same = is_same(traces[left], traces[right])
            if same is not None:
                yield Labelled(place, left, right, same)


def split(num_questions: int, shares: Sequence[float], seed: int) -> list[str]:
    """The split of each question: seeded, sizes by `shares`, whole questions only.

    Raises ValueError where the shares are no shares.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares of {', '.join(SPLITS)} must be three numbers that add up to 1")
    bounds = np.round(np.cumsum(shares) * num_questions).astype(int)
    order = np.random.default_rng(seed).permutation(num_questions)
    found = [""] * num_questions
    for rank, which in enumerate(order):
        found[which] = SPLITS[int(np.searchsorted(bounds, rank, side="right"))]
    return found


def write(
    questions: Sequence[Question], splits: Sequence[str], path: str | Path, cut: str | None = None
) -> list[Row]:
    """Write the pairs; one row a split that holds any, with its class balance."""
    counts = {name: [0, 0, 0, 0] for name in SPLITS}  # questions, same, different, unlabelled
    with open(path, "w", encoding="utf-8") as out:
        for place, question in enumerate(questions):
            name, size = splits[place], len(question.traces)
            own = list(labelled(questions, place))
            count = counts[name]
            count[0] += 1
            count[3] += size * (size - 1) // 2 - len(own)
            for pair in own:
                count[1 if pair.is_same else 2] += 1
                row = {"question_id": question.question_id, "left": pair.left, "right": pair.right,
                       "same": pair.is_same, "split": name}  # fmt: skip
                if cut is not None:
                    row["left_text"] = truncate(question.traces[pair.left], cut).text
                    row["right_text"] = truncate(question.traces[pair.right], cut).text
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return [_balance(name, *counts[name]) for name in SPLITS if counts[name][0]]


def _balance(name: str, questions: int, same: int, different: int, unlabelled: int) -> Row:
    total = same + different
    return {
        "split": name, "questions": questions, "pairs": total, "same": same,
        "different": different, "same_share": round(same / total, 4) if total else None,
        "unlabelled": unlabelled,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune pairs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--traces", required=True, help="recorded traces, JSONL or .gz")
    parser.add_argument("--output", required=True, help="the pairs, JSONL")
    parser.add_argument(
        "--shares", type=float, nargs=3, default=DEFAULT_SHARES, metavar=("TRAIN", "DEV", "TEST")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cut", help="write the texts too: tokens:K, words:K or share:F")
    parser.add_argument("--json", help="write the class balance here")
    args = parser.parse_args(argv)
    try:
        questions = load(args.traces)
        splits = split(len(questions), args.shares, args.seed)
        if args.cut is not None:
            parse_cut(args.cut)
        rows = write(questions, splits, args.output, args.cut)
    except (TraceFileError, CutError, ValueError, OSError) as error:
        print(f"sglang-deepprune pairs: {error}", file=sys.stderr)
        return 2
    print_table(rows, f"pairs: {args.output}")
    if args.json:
        write_json(args.json, "pairs", rows)
    return 0
