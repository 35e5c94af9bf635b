"""From outcomes to rows, tables and the plot of the frontier. Pure but for printing.

A question's draws are averaged before anything else. Beside each policy stands plain sampling with
fewer samples at the same tokens (`cons_equal_tokens`), over random orders of the very same draws;
`gain` is the difference, `loss` that to plain n. Intervals are 95 %, bootstrap over questions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.frontier_data import Draw
from benchmarks.frontier_sim import Outcome
from benchmarks.report import Row, print_table

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000
_ORDERS = 1000  # random orders a question, for cons@k
_PRINTED = (
    "policy", "n", "tokens_ratio", "tokens_low", "tokens_high", "accuracy", "plain_accuracy",
    "same_winner", "kv_time_ratio", "latency_ratio", "cons_equal_tokens", "gain", "gain_low",
    "gain_high", "loss_low", "loss_high",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Means:
    """One policy, [num_questions] each: means over the tries of a question."""

    tokens: Floats
    latency: Floats
    kv: Floats
    right: Floats
    same: Floats  # with the winner of plain n on the same draw


@dataclass(slots=True)
class Bench:
    """All policies at one n. The first one added is plain n."""

    draws: Sequence[Sequence[Draw]]  # [num_questions][draws]
    cons_tokens: Floats  # [num_questions, n], expected tokens of cons@k, k = 1 to n
    cons_right: Floats  # [num_questions, n], expected accuracy
    weights: Floats  # [resamples, num_questions], a bootstrap resample each
    plain: list[list[str | None]] = field(default_factory=list)  # winners
    means: dict[str, Means] = field(default_factory=dict)

    @classmethod
    def of(cls, draws: Sequence[Sequence[Draw]], seed: int) -> Bench:
        generator = np.random.default_rng(seed)
        right = np.stack([_cons_right(own, generator) for own in draws])
        lengths = [np.mean([b.length for draw in own for b in draw.branches]) for own in draws]
        tokens = np.outer(np.asarray(lengths), np.arange(1, right.shape[1] + 1))
        count = len(draws)
        weights = generator.multinomial(count, [1 / count] * count, size=_RESAMPLES) / count
        return cls(draws, tokens, right, weights)

    @property
    def size(self) -> int:
        return int(self.cons_right.shape[1])

    def add(self, name: str, play: Callable[[Draw], Sequence[Outcome]]) -> None:
        tries = [[play(draw) for draw in own] for own in self.draws]
        if not self.means:
            self.plain = [[outcomes[0].answer for outcomes in own] for own in tries]
        rows = [
            _mean_of(own, winners, draws[0].question.gold)
            for own, winners, draws in zip(tries, self.plain, self.draws, strict=True)
        ]
        self.means[name] = Means(*np.asarray(rows).T)

    def rows(self) -> list[Row]:
        return [self._row(name, means) for name, means in self.means.items()]

    def _row(self, name: str, means: Means) -> Row:
        plain = next(iter(self.means.values()))
        base = _at_tokens(self.cons_tokens.mean(0), self.cons_right.mean(0), means.tokens.mean())
        gain, loss = means.right.mean() - base, means.right.mean() - plain.right.mean()
        spent, right = self.weights @ means.tokens, self.weights @ means.right
        bases = map(
            _at_tokens, self.weights @ self.cons_tokens, self.weights @ self.cons_right, spent
        )
        return {
            **{"policy": name, "n": self.size, "questions": len(self.draws)},
            "tokens": float(means.tokens.mean()),
            "tokens_ratio": _ratio(means.tokens, plain.tokens),
            **_interval("tokens", spent / (self.weights @ plain.tokens)),
            "accuracy": float(means.right.mean()),
            "plain_accuracy": float(plain.right.mean()),
            "same_winner": float(means.same.mean()),
            "kv_time_ratio": _ratio(means.kv, plain.kv),
            "latency_ratio": _ratio(means.latency, plain.latency),
            **{"cons_equal_tokens": base, "gain": float(gain)},
            **_interval("gain", right - np.asarray(list(bases))),
            "loss": float(loss),
            **_interval("loss", right - self.weights @ plain.right),
        }


@dataclass(frozen=True, slots=True)
class Served:
    """One policy on a server with few slots, over its draws."""

    makespan: float  # steps until the last question is answered, mean
    tokens: float
    latency: float  # of a question, mean
    kv: float
    answers: list[str | None]
    accuracy: float

    @classmethod
    def of(cls, plays: Sequence[Sequence[Outcome]], gold: Sequence[str | None]) -> Served:
        flat = [one for play in plays for one in play]
        return cls(
            makespan=float(np.mean([max(one.latency for one in play) for play in plays])),
            tokens=float(np.mean([one.tokens for one in flat])),
            latency=float(np.mean([one.latency for one in flat])),
            kv=float(np.mean([one.kv for one in flat])),
            answers=[one.answer for one in flat],
            accuracy=_share_right([one.answer for one in flat], list(gold) * len(plays)),
        )


def server_row(served: Served, plain: Served) -> Row:
    return {
        "questions_per_s_ratio": plain.makespan / served.makespan,
        "tokens_ratio": served.tokens / plain.tokens,
        "accuracy": served.accuracy,
        "plain_accuracy": plain.accuracy,
        "same_winner": sum(map(operator.eq, served.answers, plain.answers)) / len(plain.answers),
        "mean_latency_ratio": served.latency / plain.latency,
        "kv_time_ratio": served.kv / plain.kv,
    }


def print_report(rows: Sequence[Row], served: Sequence[Row], questions: int, draws: int) -> None:
    what = f"{questions} questions, {draws} draws"
    table = [{name: row[name] for name in _PRINTED} for row in rows]
    print_table(table, f"Frontier, slots for everybody: {what}")
    if served:
        print_table(list(served), f"Frontier, all {questions} questions at once on few slots")


def save_plot(benches: Sequence[Bench], path: Path) -> None:
    """Accuracy over tokens, one panel a size: cons@k as the line, policies as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(benches))
    height = -(-len(benches) // columns)
    figure, panels = pyplot.subplots(
        height, columns, figsize=(5.2 * columns + 2.6, 4 * height), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, bench in zip(panels.flat, benches, strict=False):
        axes.plot(
            bench.cons_tokens.mean(0) / 1e3, 100 * bench.cons_right.mean(0), "k.-", linewidth=1,
            markersize=3, label="cons@k, expected",
        )  # fmt: skip
        floor = 100 * float(bench.cons_right.mean(0).min()) - 4
        for (label, points), marker in zip(_points(bench).items(), "sD^vP*X<>hpd8o", strict=False):
            tokens, right = zip(*points, strict=True)
            axes.plot(tokens, np.maximum(right, floor), marker, alpha=0.8, label=label)
            for x, y in points:
                if y < floor:  # far below: told as a number, so that the others can be seen
                    axes.annotate(
                        f"{y:.0f} %", (x, floor), xytext=(6, 0), textcoords="offset points"
                    )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=f"n = {bench.size}", xlabel="thousand tokens a question")
        axes.set_ylabel("right answers, %")
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(benches) :]:
        axes.set_visible(False)
    lines, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _points(bench: Bench) -> dict[str, list[tuple[float, float]]]:
    """(thousand tokens, right in %) by label; one label for all judges of a pruning rule."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, means in bench.means.items():
        if not name.startswith("cons@"):
            rule, is_judged, _ = name.partition(", AUROC")
            label = f"{rule}, by AUROC" if is_judged else name
            point = float(means.tokens.mean()) / 1e3, 100 * float(means.right.mean())
            points.setdefault(label, []).append(point)
    return points


def _mean_of(
    tries: Sequence[Sequence[Outcome]], winners: Sequence[str | None], gold: str | None
) -> list[float]:
    """In the order of `Means`. Every draw counts the same, however many tries it is good for."""
    cells = [
        np.mean(
            [
                (one.tokens, one.latency, one.kv, _is_right(one.answer, gold), one.answer == best)
                for one in outcomes
            ],
            axis=0,
        )
        for outcomes, best in zip(tries, winners, strict=True)
    ]
    return [float(cell) for cell in np.mean(cells, axis=0)]


def _cons_right(draws: Sequence[Draw], generator: np.random.Generator) -> Floats:
    """[n] P(cons@k is right), over random orders of each draw; tied answers win equally often."""
    orders = max(1, _ORDERS // len(draws))
    found = np.stack([_cons_of(draw, orders, generator) for draw in draws])
    return np.asarray(found.mean(axis=0))


def _cons_of(draw: Draw, orders: int, generator: np.random.Generator) -> Floats:
    answers = [branch.answer for branch in draw.branches]
    known = list(dict.fromkeys(answer for answer in answers if answer is not None))
    right = np.zeros(draw.size)
    if draw.question.gold not in known:
        return right
    gold = known.index(draw.question.gold)
    kinds = np.asarray([len(known) if a is None else known.index(a) for a in answers])
    shuffled = generator.permuted(np.tile(kinds, (orders, 1)), axis=1)
    votes = np.zeros((orders, len(known) + 1), dtype=np.int64)  # the last: abstentions
    for k in range(draw.size):
        votes[np.arange(orders), shuffled[:, k]] += 1
        most = votes[:, :-1].max(axis=1)
        tied = (votes[:, :-1] == most[:, None]).sum(axis=1)
        right[k] = np.mean((votes[:, gold] == most) * (most > 0) / tied)
    return right


def _at_tokens(tokens: Floats, right: Floats, spent: float) -> float:
    return float(np.interp(spent, tokens, right))


def _interval(name: str, values: Floats) -> Row:
    low, high = np.percentile(values, [2.5, 97.5]).round(9)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _ratio(values: Floats, plain: Floats) -> float:
    return float(values.mean() / plain.mean())


def _is_right(answer: str | None, gold: str | None) -> bool:
    return answer is not None and answer == gold


def _share_right(answers: Sequence[str | None], gold: Sequence[str | None]) -> float:
    return sum(map(_is_right, answers, gold)) / len(answers)
