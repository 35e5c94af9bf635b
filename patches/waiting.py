"""The siblings that wait within their group: in no SGLang queue, without a row, without KV.

Whatever SGLang does to a request that waits must reach them too: aborts by rid, prefix or all, the
queue limit, priority, idle checks, load reports. So while SGLang looks at its queue for one of
these, they are in it (`shown`), and its own code does the rest. Not so the waiting time-out, which
is about want of room: it begins when they are claimed. When they start, they take their group's
place in the queue, not its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_ORDER = "_deepprune_order"  # attribute of a Req: its place in the order of arrival
_CLAIMED = "_deepprune_claimed"  # attribute of a Req: the clock when it was last held no more


class WaitingRoom:
    """Held requests of one scheduler, in order of arrival. `num_yielding`: rows that are taken, and
    given back as soon as anybody waits."""

    def __init__(self, scheduler: Any, num_yielding: Callable[[], int] = lambda: 0):
        self.scheduler = scheduler
        self._num_yielding = num_yielding
        self.held: dict[str, Any] = {}  # rid -> Req
        self._arrivals = 0
        self._is_shown = False
        self._last: tuple[int, int, int] = (0, 0, 0)  # see `queue`

    def stamp(self, req: Any, order: int | None = None) -> int:
        """Give a request its place in the order of arrival; siblings share their group's.

        A request without one came while no group lived: before all others.
        """
        if order is None:
            self._arrivals += 1
            order = self._arrivals
        setattr(req, _ORDER, order)
        return order

    @contextmanager
    def shown(self, some: Sequence[Any] | None = None) -> Iterator[None]:
        """SGLang's waiting queue with the held ones, or `some` of them, at its end; those it drops
        are held no more."""
        added = list(self.held.values()) if some is None else some
        if not added or self._is_shown:
            yield
            return
        scheduler, self._is_shown = self.scheduler, True
        before = scheduler.waiting_queue
        scheduler.waiting_queue = [*before, *added]
        try:
            yield
        finally:
            queue, held = scheduler.waiting_queue, self.held
            if queue == [*before, *(req for req in added if held.get(req.rid) is req)]:
                # It only looked, as nearly always, or whom it dropped has left (`take`) already: n
                # aborts, one by one, do not rebuild both n times.
                scheduler.waiting_queue = before
            else:
                left = {id(req) for req in queue}
                for req in added:
                    if id(req) not in left:
                        held.pop(req.rid, None)
                scheduler.waiting_queue = [req for req in queue if held.get(req.rid) is not req]
            self._is_shown = False

    @contextmanager
    def counted(self, req: Any) -> Iterator[None]:
        """`req` arrives, and the queue's limit counts whoever waits for a row: all that are held
        once no row is free. Before that they wait for a claim, and only the arrival's own siblings
        count, as far as they are more than the free rows. Below the limit nothing looks."""
        scheduler, held = self.scheduler, len(self.held)
        limit = scheduler.max_queued_requests
        if limit is None or not held or len(scheduler.waiting_queue) + held < limit:
            yield
            return
        free = scheduler.get_num_allocatable_reqs(len(scheduler.running_batch.reqs))
        free += self._num_yielding()
        with self.shown(self._siblings_of(req)[free:] if free > 0 else None):
            yield

    def _siblings_of(self, req: Any) -> list[Any]:
        return [one for one in self.held.values() if _order(one) == _order(req)]

    def hold(self, req: Any) -> None:
        self.held[req.rid] = req

    def hold_last(self, req: Any) -> None:
        """SGLang has accepted the request, at the end of its queue; else it was refused."""
        waiting = self.scheduler.waiting_queue
        if waiting and waiting[-1] is req:
            waiting.pop()
            self.hold(req)

    @contextmanager
    def since_claimed(self) -> Iterator[None]:
        """Siblings in SGLang's queue wait since their claim. For the time-out alone: they keep
        their clock, by which SGLang orders requests of one priority."""
        moved = []
        for req in self.scheduler.waiting_queue:
            stats, claimed = req.time_stats, getattr(req, _CLAIMED, 0.0)
            if claimed > stats.wait_queue_entry_time:
                moved.append((stats, stats.wait_queue_entry_time))
                stats.wait_queue_entry_time = claimed
        try:
            yield
        finally:
            for stats, entry in moved:
                stats.wait_queue_entry_time = entry

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """No request that was admitted once is refused for the queue's limit."""
        scheduler = self.scheduler
        limit, scheduler.max_queued_requests = scheduler.max_queued_requests, None
        try:
            yield
        finally:
            scheduler.max_queued_requests = limit

    def take(self, req: Any) -> bool:
        """The request is held no more. False: it was not."""
        rid = req.rid
        if self.held.get(rid) is not req:
            return False
        del self.held[rid]
        setattr(req, _CLAIMED, time.perf_counter())
        return True

    def queue(self, req: Any) -> None:
        """Into SGLang's waiting queue, in front of everything that arrived after its group."""
        waiting = self.scheduler.waiting_queue
        if self._is_shown and any(req is other for other in waiting):
            return  # a fault while SGLang walks this very list: it stays where it is
        order, (place, *queue), start = _order(req), self._last, 0
        # A group's siblings start in a row: nobody in front of one is later, if nobody else has
        # come or gone meanwhile.
        if queue == [id(waiting), len(waiting)] and place < len(waiting):
            start = place + 1 if _order(waiting[place]) == order else 0
        later = (i for i in range(start, len(waiting)) if _order(waiting[i]) > order)
        place = next(later, len(waiting))
        waiting.insert(place, req)
        self._last = place, id(waiting), len(waiting)

    def queue_last(self, req: Any) -> None:
        """Into SGLang's waiting queue, behind everybody, as SGLang puts whom it retracts."""
        self.scheduler.waiting_queue.append(req)

    def requeue(self, req: Any) -> None:
        """SGLang has put a retracted sibling at the end of its queue: to its group's place."""
        waiting = self.scheduler.waiting_queue
        if waiting and waiting[-1] is req:
            waiting.pop()
            self.queue(req)


def _order(req: Any) -> int:
    return int(getattr(req, _ORDER, 0))
