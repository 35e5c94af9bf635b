"""The fault harness in three sizes: nobody hangs, nothing leaks, and every answer is right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine import faults
from tests.engine.fault_plan import FAULTS, MARKS, ROUNDS_A_SERVER, Round, round_of, setup_of

# 300 requests on two servers, one with room and one whose pool holds three long siblings. Of all
# seeds these have, between them, every fault, every fate and a judge with every fault of its own.
CI_SEEDS = (33504, 33505, 2301, 2302)
CI_ROUND = 75


def check(rows: list[dict], failures: list[str], num_requests: int) -> None:
    assert not failures, "\n".join(failures)
    assert sum(row["requests"] for row in rows) == num_requests
    assert {(row["leaked_slots"], row["hung_clients"], row["wrong_states"]) for row in rows} == {
        (0, 0, 0)
    }


def run(num_requests: int, seed: int) -> None:
    rows, failures = faults.play(num_requests, seed)
    check(rows, failures, num_requests)


@pytest.mark.timeout(600)
def test_three_hundred_requests_among_all_faults_leave_nothing_behind():
    # Both at once: each of them waits as often as it works.
    with ThreadPoolExecutor(2) as pool:
        sizes = [CI_ROUND, CI_ROUND]
        jobs = [pool.submit(faults.rounds, some, sizes) for some in (CI_SEEDS[:2], CI_SEEDS[2:])]
        played = [job.result() for job in jobs]
    rows = [row for some, _ in played for row in some]
    failures = [failure for _, some in played for failure in some]
    check(rows, failures, 300)
    assert faults.delivered_in(rows) == set(FAULTS)
    assert sum(row["renewed"] for row in rows) > 0  # groups that new weights have met
    small = rows[2:]  # its KV was exhausted
    assert sum(row["retracted"] + row["relieved"] for row in small) > 0


def judged(plan: Round) -> set[str]:
    """Faults of a judge that a round's groups are long enough to ask for."""
    return {
        ask.prompt.removeprefix("faults: ")
        for ask in plan.asks
        if ask.kind == "group" and ask.n >= 4 and ask.max_new_tokens >= 60
    } & set(MARKS)


def test_the_three_hundred_have_every_fault_between_them():
    plans = [round_of(seed, CI_ROUND) for seed in CI_SEEDS]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(FAULTS)
    assert set().union(*map(judged, plans)) == set(MARKS)
    kinds = {(ask.kind, ask.fate) for plan in plans for ask in plan.asks}
    fates = {"waits", "streams", "completes", "leaves", "aborts", "reuses"}
    assert kinds == {("group", fate) for fate in fates} | {
        ("members", "waits"), ("members", "aborts"), ("bystander", "waits"), ("stranger", "waits"),
    }  # fmt: skip
    assert {plan.is_exact for plan in plans} == {True, False}
    assert not all(plan.aborts_all for plan in plans)  # else no wrong abort could be seen
    big, small = setup_of(CI_SEEDS[0]), setup_of(CI_SEEDS[2])
    assert (big.page_size, big.is_overlap, big.slots) == (1, True, 6000)
    assert (small.page_size, small.is_overlap, small.slots) == (16, False, 480)
    assert [setup_of(seed) for seed in CI_SEEDS] == [big, big, small, small]


@pytest.mark.modes
@pytest.mark.timeout(3600)
def test_two_thousand_requests_among_faults_leave_nothing_behind():
    run(2000, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_requests_among_faults_leave_nothing_behind():
    run(10_000, seed=3)


def test_all_of_a_round_follows_from_its_seed():
    assert round_of(7, 60) == round_of(7, 60) != round_of(8, 60)
    plan = round_of(7, 60)
    assert [ask.number for ask in plan.asks] == list(range(len(plan.asks)))
    kinds = {fault.kind for seed in range(100) for fault in round_of(seed, 60).faults}
    assert kinds == set(FAULTS)
    setups = [setup_of(seed) for seed in range(40 * ROUNDS_A_SERVER)]
    assert len({(setup.page_size, setup.is_overlap) for setup in setups}) == 4
    assert setups[0] == setups[ROUNDS_A_SERVER - 1]
