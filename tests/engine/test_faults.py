"""The fault harness in three sizes: nobody hangs, nothing leaks, and every answer is right."""

from __future__ import annotations

import pytest

from tests.engine import fault_checks, faults
from tests.engine.fault_plan import FAULTS, ROUNDS_A_SERVER, Ask, round_of, setup_of


def run(num_requests: int, seed: int) -> None:
    rows, failures = faults.play(num_requests, seed)
    assert not failures, "\n".join(failures)
    assert sum(row["requests"] for row in rows) == num_requests
    assert {(row["leaked_slots"], row["hung_clients"], row["wrong_states"]) for row in rows} == {
        (0, 0, 0)
    }


def test_faults_at_random_leave_nothing_behind():
    run(180, seed=1)


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
    assert [ask.number for ask in round_of(7, 60).asks] == list(range(60))
    kinds = {fault.kind for seed in range(100) for fault in round_of(seed, 60).faults}
    assert kinds == set(FAULTS)
    setups = [setup_of(seed) for seed in range(40 * ROUNDS_A_SERVER)]
    assert len({(setup.page_size, setup.is_overlap) for setup in setups}) == 4
    assert setups[0] == setups[ROUNDS_A_SERVER - 1]


def choice(state: str, reason: str, text: str) -> dict:
    said = {"index": 0, "state": state, "tokens": 1, "answer": None, "cluster": None,
            "similarity": None, "pruned_at": None}  # fmt: skip
    meta = {"deepprune": {"choice": said}, "finish_reason": {"type": reason},
            "completion_tokens": 1}  # fmt: skip
    return {"text": text, "meta_info": meta}


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (choice("finished", "stop", "whole"), ""),
        (choice("pruned", "length", "wh"), ""),
        (choice("pruned", "abort", "wh"), "its finish reason is abort"),
        (choice("finished", "stop", "wh"), "only 2 of 5"),
        (choice("decided", "length", "another"), "another text"),
        ({"text": "", "meta_info": {}}, "record"),
    ],
)
def test_a_wrong_choice_is_seen(output: dict, what: str):
    wrong = fault_checks.of_choice(output, ["whole"])
    assert wrong == [] if not what else what in wrong[0]


def test_a_record_whose_counts_do_not_add_up_is_seen():
    said = choice("finished", "stop", "whole")["meta_info"]["deepprune"]["choice"]
    record = {
        "active": True, "settled": True, "size": 1, "choices": [said], "votes": [],
        "abstentions": 1, "generated_tokens": 1, "saved_tokens_at_most": 0, "clusters": [],
    }  # fmt: skip
    ask = Ask(0, "group", "waits", "faults: agree", 1, 60)
    assert fault_checks.of_record(ask, record) == []
    assert fault_checks.of_record(ask, {**record, "abstentions": 0})
    assert fault_checks.of_record(ask, {**record, "generated_tokens": 2})
    assert fault_checks.of_record(ask, {**record, "clusters": [[0], [0]]})
