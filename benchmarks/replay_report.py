"""From finished questions to rows, tables and the plot of a replay. Pure but for printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay_curve import Curves, Sampled, gain_interval, is_right, winner
from benchmarks.replay_data import Played, Workspace
from benchmarks.replay_results import PLAIN, Outcome, Policy, Results
from benchmarks.report import Row, print_table, with_ratios

_RATIOS = ("decode_tokens", "wall_s", "cpu_s", "steps", "kv_peak", "kv_mean")
_SHORT = {
    "decode_tokens_ratio": "tokens_ratio",
    "wall_s_ratio": "wall_ratio",
    "cpu_s_ratio": "cpu_ratio",
}
_COST = (
    "policy", "judge", "k2", "decode_tokens", "tokens_ratio", "prefix_tokens",
    "judge_tokens", "judge_calls", "wall_s", "wall_ratio",
    "cpu_s", "cpu_ratio", "steps", "steps_ratio", "kv_peak", "kv_mean",
    "pruned", "decided",
)  # fmt: skip
_VOTE = (
    "policy", "judge", "k2", "accuracy", "plain_accuracy", "same_winner", "cons_k",
    "cons_k_accuracy", "gain", "gain_low", "gain_high", "cons_k_with_judge",
    "cons_k_with_judge_accuracy",
)  # fmt: skip
_QUESTION = (
    "question", "policy", "judge", "k2", "n", "decode_tokens", "prefix_tokens", "judge_tokens",
    "judge_calls", "latency_s", "kv_peak", "winner", "gold", "is_right", "plain_winner", "cons_k",
    "cons_k_accuracy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is printed and written."""

    rows: list[Row]  # one a policy
    questions: list[Row]  # one a policy and question
    cons: list[Row]  # cons@k over all questions
    num_siblings: int


def report_of(workspace: Workspace, policies: Sequence[Policy], results: Results) -> Report:
    """Rows of the policies whose pass is complete."""
    played = workspace.questions
    curves = Curves.of([_sampled(one) for one in played])
    rows: list[Row] = []
    questions: list[Row] = []
    for policy in policies:
        outcomes = results.of(policy, played)
        rows.append(policy_row(policy, outcomes, played, curves))
        questions += [
            question_row(outcome, one, curves.pick([index]))
            for index, (outcome, one) in enumerate(zip(outcomes, played, strict=True))
        ]
    # Plain said what was recorded, token for token; without a plain pass its time is unknown.
    plain = {"decode_tokens": sum(sum(one.lengths) for one in played)}
    plain |= next((row for row in rows if row["policy"] == PLAIN), {})
    ratios = with_ratios(rows, plain, _RATIOS)
    rows = [{_SHORT.get(name, name): value for name, value in row.items()} for row in ratios]
    cons = [{"k": p.k, "tokens": p.tokens, "accuracy": p.accuracy} for p in curves.points]
    return Report(rows, questions, cons, sum(len(one.lengths) for one in played))


def policy_row(
    policy: Policy, outcomes: Sequence[Outcome], played: Sequence[Played], curves: Curves
) -> Row:
    """One policy over all questions."""

    def total(name: str) -> int:
        return sum(int(getattr(one, name)) for one in outcomes)

    count = len(outcomes)
    decode, judge = total("decode_tokens"), total("judge_tokens")
    base, judged = curves.at_tokens(decode), curves.at_tokens(decode + judge)
    accuracy = total("is_right") / count
    low, high = gain_interval(
        curves, [one.decode_tokens for one in outcomes], [one.is_right for one in outcomes]
    )
    plain = [winner(one.answers)[0] for one in played]
    gold = [one.question.gold for one in played]
    same = [one.winner == best for one, best in zip(outcomes, plain, strict=True)]
    return {
        **{"policy": policy.name, "judge": policy.judge, "k2": _k2_name(policy.k2)},
        **{"questions": count, "n": total("n") / count},
        **{"decode_tokens": decode, "prefix_tokens": total("prefix_tokens")},
        **{"judge_tokens": judge, "judge_calls": total("judge_calls")},
        **usage_of(outcomes),
        **{"longest": total("longest"), "pruned": total("pruned"), "decided": total("decided")},
        **{"not_started": total("not_started"), "retractions": total("retractions")},
        "accuracy": accuracy,
        "plain_accuracy": sum(map(is_right, plain, gold)) / count,
        **{"same_winner": sum(same) / count, "ties": total("tie")},
        **{"cons_k": base.k, "cons_k_accuracy": base.accuracy},
        **{"gain": accuracy - base.accuracy, "gain_low": low, "gain_high": high},
        **{"cons_k_with_judge": judged.k, "cons_k_with_judge_accuracy": judged.accuracy},
    }


def usage_of(outcomes: Sequence[Outcome]) -> Row:
    """Wall clock and KV slots of one pass, put together from its questions' shares."""
    used = [one.usage for one in outcomes]
    samples = sum(one.kv_samples for one in used)
    return {
        "wall_s": sum(one.wall_s for one in used),
        "cpu_s": sum(one.cpu_s for one in used),
        "steps": sum(one.steps for one in used),
        "judge_s": sum(one.judge_ms for one in outcomes) / 1e3,
        "kv_peak": max(one.kv_peak for one in used),
        "kv_mean": sum(one.kv_sum for one in used) / samples if samples else None,
    }


def question_row(outcome: Outcome, played: Played, curve: Curves) -> Row:
    """One question under one policy."""
    base = curve.at_tokens(outcome.decode_tokens)
    names = [name for name in Outcome.__slots__ if name != "usage"]
    return {
        **{name: getattr(outcome, name) for name in names},
        "k2": _k2_name(outcome.k2),
        "kv_peak": outcome.usage.kv_peak,
        "plain_winner": winner(played.answers)[0],
        "cons_k": base.k,
        "cons_k_accuracy": base.accuracy,
    }


def print_report(report: Report) -> None:
    count = report.rows[0]["questions"] if report.rows else 0
    size = f"{count} questions, {report.num_siblings} traces"
    print_table(_columns(report.questions, _QUESTION), f"Replay by question: {size}")
    print_table(_columns(report.rows, _COST), f"Replay, what it costs: {size}")
    print_table(_columns(report.rows, _VOTE), f"Replay, what it answers: {size}")


def save_plot(report: Report, path: Path) -> None:
    """Accuracy over decode tokens: cons@k as a line, policies as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = report.cons[-1]["tokens"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    line = [(one["tokens"] / whole, 100 * one["accuracy"]) for one in report.cons]
    axes.plot(*zip(*line, strict=True), "k.-", linewidth=1, label="cons@k, expected")
    for row, marker in zip(report.rows, "sD^vP*X<>hpd8" * 2, strict=False):
        judge = "" if row["judge"] == "none" else f", {row['judge']}"
        k2 = "" if row["k2"] is None else f", K2={row['k2']}"
        axes.plot(
            row["decode_tokens"] / whole, 100 * row["accuracy"], marker, alpha=0.8,
            label=f"{row['policy']}{judge}{k2}",
        )  # fmt: skip
    axes.set_xlabel("decode tokens, as a share of plain n>1")
    axes.set_ylabel("right answers, %")
    count = report.rows[0]["questions"]
    axes.set_title(
        f"{count} questions of {100 / count:.1f} points, {report.num_siblings} recorded traces",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _sampled(played: Played) -> Sampled:
    return Sampled(played.answers, played.lengths, played.question.gold)


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    return [{name: "" if row[name] is None else row[name] for name in names} for row in rows]


def _k2_name(k2: int | None) -> int | str | None:
    return "n/4" if k2 == 0 else k2
