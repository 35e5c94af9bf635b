"""Fewer comparisons: sim(t, c) is found out only as far as the placement of t needs it.

The full loop asks a judge about p = min(K1, |c|) members of every cluster. Here the same members
are asked about one after the other, the most promising cluster first, until the placement is clear:

- A cluster whose mean can no longer pass tau, or no longer the best one's, is asked no further. The
  bounds are those of the scores that are still out, [0, 1] each: no placement changes by this.
- With `error` > 0 they are the narrower normal interval of the mean of p scores of which m are
  known, drawn in random order, at that chance of lying outside. No guarantee: an approximation for
  few scores, looked at again after each. Its prior is the widest spread that scores can have, and
  so no more than that share of the placements differed in what was tried: judges' scores on
  recorded branches, and scores of two values, which are the worst (tests/unit/test_sequential.py).
- With `is_exclusive` clusters exclude each other: a trace that belongs to one with probability q
  belongs to another with at most 1 - q, so that most clusters are never asked. True of answers, and
  of a judge that is sure; of a noisy one many placements differ from the full loop's.

benchmarks/comparisons.py measures calls and placements, judge by judge.

Ties go as in `clustering`: to the older cluster. Pure, as everything here.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

_PRIOR_SD = 0.5  # of the scores inside a cluster, before any is known: as wide as [0, 1] allows
_PRIOR_WEIGHT = 3  # in scores

# Asks about (cluster, place among its drawn members), is sent P(same) or NaN; ends with the means.
Comparing = Generator[tuple[int, int], float, list[float]]


@dataclass(slots=True)
class Side:
    """What is known of sim(t, c) for one cluster.

    Attributes
    ----------
    facts : list[float | None]
        [p] P(same) of the drawn members; None = only a judge can say.
    """

    facts: Sequence[float | None]
    known: list[float] = field(init=False)
    left: list[int] = field(init=False)  # places to ask, in order

    def __post_init__(self) -> None:
        self.known = [fact for fact in self.facts if fact is not None]
        self.left = [place for place, fact in enumerate(self.facts) if fact is None]

    @property
    def mean(self) -> float:
        return math.fsum(self.known) / len(self.known) if self.known else math.nan

    def learn(self, value: float) -> None:
        """The score of the member asked last; NaN = no verdict, the mean is over the others."""
        if not math.isnan(value):
            self.known.append(value)

    def bounds(self, z: float | None) -> tuple[float, float]:
        """Between which the mean of all drawn members lies. `z` None: for certain."""
        known, left = len(self.known), len(self.left)
        if not left:
            return (self.mean, self.mean) if known else (-math.inf, -math.inf)
        total = math.fsum(self.known)
        low, high = total / (known + left), (total + left) / (known + left)
        if z is None or not known:
            return low, high
        mean = self.mean
        spread = math.fsum((value - mean) ** 2 for value in self.known)
        variance = (_PRIOR_WEIGHT * _PRIOR_SD**2 + spread) / (_PRIOR_WEIGHT + known - 1)
        reach = z * math.sqrt(variance * left / ((known + left) * known))
        return max(low, mean - reach), min(high, mean + reach)


def similarities(
    facts: Sequence[Sequence[float | None]],
    tau: float,
    error: float,
    *,
    is_exclusive: bool = False,
) -> Comparing:
    """Ends with the mean of each cluster as far as it was found out; NaN: nothing is known of it.

    The largest of those above tau is where the trace belongs; none above: nowhere.
    """
    z = NormalDist().inv_cdf(1 - error / 2) if error > 0 else None
    sides = [Side(row) for row in facts]
    while True:
        bounds = [side.bounds(z) for side in sides]
        if is_exclusive:
            bounds = _excluded(bounds)
        which = _next(sides, bounds, tau)
        if which is None:
            return [_settled(side, bound) for side, bound in zip(sides, bounds, strict=True)]
        place = sides[which].left.pop(0)
        sides[which].learn((yield which, place))


def _excluded(bounds: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """No cluster may have more than the surest of the others leaves."""
    lows = sorted((low for low, _ in bounds), reverse=True)
    found = []
    for low, high in bounds:
        rival = 0.0 if len(lows) < 2 else lows[1] if low == lows[0] else lows[0]
        found.append((low, max(low, min(high, 1 - max(0.0, rival)))))
    return found


def _next(sides: Sequence[Side], bounds: Sequence[tuple[float, float]], tau: float) -> int | None:
    """The cluster to ask next; None: the placement is clear."""
    open_ = [j for j, (_, high) in enumerate(bounds) if high > tau]
    if not open_:
        return None
    first = max(open_, key=lambda j: (bounds[j][0], -j))  # the surest; the older of two
    rivals = [j for j in open_ if j != first and _may_beat(bounds, j, first)]
    if bounds[first][0] > tau and not rivals:
        return None
    askable = [j for j in (first, *rivals) if sides[j].left]
    if not askable:
        return None
    # The one that could come out highest; of these the larger cluster, then the older.
    return max(askable, key=lambda j: (bounds[j][1], len(sides[j].facts), -j))


def _may_beat(bounds: Sequence[tuple[float, float]], rival: int, first: int) -> bool:
    high, low = bounds[rival][1], bounds[first][0]
    return high > low or (high == low and rival < first)


def _settled(side: Side, bound: tuple[float, float]) -> float:
    """The mean, inside the bounds that decided."""
    return math.nan if math.isnan(side.mean) else min(max(side.mean, bound[0]), bound[1])
