"""The held siblings and SGLang's queue: in sight when SGLang looks, else nowhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from sglang_deepprune.patches.waiting import WaitingRoom


def request(rid: str) -> Any:
    return SimpleNamespace(rid=rid)


def room(*rids: str, free: int = 0, limit: int = 1, num_yielding: int = 0) -> WaitingRoom:
    scheduler = SimpleNamespace(
        waiting_queue=[request(rid) for rid in rids], max_queued_requests=limit,
        running_batch=SimpleNamespace(reqs=[]), get_num_allocatable_reqs=lambda running: free,
    )  # fmt: skip
    return WaitingRoom(scheduler, lambda: num_yielding)


def rids(room: WaitingRoom) -> list[str]:
    return [req.rid for req in room.scheduler.waiting_queue]


def test_a_claimed_sibling_takes_its_groups_place() -> None:
    own = room("older")  # without a place: it came while no group lived
    sibling, later = request("sibling"), request("later")
    order = own.stamp(request("first sibling"))
    own.stamp(later)
    own.scheduler.waiting_queue.append(later)
    own.stamp(sibling, order)
    own.queue(sibling)
    assert rids(own) == ["older", "sibling", "later"]


def test_siblings_of_one_group_keep_their_order() -> None:
    own = room()
    order = own.stamp(request("a"))
    for rid in "bc":
        one = request(rid)
        own.stamp(one, order)
        own.queue(one)
    assert rids(own) == ["b", "c"]


def test_siblings_that_start_in_a_row_do_not_walk_the_queue_each() -> None:
    """Thousands may be released at once, and the scheduler's loop is everybody's."""

    class Counted(list[Any]):
        looks = 0

        def __getitem__(self, place: Any) -> Any:
            self.looks += 1
            return super().__getitem__(place)

        def __iter__(self) -> Iterator[Any]:
            self.looks += len(self)
            return super().__iter__()

    own = room("older")
    own.scheduler.waiting_queue = queue = Counted(own.scheduler.waiting_queue)
    order, later = own.stamp(request("first")), request("later")
    own.stamp(later)
    queue.append(later)
    names = [f"sibling {number}" for number in range(500)]
    for name in names:
        one = request(name)
        own.stamp(one, order)
        own.queue(one)
    assert queue.looks <= 3 * len(names) + 3
    assert rids(own) == ["older", *names, "later"]


def test_the_place_of_another_group_is_no_place_to_start_from() -> None:
    own = room("older")
    first, second = (own.stamp(request(name)) for name in ("first group", "second group"))
    for name, order in (("c", second), ("a", first), ("d", second), ("b", first)):
        one = request(name)
        own.stamp(one, order)
        own.queue(one)
    assert rids(own) == ["older", "a", "b", "c", "d"]
    own.scheduler.waiting_queue.clear()  # all were prefilled
    own.queue(one)
    assert rids(own) == ["b"]


def test_what_sglang_drops_while_it_looks_is_held_no_more() -> None:
    own = room("w")
    for rid in "ab":
        own.hold(request(rid))
    with own.shown():
        assert rids(own) == ["w", "a", "b"]
        own.scheduler.waiting_queue.pop(1)
        own.scheduler.waiting_queue.append(request("new"))
        with own.shown():  # nested: nobody is shown twice
            assert rids(own) == ["w", "b", "new"]
    assert rids(own) == ["w", "new"] and list(own.held) == ["b"]


def test_an_abort_of_a_held_sibling_rebuilds_nothing() -> None:
    """A client that leaves aborts n of them one by one."""
    own = room("w")
    reqs = [request(rid) for rid in "abc"]
    for one in reqs:
        own.hold(one)
    queue, held = own.scheduler.waiting_queue, own.held
    with own.shown():
        own.take(own.scheduler.waiting_queue.pop(2))
    assert own.scheduler.waiting_queue is queue and rids(own) == ["w"]
    assert own.held is held and list(held) == ["a", "c"]


def test_who_is_let_go_while_sglang_looks_stays_in_its_queue() -> None:
    """A fault of ours meanwhile: its group is plain sampling from here."""
    own = room("w")
    first, second = request("a"), request("b")
    own.hold(first)
    own.hold(second)
    with own.shown():
        own.take(first)
        own.queue(first)
    assert rids(own) == ["w", "a"] and list(own.held) == ["b"]


def test_one_dropped_and_one_added_is_no_mere_look() -> None:
    own = room("w")
    for rid in "ab":
        own.hold(request(rid))
    with own.shown():  # SGLang's limit with priorities: one goes, the new one comes
        own.scheduler.waiting_queue.pop(2)
        own.scheduler.waiting_queue.append(request("new"))
    assert rids(own) == ["w", "new"] and list(own.held) == ["a"]


def test_a_request_of_a_held_siblings_rid_stays_in_the_queue() -> None:
    own = room("w", "a")
    own.hold(request("a"))
    own.hold(request("b"))
    with own.shown():
        own.scheduler.waiting_queue.pop(0)
    assert rids(own) == ["a"] and list(own.held) == ["a", "b"]


def test_a_mere_look_leaves_the_queue_as_it_was() -> None:
    own = room("w")
    own.hold(request("a"))
    queue = own.scheduler.waiting_queue
    with own.shown():
        assert rids(own) == ["w", "a"]
    assert own.scheduler.waiting_queue is queue and list(own.held) == ["a"]


def test_without_a_limit_an_arrival_sees_nobody() -> None:
    own = room("w")
    own.hold(request("a"))
    with own.counted(request("new")):
        assert rids(own) == ["w", "a"]
    own.scheduler.max_queued_requests = None
    with own.counted(request("new")):
        assert rids(own) == ["w"]


def test_below_the_limit_nobody_is_shown() -> None:
    """Whatever an arrival sees, it is not refused: its own siblings need not be looked for."""
    own = room("w", limit=3)
    own.hold(request("a"))
    with own.counted(request("new")):
        assert rids(own) == ["w"]
    own.hold(request("b"))
    with own.counted(request("new")):
        assert rids(own) == ["w", "a", "b"]


def test_rows_that_extras_would_give_back_count_as_free() -> None:
    own = room("w", num_yielding=1)
    own.hold(request("a"))
    stranger = request("stranger")
    own.stamp(stranger)
    with own.counted(stranger):
        assert rids(own) == ["w"]


def test_a_queue_that_has_changed_since_is_walked_from_its_beginning() -> None:
    own = room("older")
    orders = [own.stamp(request(str(index))) for index in range(3)]

    def of(order: int, rid: str) -> Any:
        one = request(rid)
        own.stamp(one, order)
        return one

    own.queue(of(orders[1], "b"))
    late = of(orders[0], "late")
    own.scheduler.waiting_queue = [of(orders[2], "c"), late]  # it came by itself, to the end
    own.queue(of(orders[0], "a"))
    assert rids(own) == ["a", "c", "late"]


def test_while_rows_are_free_an_arrival_sees_its_own_siblings_beyond_them() -> None:
    own = room("w", free=2)
    orders = {group: own.stamp(request(group)) for group in "ab"}
    for group, index in ("a", 1), ("b", 1), ("b", 2), ("b", 3):
        sibling = request(f"{group}{index}")
        own.stamp(sibling, orders[group])
        own.hold(sibling)
    arrival, stranger = request("b4"), request("stranger")
    own.stamp(arrival, orders["b"])
    own.stamp(stranger)
    with own.counted(stranger):
        assert rids(own) == ["w"]
    with own.counted(arrival):
        assert rids(own) == ["w", "b3"]
        own.scheduler.waiting_queue[1:] = [arrival]  # what SGLang may do to those in sight
    assert list(own.held) == ["a1", "b1", "b2"] and rids(own) == ["w", "b4"]


def test_a_siblings_time_out_counts_from_its_claim() -> None:
    own = room("stranger")
    stranger, claimed, held = own.scheduler.waiting_queue[0], request("claimed"), request("held")
    for one in stranger, claimed, held:
        one.time_stats = SimpleNamespace(wait_queue_entry_time=1.0)
    own.hold(claimed)
    own.hold(held)
    before = time.perf_counter()
    assert own.take(claimed) and not own.take(stranger)
    own.queue(claimed)
    with own.since_claimed():
        assert rids(own) == ["stranger", "claimed"]
        assert stranger.time_stats.wait_queue_entry_time == 1.0
        assert claimed.time_stats.wait_queue_entry_time >= before
    assert claimed.time_stats.wait_queue_entry_time == 1.0, "SGLang's order is by this clock"
    claimed.time_stats.wait_queue_entry_time = later = time.perf_counter()  # retracted
    with own.since_claimed():
        assert claimed.time_stats.wait_queue_entry_time == later


def test_a_refused_request_is_not_held() -> None:
    own = room("w")
    accepted, refused = request("accepted"), request("refused")
    own.scheduler.waiting_queue.append(accepted)
    own.hold_last(refused)
    own.hold_last(accepted)
    assert list(own.held) == ["accepted"] and rids(own) == ["w"]


def test_the_queue_limit_is_lifted_and_set_again() -> None:
    own = room(limit=7)
    try:
        with own.unlimited():
            assert own.scheduler.max_queued_requests is None
            raise RuntimeError
    except RuntimeError:
        pass
    assert own.scheduler.max_queued_requests == 7
