"""How long a decode step takes with so many rows: fitted online, from the steps themselves.

Whether a free row is free depends on the machine: on a GPU below saturation a step takes as long
with 32 rows as with 8, on a CPU it grows with every row. `rows_within` says how far the rows may be
filled before the step grows by more than a given share. Pure; the leader alone holds one, because
clocks differ between ranks.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SAMPLES_A_COUNT = 32  # newest step times kept for one number of rows
STALE = 4000  # samples after which a number of rows that was not seen again is forgotten
REFIT = 16  # samples between two fits
SPREAD = 1.25  # largest over smallest number of rows that a fit needs
EXPLORE = 4  # without a fit, rows may grow by a quarter at a time


class StepModel:
    """Step time over rows: a line through the medians, never falling."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # rows -> number of the newest sample
        self._num_samples = 0
        self._fit: tuple[float, float] | None = None  # seconds, seconds a row

    def add(self, rows: int, seconds: float) -> None:
        """One decode step of `rows` rows took `seconds`."""
        self._num_samples += 1
        self._seen[rows] = self._num_samples
        self._times.setdefault(rows, deque(maxlen=SAMPLES_A_COUNT)).append(seconds)
        if self._num_samples % REFIT == 0:
            self._refit()

    @property
    def fit(self) -> tuple[float, float] | None:
        """(seconds of a step, seconds a row on top), None while rows were too alike to tell."""
        return self._fit

    def rows_within(self, rows: int, growth: float) -> int | None:
        """The most rows whose step is at most `growth` longer than one of `rows`; None: any."""
        if self._fit is None:
            return rows + max(1, rows // EXPLORE)
        base, slope = self._fit
        room = growth * (base + slope * rows)
        # A slope that would not reach the bound within a thousand rows is flat.
        return rows + int(room / slope) if slope * 1000 > room else None

    def _refit(self) -> None:
        for rows in [r for r, seen in self._seen.items() if self._num_samples - seen > STALE]:
            del self._seen[rows], self._times[rows]
        points = [(rows, median(times), len(times)) for rows, times in self._times.items()]
        counts = [rows for rows, _, _ in points]
        if max(counts) < SPREAD * min(counts):
            self._fit = None
            return
        total = sum(weight for *_, weight in points)
        mean_x = sum(x * weight for x, _, weight in points) / total
        mean_y = sum(y * weight for _, y, weight in points) / total
        covariance = sum((x - mean_x) * (y - mean_y) * weight for x, y, weight in points)
        variance = sum((x - mean_x) ** 2 * weight for x, _, weight in points)
        slope = max(0.0, covariance / variance)
        self._fit = (max(0.0, mean_y - slope * mean_x), slope)
