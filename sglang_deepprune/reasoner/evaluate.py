"""Measures a reasoner: `python -m sglang_deepprune.reasoner.evaluate [--json FILE]`.

Samples every question 64 times at temperature 1 and prints, a level a line, how often one trace is
right, how often a plurality of 16 and of 64 is, how often two traces agree, and how long they are.
Its questions come from their own seed, which training never uses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sglang_deepprune.reasoner import model_path
from sglang_deepprune.reasoner.questions import DIFFICULTIES, Question, questions
from sglang_deepprune.reasoner.sampling import Sample, load, render, sample
from sglang_deepprune.reasoner.traces import count_reasoning_words

QUESTION_SEED = 20_000
HARDER = DIFFICULTIES[2:]
_ROWS = 256  # traces decoded together
_BOXED = re.compile(r"\\boxed\{\s*(\d+)\s*\}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question and the traces sampled for it."""

    question: Question
    samples: tuple[Sample, ...]
    answers: tuple[str | None, ...]  # one a sample

    def accuracy(self) -> float:
        """Share of single traces that are right."""
        return fmean(answer == self.question.answer for answer in self.answers)

    def vote_accuracy(self, size: int) -> float:
        """Share of disjoint ballots of `size` traces whose plurality is right."""
        starts = range(0, len(self.answers) - size + 1, size)
        return fmean(vote(self.answers[i : i + size]) == self.question.answer for i in starts)

    def same_answer_rate(self) -> float:
        """Share of pairs that answer the same; a trace without an answer agrees with none."""
        counts = Counter(answer for answer in self.answers if answer is not None)
        total = len(self.answers) * (len(self.answers) - 1)
        return sum(c * (c - 1) for c in counts.values()) / total

    def distinct_wrong(self) -> int:
        """How many different wrong answers there are."""
        return len(set(self.answers) - {None, self.question.answer})


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the one that came first on a tie."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def boxed_answer(text: str) -> str | None:
    """The last boxed number of a trace."""
    found = _BOXED.findall(text)
    return found[-1] if found else None


def measure(
    model: Any, tokenizer: Any, asked: Sequence[Question], size: int, seed: int = 0
) -> list[Outcome]:
    """Sample every question `size` times."""
    from tqdm import tqdm

    step = max(1, _ROWS // size)
    outcomes = []
    for start in tqdm(range(0, len(asked), step), unit="batch", disable=None):
        some = asked[start : start + step]
        prompts = [render(tokenizer, question.prompt) for question in some for _ in range(size)]
        samples = sample(model, tokenizer, prompts, seed=seed + start)
        for i, question in enumerate(some):
            own = tuple(samples[i * size : (i + 1) * size])
            outcomes.append(Outcome(question, own, tuple(boxed_answer(s.text) for s in own)))
    return outcomes


def summarise(name: str, outcomes: Sequence[Outcome], size: int) -> dict[str, Any]:
    """One row of the table."""
    samples = [one for outcome in outcomes for one in outcome.samples]
    row: dict[str, Any] = {
        "difficulty": name,
        "questions": len(outcomes),
        "single": round(fmean(o.accuracy() for o in outcomes), 3),
    }
    for ballot in (16, 64):
        if ballot <= size:
            row[f"vote@{ballot}"] = round(fmean(o.vote_accuracy(ballot) for o in outcomes), 3)
    row["same_answer"] = round(fmean(o.same_answer_rate() for o in outcomes), 3)
    row["wrong_answers"] = median(o.distinct_wrong() for o in outcomes)
    row["tokens"] = median(s.num_tokens for s in samples)
    row["tokens_max"] = max(s.num_tokens for s in samples)
    row["words"] = median(count_reasoning_words(s.text) for s in samples)
    row["ended"] = round(fmean(s.is_ended for s in samples), 4)
    return row


def tabulate(outcomes: Sequence[Outcome], size: int) -> list[dict[str, Any]]:
    """All rows: each level, the harder half, and the total."""
    parts: list[tuple[str, tuple[str, ...]]] = [(level, (level,)) for level in DIFFICULTIES]
    parts += [("harder half", HARDER), ("total", DIFFICULTIES)]
    chosen = [(n, [o for o in outcomes if o.question.difficulty in levels]) for n, levels in parts]
    return [summarise(name, some, size) for name, some in chosen if some]


def _report(rows: Sequence[dict[str, Any]], versions: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "reasoner",
        "command": f"python -m sglang_deepprune.reasoner.evaluate {' '.join(sys.argv[1:])}".strip(),
        "versions": versions,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "rows": list(rows),
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Measure the embedded reasoner.")
    parser.add_argument("--model", default=model_path(), help="checkpoint folder")
    parser.add_argument("--questions", type=int, default=100, help="over all levels")
    parser.add_argument("--samples", type=int, default=64, help="traces a question")
    parser.add_argument("--seed", type=int, default=QUESTION_SEED, help="seed of the questions")
    parser.add_argument("--dtype", default="float32", help="what the model computes in")
    parser.add_argument("--json", type=Path, help="write one object with everything")
    args = parser.parse_args()

    import torch
    import transformers

    model, tokenizer = load(args.model, args.dtype)
    asked = sorted(questions(args.seed, args.questions), key=lambda q: len(q.prompt))
    rows = tabulate(measure(model, tokenizer, asked, args.samples), args.samples)
    _print_table(rows)
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        args.json.write_text(json.dumps(_report(rows, versions), indent=2) + "\n")


if __name__ == "__main__":
    main()
