"""What focal loss and oversampling bring: the paper's ablation, on recorded traces, by folds.

A causal LM is fine-tuned as in `train-judge --base` with each of {plain, focal, oversampling,
both}, at each cut, and judges the questions of the folds that it has not seen. Beside it, on the
same pairs: the shallow judges of --rivals, and `belief` fitted in the same folds. Figures are those
of `eval-judge`.

    python -m benchmarks.ablation --traces FILE --base MODEL --json benchmarks/results/ablation.json

The paper's, on one GPU: --base Qwen/Qwen3-4B-Instruct-2507 --lora 16 --pairs 190
--traces-a-question 0
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.report import Row, print_table, write_json
from sglang_deepprune import evaluation
from sglang_deepprune.judges import Judge, load_judge
from sglang_deepprune.lm_recipe import Recipe
from sglang_deepprune.lm_training import train
from sglang_deepprune.traces import Question, load
from sglang_deepprune.training import folds_of

RECIPES = {
    "plain": (False, 1), "focal": (True, 1), "oversampling": (False, 2), "both": (True, 2),
}  # fmt: skip
FIGURES = (
    "pooled_auroc", "pooled_low", "pooled_high", "within_auroc", "within_low", "within_high",
    "difficulty_auroc", "both_unfinished_auroc", "tnr_at_fnr_0_2", "brier", "cost_ms",
)  # fmt: skip


def shortened(questions: Sequence[Question], most: int) -> list[Question]:
    """The first `most` traces of each question; 0: all."""
    return [replace(one, traces=one.traces[: most or None]) for one in questions]


def row_of(
    name: str, questions: Sequence[Question], cut: str, judge_of: evaluation.JudgeOf, seed: int
) -> Row:
    scored = evaluation.score_cut(questions, cut, judge_of)
    figures = evaluation.evaluate(scored, name, cut, 0.2, seed)
    return {"judge": name, "cut": cut, **{key: figures[key] for key in FIGURES}}


def fine_tuned(
    questions: Sequence[Question],
    folds: Sequence[int],
    chosen: Sequence[int],
    base: str,
    recipe: Recipe,
) -> dict[int, Judge]:
    """The judge of each chosen fold, trained on all other questions."""
    judges: dict[int, Judge] = {}
    for fold in chosen:
        others = [one for one, own in zip(questions, folds, strict=True) if own != fold]
        with tempfile.TemporaryDirectory() as folder:
            train(others, base, folder, recipe)
            judges[fold] = load_judge(f"llm:{folder}")
    return judges


def rows_of(args: argparse.Namespace) -> list[Row]:
    questions = shortened(load(args.traces), args.traces_a_question)
    folds = folds_of(questions, args.seed, args.folds)
    chosen = sorted(range(args.folds))[: args.run_folds or None]
    seen = [place for place, fold in enumerate(folds) if fold in chosen]
    asked = [questions[place] for place in seen]
    belief = evaluation.folded_belief(questions, args.folds, args.seed)
    rows: list[Row] = []
    for cut in args.cuts:
        for name in args.rivals:
            judge = load_judge(name)
            rows.append(row_of(name, asked, cut, lambda _, j=judge: j, args.seed))  # type: ignore[misc]
        rows.append(row_of("belief", asked, cut, lambda i: belief(seen[i]), args.seed))
        for name, (is_focal, oversample) in RECIPES.items():
            recipe = Recipe(
                cut, is_focal, oversample=oversample, pairs_a_question=args.pairs,
                epochs=args.epochs, batch=args.batch, learning_rate=args.lr, lora=args.lora,
                seed=args.seed,
            )  # fmt: skip
            start = time.monotonic()
            judges = fine_tuned(questions, folds, chosen, args.base, recipe)
            spent = time.monotonic() - start

            def judge_of(place: int, judges: dict[int, Judge] = judges) -> Judge:
                return judges[folds[seen[place]]]

            own = row_of(f"LM, {name}", asked, cut, judge_of, args.seed)
            rows.append({**own, "training_s": round(spent)})
            print({k: v if not isinstance(v, float) else round(v, 3) for k, v in rows[-1].items()})
    for row in rows:
        base = next(r for r in rows if (r["judge"], r["cut"]) == ("LM, plain", row["cut"]))
        row["within_auroc_ratio"] = _ratio(row["within_auroc"], base["within_auroc"])
    return rows


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base and not np.isnan(base) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", required=True, help="recorded traces, JSONL or .gz")
    parser.add_argument("--base", required=True, help="folder, GGUF file or hub name of an LM")
    parser.add_argument("--cuts", nargs="+", default=["words:25", "tokens:500"])
    parser.add_argument("--rivals", nargs="*", default=["similarity"], help="NAME[:PATH]")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--run-folds", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--traces-a-question", type=int, default=8, help="the first ones; 0: all")
    parser.add_argument("--pairs", type=int, default=20, help="a question, in training")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = rows_of(args)
    print_table(rows, "ablation of the fine-tuned judge")
    if args.json is not None:
        write_json(args.json, "ablation", rows)


if __name__ == "__main__":
    main()
