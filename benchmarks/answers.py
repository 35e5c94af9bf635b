"""How well answers are taken out of traces and told apart: `python benchmarks/answers.py FILE`.

Each line of FILE is a case: two texts, whether their answers are the same, and what should be
extracted from the first. The verdict is `compare`, and where that cannot tell, the fence. A case
is right when the verdict equals `same`; an abstention on either side is "not the same".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("sglang_deepprune") is None:
    # Behind everything else: nothing in the repository root may shadow an installed package.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from sglang_deepprune import report
from sglang_deepprune.answers import Extraction, Fence, canonical, compare, extract


@dataclass(frozen=True, slots=True)
class Outcome:
    """One judged case."""

    case: dict[str, Any]
    left: Extraction | None
    right: Extraction | None
    verdict: bool

    @property
    def is_right(self) -> bool:
        return self.verdict is bool(self.case["same"])

    @property
    def is_wrong_extraction(self) -> bool:
        wanted = self.case["extracted"]
        if self.left is None or wanted is None:
            return (self.left is None) != (wanted is None)
        if canonical(self.left.answer) == canonical(wanted):
            return False
        return compare(self.left.answer, wanted) is not True


def judge(case: dict[str, Any], fence: Fence) -> Outcome:
    """Extract from both texts and decide whether the answers are the same."""
    left, right = extract(case["text"]), extract(case["other_text"])
    verdict: bool | None = False
    if left is not None and right is not None:
        verdict = compare(left.answer, right.answer)
        if verdict is None:
            verdict = fence.equivalent(left.answer, right.answer)
    return Outcome(case, left, right, verdict is True)


def summarize(outcomes: list[Outcome], time_s: float) -> dict[str, Any]:
    """The one row of this benchmark."""
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    return {
        "right": len(outcomes) - len(wrong),
        "false_merges": sum(outcome.verdict for outcome in wrong),
        "false_splits": sum(not outcome.verdict for outcome in wrong),
        "wrong_extractions": sum(outcome.is_wrong_extraction for outcome in outcomes),
        "abstentions": sum(None in (outcome.left, outcome.right) for outcome in outcomes),
        "time_s": round(time_s, 3),
        "cases": len(outcomes),
    }


def print_misses(outcomes: list[Outcome]) -> None:
    """Every case that was decided or extracted wrongly."""
    for outcome in outcomes:
        if outcome.is_right and not outcome.is_wrong_extraction:
            continue
        sides = [side.answer if side else None for side in (outcome.left, outcome.right)]
        print(
            f"{outcome.case['id']} ({outcome.case['kind']}): got {sides[0]!r} vs {sides[1]!r}, "
            f"same={outcome.verdict}; wanted {outcome.case['extracted']!r}, "
            f"same={outcome.case['same']}"
        )


def main() -> None:
    """Run all cases of one file in one process; loading the child is not timed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="cases, one JSON object a line")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with arguments.file.open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines if line.strip()]
    fence = Fence()
    try:
        fence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
        start = time.perf_counter()
        outcomes = [judge(case, fence) for case in cases]
        row = summarize(outcomes, time.perf_counter() - start)
    finally:
        fence.close()
    report.print_table([row], f"Answers: {arguments.file.name}")
    print_misses(outcomes)
    if arguments.json is not None:
        report.write_json(arguments.json, "answers", [row])


if __name__ == "__main__":
    main()
