"""The step model: what it finds out about a machine, from step times alone."""

from __future__ import annotations

import random

from sglang_deepprune.stepmodel import StepModel


def learn(model: StepModel, base: float, slope: float, rows: list[int], noise: float = 0.0) -> None:
    rng = random.Random(0)
    for i in range(320):
        count = rows[i % len(rows)]
        model.add(count, base + slope * count + noise * rng.random())


def test_flat_steps_make_every_row_free() -> None:
    model = StepModel()
    learn(model, 0.025, 0.0, [4, 8, 16], noise=0.0005)
    assert model.rows_within(8, 0.25) is None or model.rows_within(8, 0.25) > 200  # type: ignore[operator]


def test_growing_steps_bound_the_fill() -> None:
    model = StepModel()
    learn(model, 0.004, 0.0005, [4, 8, 16, 32])
    assert model.rows_within(8, 0.25) == 12  # 8 ms; a quarter more is 10 ms: 4 rows
    assert model.rows_within(32, 0.25) == 42


def test_without_a_spread_of_rows_the_fill_feels_its_way() -> None:
    model = StepModel()
    learn(model, 0.01, 0.0, [8])
    assert (
        model.fit is None and model.rows_within(8, 0.25) == 10 and model.rows_within(1, 0.25) == 2
    )


def test_one_slow_step_does_not_change_the_picture() -> None:
    model = StepModel()
    learn(model, 0.004, 0.0005, [4, 8, 16, 32])
    for _ in range(3):
        model.add(4, 2.0)
    learn(model, 0.004, 0.0005, [4, 8, 16, 32])
    assert model.rows_within(8, 0.25) == 12


def test_rows_that_are_seen_no_more_are_forgotten() -> None:
    model = StepModel()
    learn(model, 0.5, 0.0, [64])
    for i in range(4200):
        model.add(4 + i % 8, 0.004 + 0.0005 * (4 + i % 8))
    assert model.rows_within(8, 0.25) == 12
