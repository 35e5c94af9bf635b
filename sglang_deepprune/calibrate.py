"""`sglang-deepprune calibrate`: the tau at which merges are wrong no more than so often."""

from __future__ import annotations

import argparse
import sys

from sglang_deepprune import evaluation
from sglang_deepprune.config import ConfigError
from sglang_deepprune.judges import check_offline, load_judge
from sglang_deepprune.traces import CutError, TraceFileError, load, parse_cut


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sglang-deepprune calibrate", description=__doc__)
    parser.add_argument("--judge", required=True, help="NAME[:PATH], as --deepprune-judge")
    parser.add_argument("--traces", required=True, help="recorded traces, JSONL or .gz")
    parser.add_argument("--cut", required=True, help="tokens:K, words:K or share:F")
    parser.add_argument("--false-merge", type=float, default=0.2, help="wanted rate")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.false_merge < 1:
            raise ConfigError("false-merge", "must be between 0 and 1")
        parse_cut(args.cut)
        questions = [question for question in load(args.traces) if len(question.traces) > 1]
        check_offline(args.judge)
        judge = load_judge(args.judge)
    except (TraceFileError, CutError, ConfigError, ValueError) as error:
        print(f"sglang-deepprune calibrate: {error}", file=sys.stderr)
        return 2
    scored = evaluation.score_cut(questions, args.cut, lambda place: judge)
    tau = evaluation.calibrate(scored.labels, scored.scores, args.false_merge)
    if tau is None:
        print(f"no tau keeps false merges at or below {args.false_merge:g} at {args.cut}")
        return 1
    rate = evaluation.false_merge(scored.labels, scored.scores, tau)
    share = float((scored.scores > tau).mean())
    print(
        f"tau {tau:g}: {share:.0%} of {len(scored.scores)} pairs merged, {rate:.1%} of them wrong"
    )
    return 0
