"""Runs the slow path behind a fence: one child process, one pair in flight, one second each.

Owns the queue, the time limit and the memory of decided pairs. `ask` and `poll` never block, so
the decode loop calls both. A pair that runs out of time, or kills its child, is answered with
None ("not shown equal", which a vote treats as different) and never asked again. Loading the
child does not count against a pair's second.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from sglang_deepprune.answers.canonical import canonical
from sglang_deepprune.answers.compare import compare
from sglang_deepprune.child import Child

logger = logging.getLogger(__name__)

COMPARER = "sglang_deepprune.answers.equivalence:make_comparer"


class Fence:
    """Answers "are these two the same?" without ever holding up its caller."""

    def __init__(
        self,
        *,
        limit_s: float = 1.0,
        load_limit_s: float = 120.0,
        max_decided: int = 4096,
        comparer: str = COMPARER,
    ):
        self.limit_s = limit_s
        self.load_limit_s = load_limit_s
        self.max_decided = max_decided
        self.num_timeouts = 0
        self._child = Child(comparer)
        self._queue: deque[tuple[int, str, str]] = deque()
        self._in_flight: tuple[int, str, str] | None = None
        self._answered: list[tuple[int, bool | None]] = []
        self._decided: OrderedDict[tuple[str, str], bool | None] = OrderedDict()
        self._next_ticket = 0
        self._num_failed_loads = 0
        self._has_logged = False

    @property
    def num_open(self) -> int:
        """Tickets handed out whose answers `poll` has not yet returned."""
        return len(self._queue) + len(self._answered) + (self._in_flight is not None)

    def warm_up(self) -> None:
        """Start loading the child now, before the first question."""
        if not self._child.is_alive:
            self._child.launch()

    def ask(self, a: str, b: str) -> int:
        """Queue a question; its answer comes out of `poll` under the returned ticket."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        verdict = compare(a, b)
        if verdict is not None:
            self._answered.append((ticket, verdict))
        else:
            self._queue.append((ticket, a, b))
            self._advance()
        return ticket

    def poll(self) -> list[tuple[int, bool | None]]:
        """The answers that have become known since the last call. Never blocks."""
        self._advance()
        answered, self._answered = self._answered, []
        return answered

    def drop(self, tickets: Iterable[int]) -> None:
        """Nobody wants these answers any more.

        The pair in flight is not broken off: nearly all take milliseconds, and a new child would
        load for a second or more, which the next pair would wait for. `poll` holds it to its limit,
        so whoever drops must go on polling while `num_open` is not zero.
        """
        gone = set(tickets)
        self._queue = deque(question for question in self._queue if question[0] not in gone)
        self._answered = [answer for answer in self._answered if answer[0] not in gone]

    def equivalent(self, a: str, b: str) -> bool | None:
        """Blocking form for scripts: the answer to one pair; other answers stay for `poll`."""
        ticket = self.ask(a, b)
        while True:
            self._advance()
            for index, (known, verdict) in enumerate(self._answered):
                if known == ticket:
                    del self._answered[index]
                    return verdict
            time.sleep(0.0005)

    def close(self) -> None:
        """End the child. Questions still open are answered with None by the next `poll`."""
        self._child.kill()
        left = [self._in_flight] if self._in_flight else []
        self._answered.extend((ticket, None) for ticket, _, _ in [*left, *self._queue])
        self._in_flight = None
        self._queue.clear()

    def _advance(self) -> None:
        if self._in_flight is not None:
            self._collect(self._in_flight)
        while self._in_flight is None and self._queue:
            self._send(self._queue.popleft())

    def _collect(self, question: tuple[int, str, str]) -> None:
        was_ready = self._child.is_ready  # a crash clears it
        reply = self._child.poll()
        if reply is not None:
            is_load_failure = reply.error is not None and not was_ready
            if reply.error is not None:
                self._log_once(reply.error)
            self._num_failed_loads = self._num_failed_loads + 1 if is_load_failure else 0
            self._settle(question, None if reply.error is not None else bool(reply.value))
        elif self._child.elapsed_s > (self.limit_s if self._child.is_ready else self.load_limit_s):
            self.num_timeouts += 1
            self._log_once(f"no answer within {self.limit_s:g} s")
            self._settle(question, None)
            # Relaunched at once: the next question should not wait for the loading.
            self._launched(self._child.launch)

    def _send(self, question: tuple[int, str, str]) -> None:
        key = _key(question)
        if key in self._decided:
            self._decided.move_to_end(key)
            self._answered.append((question[0], self._decided[key]))
        elif self._num_failed_loads >= 3:
            self._answered.append((question[0], None))
        elif self._launched(lambda: self._child.start(question[1:])):
            self._in_flight = question
        else:
            self._answered.append((question[0], None))

    def _launched(self, step: Callable[[], None]) -> bool:
        """Whether the process could be started: a machine may be out of memory, or of processes."""
        try:
            step()
        except OSError as error:
            self._child.kill()
            self._log_once(f"{type(error).__name__}: its process does not start")
            return False
        return True

    def _settle(self, question: tuple[int, str, str], verdict: bool | None) -> None:
        self._in_flight = None
        self._answered.append((question[0], verdict))
        self._decided[_key(question)] = verdict
        while len(self._decided) > self.max_decided:
            self._decided.popitem(last=False)

    def _log_once(self, reason: str) -> None:
        """The reason alone: an answer is a request's text and belongs in no log."""
        if not self._has_logged:
            self._has_logged = True
            logger.warning(
                "Comparing two answers failed (%s); such pairs count as different. "
                "Further failures are not logged.",
                reason.partition(":")[0],
            )


def _key(question: tuple[int, str, str]) -> tuple[str, str]:
    left, right = sorted((canonical(question[1]), canonical(question[2])))
    return left, right
