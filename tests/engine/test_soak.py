"""The soak's rule on made-up numbers, and the soak itself for a minute and a half."""

from __future__ import annotations

import ctypes

import pytest

from benchmarks.report import Row
from tests.engine import soak
from tests.engine.c_heap import used_mib
from tests.engine.soak import MIB, growth, is_good, verdict


def samples(
    rss: float = 0.0, fds: float = 0.0, groups: float = 0.0, blocks: float = 0.0, heap: float = 0.0
) -> list[Row]:
    """A run of ten minutes; the arguments are what is added a second."""
    return [
        {"seconds": s, "requests": s,
         "processes": {"scheduler": {"rss_mib": 900 + rss * s + 3 * (s % 20 == 0),
                                     "fds": 50 + fds * s, "threads": 12}},
         "python_blocks": 3_000_000 + blocks * s, "c_heap_mib": 500 + heap * s,
         "tables": {"groups": 9 + groups * s}}
        for s in range(0, 600, 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grows", "what"),
    [({}, None), ({"rss": 0.02}, None), ({"rss": 0.1}, "rss_mib"), ({"fds": 0.1}, "fds"),
     ({"groups": 0.5}, "groups"), ({"blocks": 10}, None), ({"blocks": 100}, "python_blocks"),
     ({"heap": 0.1}, "c_heap_mib")],
)  # fmt: skip
def test_what_grows_is_seen(grows: dict[str, float], what: str | None):
    rows = verdict(samples(**grows))
    assert [row["measure"] for row in rows if not row["is_flat"]] == ([what] if what else [])


def test_growth_is_that_of_a_line_and_not_of_two_points():
    assert growth([0, 1, 2, 3], [5, 5, 5, 5]) == 0
    assert growth([0, 10, 20, 30], [1, 2, 3, 4]) == pytest.approx(3)
    assert abs(growth(range(100), [900 + 50 * (t == 99) for t in range(100)])) < 5


def test_a_client_without_an_answer_is_no_flat_run():
    about = {"hung": 0, "wrong": 0, "leaked_slots": 0}
    rows = verdict(samples())
    assert is_good(rows, about)
    assert not is_good(rows, {**about, "hung": 1})


def test_a_sample_holds_this_very_process():
    import os

    held = soak.sample(os.getpid())["main"]
    assert held["rss_mib"] * MIB > 10 * MIB and held["threads"] >= 1 and held["fds"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_and_a_half_of_load_is_flat():
    verdicts, rows, about = soak.soak(1.5, every_s=2.0)
    assert about["requests"] > 50 and len(rows) > 20
    assert is_good(verdicts, about), (about, [row for row in verdicts if not row["is_flat"]])


def test_the_c_heap_in_use_is_seen():
    before = used_mib()
    if not before:
        pytest.skip("no mallinfo2 here")
    block = ctypes.create_string_buffer(64 * MIB)
    assert used_mib() - before == pytest.approx(64, abs=1)
    del block
    assert used_mib() - before == pytest.approx(0, abs=1)
