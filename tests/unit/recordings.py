"""Made-up recordings for the tests of judges: traces that drift to their answer, seeded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

OPTIONS = ["red copper wire", "blue silver coin", "green golden ring", "black iron nail"]


def lettered(num_questions: int = 8, n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Four options; the first half of a trace wanders, the second mostly speaks of its answer."""
    return _rows(num_questions, n, seed, _lettered)


def open_ended(num_questions: int = 8, n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Numeric answers that are stated as drafts before the end."""
    return _rows(num_questions, n, seed, _open)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(num_questions: int, n: int, seed: int, make: Any) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for question in range(num_questions):
        share = rng.choice([0.5, 0.7, 0.9])
        favourite = rng.randrange(4)
        for index in range(n):
            choice = favourite if rng.random() < share else rng.randrange(4)
            rows.append({"question_id": f"q{question}", "seed": index, **make(rng, choice)})
    return rows


def _lettered(rng: random.Random, choice: int) -> dict[str, Any]:
    steps = []
    for place in range(12):
        own = choice if rng.random() < 0.2 + 0.06 * place else rng.randrange(4)
        word = rng.choice(["wait, maybe", "so it seems", "therefore"])
        steps.append(f"{word} option {chr(65 + own)}, the {OPTIONS[own]}, fits.")
    options = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(OPTIONS))
    letter = chr(65 + choice)
    return {
        "prompt": f"Which one?\n{options}", "text": "\n".join(steps) + f"\nThe answer is {letter}.",
        "num_tokens": 200 + rng.randrange(50), "answer": letter, "gold": "A",
    }  # fmt: skip


def _open(rng: random.Random, choice: int) -> dict[str, Any]:
    answer = 10 + choice
    steps = []
    for place in range(12):
        own = answer if rng.random() < 0.2 + 0.06 * place else 10 + rng.randrange(4)
        steps.append(f"wait, check: {own - 3} + 3 = {own}, therefore the sum is {own}.")
    return {
        "prompt": "How much is it?", "text": "\n".join(steps) + f"\n\\boxed{{{answer}}}",
        "num_tokens": 200 + rng.randrange(50), "answer": str(answer), "gold": "10",
    }  # fmt: skip
