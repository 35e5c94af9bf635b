"""Whom a group's state stops. No server, no judge: groups made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune import policy
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.group import Group, State
from sglang_deepprune.types import ABSENT, Plan
from sglang_deepprune.voting import Ballot, Tally


def compare(left: str, right: str) -> bool | None:
    """Equal as written; a question mark makes it a case for the fence."""
    return None if "?" in left + right else left == right


def make_group(
    size: int, clusters: list[list[int]] | None = None, *, preset: str = "paper", **settings: Any
) -> Group:
    """A running group; clustered siblings are placed, the others have not reached their cut."""
    group = Group("g", size, DeepPruneConfig(preset=preset, **settings))
    group.tally = Tally(compare)
    group.clusters = clusters or []
    for sibling in group.siblings.values():
        sibling.state = State.RUNNING
    for number, cluster in enumerate(group.clusters):
        for index in cluster:
            group.siblings[index].cluster = number
            group.siblings[index].is_submitted = group.siblings[index].has_verdict = True
    return group


def vote(group: Group, index: int, answer: str | None) -> None:
    """A sibling finishes as the coordinator lets it: ballot first."""
    sibling = group.siblings[index]
    sibling.state, sibling.answer, sibling.has_voted = State.FINISHED, answer, True
    group.tally.add(Ballot(answer, index))


def stop(group: Group, plan: Plan) -> None:
    for index in plan.stop:
        group.siblings[index].doom = State.PRUNED


def leave_out(group: Group, *indices: int) -> None:
    for index in indices:
        group.siblings[index].is_submitted = group.siblings[index].has_verdict = True


def lose_verdict(group: Group, *indices: int) -> None:
    for index in indices:
        group.siblings[index].is_submitted = True


def test_a_plan_asks_the_tally_for_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made at each vote: to sort and to name all ballots then would cost their square."""
    group = make_group(64, preset="faithful", give_up_votes=8)
    for index in range(20):
        vote(group, index, str(index % 3))
    wanted = policy.plan(group)
    monkeypatch.setattr(Tally, "counts", None)
    assert policy.plan(group) == wanted and not wanted.decided


def test_three_equal_answers_of_sixteen_stop_all_the_others() -> None:
    group = make_group(16, preset="latency")
    for index in (2, 5, 7):
        vote(group, index, "42")
    plan = policy.plan(group)
    assert plan.decided and plan.reason == "decided: 3:0 of 3 votes, at most 13 to come"
    assert plan.stop == tuple(i for i in range(16) if i not in (2, 5, 7))


def test_a_sibling_that_has_voted_but_not_ended_is_not_stopped() -> None:
    group = make_group(16, preset="latency")
    for index in (2, 5, 7):
        vote(group, index, "42")
    group.siblings[7].state = State.RUNNING  # its ballot comes a moment before its end state
    assert 7 not in policy.plan(group).stop


def test_two_stop_strings_inside_the_thinking_decide_nothing() -> None:
    group = make_group(8, preset="latency")
    vote(group, 0, None)
    vote(group, 1, None)
    assert policy.plan(group) == Plan()
    vote(group, 2, "8")
    assert policy.plan(group) == Plan()


def test_open_questions_of_the_fence_count_against_the_leader() -> None:
    group = make_group(9, preset="latency")
    for index, answer in enumerate(["4", "4", "4", "4", "5?", "6?", "7?"]):
        vote(group, index, answer)
    assert policy.top_votes(group) == (4, 3)
    for index, answer in enumerate(["4", "4", "4", "4", "5", "6"]):
        group = make_group(9, preset="latency") if index == 0 else group
        vote(group, index, answer)
    assert policy.top_votes(group) == (4, 1)
    assert policy.top_votes(make_group(4)) == (0, 0)


def test_aborted_siblings_may_not_vote_any_more() -> None:
    group = make_group(64, preset="latency")
    for index in range(3):
        vote(group, index, "42")
    assert not policy.plan(group).decided
    for index in range(16, 64):
        group.siblings[index].state = State.ABORTED
    assert policy.num_remaining(group) == 13
    assert policy.plan(group).decided


def test_a_vote_with_nobody_left_is_counted_and_not_decided() -> None:
    group = make_group(3, preset="latency")
    for index in range(3):
        vote(group, index, "42")
    assert policy.plan(group) == Plan()


def test_an_open_client_side_group_reckons_with_further_members() -> None:
    group = make_group(5, preset="latency")
    group.size = 0
    for index in range(3):
        vote(group, index, "42")
    assert not policy.plan(group).decided
    group.is_closed = True
    assert policy.plan(group).decided


def test_three_finishers_without_an_answer_release_the_group() -> None:
    for preset in ("paper", "latency"):
        group = make_group(8, [[0, 1], [2]], preset=preset)
        vote(group, 0, None)
        vote(group, 1, None)
        assert policy.plan(group).reason != policy.OPEN_ENDED
        vote(group, 2, None)
        assert policy.plan(group) == Plan(reason=policy.OPEN_ENDED)
        group.is_released = True
        assert policy.plan(group) == Plan()


def test_collect_never_stops_anybody() -> None:
    group = make_group(16, [[0, 1, 2, 3]], preset="collect", k2=1)
    for index in range(9):
        vote(group, index, "42")
    assert policy.plan(group) == Plan()


def test_collect_stops_nobody_where_the_server_sets_an_eps() -> None:
    group = make_group(16, preset="collect", eps=0.05, give_up_votes=3, give_up_share=1.0)
    for index in range(9):
        vote(group, index, str(index % 2))
    assert policy.plan(group) == Plan()


def test_leftovers_of_a_decided_group_are_stopped() -> None:
    group = make_group(16, preset="latency")
    group.is_decided, group.reason = True, "decided: 3:0 of 3 votes"
    for index in range(14):
        vote(group, index, "42")
    assert policy.plan(group) == Plan((14, 15), decided=True, reason=group.reason)


def test_a_joiner_of_a_cluster_that_has_its_k2_stops_at_once() -> None:
    group = make_group(16, [[3, 1, 7], [0]], k2=2)
    plan = policy.plan(group)
    assert plan.stop == (7,) and "redundant" in plan.reason and not plan.decided


def test_a_stopped_or_lost_member_does_not_use_up_k2() -> None:
    group = make_group(16, [[3, 1, 7, 8, 9], [0]], k2=2)
    group.siblings[3].state = State.ABORTED
    vote(group, 1, None)
    group.siblings[7].doom = State.PRUNED
    assert policy.plan(group) == Plan()
    vote(group, 8, "5")
    assert policy.plan(group) == Plan()
    group.clusters[0].append(10)
    assert policy.plan(group).stop == (10,)


def test_the_largest_cluster_is_final_when_everybody_is_placed() -> None:
    group = make_group(6, [[0, 1], [2, 3, 4], [5]], k2=2)
    assert policy.plan(group).stop == (0, 1, 4, 5)


def test_of_two_largest_clusters_the_older_one_runs_on() -> None:
    assert policy.plan(make_group(5, [[0], [4, 2], [1, 3]])).stop == (0, 1, 3)


def test_waiting_siblings_keep_a_cluster_from_being_final_while_they_could_turn_it() -> None:
    group = make_group(8, [[0, 1, 2, 3], [4], [5]])
    leave_out(group, 6)
    assert policy.plan(group).stop == (4, 5, 6, 7)
    group = make_group(8, [[0, 1, 2], [4], [5]])
    leave_out(group, 3)
    assert policy.plan(group) == Plan()  # 6 and 7 could make [4] as large


def test_queued_and_expected_siblings_stop_with_the_rest() -> None:
    group = make_group(6, [[0, 1, 2, 3]])
    group.siblings[4].state, group.siblings[5].state = State.QUEUED, State.EXPECTED
    assert policy.plan(group).stop == (4, 5)


def test_a_finished_sibling_in_flight_still_counts_as_waiting() -> None:
    group = make_group(3, [[0], [1]])
    vote(group, 2, "5")
    lose_verdict(group, 2)
    assert policy.plan(group, in_flight=frozenset({2})) == Plan()


def test_a_sibling_without_a_verdict_is_neither_stopped_nor_waited_for() -> None:
    group = make_group(5, [[0, 1], [2]])
    lose_verdict(group, 3, 4)
    assert policy.plan(group, in_flight=frozenset({3, 4})) == Plan()
    assert policy.plan(group).stop == (2,)


def test_a_sibling_in_flight_stops_once_it_could_turn_nothing() -> None:
    group = make_group(5, [[0, 1, 2], [3]])
    lose_verdict(group, 4)
    assert policy.plan(group, in_flight=frozenset({4})).stop == (3, 4)


def test_singletons_alone_keep_the_first_k3() -> None:
    group = make_group(5, [[3], [1], [0], [4], [2]], k3=2)
    assert policy.plan(group).stop == (0, 2, 4)


def test_singletons_are_not_final_while_somebody_waits() -> None:
    assert policy.plan(make_group(4, [[0], [1], [2]], k3=1)) == Plan()


def test_left_out_siblings_stop_with_the_small_clusters() -> None:
    group = make_group(5, [[0, 1], [2]], k=2)
    leave_out(group, 3, 4)
    assert group.siblings[3].cluster == ABSENT
    assert policy.plan(group).stop == (2, 3, 4)


def test_finished_members_count_towards_k2() -> None:
    group = make_group(4, [[0, 1, 2, 3]], k2=2)
    vote(group, 1, "5")
    assert policy.plan(group).stop == (2, 3)


def test_a_kept_cluster_that_ends_without_an_answer_stops_nobody() -> None:
    group = make_group(6, [[0, 1, 2], [3], [4]])
    for index in (0, 1):
        vote(group, index, None)
    group.siblings[2].state = State.ABORTED
    leave_out(group, 5)
    assert policy.plan(group) == Plan()


def test_an_open_client_side_group_has_no_final_cluster_before_it_is_closed() -> None:
    group = make_group(4, [[0, 1, 2], [3]])
    group.size = 0
    assert policy.plan(group) == Plan()
    group.is_closed = True
    assert policy.plan(group).stop == (3,)


def test_without_any_verdict_nobody_is_stopped() -> None:
    group = make_group(4)
    lose_verdict(group, 0, 1, 2, 3)
    assert policy.plan(group) == Plan()


@given(st.data())
def test_no_sequence_of_events_stops_the_last_chance_of_an_answer(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    k2, k3, limit = (data.draw(st.integers(1, 3)) for _ in range(3))
    group = make_group(size, k2=k2, k3=k3, k=limit)
    for index in data.draw(st.permutations(range(size))):
        where = data.draw(st.integers(ABSENT, min(len(group.clusters), limit - 1)))
        sibling = group.siblings[index]
        if sibling.is_live:
            sibling.is_submitted = sibling.has_verdict = True
            sibling.cluster = where
            if where == len(group.clusters):
                group.clusters.append([])
            if where != ABSENT:
                group.clusters[where].append(index)
        before = {s.index for s in group.live if not s.has_voted}
        plan = policy.plan(group)
        assert set(plan.stop) <= before
        stop(group, plan)
        answered = any(s.answer for s in group.siblings.values())
        assert answered or not plan.stop or group.num_live > 0
        ending = data.draw(st.sampled_from([State.RUNNING, State.FINISHED, State.ABORTED]))
        if sibling.is_live and ending is State.FINISHED:
            vote(group, index, data.draw(st.sampled_from([None, "5"])))
        elif sibling.is_live:
            sibling.state = ending
        stop(group, policy.plan(group))


def lazy_group(size: int, started: int, **settings: Any) -> Group:
    group = make_group(size, preset=settings.pop("preset", "balanced"), **settings)
    for index in range(started, size):
        group.siblings[index].state = State.HELD
    return group


def test_the_claim_widens_with_age_in_units_of_the_groups_own_lengths() -> None:
    group = lazy_group(64, 4, base=4, widen=0.5)
    group.steps = 1500
    assert policy.width(group) == 4  # nobody has finished: there is no measure of age
    vote(group, 0, "1")
    group.siblings[0].num_tokens = 500
    assert policy.width(group) == 4  # three lengths old: not yet
    group.steps = 2000
    assert policy.width(group) == 6
    group.steps = 2500
    assert policy.width(group) == 8


def test_eager_and_released_groups_claim_all_that_is_held() -> None:
    for settings in ({"preset": "latency"}, {"admission": "eager"}):
        assert policy.plan(lazy_group(8, 2, **settings)).admit == 6
    group = lazy_group(8, 2)
    group.is_released = True
    assert policy.plan(group).admit == 6


def test_whom_a_plan_stops_makes_room_for_a_claim() -> None:
    group = lazy_group(8, 2, base=2, widen=0.0)
    assert policy.plan_claims(group) == 0
    assert policy.plan_claims(group, stopped=(0, 1)) == 2
    assert policy.plan_claims(group, stopped=(0, 1, 2, 3, 4, 5, 6)) == 1  # one is left to start


def test_extras_are_what_runs_beyond_the_claim() -> None:
    group = lazy_group(16, 7, widen=0.0)
    assert policy.num_extras(group) == 3
    vote(group, 0, "1")
    assert policy.num_extras(group) == 2 and policy.plan(group).admit == 0


def test_free_rows_go_to_the_groups_with_the_fewest_votes_and_runners() -> None:
    first, second = lazy_group(16, 6), lazy_group(6, 4)
    order = [group is first for group in policy.fill_order([first, second])]
    assert order == [False, False] + [True] * 10
    first.is_decided = True
    assert list(policy.fill_order([first, second])) == [second, second]


def test_a_hopeless_group_gives_up_where_it_may() -> None:
    for preset, expected in (("economy", True), ("balanced", False)):
        group = lazy_group(64, 20, preset=preset)
        for index in range(16):
            vote(group, index, str(index % 8))
        plan = policy.plan(group)
        assert plan.decided is expected
        assert plan.reason.startswith("gave up: the leader has 2 of 16") is expected


def test_a_group_without_a_decided_stop_gives_up_all_the_same() -> None:
    for preset, expected in (("economy", True), ("collect", False)):
        group = lazy_group(64, 20, preset=preset, eps=0.0, give_up_votes=16)
        for index in range(16):
            vote(group, index, str(index % 8))
        assert policy.plan(group).decided is expected


def test_abstentions_alone_are_no_reason_to_give_up() -> None:
    group = lazy_group(64, 20, preset="economy", give_up_votes=2, give_up_share=0.6)
    vote(group, 0, None)
    vote(group, 1, None)
    assert not policy.plan(group).decided
    vote(group, 2, "5")
    assert policy.plan(group).reason == "gave up: the leader has 1 of 3 votes"


def votes_until_decided(preset: str) -> int:
    group = lazy_group(16, 4, preset=preset)
    for index in range(16):
        vote(group, index, "1")
        if policy.plan(group).decided:
            return index + 1
    return 16


def test_faithful_waits_longer_than_balanced() -> None:
    assert votes_until_decided("balanced") == 3
    assert votes_until_decided("faithful") > 3


def test_nobody_is_redundant_in_a_group_that_runs_on_untouched() -> None:
    group = make_group(4, [[0, 1, 2], [3]])
    lengths = {index: 10 + index for index in range(4)}
    assert policy.most_redundant(group, lengths) == 0
    group.is_released = True
    assert policy.most_redundant(group, lengths) is None
